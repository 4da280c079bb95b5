"""GLM-4.5V and 4.6V, with a mixture of experts in their layers; all else is as in GLM-4.1V."""

from vllm.model_executor.models.glm4_1v import Glm4vMoeForConditionalGeneration

from vllm_dpp.serving.worker.models.glm4v import DPPGlm4vForConditionalGeneration


class DPPGlm4vMoeForConditionalGeneration(
    DPPGlm4vForConditionalGeneration, Glm4vMoeForConditionalGeneration
):
    """The stock model with a selection before its decoder, and its decoder split."""
