"""MiniCPM-V 4.6 with video pruning before the decoder, which is Qwen3.5's.

A frame is a picture between marks; of a large one tiles follow, each between marks of its own. All
that is of one frame is a slice. Positions count tokens: a video that enters in part is to the
decoder a shorter one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.minicpmv import MiniCPMVDummyInputsBuilder
from vllm.model_executor.models.minicpmv4_6 import (
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6MultiModalProcessor,
    MiniCPMV4_6ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import TimedEntryProcessorMixin
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import TextBetween
from vllm_dpp.serving.worker.models.pruned_model import PrunedModelMixin

VIDEO_GRID, VIDEO_TEXT = "video_grid", "video_text"
"""Keys of what the processor adds to each video: int64 [3], its slices, rows and columns, and
int64 [2, x], ids of the text in it and how many of its tokens stand before each."""


class DPPMiniCPMV46Processor(
    AdmissionProcessorMixin, TimedEntryProcessorMixin, MiniCPMV4_6MultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if grids := self.video_grids(outputs):
            outputs[VIDEO_GRID] = torch.tensor(grids)
            texts = [np.stack(self._text(outputs, item)) for item in range(len(grids))]
            outputs[VIDEO_TEXT] = [torch.from_numpy(text) for text in texts]
        return outputs

    def video_grids(self, outputs: Any) -> list[Grid]:
        if "video_pixel_values" not in outputs:  # sent as embeddings
            return []
        grids = []
        for item, sizes in enumerate(outputs["video_image_sizes"]):
            number = int((self._words(outputs, item) == self.video_token_id()).sum())
            grids.append((len(sizes), 1, number // len(sizes)))
        return grids

    def video_token_id(self) -> int:
        return self.info.get_tokenizer().get_vocab()[self.info.video_pattern]

    def num_positions(self, grid: Grid, number: int, num_text: int) -> int:
        return number + num_text

    def text_between(self, outputs: Any, item: int) -> list[int]:
        return self._text(outputs, item)[0].tolist()

    def _placeholders(self, whole: Any, number: int) -> Any:
        """The video's own number is not for the encoder to fill: it is another in other prompts."""
        details = super()._placeholders(whole, number)
        if details is whole:
            return whole
        first_mark = details.full.index(self.video_token_id()) - 1
        is_filled = torch.arange(len(details.full)) >= first_mark
        return replace(details, is_embed=lambda _: is_filled)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        own = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return {**fields, VIDEO_GRID: own, VIDEO_TEXT: own}

    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        """A video has its number before it, whether all of it enters or not."""
        if cached_update.modality != "video":
            return super()._recompute_cached_prompt_update(cached_update, new_item_idx)
        details, number = cached_update.content, self._number(new_item_idx)
        leading = len(self._number(cached_update.item_idx))
        behind = details.is_embed(details.full)[leading:]
        mask = torch.cat([torch.zeros(len(number), dtype=torch.bool), behind])
        content = PromptUpdateDetails([*number, *details.full[leading:]], lambda _: mask)
        return replace(cached_update, item_idx=new_item_idx).with_content(content)

    def _text(self, outputs: Any, item: int) -> tuple[np.ndarray, np.ndarray]:
        """[x] int64 each: the text of a video, and how many of its tokens stand before each."""
        ids = self._words(outputs, item)
        is_own = ids == self.video_token_id()
        return ids[~is_own], is_own.cumsum()[~is_own]

    def _words(self, outputs: Any, item: int) -> np.ndarray:
        """[n] int64: a whole video as it stands in a prompt behind its number."""
        sizes = outputs["video_image_sizes"][item]
        width, height = sizes[0].tolist()
        merges = bool(outputs["video_use_vit_merger"][item])
        words = self.get_video_prompt_texts(
            ImageSize(width=width, height=height),
            len(sizes),
            downsample_mode="16x" if merges else "4x",
        )
        ids = self.info.get_tokenizer().encode(words, add_special_tokens=False)
        return np.asarray(ids[len(self._number(0)) :])

    def _number(self, item: int) -> list[int]:
        """What stands before a video of a prompt."""
        prefix = self._video_local_id_prefix(item)
        return self.info.get_tokenizer().encode(prefix, add_special_tokens=False)


@MULTIMODAL_REGISTRY.register_processor(
    DPPMiniCPMV46Processor, info=MiniCPMV4_6ProcessingInfo, dummy_inputs=MiniCPMVDummyInputsBuilder
)
class DPPMiniCPMV4_6ForConditionalGeneration(  # noqa: N801
    PrunedModelMixin, MiniCPMV4_6ForConditionalGeneration
):
    """The stock model with a selection before its decoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.split(vllm_config, prefix)

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        texts = [text.numpy() for text in kwargs[VIDEO_TEXT]]
        rows = self.embed_text(np.concatenate([ids for ids, _ in texts]), outputs[0])
        own = rows.split([text.shape[1] for text in texts])
        for embedded, (_, before), (slices, *_) in zip(own, texts, grids, strict=True):
            yield {
                "origins": np.zeros((slices, 3), np.int64),
                "text": TextBetween(embedded, np.zeros_like(before), before),
            }

    def video_grids(self, kwargs: Mapping[str, Any]) -> list[Grid]:
        return [tuple(grid) for grid in kwargs[VIDEO_GRID].tolist()]
