"""The forward pass of a Qwen2.5-VL on packed batches, from the weights of transformers' model.

The same mathematics as `Qwen2_5_VLForConditionalGeneration.forward`, which a test compares, but
for videos of one size at once, and open between the layers.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

from vllm_dpp.quality.scene import FRAMES_PER_STEP, GRID, Cells

PATCH = 14

# Of OpenAI's CLIP, which Qwen2-VL's processor uses.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(frames: Tensor) -> Tensor:
    """Cuts frames into normalised patches, in the order of Qwen2-VL's processor.

    Args:
        frames: [B, T, H, W, 3] uint8, H and W of whole cells.

    Returns:
        [B * steps, 4 * cells, 1176] float32.
    """
    rows, columns = cells_of(frames)
    cut = frames.view(-1, FRAMES_PER_STEP, rows, 2, PATCH, columns, 2, PATCH, 3)
    cut = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous()
    std = torch.tensor(_STD, device=frames.device)
    mean = torch.tensor(_MEAN, device=frames.device)
    scale = (1 / (255 * std)).view(3, 1)
    shift = (mean / std).view(3, 1)
    pixels = cut.view(-1, 4 * rows * columns, 3, FRAMES_PER_STEP * PATCH * PATCH).float()
    return (pixels * scale - shift).flatten(2)


def cells_of(frames: np.ndarray | Tensor) -> Cells:
    """Those of `frames`, [..., H, W, 3]."""
    height, width = frames.shape[-3:-1]
    return height // (2 * PATCH), width // (2 * PATCH)


def encode_videos(
    model: Any, patches: Tensor, num_videos: int, cells: Cells = (GRID, GRID)
) -> Tensor:
    """The vision encoder.

    A frame is no larger than one attention window, so windowed and full attention are the same.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration`.
        patches: from `patchify`.
        num_videos: B.
        cells: (rows, columns) of each of their frames.

    Returns:
        [B, V, D] float, video tokens.
    """
    visual = model.model.visual
    hidden = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = _vision_rotary(visual, patches, cells)
    for block in visual.blocks:
        hidden = hidden + _vision_attention(block.attn, _norm(hidden, block.norm1), cos, sin)
        hidden = hidden + _gated(block.mlp, _norm(hidden, block.norm2))
    merged = _norm(hidden, visual.merger.ln_q).view(num_videos, -1, 4 * hidden.shape[-1])
    return visual.merger.mlp(merged)


def _vision_attention(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    steps, patches, _ = normed.shape
    qkv = attention.qkv(normed).view(steps, patches, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.proj(mixed.transpose(1, 2).reshape(steps, patches, -1))


def _vision_rotary(visual: Any, like: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """[4 * cells, head size] cosine and sine of the patches' rows and columns."""
    rows, columns = cells
    order = torch.arange(4 * rows * columns, device=like.device).view(rows, 2, columns, 2)
    order = order.transpose(1, 2).flatten()
    places = torch.stack([order // (2 * columns), order % (2 * columns)], dim=1)
    return visual.rotary_pos_emb(like, places)


def rotary(model: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, N, head size] cosine and sine of M-RoPE `positions`, [3, B, N] int64."""
    cos, sin = model.model.language_model.rotary_emb(like, positions)
    return cos[:, None], sin[:, None]


def decoder_layer(layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """One layer of the decoder.

    Args:
        layer: a `Qwen2_5_VLDecoderLayer`.
        hidden: [B, N, D] float.
        turns: from `rotary`.
        mask: [B, 1, Q, N] bool, true where one of the last Q tokens (row) sees another (column).
            The N - Q tokens before them see all tokens up to themselves.
    """
    batch, length, _ = hidden.shape
    attention = layer.self_attn
    normed = _norm(hidden, layer.input_layernorm)
    query, key, value = (
        _heads(normed, project, attention)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _rotate(query, *turns), _rotate(key, *turns)
    mixed = _attend(query, key, value, mask)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
    return hidden + _gated(layer.mlp, _norm(hidden, layer.post_attention_layernorm))


def attention_to(
    layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, columns: slice
) -> Tensor:
    """[B, heads, Q] float: the share of its attention that each of the last Q tokens pays.

    Args:
        layer: as in `decoder_layer`, like the others.
        hidden: [B, N, D] float.
        turns: from `rotary`.
        mask: [B, 1, Q, N] bool.
        columns: the tokens that it is paid to.
    """
    attention, start = layer.self_attn, hidden.shape[1] - mask.shape[2]
    normed = _norm(hidden, layer.input_layernorm)
    cos, sin = turns
    query = _heads(normed[:, start:], attention.q_proj, attention)
    query = _rotate(query, cos[:, :, start:], sin[:, :, start:])
    key = _rotate(_heads(normed, attention.k_proj, attention), cos, sin)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = attention.scaling * query @ key.transpose(2, 3)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights[..., columns].sum(-1)


def _heads(normed: Tensor, project: Any, attention: Any) -> Tensor:
    """[B, heads, N, head size] of a projection of `normed`, [B, N, D]."""
    return project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention in two parts: the prefix never looks at the questions."""
    split = key.shape[2] - mask.shape[2]
    prefix = F.scaled_dot_product_attention(
        query[:, :, :split], key[:, :, :split], value[:, :, :split], is_causal=True, enable_gqa=True
    )
    questions = F.scaled_dot_product_attention(
        query[:, :, split:], key, value, mask, enable_gqa=True
    )
    return torch.cat([prefix, questions], dim=2)


def final_logits(model: Any, hidden: Tensor) -> Tensor:
    """[..., vocabulary] float logits of `hidden`, [..., D], after the last layer."""
    return model.lm_head(_norm(hidden, model.model.language_model.norm))


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _gated(mlp: Any, normed: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin
