"""Qwen2.5-VL with video pruning before and in the middle of the decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
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
from vllm_dpp.serving.front.entry import NUM_ENTERED, EntryProcessorMixin
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.context import Grid, PruningContext
from vllm_dpp.serving.worker.models.entry import EncodedVideo, EntryStage, prompt_positions
from vllm_dpp.serving.worker.models.split_decoder import SplitDecoder


class DPPQwen2_5_VLProcessor(  # noqa: N801
    AdmissionProcessorMixin, EntryProcessorMixin, Qwen2_5_VLMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class DPPQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The stock model with a selection before its decoder, and its decoder split."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = ServingSettings.from_vllm_config(vllm_config)
        self.pruning = PruningContext(settings, self.media_grids)
        self.entry = EntryStage(settings, vllm_config.model_config.get_inputs_embeds_size())
        self.language_model.model = SplitDecoder(
            self.language_model.model,
            self.pruning,
            vllm_config=vllm_config,
            prefix="language_model.model",
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Of each item what enters the decoder; vLLM calls it for images or for videos."""
        counts = kwargs.pop(NUM_ENTERED, None)
        outputs = super().embed_multimodal(**kwargs)
        if counts is None:
            return outputs
        merge, grids = self.visual.spatial_merge_size, kwargs["video_grid_thw"].tolist()
        seconds = kwargs.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return self.entry.select(
            [
                EncodedVideo(tokens, (t, h // merge, w // merge), count, second * rate)
                for tokens, (t, h, w), count, second in zip(
                    outputs, grids, counts.flatten().tolist(), seconds, strict=True
                )
            ]
        )

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if multimodal_embeddings and is_multimodal is not None:
            multimodal_embeddings = self.entry.unpack(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        places = self.entry.place(positions)
        if places is not None:
            self.pruning.entered(places)
        return super().forward(input_ids, positions, *args, **kwargs)

    def get_encoder_cudagraph_config(self) -> Any:
        """Without videos: the graphs' outputs pass by `embed_multimodal`."""
        config = super().get_encoder_cudagraph_config()
        return replace(config, modalities=[m for m in config.modalities if m != "video"])

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        return prompt_positions(len(input_tokens), self._media(mm_features))

    def media_grids(self, mm_features: Sequence[MultiModalFeatureSpec]) -> dict[int, Grid]:
        """Slices, rows and columns of each item's tokens, by first prompt position."""
        return {start: grid for start, _, grid, _ in self._media(mm_features)}

    def _media(
        self, mm_features: Sequence[MultiModalFeatureSpec]
    ) -> Iterator[tuple[int, int, Grid, float]]:
        """First position, number of tokens, grid and positions between slices of each item."""
        lengths = {f.mm_position.offset: f.mm_position.length for f in mm_features}
        for offset, *grid, step in self.iter_mm_grid_thw(list(mm_features)):
            slices, rows, columns = grid
            yield offset, lengths[offset], (slices, rows, columns), step

    @staticmethod
    def get_model_state_cls():
        """The V2 model runner's seam."""
        from vllm_dpp.serving.worker.model_state import PruningModelState

        return PruningModelState
