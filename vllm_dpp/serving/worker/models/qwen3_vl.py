"""Qwen3-VL with video pruning in the middle of the decoder.

Between the slices of its videos stands text: the time, and the markers of a slice. It is never
pruned. DeepStack adds to the first layers, which see every token, so nothing of it is pruned.
"""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import WholeVideosProcessorMixin
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.context import Grid, PruningContext
from vllm_dpp.serving.worker.models.split_decoder import SplitDecoder


class DPPQwen3VLProcessor(
    AdmissionProcessorMixin, WholeVideosProcessorMixin, Qwen3VLMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for."""


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
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
            deepstack_levels=self.deepstack_num_level,
        )

    def media_grids(self, mm_features: Sequence[MultiModalFeatureSpec]) -> dict[int, Grid]:
        """Slices, rows and columns of each item's tokens, by first prompt position."""
        merge, grids = self.visual.spatial_merge_size, {}
        for feature in mm_features:
            data = feature.data
            assert data is not None
            slices, rows, columns = data[f"{feature.modality}_grid_thw"].data.tolist()
            grids[feature.mm_position.offset] = slices, rows // merge, columns // merge
        return grids

    @staticmethod
    def get_model_state_cls():
        """The V2 model runner's seam."""
        from vllm_dpp.serving.worker.model_state import PruningModelState

        return PruningModelState
