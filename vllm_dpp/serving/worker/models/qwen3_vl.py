"""Qwen3-VL with video pruning before and in the middle of the decoder.

Between the slices of its videos stands text: the time, and the markers of a slice. It is never
pruned. DeepStack adds to the first layers, which see every token that enters.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import POSITIONS_PER_TOKEN, TimedEntryProcessorMixin
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import PlacedItem, TextBetween
from vllm_dpp.serving.worker.models.pruned_model import PrunedMRopeModelMixin
from vllm_dpp.serving.worker.models.timed_slices import TimedSlices


class DPPQwen3VLProcessor(
    AdmissionProcessorMixin, TimedEntryProcessorMixin, Qwen3VLMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def text_between(self, outputs: Any, item: int) -> list[int]:
        timestamps = outputs["timestamps"][item]
        return _text_between(timestamps, self.info.get_tokenizer(), self.info.get_hf_config())


class PrunedQwen3VLMixin(PrunedMRopeModelMixin):
    """Mixed into a stock model of this kind, whatever its decoder's layers are made of."""

    config: Any
    deepstack_num_level: int
    _tokenizer: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.split(vllm_config, prefix, self.deepstack_num_level)
        longest = POSITIONS_PER_TOKEN * vllm_config.model_config.max_model_len
        for layer in self.language_model.model.layers:
            provide_positions(layer.self_attn.rotary_emb, longest)

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        texts = [
            _text_between(timestamps, self._tokenizer, self.config)
            for timestamps in kwargs["timestamps"]
        ]
        ids = async_tensor_h2d([t for text in texts for t in text], device=outputs[0].device)
        embedded = self.language_model.embed_input_ids(ids).to(outputs[0].dtype)
        rows = embedded.new_zeros(len(ids), outputs[0].shape[1])  # DeepStack adds nothing to text
        rows[:, : embedded.shape[1]] = embedded
        for text, grid, own in zip(texts, grids, rows.split([len(t) for t in texts]), strict=True):
            slices = TimedSlices.of(text, grid, self.config.vision_end_token_id)
            between = TextBetween(own, slices.text, slices.slices_before)
            yield {"origins": slices.origins, "text": between}

    def placed_media(
        self, input_tokens: Sequence[int], mm_features: Sequence[MultiModalFeatureSpec]
    ) -> Iterator[PlacedItem]:
        for feature in mm_features:
            start, length = feature.mm_position.offset, feature.mm_position.length
            grid = self.grid_of(feature)
            if feature.modality == "image":
                yield PlacedItem(start, length, np.indices(grid).reshape(3, -1), max(grid[1:]))
                continue
            tokens = np.asarray(input_tokens[start : start + length])
            is_own = tokens == self.config.video_token_id
            slices = TimedSlices.of(tokens[~is_own], grid, self.config.vision_end_token_id)
            whole = is_own.sum() == np.prod(grid)
            positions = slices.whole(is_own, grid) if whole else None
            yield PlacedItem(start, length, positions, slices.span)


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3VLForConditionalGeneration(PrunedQwen3VLMixin, Qwen3VLForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""


def _text_between(timestamps: Any, tokenizer: Any, config: Any) -> list[int]:
    """Token ids of the text of a video, all slices together."""
    return Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[0] * len(timestamps),
        timestamps=timestamps,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    ).full


def provide_positions(rotary: Any, number: int) -> None:
    """Have a rotary embedding, which layers share, know at least so many positions.

    Where a video enters in part, positions go on faster than tokens (`POSITIONS_PER_TOKEN`).
    """
    table = rotary.cos_sin_cache
    if len(table) >= number:
        return
    # YaRN's frequencies depend on the trained length, which stays what it is.
    scaling = getattr(rotary, "scaling_factor", None)
    frequencies = rotary._compute_inv_freq(rotary.base if scaling is None else scaling)
    positions = torch.arange(len(table), number, device=frequencies.device)
    angles = torch.outer(positions.float(), frequencies)
    more = torch.cat([angles.cos(), angles.sin()], dim=-1) * getattr(rotary, "mscale", 1.0)
    for name in ("cos_sin_cache", "cos_sin_cache_bf16"):
        if (known := getattr(rotary, name, None)) is not None:
            setattr(rotary, name, torch.cat([known, more.to(known)]))
