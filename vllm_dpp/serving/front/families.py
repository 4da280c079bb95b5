"""The model families that can be pruned: one entry each, nothing imported until it is used."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture and its pruning variant.

    Args:
        base: The architecture in the checkpoint's ``config.json``.
        variant: The architecture that ``--hf-overrides`` names.
        implementation: ``module:class`` of the variant.
        turn_end_token: The token that ends a chat turn.
    """

    base: str
    variant: str
    implementation: str
    turn_end_token: str


FAMILIES = (
    Family(
        base="Qwen2_5_VLForConditionalGeneration",
        variant="DPPQwen2_5_VLForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.qwen2_5_vl:DPPQwen2_5_VLForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
    ),
)


def family_of(architecture: str) -> Family:
    """The family that ``architecture`` belongs to, by its base or its variant name.

    Raises:
        ValueError: No family has it.
    """
    for family in FAMILIES:
        if architecture in (family.base, family.variant):
            return family
    known = ", ".join(family.base for family in FAMILIES)
    raise ValueError(f"{architecture} cannot be pruned; supported architectures: {known}")
