"""Piecewise CUDA graphs as far as a CPU can play them: addresses, sizes and reused memory."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context

from vllm_dpp.serving.worker.models.graph_inputs import GraphInputs
from vllm_dpp.serving.worker.models.split_decoder import SplitDecoder

MOST_ROWS = 4096
STACKS = "below_relevance", "below_split", "above_split"


class PlayedGraph:
    """A stack that reads its inputs where they lay the first time that a step had this size.

    All of them put their results into the same memory, which is lost before one runs.
    """

    def __init__(self, stack: Any, memory: torch.Tensor) -> None:
        self.stack, self.memory = stack, memory
        self.first = stack.first
        self.inputs: dict[BatchDescriptor, tuple[Any, ...]] = {}
        self.replays = 0

    def __call__(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self.stack(*args)
        size = context.batch_descriptor.num_tokens
        assert all(len(x) == size for x in args[1:3] if x is not None), "another size"
        self.replays += context.batch_descriptor in self.inputs
        captured = self.inputs.setdefault(context.batch_descriptor, args)
        self.memory.fill_(torch.nan)
        for place, result in zip(self.memory, self.stack(*captured), strict=True):
            place[:size] = result
        hidden, residual = self.memory[:, :size]
        return hidden, residual


def play_graphs(decoder: SplitDecoder) -> list[PlayedGraph]:
    """Let every step of a decoder that is loaded on a CPU run as piecewise graphs would."""
    like = decoder.layers[0].input_layernorm.weight
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.PIECEWISE, max_cudagraph_capture_size=MOST_ROWS
    )
    config: Any = SimpleNamespace(compilation_config=compilation)
    decoder.into_split, decoder.into_upper = (GraphInputs(like, config) for _ in range(2))
    memory = like.new_empty(2, MOST_ROWS, len(like))
    played = []
    for name in STACKS:
        if (stack := getattr(decoder, name)) is not None:
            played.append(PlayedGraph(stack, memory))
            delattr(decoder, name)
            setattr(decoder, name, played[-1])
    run = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        context = get_forward_context()
        if context.attn_metadata is not None:
            context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
            context.batch_descriptor = BatchDescriptor(num_tokens=len(kwargs["inputs_embeds"]))
        return run(*args, **kwargs)

    decoder.__dict__["forward"] = forward
    return played
