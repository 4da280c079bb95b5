"""A decoder that runs its lower layers on every token and its upper layers on kept tokens.

Generic over vLLM decoders whose layers have the shape ``layer(positions, hidden_states, residual)``
and hold ``self_attn`` and ``input_layernorm``: Qwen2, Qwen3, Llama and their kin. The decoder is
taken over after vLLM has built it, so parameter names, quantisation and loading stay its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors

from vllm_dpp.pruning.select import warm_up
from vllm_dpp.serving.worker.attention import make_compact
from vllm_dpp.serving.worker.context import PruningContext
from vllm_dpp.serving.worker.models.selection import VideoSelector

States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states and residual, each [num_rows, D]; the residual is ``None`` before layer 0."""


@support_torch_compile(
    dynamic_arg_dims={"positions": {-1: "b"}, "hidden_states": {0: "b"}, "residual": {0: "b"}}
)
class LayerStack(nn.Module):
    """Consecutive layers, compiled as one graph. The layers stay owned by the decoder."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.layers: Any
        self.__dict__["layers"] = list(layers)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> States:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


class SplitDecoder(nn.Module):
    """The decoder ``inner``, split at layer K.

    Layers [0, K) run on all rows. Before the last of them (the *relevance layer*; layer 0 when
    K = 0) the questions' attention is read off. Then videos are pruned, and layers [K, L) run on
    the kept rows with their original positions. The result has all rows; pruned ones are zero.

    Args:
        inner: A built decoder with ``embed_tokens``, ``layers`` and ``norm``.
        context: The worker's plans.
        vllm_config: The engine's configuration.
        prefix: Name of ``inner`` in the model.
    """

    embed_tokens: Any
    layers: Any
    norm: Any
    inner: Any

    def __init__(
        self, inner: Any, context: PruningContext, *, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm = inner.embed_tokens, inner.layers, inner.norm
        self.make_empty_intermediate_tensors = inner.make_empty_intermediate_tensors
        self.__dict__["inner"] = inner
        self.context = context
        self.selector = VideoSelector(context)
        weight = inner.layers[0].input_layernorm.weight
        warm_up(weight.device, len(weight), torch.float32)
        split = context.settings.split_layer
        self.relevance_layer = max(split - 1, 0) if self.selector.needs_relevance else split
        for layer in self.layers[split:]:
            self._make_compact(_attention_of(layer), v2=vllm_config.use_v2_model_runner)

        def stack(tag: str, start: int, end: int) -> LayerStack | None:
            if start == end:
                return None
            with set_model_tag(tag):
                return LayerStack(
                    vllm_config=vllm_config,
                    prefix=f"{prefix}.{tag}",
                    layers=self.layers[start:end],
                )

        first = min(self.relevance_layer, split)
        self.below_relevance = stack("dpp_below_relevance", 0, first)
        self.below_split = stack("dpp_below_split", first, split)
        self.above_split = stack("dpp_above_split", split, len(self.layers))

    def _make_compact(self, attention: Attention, *, v2: bool) -> None:
        make_compact(attention)
        if not v2:
            from vllm_dpp.serving.worker.v1.attention import compact_backend

            attention.pruning = self.context
            attention.attn_backend = compact_backend(attention.attn_backend)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states [num_rows, D]; the rows of pruned tokens are zero."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout = self.context.take_layout()
        states = _run(self.below_relevance, positions, (hidden, None))
        relevance = None
        if layout is not None and layout.videos and self.selector.needs_relevance:
            layer = self.layers[self.relevance_layer]
            relevance = self.selector.raw_relevance(layer, positions, *states, layout)
        states = _run(self.below_split, positions, states)
        if layout is None or not layout.videos:
            return self._finish(positions, states)
        rows = self.selector.kept_rows(*states, relevance, layout)
        kept = self._finish(positions[..., rows], _take(states, rows))
        return torch.zeros_like(hidden).index_copy_(0, rows, kept)

    def _finish(self, positions: torch.Tensor, states: States) -> torch.Tensor:
        hidden, residual = _run(self.above_split, positions, states)
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as the original decoder does; the layers are the same objects."""
        return self.inner.load_weights(weights)


def _run(stack: LayerStack | None, positions: torch.Tensor, states: States) -> States:
    return states if stack is None else stack(positions, *states)


def _take(states: States, rows: torch.Tensor) -> States:
    hidden, residual = states
    return hidden[rows], None if residual is None else residual[rows]


def _attention_of(layer: nn.Module) -> Attention:
    """The one attention op of a decoder layer."""
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise ValueError(f"expected one attention op in {type(layer)}, found {len(found)}")
    return found[0]
