"""The model families that can be pruned: one entry each, nothing imported until it is used."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture and its pruning variant.

    Args:
        base: The architecture in the checkpoint's ``config.json``.
        variant: The architecture that ``--hf-overrides`` names.
        implementation: ``module:class`` of the variant.
        turn_end_token: The token that ends a chat turn, or begins the answer to it.
        has_text_in_videos: Whether text stands between the slices of a video.
        video_token: What stands in a prompt for a token of a video; ``None`` where ``config.json``
            has its id as ``video_token_id``.
        video_end_length: How many of them, at its end, are no patch's, such as a newline.
        entry_only_because: Why nothing can be left out in the middle of its decoder, if so.
    """

    base: str
    variant: str
    implementation: str
    turn_end_token: str
    has_text_in_videos: bool = False
    video_token: str | None = None
    video_end_length: int = 0
    entry_only_because: str = ""

    def check(self, settings: ServingSettings) -> None:
        """Raise ``ValueError`` where a setting asks for what the family cannot do yet."""
        if settings.decide_every is not None and self.has_text_in_videos:
            raise ValueError(
                f"decide_every {settings.decide_every}: videos of {self.base} have text between "
                "their slices and are decided as a whole; leave it out"
            )


LINEAR_ATTENTION = (
    "the linear attention of this model's decoder carries a state through every token of a chunk"
)

FAMILIES = (
    Family(
        base="Qwen2VLForConditionalGeneration",
        variant="DPPQwen2VLForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.qwen2_vl:DPPQwen2VLForConditionalGeneration",
        turn_end_token="<|im_end|>",
    ),
    Family(
        base="Qwen2_5_VLForConditionalGeneration",
        variant="DPPQwen2_5_VLForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.qwen2_5_vl:DPPQwen2_5_VLForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
    ),
    Family(
        base="Qwen3VLForConditionalGeneration",
        variant="DPPQwen3VLForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.qwen3_vl:DPPQwen3VLForConditionalGeneration",
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
    ),
    Family(
        base="Qwen3VLMoeForConditionalGeneration",
        variant="DPPQwen3VLMoeForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.qwen3_vl_moe:DPPQwen3VLMoeForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
    ),
    Family(
        base="Qwen3_5ForConditionalGeneration",
        variant="DPPQwen3_5ForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.qwen3_5:DPPQwen3_5ForConditionalGeneration",
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
        entry_only_because=LINEAR_ATTENTION,
    ),
    Family(
        base="Qwen3_5MoeForConditionalGeneration",
        variant="DPPQwen3_5MoeForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.qwen3_5_moe:DPPQwen3_5MoeForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
        entry_only_because=LINEAR_ATTENTION,
    ),
    Family(
        base="Qwen3OmniMoeForConditionalGeneration",
        variant="DPPQwen3OmniMoeForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.qwen3_omni_moe:DPPQwen3OmniMoeForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
    ),
    Family(
        base="InternVLForConditionalGeneration",
        variant="DPPInternVLForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.internvl:DPPInternVLForConditionalGeneration",
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
        video_token="<video>",
    ),
    Family(
        base="Glm4vForConditionalGeneration",
        variant="DPPGlm4vForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.glm4v:DPPGlm4vForConditionalGeneration",
        turn_end_token="<|assistant|>",
        has_text_in_videos=True,
        video_token="<|image|>",
    ),
    Family(
        base="Glm4vMoeForConditionalGeneration",
        variant="DPPGlm4vMoeForConditionalGeneration",
        implementation="vllm_dpp.serving.worker.models.glm4v_moe:DPPGlm4vMoeForConditionalGeneration",
        turn_end_token="<|assistant|>",
        has_text_in_videos=True,
        video_token="<|image|>",
    ),
    Family(
        base="LlavaOnevisionForConditionalGeneration",
        variant="DPPLlavaOnevisionForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.llava_onevision:"
            "DPPLlavaOnevisionForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
        video_token="<video>",
        video_end_length=1,
    ),
    Family(
        base="MiniCPMV4_6ForConditionalGeneration",
        variant="DPPMiniCPMV4_6ForConditionalGeneration",
        implementation=(
            "vllm_dpp.serving.worker.models.minicpmv4_6:DPPMiniCPMV4_6ForConditionalGeneration"
        ),
        turn_end_token="<|im_end|>",
        has_text_in_videos=True,
        video_token="<|video_pad|>",
        entry_only_because=LINEAR_ATTENTION,
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


def seeing_config(model_config: "ModelConfig") -> Any:
    """The configuration of the part of a model that has a vision encoder."""
    return getattr(model_config.hf_config, "thinker_config", model_config.hf_config)
