"""Question-aware selection inside the forward pass: from rows of one batch to kept rows.

No host synchronisation: lengths come from the layout, indices stay on the device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.pruner import VideoTokens, keep_indices
from vllm_dpp.pruning.relevance import question_attention
from vllm_dpp.serving import records
from vllm_dpp.serving.step import StepLayout, VideoRows
from vllm_dpp.serving.worker.context import PruningContext

Select = Callable[[Sequence[VideoTokens], PruningConfig], list[torch.Tensor]]


class VideoSelector:
    """Decides which rows of a batch go on to the upper layers.

    Args:
        context: Plans, grids and settings of this worker.
    """

    def __init__(self, context: PruningContext) -> None:
        self.context = context
        self.select: Select = keep_indices
        if context.settings.shard_selection and get_tensor_model_parallel_world_size() > 1:
            self.select = partial(keep_indices, group=get_tp_group().device_group)

    @property
    def needs_relevance(self) -> bool:
        return self.context.settings.relevance != "none"

    def raw_relevance(
        self,
        layer: Any,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        layout: StepLayout,
    ) -> list[torch.Tensor]:
        """How much attention each question pays to its video's tokens in ``layer``.

        Args:
            layer: The decoder layer that is about to run on these inputs.
            positions: [..., num_rows] RoPE positions.
            hidden_states: [num_rows, D] input of ``layer``.
            residual: [num_rows, D], or ``None`` before the first layer.
            layout: The step's layout.

        Returns:
            One [num_tokens] float32 tensor for each video of the layout.
        """
        return [
            _question_attention(layer, positions, hidden_states, residual, rows)
            for rows in layout.videos
        ]

    def kept_rows(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        raw_relevance: Sequence[torch.Tensor] | None,
        layout: StepLayout,
    ) -> torch.Tensor:
        """[num_compact_rows] int64, ascending: the rows that enter layer K."""
        videos = []
        for i, rows in enumerate(layout.videos):
            request = self.context.requests[rows.request_id]
            videos.append(
                VideoTokens(
                    features=_stream(hidden_states, residual, rows.start, rows.end),
                    raw_relevance=None if raw_relevance is None else raw_relevance[i],
                    num_kept=rows.video.num_kept,
                    num_slices=request.grids[rows.video.start][0],
                )
            )
        kept = [_agree(indices) for indices in self.select(videos, self.context.settings)]
        self._record(layout, kept)
        return _splice(layout, kept, hidden_states.device)

    def _record(self, layout: StepLayout, kept: Sequence[torch.Tensor]) -> None:
        """Write the records that requests asked for. Only these requests wait for the device."""
        folder = self.context.settings.record_path
        if folder is None or get_tp_group().rank_in_group != 0:
            return
        for rows, indices in zip(layout.videos, kept, strict=True):
            request = self.context.requests[rows.request_id]
            if request.record:
                grid = request.grids[rows.video.start]
                entry = {"start": rows.video.start, "grid": grid, "keep": indices.tolist()}
                records.write_kept(folder, rows.request_id, [entry])


def _stream(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, start: int, end: int
) -> torch.Tensor:
    """[end - start, D] float32: the residual stream, before the next layer's norm."""
    rows = hidden_states[start:end].float()
    return rows if residual is None else rows + residual[start:end].float()


def _question_attention(
    layer: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    rows: VideoRows,
) -> torch.Tensor:
    spans = [(rows.start, rows.end), *rows.question]
    stream = torch.cat([_stream(hidden_states, residual, a, b) for a, b in spans])
    where = torch.cat([positions[..., a:b] for a, b in spans], dim=-1)
    attention = layer.self_attn
    normed = layer.input_layernorm(stream.to(hidden_states.dtype))
    qkv, _ = attention.qkv_proj(normed)
    query, key, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    query, key = attention.rotary_emb(where, query.contiguous(), key.contiguous())
    length = rows.video.length
    relevance = question_attention(
        query[length:].unflatten(-1, (attention.num_heads, attention.head_dim)),
        key[:length].unflatten(-1, (attention.num_kv_heads, attention.head_dim)),
        attention.scaling,
        total_num_heads=attention.total_num_heads,
    )
    if get_tensor_model_parallel_world_size() > 1:
        relevance = tensor_model_parallel_all_reduce(relevance)
    return relevance


def _agree(indices: torch.Tensor) -> torch.Tensor:
    """The first rank's choice, so that rounding cannot make tensor-parallel ranks differ."""
    if get_tensor_model_parallel_world_size() == 1:
        return indices
    return get_tp_group().broadcast(indices.contiguous(), src=0)


def _splice(layout: StepLayout, kept: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Row numbers of the whole batch, with each video's rows replaced by its kept ones."""
    rows = torch.arange(layout.num_rows, device=device)
    parts, at = [], 0
    for video, indices in zip(layout.videos, kept, strict=True):
        parts += [rows[at : video.start], indices + video.start]
        at = video.end
    return torch.cat([*parts, rows[at:]])
