"""Qwen2.5-VL with mid-decoder video pruning."""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.context import Grid, PruningContext
from vllm_dpp.serving.worker.models.split_decoder import SplitDecoder


class DPPQwen2_5_VLProcessor(AdmissionProcessorMixin, Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """The stock processor; a front end that builds it also checks what requests ask for."""


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class DPPQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The stock model with its decoder split."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = ServingSettings.from_vllm_config(vllm_config)
        self.pruning = PruningContext(settings, self.media_grids)
        self.language_model.model = SplitDecoder(
            self.language_model.model,
            self.pruning,
            vllm_config=vllm_config,
            prefix="language_model.model",
        )

    def media_grids(self, mm_features: Sequence[MultiModalFeatureSpec]) -> dict[int, Grid]:
        """Slices, rows and columns of each item's tokens, by first prompt position."""
        return {
            offset: (slices, rows, columns)
            for offset, slices, rows, columns, _ in self.iter_mm_grid_thw(list(mm_features))
        }

    @staticmethod
    def get_model_state_cls():
        """The V2 model runner's seam."""
        from vllm_dpp.serving.worker.model_state import PruningModelState

        return PruningModelState
