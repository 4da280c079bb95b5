"""Question-aware selection inside the forward pass: what each video of a step keeps.

No host synchronisation: lengths come from the layout, indices stay on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.utils.math_utils import cdiv

from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.pruner import keep_indices
from vllm_dpp.pruning.relevance import question_attention
from vllm_dpp.pruning.segments import equal_slices
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.pruning.workspace import workspace_bytes
from vllm_dpp.serving.plan import PrunedVideo
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.step import RangeRows
from vllm_dpp.serving.worker.context import PruningContext
from vllm_dpp.serving.worker.models.agreement import agree
from vllm_dpp.serving.worker.own_tokens import OwnTokens

Select = Callable[[Sequence[VideoTokens], PruningConfig], list[torch.Tensor]]
TOKENS_PER_SLICE = 1024
"""What the memory profile takes a slice to have; in Qwen2.5-VL 896 x 896 pixels. Of slices so large
the features are held twice, since a segment is a part of several."""
States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states and residual, each [num_rows, D]; the residual is ``None`` before layer 0."""


class VideoSelector:
    """Reads what questions look at, and decides what each video keeps.

    Args:
        context: Plans, grids, settings and the buffer of this worker.
    """

    def __init__(self, context: PruningContext) -> None:
        self.context = context
        self.select: Select = keep_indices
        if context.settings.shard_selection and get_tensor_model_parallel_world_size() > 1:
            self.select = partial(keep_indices, group=get_tp_group().device_group)

    @property
    def needs_relevance(self) -> bool:
        return self.context.settings.reads_question

    def bytes_at_once(self, num_tokens: int, like: torch.Tensor) -> int:
        """Memory of the selection of one video beside the layers' own, for the memory profile.

        Args:
            num_tokens: Its tokens.
            like: A tensor [..., D] of the dtype and on the device of the residual stream.
        """
        settings, dim = self.context.settings, like.shape[-1]
        kept = num_kept(num_tokens, settings.retention_ratio)
        # What entered, what is compared, what goes up.
        rows = num_tokens * (1 + settings.compares_embeddings + settings.compares_both)
        gathered = (rows + 3 * kept) * dim * like.element_size()
        return gathered + max(
            workspace_bytes(
                num_tokens,
                dim * (1 + settings.compares_both),
                kept,
                replace(settings, rule=rule),
                like.device,
                num_slices=-(-num_tokens // TOKENS_PER_SLICE),
                num_tail=-num_tokens % TOKENS_PER_SLICE,
                dtype=like.dtype,
            )
            for rule in settings.rules_to_choose
        )

    def read(
        self, layer: Any, positions: torch.Tensor, states: States, part: RangeRows
    ) -> list[torch.Tensor | None]:
        """Add the attention that this step's question rows pay to each video of their turn.

        Args:
            layer: The decoder layer that is about to run on these inputs.
            positions: [..., num_rows] RoPE positions.
            states: Input of ``layer``.
            part: What this step has of the range.

        Returns:
            For each video [length] float32, the raw relevance; ``None`` of all where no question
            is read. Nothing before the range is decided.
        """
        if not any(video.question for video in part.turn.videos):
            return [None] * len(part.turn.videos)
        rows = slice(part.row, part.row + part.num_rows)
        with self.context.adapters.over_range(part):
            query, key = _queries_and_keys(layer, positions[..., rows], _take(states, rows))
        keys, seen, at = self._accumulators(part, key)
        complete: list[torch.Tensor | None] = []
        for video in part.turn.videos:
            place = at(self.context.own_tokens(part, video, key.device))
            asked = _asked(part, video, query)
            if len(asked):
                seen[place] += _attention(layer, asked, keys[place], video)
            if part.is_decided:
                complete.append(_all_reduce(seen[place]))
        return complete

    def _accumulators(
        self, part: RangeRows, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[OwnTokens], Any]]:
        """Keys and relevance so far of a range, and how to index both by offsets."""
        if part.is_whole:
            relevance = key.new_zeros(part.turn.length, dtype=torch.float32)
            return key, relevance, lambda offsets: offsets
        buffer, stored = self.context.buffer, self.context.buffer.rows_of(part.key)
        new = stored[part.first : part.end]
        buffer.keys[new] = key
        buffer.relevance[new] = 0
        return buffer.keys, buffer.relevance, lambda offsets: stored[offsets]

    def kept(
        self,
        features: Callable[[int, PrunedVideo], torch.Tensor],
        parts: Sequence[RangeRows],
        relevance: Sequence[Sequence[torch.Tensor | None]] | None,
    ) -> list[list[torch.Tensor]]:
        """What the decided ranges keep.

        Args:
            features: Reads what the tokens of a video of a range are compared by, [length, D], by
                the range's number.
            parts: The decided ranges.
            relevance: For each of them the raw relevance of its videos.

        Returns:
            For each range and video [num_kept] int64 on the device, ascending, counted from the
            video's first token.
        """
        videos = [
            VideoTokens(
                features=features(i, video),
                raw_relevance=None if relevance is None else relevance[i][j],
                num_kept=video.num_kept,
                **self._slices(part.request_id, video),
            )
            for i, part in enumerate(parts)
            for j, video in enumerate(part.turn.videos)
        ]
        settings = [
            self.context.requests[part.request_id].settings
            for part in parts
            for _ in part.turn.videos
        ]
        waiting = iter([agree(indices) for indices in self._select_by(videos, settings)])
        kept = [[next(waiting) for _ in part.turn.videos] for part in parts]
        for part, indices in zip(parts, kept, strict=True):
            self.context.decided(part.request_id, part.turn, indices)
        return kept

    def _select_by(
        self, videos: Sequence[VideoTokens], settings: Sequence[ServingSettings]
    ) -> list[torch.Tensor]:
        """What each video keeps under its own settings; those that share them go together."""
        kept: dict[int, torch.Tensor] = {}
        for each in dict.fromkeys(settings):
            places = [i for i, other in enumerate(settings) if other == each]
            chosen = self.select([videos[i] for i in places], each)
            kept.update(zip(places, chosen, strict=True))
        return [kept[i] for i in range(len(videos))]

    def _slices(self, request_id: str, video: PrunedVideo) -> dict[str, int]:
        """How the pruner is to see a video in time; a piece is one segment."""
        if video.piece_of is not None:
            return {"num_slices": 1}
        slices, rows, columns = self.context.requests[request_id].grids[video.start]
        return _in_slices(video, slices, slices * rows * columns)


def _in_slices(video: PrunedVideo, num_slices: int, num_tokens: int) -> dict[str, int]:
    """The slices and the tail of a video of so many slices and tokens, all of them entered or not.

    Where some have not entered, the host does not know of which slices they were, and the last is
    taken to have as many as they have on average.
    """
    entered = video.length_with_tail
    if entered == num_tokens:
        return {"num_slices": num_slices, "num_tail": video.num_tail}
    parts, per_part = equal_slices(entered, num_slices)
    return {
        "num_slices": parts,
        "num_tail": parts * per_part - video.length,
        "num_last": max(0, cdiv(entered, num_slices) - video.num_tail),
    }


def merged(states: States, rows: slice) -> torch.Tensor:
    """[rows, D]: the residual stream, before the next layer's norm, in the model's dtype."""
    hidden, residual = _take(states, rows)
    return hidden if residual is None else hidden + residual


def _take(states: States, rows: slice) -> States:
    hidden, residual = states
    return hidden[rows], None if residual is None else residual[rows]


def _queries_and_keys(
    layer: Any, positions: torch.Tensor, states: States
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries [n, H, d] and keys [n, Hkv, d] of a layer's attention; this rank's heads."""
    attention, stream = layer.self_attn, merged(states, slice(None))
    qkv, _ = attention.qkv_proj(layer.input_layernorm(stream))
    query, key, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if hasattr(attention, "q_norm"):  # by head, as in Qwen3
        query = attention.q_norm(query.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
        key = attention.k_norm(key.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
    query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
    return (
        query.unflatten(-1, (attention.num_heads, attention.head_dim)),
        key.unflatten(-1, (attention.num_kv_heads, attention.head_dim)),
    )


def _asked(part: RangeRows, video: PrunedVideo, query: torch.Tensor) -> torch.Tensor:
    """[q, H, d]: the queries of the video's question that are in this step."""
    spans = [part.offsets_of(span) for span in video.question]
    found = [query[a - part.first : b - part.first] for a, b in spans if a < b]
    return torch.cat(found) if found else query[:0]


def _attention(
    layer: Any, query: torch.Tensor, keys: torch.Tensor, video: PrunedVideo
) -> torch.Tensor:
    """[length] float32: these questions' share of the mean attention of the whole question."""
    attention = layer.self_attn
    mean = question_attention(
        query, keys, attention.scaling, total_num_heads=attention.total_num_heads
    )
    return mean * (len(query) / video.question_length)


def _all_reduce(relevance: torch.Tensor) -> torch.Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return relevance
    return tensor_model_parallel_all_reduce(relevance)
