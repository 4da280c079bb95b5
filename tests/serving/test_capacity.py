"""Blocks are really saved: counts of the engine itself against the arithmetic of K, L and r."""

import math
from pathlib import Path

import pytest

from tests.engines.host import engine_host
from tests.engines.judge import Judge
from tests.engines.traffic import Arrival, Traffic
from tests.reference.chats import user, video
from tests.reference.prompt import chat_text, multi_modal_data

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

LAYERS, PRUNE_LAYER, RATIO, BLOCK_SIZE = 6, 2, 0.25, 32
KV_BYTES = 64 * 2**20
NUM_REQUESTS = 66
MAX_TOKENS = 12  # they fit in the last block of the prompt, in every group
COMMON = {
    "kv_cache_memory_bytes": KV_BYTES,
    "block_size": BLOCK_SIZE,
    "max_model_len": 1024,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 96,
}


@pytest.fixture(scope="module")
def long_video(judge: Judge) -> dict:
    """16 slices of 6 x 6 tokens: 576 video tokens."""
    messages = [
        user(video(5, 32, 168, 168), {"type": "text", "text": "What moves through the picture?"})
    ]
    text = chat_text(judge.reference.processor, messages)
    return {"prompt": text, "multi_modal_data": multi_modal_data(messages)}


def serve(checkpoint: Path, prompt: dict, dpp: dict | None) -> Traffic:
    arrivals = [
        Arrival(f"r{i}", prompt, max_tokens=MAX_TOKENS, logprobs=False) for i in range(NUM_REQUESTS)
    ]
    with engine_host("v1") as host:
        host.load(checkpoint, dpp, **COMMON)
        return host.run(arrivals)


def test_blocks_concurrency_and_steps_match_the_cost_model(
    long_video: dict, tiny_checkpoint: Path
) -> None:
    stock = serve(tiny_checkpoint, long_video, None)
    dpp = serve(tiny_checkpoint, long_video, {"prune_layer": PRUNE_LAYER, "retention_ratio": RATIO})
    prompt_len = len(stock.answers["r0"].prompt_token_ids)
    num_video = 576
    assert prompt_len > num_video

    full = math.ceil(prompt_len / BLOCK_SIZE)
    compact = math.ceil((prompt_len - num_video + round(num_video * RATIO)) / BLOCK_SIZE)
    assert stock.first_blocks["r0"] == (full,)
    assert dpp.first_blocks["r0"] == (full, compact, compact)  # groups of two layers each

    layer_blocks_stock = full * LAYERS
    layer_blocks_dpp = full * PRUNE_LAYER + compact * (LAYERS - PRUNE_LAYER)
    share = PRUNE_LAYER / LAYERS + (1 - PRUNE_LAYER / LAYERS) * RATIO
    text = (prompt_len - num_video) / prompt_len
    predicted = share * (1 - text) + text
    assert layer_blocks_dpp / layer_blocks_stock == pytest.approx(predicted, rel=0.05)

    assert stock.peak_running < NUM_REQUESTS, "the KV cache must be what limits stock"
    assert dpp.peak_running / stock.peak_running == pytest.approx(1 / predicted, rel=0.05)
    assert stock.preemptions == dpp.preemptions == 0
    print(stock.working_steps, dpp.working_steps, predicted)
    assert dpp.working_steps / stock.working_steps == pytest.approx(predicted, rel=0.05)
    assert (dpp.blocks_held, dpp.plans_left) == (0, 0)
