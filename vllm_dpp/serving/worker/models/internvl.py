"""InternVL3.5 (and 3, 2.5) in Hugging Face's format, with video pruning.

A frame is a slice, always of as many tokens, behind its number as text. Positions count tokens: a
video that enters in part is to its decoder a shorter one, a token that layer K drops leaves a gap.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.tokenizers.registry import cached_tokenizer_from_config

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import TimedEntryProcessorMixin
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import TextBetween
from vllm_dpp.serving.worker.models.pruned_model import PrunedModelMixin

VIDEO_TOKEN = "<video>"


class DPPInternVLProcessor(
    AdmissionProcessorMixin, TimedEntryProcessorMixin, InternS1MultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def video_grids(self, outputs: Any) -> list[Grid]:
        return _grids(outputs.get("video_num_patches", ()), self.info.get_hf_config())

    def video_token_id(self) -> int:
        return self.info.get_tokenizer().get_vocab()[VIDEO_TOKEN]

    def num_positions(self, grid: Grid, number: int, num_text: int) -> int:
        return number + num_text

    def text_between(self, outputs: Any, item: int) -> list[int]:
        num_frames = int(outputs["video_num_patches"][item])
        return _text_between(num_frames, self.info.get_tokenizer())[0].tolist()


@MULTIMODAL_REGISTRY.register_processor(
    DPPInternVLProcessor, info=InternS1ProcessingInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class DPPInternVLForConditionalGeneration(PrunedModelMixin, InternS1ForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.split(vllm_config, prefix)

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        texts = [_text_between(slices, self._tokenizer) for slices, *_ in grids]
        rows = self.embed_text(np.concatenate([ids for ids, _ in texts]), outputs[0])
        own = rows.split([len(ids) for ids, _ in texts])
        for embedded, (_, before), (slices, height, width) in zip(own, texts, grids, strict=True):
            yield {
                "origins": np.zeros((slices, 3), np.int64),
                "text": TextBetween(embedded, np.zeros_like(before), before * height * width),
            }

    def video_grids(self, kwargs: Mapping[str, Any]) -> list[Grid]:
        return _grids(kwargs["video_num_patches"], self.config)

    def grid_of(self, feature: MultiModalFeatureSpec) -> Grid:
        assert feature.data is not None
        (grid,) = _grids([feature.data[f"{feature.modality}_num_patches"].data], self.config)
        return grid


def _grids(num_patches: Sequence[Any], config: Any) -> list[Grid]:
    """Of videos of so many frames, or images of so many tiles."""
    side = isqrt(config.image_seq_length)
    return [(int(number), side, side) for number in num_patches]


def _text_between(num_frames: int, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """[x] int64 token ids of the text of a video, and how many frames stand before each."""
    frames = (f"Frame{i + 1}: <img>{VIDEO_TOKEN}</img>" for i in range(num_frames))
    ids = np.asarray(tokenizer.encode("\n".join(frames), add_special_tokens=False))
    is_frame = ids == tokenizer.get_vocab()[VIDEO_TOKEN]
    return ids[~is_frame], is_frame.cumsum()[~is_frame]
