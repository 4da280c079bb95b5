"""What every pruning variant of a vLLM model does alike: its two stages, and their seams.

A family mixes it in before the stock model, and says what differs: where its media stand in a
prompt, and what its vision encoder returns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.serving.front.entry import NUM_ENTERED
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.settings import MODALITIES, ServingSettings
from vllm_dpp.serving.worker.adapters import Adapters
from vllm_dpp.serving.worker.context import PruningContext
from vllm_dpp.serving.worker.metrics import WorkerMetrics
from vllm_dpp.serving.worker.models.entry import (
    EncodedVideo,
    EntryStage,
    PlacedItem,
    prompt_positions,
)
from vllm_dpp.serving.worker.models.split_decoder import SplitDecoder

POSITIONS = "dpp_positions"
"""Key of what one pipeline stage tells the next: [num_rows, 3] int64."""


class PrunedModelMixin:
    """Mixed into a stock model before it; `split` ends its construction."""

    lora_manager: Any
    language_model: Any
    get_model_state_cls: Callable[[], Any]  # the V2 model runner's seam
    pruning: PruningContext | None = None
    has_axes = False
    """Whether a token stands on three axes, and where it would if all of its video were there."""

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterable[Mapping[str, Any]]:
        """The `origins` and `text` of an `EncodedVideo`, for each video.

        Args:
            outputs: [N, W] each, of the vision encoder.
            grids: Slices, rows and columns of each.
            kwargs: What the encoder was given.
        """
        raise NotImplementedError

    def video_grids(self, kwargs: Mapping[str, Any]) -> list[Grid]:
        """Slices, rows and columns of the tokens of each video that the encoder was given."""
        raise NotImplementedError

    def grid_of(self, feature: MultiModalFeatureSpec) -> Grid:
        """Slices, rows and columns of an item's tokens."""
        raise NotImplementedError

    def split(self, vllm_config: VllmConfig, prefix: str, deepstack_levels: int = 0) -> None:
        """Put a selection before the decoder, and split it unless nothing else is left out.

        Args:
            vllm_config: The engine's configuration.
            prefix: Of the model.
            deepstack_levels: How many levels of the vision encoder its output holds beside its own.
        """
        settings = ServingSettings.from_vllm_config(vllm_config)
        model_config = vllm_config.model_config
        width = model_config.get_inputs_embeds_size()
        max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.metrics = WorkerMetrics(vllm_config, settings)
        self.entry = EntryStage(
            settings,
            width,
            width * (1 + deepstack_levels),
            max_rows if self.has_axes else 0,
        )
        if settings.entry_only:
            if vllm_config.speculative_config is not None:
                self.get_model_state_cls = partial(_entry_state_cls, model_config.is_hybrid)
            return
        adapters = Adapters(lambda: self.lora_manager)
        self.pruning = PruningContext(settings, self.media_grids, self.metrics, adapters)
        self.get_model_state_cls = _model_state_cls
        self.language_model.model = SplitDecoder(
            self.language_model.model,
            self.pruning,
            vllm_config=vllm_config,
            prefix=f"{prefix}.language_model.model" if prefix else "language_model.model",
            deepstack_levels=deepstack_levels,
        )

    def embed_text(self, token_ids: Sequence[int] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """[x, D] of text between slices, of the type and on the device of an encoder's output.

        Pipeline stages behind the first have no embeddings, and no use for what they encode, which
        is to measure memory.
        """
        if not get_pp_group().is_first_rank:
            return like.new_zeros(len(token_ids), self.entry.width)
        ids = async_tensor_h2d(token_ids, device=like.device)
        return self.language_model.embed_input_ids(ids).to(like.dtype)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Of each item what enters the decoder; vLLM calls it for images or for videos."""
        counts = kwargs.pop(NUM_ENTERED, None)
        outputs = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if counts is None:
            return outputs
        numbers = counts.flatten().tolist()
        if self.pruning is None:
            self.metrics.encoded(sum(map(prod, self.video_grids(kwargs))), sum(numbers))
        if all(number == len(tokens) for number, tokens in zip(numbers, outputs, strict=True)):
            return outputs
        grids = self.video_grids(kwargs)
        found = self.encoded_videos(outputs, grids, kwargs)
        videos = [
            EncodedVideo(tokens, grid, number, **more)
            for tokens, grid, number, more in zip(outputs, grids, numbers, found, strict=True)
        ]
        with self.metrics.timed("entry"):
            return self.entry.select(videos)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.entry.forget()
        if multimodal_embeddings and is_multimodal is not None:
            multimodal_embeddings = self.entry.unpack(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self.metrics.step(is_real=get_forward_context().attn_metadata is not None)
        places = self.entry.take_places()
        if places is not None and self.pruning is not None:
            self.pruning.entered(places)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def media_grids(self, mm_features: Sequence[MultiModalFeatureSpec]) -> dict[int, Grid]:
        """Slices, rows and columns of each image and video, in tokens, by first prompt position."""
        seen = (feature for feature in mm_features if feature.modality in MODALITIES)
        return {feature.mm_position.offset: self.grid_of(feature) for feature in seen}


class PrunedMRopeModelMixin(PrunedModelMixin):
    """Mixed into a model whose tokens stand on three axes, and whose media tell their grids."""

    visual: Any
    has_axes = True
    make_empty_intermediate_tensors: Callable[..., IntermediateTensors]

    def split(self, vllm_config: VllmConfig, prefix: str, deepstack_levels: int = 0) -> None:
        super().split(vllm_config, prefix, deepstack_levels)
        self.make_empty_intermediate_tensors = with_positions(self.make_empty_intermediate_tensors)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Where rows stand is known to the first pipeline stage, which tells it to the next."""
        if intermediate_tensors is None:
            positions = self.entry.place(positions)
        else:
            others = dict(intermediate_tensors.items())
            positions = others.pop(POSITIONS).T
            intermediate_tensors = IntermediateTensors(others)
        output = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if isinstance(output, IntermediateTensors):
            output.tensors[POSITIONS] = positions.T.contiguous()
        return output

    def placed_media(
        self, input_tokens: Sequence[int], mm_features: Sequence[MultiModalFeatureSpec]
    ) -> Iterable[PlacedItem]:
        """Where a prompt's media stand, in order."""
        raise NotImplementedError

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        in_order = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return prompt_positions(len(input_tokens), self.placed_media(input_tokens, in_order))

    def get_encoder_cudagraph_config(self) -> Any:
        """Without videos: the graphs' outputs pass by `embed_multimodal`."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=[m for m in config.modalities if m != "video"])

    def video_grids(self, kwargs: Mapping[str, Any]) -> list[Grid]:
        return [self._in_tokens(grid) for grid in kwargs["video_grid_thw"].tolist()]

    def grid_of(self, feature: MultiModalFeatureSpec) -> Grid:
        assert feature.data is not None
        return self._in_tokens(feature.data[f"{feature.modality}_grid_thw"].data.tolist())

    def _in_tokens(self, grid_thw: Sequence[int]) -> Grid:
        slices, rows, columns = grid_thw
        merge = self.visual.spatial_merge_size
        return slices, rows // merge, columns // merge


def with_positions(empty: Callable[..., IntermediateTensors]) -> Callable[..., IntermediateTensors]:
    """A model's ``make_empty_intermediate_tensors``, with room for positions [num_rows, 3]."""

    def make_empty_intermediate_tensors(
        batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        tensors = empty(batch_size, dtype, device)
        tensors.tensors[POSITIONS] = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
        return tensors

    return make_empty_intermediate_tensors


def _entry_state_cls(is_hybrid: bool) -> Any:
    from vllm_dpp.serving.worker import entry_state

    return entry_state.HybridEntryModelState if is_hybrid else entry_state.EntryModelState


def _model_state_cls() -> Any:
    from vllm_dpp.serving.worker.model_state import PruningModelState

    return PruningModelState
