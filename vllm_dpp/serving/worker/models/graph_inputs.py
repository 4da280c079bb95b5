"""What one stack of layers hands to the next, where both may replay piecewise CUDA graphs."""

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_dpp.serving.worker.models.selection import States


class GraphInputs:
    """The inputs of a stack, at addresses that never change.

    A graph reads its inputs where they lay when it was captured. vLLM takes the last piece of a
    compiled module for the last of the step, so the memory of its results is free for whatever is
    captured next; the results must have left it before another graph replays.

    Args:
        like: [D], of the states' width, type and device.
        vllm_config: The engine's configuration.
    """

    def __init__(self, like: torch.Tensor, vllm_config: VllmConfig) -> None:
        compilation = vllm_config.compilation_config
        size = 0
        if compilation.cudagraph_mode.has_piecewise_cudagraphs():
            size = compilation.max_cudagraph_capture_size or 0
        self._hidden, self._residual = (like.new_empty(size, len(like)) for _ in range(2))

    def __call__(self, states: States) -> States:
        """The same states, [T, D] each, moved where the step replays or captures such graphs."""
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return states
        hidden, residual = states
        n = len(hidden)
        self._hidden[:n].copy_(hidden)
        if residual is None:
            return self._hidden[:n], None
        self._residual[:n].copy_(residual)
        return self._hidden[:n], self._residual[:n]
