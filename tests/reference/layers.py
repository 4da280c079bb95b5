"""One decoder layer and the relevance of video tokens, in plain algebra on transformers' weights.

No batch dimension and no cache: a sequence is [tokens, hidden]. Everything here is computed in the
dtype of the weights; the norms and the softmax of transformers drop a float64 model to float32.
"""

import math
import sys

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]


def rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Apply an RMS norm of transformers to hidden states [tokens, hidden]."""
    mean_square = hidden.pow(2).mean(-1, keepdim=True)
    return norm.weight * hidden * torch.rsqrt(mean_square + norm.variance_epsilon)


def rotated_queries_and_keys(
    attention: nn.Module, normed: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each [heads, tokens, head_dim]; key heads are repeated to match."""
    queries = _split_heads(attention.q_proj(normed), attention.head_dim)
    keys = _split_heads(attention.k_proj(normed), attention.head_dim)
    if hasattr(attention, "q_norm"):
        queries = rms_norm(attention.q_norm, queries)
        keys = rms_norm(attention.k_norm, keys)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # the family's own
    queries, keys = rotate(queries, keys, *rotary, unsqueeze_dim=0)
    return queries, keys.repeat_interleave(attention.num_key_value_groups, dim=0)


def decoder_layer(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
    """Hidden states [tokens, hidden] that leave the layer; no row attends to a later one."""
    normed = rms_norm(layer.input_layernorm, hidden)
    attended = _causal_attention(layer.self_attn, normed, rotary)
    sandwich = hasattr(layer, "post_self_attn_layernorm")  # norms behind both halves, too
    if sandwich:
        attended = rms_norm(layer.post_self_attn_layernorm, attended)
    hidden = hidden + attended
    # A mixture of experts wants a batch.
    added = layer.mlp(rms_norm(layer.post_attention_layernorm, hidden)[None])[0]
    return hidden + (rms_norm(layer.post_mlp_layernorm, added) if sandwich else added)


def raw_relevance(
    layer: nn.Module, hidden: Tensor, rotary: Rotary, question: list[int], video: list[int]
) -> Tensor:
    """Attention that each video token gets from the question, [video tokens]; it sums to one.

    The softmax runs over the tokens of the video alone, the mean over heads and question tokens.
    """
    normed = rms_norm(layer.input_layernorm, hidden)
    queries, keys = rotated_queries_and_keys(layer.self_attn, normed, rotary)
    scores = queries[:, question] @ keys[:, video].transpose(1, 2)
    scores = scores / math.sqrt(layer.self_attn.head_dim)
    return scores.softmax(dim=-1).mean(dim=(0, 1))


def _causal_attention(attention: nn.Module, normed: Tensor, rotary: Rotary) -> Tensor:
    queries, keys = rotated_queries_and_keys(attention, normed, rotary)
    values = _split_heads(attention.v_proj(normed), attention.head_dim)
    values = values.repeat_interleave(attention.num_key_value_groups, dim=0)

    scores = queries @ keys.transpose(1, 2) / math.sqrt(attention.head_dim)
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return attention.o_proj((weights @ values).transpose(0, 1).flatten(start_dim=1))


def _split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """[tokens, heads * head_dim] to [heads, tokens, head_dim]."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(0, 1)
