"""What families do alike whose videos have text between their slices. It is never pruned."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_dpp.serving.front.entry import POSITIONS_PER_TOKEN
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import PlacedItem, TextBetween
from vllm_dpp.serving.worker.models.pruned_model import PrunedMRopeModelMixin
from vllm_dpp.serving.worker.models.timed_slices import TimedSlices


class TimedMediaMixin(PrunedMRopeModelMixin):
    """Mixed into a stock model of this kind; `split` ends its construction."""

    @property
    def own_token_id(self) -> int:
        """The token that stands in the prompt for one of a video's own."""
        raise NotImplementedError

    @property
    def slice_end_id(self) -> int:
        """The token right behind each slice, which nothing else in a video has."""
        raise NotImplementedError

    def texts_between(self, kwargs: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        """Token ids of the text of each video, all slices together.

        Args:
            kwargs: What the encoder was given.
        """
        raise NotImplementedError

    def split(self, vllm_config: VllmConfig, prefix: str, deepstack_levels: int = 0) -> None:
        super().split(vllm_config, prefix, deepstack_levels)
        longest = POSITIONS_PER_TOKEN * vllm_config.model_config.max_model_len
        for module in self.language_model.modules():
            if (rotary := getattr(module, "rotary_emb", None)) is not None:
                provide_positions(rotary, longest)

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        texts = self.texts_between(kwargs)
        embedded = self.embed_text([t for text in texts for t in text], outputs[0])
        # DeepStack adds nothing to text.
        rows = embedded.new_zeros(len(embedded), outputs[0].shape[1])
        rows[:, : embedded.shape[1]] = embedded
        for text, grid, own in zip(texts, grids, rows.split([len(t) for t in texts]), strict=True):
            slices = TimedSlices.of(text, grid, self.slice_end_id)
            between = TextBetween(own, slices.text, slices.tokens_before)
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
            is_own = tokens == self.own_token_id
            slices = TimedSlices.of(tokens[~is_own], grid, self.slice_end_id)
            whole = is_own.sum() == np.prod(grid)
            positions = slices.whole(is_own, grid) if whole else None
            yield PlacedItem(start, length, positions, slices.span)


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
