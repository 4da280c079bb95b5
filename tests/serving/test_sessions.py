"""Streamed inputs: a prompt that comes in parts, which vLLM's asynchronous engine alone takes."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engines.judge import Judge
from tests.reference.chats import text, user, video
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PRUNE_LAYER, ENTRY_RATIO = 2, 0.6
DPP = {"prune_layer": PRUNE_LAYER, "retention_ratio": 0.25, "entry_ratio": ENTRY_RATIO}
WORDS = "What moves through the picture?"
PATIENCE = 120
"""Seconds, should an answer never come."""


def params(max_tokens: int, **extra_args: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args or None,
    )


async def answers(engine: AsyncLLM, *inputs: StreamingInput) -> list[int]:
    """The tokens after each input; the next one is sent when those are there."""
    tokens: list[int] = []
    due = 0

    async def stream() -> AsyncGenerator[StreamingInput, None]:
        nonlocal due
        for one in inputs:
            while len(tokens) < due:
                await asyncio.sleep(0.01)
            due += one.sampling_params.max_tokens if one.sampling_params else 0
            yield one

    async for output in engine.generate(stream(), params(1), "session"):
        tokens += output.outputs[0].token_ids
    return tokens


def test_a_session_keeps_what_entered(judge: Judge, tiny_checkpoint: Path) -> None:
    """By the parameters of its later inputs, too, which bring no video; less is refused."""
    settings = ServingSettings(**DPP)
    judge.add("told in parts", [user(video(5, 32, 112, 112), text(WORDS))])
    judge.enter("in parts", "told in parts", ENTRY_RATIO, settings.entry_config)
    whole = judge.engine_prompts["in parts"]
    said, cut, rest = whole["prompt"].partition(" through")

    async def converse() -> tuple[list[int], str]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                str(tiny_checkpoint),
                hf_overrides={"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]},
                additional_config={"dpp": DPP},
                dtype="float32",
                enforce_eager=True,
                block_size=32,
                max_model_len=1024,
                kv_cache_memory_bytes=16 * 2**20,
            )
        )
        try:
            first = StreamingInput(prompt={**whole, "prompt": said}, sampling_params=params(1))
            second = StreamingInput(prompt={"prompt": cut + rest}, sampling_params=params(4))
            tokens = await asyncio.wait_for(answers(engine, first, second), PATIENCE)
            asking = StreamingInput({"prompt": cut}, params(1, dpp_retention_ratio=0.5))
            with pytest.raises(VLLMValidationError) as refused:
                await asyncio.wait_for(answers(engine, first, asking), PATIENCE)
            return tokens, str(refused.value)
        finally:
            engine.shutdown()

    tokens, why = asyncio.run(converse())
    everything = judge.keep("in parts", 1.0, PRUNE_LAYER, settings)
    told = tuple(tokens[1:])  # the token after the first part is not part of the prompt
    expected = judge.logprobs("in parts", PRUNE_LAYER, everything, told).argmax(-1)
    assert len(told) == 4 and told == tuple(expected.tolist())
    assert "streaming-input" in why
