"""A decoder that runs its lower layers on every token and its upper layers on kept tokens.

Generic over vLLM decoders whose layers have the shape ``layer(positions, hidden_states, residual)``
and hold ``self_attn`` and ``input_layernorm``: Qwen2, Qwen3, Llama and their kin. After the first
ones DeepStack (arXiv 2406.04334) may add features of the vision encoder's depth. The decoder is
taken over after vLLM has built it, so parameter names, quantisation and loading stay its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.pruning.dpp.select import warm_up
from vllm_dpp.serving.step import StepLayout
from vllm_dpp.serving.worker.attention import make_compact
from vllm_dpp.serving.worker.context import PruningContext
from vllm_dpp.serving.worker.models.graph_inputs import GraphInputs
from vllm_dpp.serving.worker.models.selection import States, VideoSelector, merged
from vllm_dpp.serving.worker.models.upper_rows import RangeReader, UpperRows, gather, scatter
from vllm_dpp.serving.worker.range_buffer import RangeBuffer


class LayerStack(nn.Module):
    """Consecutive layers, compiled as one graph. The layers stay owned by the decoder.

    A stack is given `deepstack` in every step or in none, since it is compiled once. Every stack of
    a decoder is a class of its own: vLLM names what it has compiled by the class alone, so one
    would find another's graph on disk (``patches/compile-cache.md``).
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layers: Sequence[nn.Module],
        first: int,
    ) -> None:
        """Args:
        layers: The layers.
        first: Number of the first of them.
        """
        super().__init__()
        self.layers: Any
        self.__dict__["layers"] = list(layers)
        self.first = first

    def run(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None,
    ) -> States:
        """The layers, one after another."""
        for number, layer in enumerate(self.layers, self.first):
            hidden_states, residual = layer(
                positions=positions, hidden_states=hidden_states, residual=residual
            )
            if deepstack is not None and number < len(deepstack):
                hidden_states = hidden_states + deepstack[f"deepstack_input_embeds_{number}"]
        return hidden_states, residual


_compiled = support_torch_compile(
    dynamic_arg_dims={
        "positions": {-1: "b"},
        "hidden_states": {0: "b"},
        "residual": {0: "b"},
        "deepstack": {0: "b"},
    }
)


@_compiled
class BelowRelevance(LayerStack):
    """The layers below the one where questions are read."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> States:
        return self.run(positions, hidden_states, residual, deepstack)


@_compiled
class BelowSplit(LayerStack):
    """From there to layer K."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> States:
        return self.run(positions, hidden_states, residual, deepstack)


@_compiled
class AboveSplit(LayerStack):
    """Layers from K on, which see kept rows alone."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> States:
        return self.run(positions, hidden_states, residual, deepstack)


class SplitDecoder(nn.Module):
    """The decoder ``inner``, split at layer K.

    Layers [0, K) run on all rows. Before the last of them (the *relevance layer*; layer 0 when
    K = 0) the questions' attention is read off. A turn whose decision point lies beyond this step
    stays there, in the buffer. One whose decision point is reached is pruned, and layers [K, L)
    run on its kept rows and on all others', with their original positions.

    Args:
        inner: A built decoder with ``embed_tokens``, ``layers`` and ``norm``.
        context: The worker's plans.
        vllm_config: The engine's configuration.
        prefix: Name of ``inner`` in the model.
        deepstack_levels: How many of its first layers DeepStack adds to, at most K.
    """

    embed_tokens: Any
    layers: Any
    norm: Any
    inner: Any

    def __init__(
        self,
        inner: Any,
        context: PruningContext,
        *,
        vllm_config: VllmConfig,
        prefix: str,
        deepstack_levels: int = 0,
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
        self.deepstack_levels = deepstack_levels
        self.relevance_layer = max(split - 1, 0) if self.selector.needs_relevance else split
        for layer in self.layers[split:]:
            self._make_compact(_attention_of(layer), v2=vllm_config.use_v2_model_runner)

        self.buffer = self._make_buffer(weight, vllm_config)
        self.longest_video = min(
            context.settings.deferred_rows(vllm_config), vllm_config.model_config.max_model_len
        )
        context.attach(self.buffer)

        def stack(of_class: type[LayerStack], tag: str, start: int, end: int) -> LayerStack | None:
            if start == end:
                return None
            with set_model_tag(tag):
                return of_class(
                    vllm_config=vllm_config,
                    prefix=f"{prefix}.{tag}",
                    layers=self.layers[start:end],
                    first=start,
                )

        first = min(self.relevance_layer, split)
        self.below_relevance = stack(BelowRelevance, "dpp_below_relevance", 0, first)
        self.below_split = stack(BelowSplit, "dpp_below_split", first, split)
        self.above_split = stack(AboveSplit, "dpp_above_split", split, len(self.layers))
        self.into_split = GraphInputs(weight, vllm_config)
        self.into_upper = GraphInputs(weight, vllm_config)

    def _make_buffer(self, like: torch.Tensor, vllm_config: VllmConfig) -> RangeBuffer:
        key_shape: tuple[int, ...] = (0,)
        if self.selector.needs_relevance:
            attention = self.layers[self.relevance_layer].self_attn
            key_shape = (attention.num_kv_heads, attention.head_dim)
        return RangeBuffer(
            self.context.settings.deferred_rows(vllm_config),
            like,
            key_shape=key_shape,
            position_shape=(3,) if vllm_config.model_config.uses_mrope else (),
            compares_embeddings=self.context.settings.compares_embeddings,
        )

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
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> torch.Tensor:
        """Final hidden states [num_rows, D]; rows of pruned videos are zero."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout = self.context.take_layout()
        if get_forward_context().attn_metadata is None:
            self._reserve_workspace(hidden)
        lower = positions, deepstack_input_embeds
        if layout is None or layout.is_plain:
            states = self._run_lower(self.below_relevance, (hidden, None), *lower)
            if self.below_relevance is not None:
                states = self.into_split(states)
            states = self._run_lower(self.below_split, states, *lower)
            return self._finish(positions, self.into_upper(states))
        return self._prune(layout, hidden, *lower)

    def _reserve_workspace(self, hidden: torch.Tensor) -> None:
        """In a run without attention, which measures memory: what the longest selection takes."""
        num_bytes = self.selector.bytes_at_once(self.longest_video, hidden)
        torch.empty(num_bytes, dtype=torch.uint8, device=hidden.device)

    def _run_lower(
        self,
        stack: LayerStack | None,
        states: States,
        positions: torch.Tensor,
        deepstack: IntermediateTensors | None,
    ) -> States:
        """Run some of the layers below K, with DeepStack where it adds to them."""
        if stack is None:
            return states
        return stack(positions, *states, deepstack if stack.first < self.deepstack_levels else None)

    def _prune(
        self,
        layout: StepLayout,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        deepstack: IntermediateTensors | None,
    ) -> torch.Tensor:
        """A step that reads ranges: some are stored, some decided."""
        buffer = self.context.buffer
        stored = [part for part in layout.ranges if not part.is_whole]
        for part in stored:
            if part.first == 0:
                buffer.take(part.key, part.turn.length)
            self.context.store_own(part)
        embeddings = self._keep_embeddings(layout, hidden)

        states = self._run_lower(self.below_relevance, (hidden, None), positions, deepstack)
        if self.below_relevance is not None:
            states = self.into_split(states)
        relevance = None
        if self.selector.needs_relevance:
            layer = self.layers[self.relevance_layer]
            with self.context.metrics.timed("relevance"):
                read = [self.selector.read(layer, positions, states, p) for p in layout.ranges]
            relevance = [seen for seen, p in zip(read, layout.ranges, strict=True) if p.is_decided]
        states = self._run_lower(self.below_split, states, positions, deepstack)
        for part in stored:
            rows = slice(part.row, part.row + part.num_rows)
            buffer.store(part.key, part.first, merged(states, rows), positions[..., rows])

        with self.context.metrics.timed("choice"):
            upper = self._select(layout, positions, states, embeddings, relevance)
        for part in stored:
            if part.is_decided:
                buffer.release(part.key)
        output = torch.zeros_like(hidden)
        if layout.num_compact_rows:
            scatter(layout, self._run_passes(layout, upper), output)
        return output

    def _keep_embeddings(
        self, layout: StepLayout, hidden: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Before the layers write over it: what enters of ranges, if tokens are compared by it.

        Args:
            layout: The step's.
            hidden: [num_rows, D], the input of layer 0.

        Returns:
            For each range that is decided [length, D] if all of it is in the step.
        """
        if not self.context.settings.compares_embeddings:
            return [None] * len(layout.decided)
        for part in layout.ranges:
            if not part.is_whole:
                rows = hidden[part.row : part.row + part.num_rows]
                self.context.buffer.store_embeddings(part.key, part.first, rows)
        return [
            hidden[part.row : part.row + part.num_rows].clone() if part.is_whole else None
            for part in layout.decided
        ]

    def _select(
        self,
        layout: StepLayout,
        positions: torch.Tensor,
        states: States,
        embeddings: Sequence[torch.Tensor | None],
        relevance: Sequence[Sequence[torch.Tensor | None]] | None,
    ) -> UpperRows:
        """What goes up, once every decided range has lost what it does not keep."""
        both = self.context.settings.compares_both
        readers = [
            RangeReader(part, positions, states, self.context.buffer, entered, compares_both=both)
            for part, entered in zip(layout.decided, embeddings, strict=True)
        ]
        own = [
            {v: self.context.own_tokens(part, v, positions.device) for v in part.turn.videos}
            for part in layout.decided
        ]
        kept = self.selector.kept(
            lambda i, video: readers[i].compared(own[i][video]), layout.decided, relevance
        )
        return gather(layout, positions, states, readers, own, kept)

    def _run_passes(self, layout: StepLayout, upper: UpperRows) -> torch.Tensor:
        """[num_compact_rows, D] final hidden states."""
        output = torch.empty_like(upper.states[0])
        for number, one in enumerate(layout.passes):
            rows = async_tensor_h2d(one.rows, device=output.device)
            with self.context.upper_pass(number):
                output[rows] = self._finish(*upper.take(rows))
        return output

    def _finish(self, positions: torch.Tensor, states: States) -> torch.Tensor:
        hidden, residual = states
        if self.above_split is not None:
            hidden, residual = self.above_split(positions, *states)
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as the original decoder does; the layers are the same objects."""
        return self.inner.load_weights(weights)


def _attention_of(layer: nn.Module) -> Attention:
    """The one attention op of a decoder layer."""
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise ValueError(f"expected one attention op in {type(layer)}, found {len(found)}")
    return found[0]
