"""What goes into an engine under test and what comes out; plain values that cross processes."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Arrival:
    """One request.

    Args:
        name: Its request id.
        prompt: As ``LLM.generate`` takes it.
        max_tokens: Tokens to generate, greedily; an end-of-sequence token stops nothing.
        extra_args: ``SamplingParams.extra_args``.
        step: Engine step at which it arrives.
        abort_after: Steps until it is aborted, ``None`` for never.
        logprobs: Whether to return the log-probabilities of the whole vocabulary.
        params: More sampling parameters.
        adapter: Folder of its LoRA adapter.
        priority: The lower, the sooner it is its turn.
    """

    name: str
    prompt: dict[str, Any]
    max_tokens: int = 4
    extra_args: dict[str, Any] | None = None
    step: int = 0
    abort_after: int | None = None
    logprobs: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    priority: int = 0

    def lora_request(self) -> Any:
        from vllm.lora.request import LoRARequest

        if self.adapter is None:
            return None
        return LoRARequest(self.adapter, 1 + zlib.crc32(self.adapter.encode()) % 9999, self.adapter)

    def sampling_params(self) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1 if self.logprobs else None,
            extra_args=self.extra_args,
            **self.params,
        )


@dataclass(frozen=True)
class Answer:
    """How a request ended.

    Args:
        tokens: Generated tokens.
        logprobs: [len(tokens), vocabulary] float32, or ``None``.
        finish_reason: vLLM's.
        prompt_token_ids: The expanded prompt.
        num_cached_tokens: Prompt tokens that prefix caching supplied.
        prompt_logprobs: Of each prompt token but the first, if the request asked for them.
        error: Why the request was refused, else ``None``.
    """

    tokens: tuple[int, ...] = ()
    logprobs: NDArray[np.float32] | None = None
    finish_reason: str | None = None
    prompt_token_ids: tuple[int, ...] = ()
    num_cached_tokens: int | None = None
    prompt_logprobs: tuple[float, ...] = ()
    error: str | None = None

    @classmethod
    def of(cls, output: Any) -> "Answer":
        (completion,) = output.outputs
        prompt = tuple(output.prompt_token_ids)
        scored = zip(output.prompt_logprobs or (), prompt, strict=False)
        return cls(
            tokens=tuple(completion.token_ids),
            logprobs=_table(completion.logprobs),
            finish_reason=completion.finish_reason,
            prompt_token_ids=prompt,
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=tuple(row[token].logprob for row, token in scored if row),
        )


@dataclass(frozen=True)
class Traffic:
    """A finished run.

    Args:
        answers: By request name.
        steps: Calls of ``LLMEngine.step``.
        working_steps: Steps that computed anything.
        preemptions: Requests that lost their blocks.
        peak_running: Most requests running at once.
        first_steps: The step in which a request was first given tokens, by name.
        first_blocks: Blocks of each KV group after a request's first step, by name.
        blocks_held: Blocks not returned at the end.
        plans_left: What else is held at the end, by the scheduler or the worker: plans, rows of the
            range buffer, references to encoder outputs.
    """

    answers: dict[str, Answer]
    steps: int
    working_steps: int
    preemptions: int
    peak_running: int
    first_steps: dict[str, int]
    first_blocks: dict[str, tuple[int, ...]]
    blocks_held: int
    plans_left: int


def _table(logprobs: Any) -> NDArray[np.float32] | None:
    if not logprobs:
        return None
    table = np.full((len(logprobs), 1 + max(max(row) for row in logprobs)), np.nan, np.float32)
    for i, row in enumerate(logprobs):
        for token, entry in row.items():
            table[i, token] = entry.logprob
    return table
