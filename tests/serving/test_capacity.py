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
PAGE_BYTES = BLOCK_SIZE * 2 * 2 * 64 * 4  # keys and values of 2 heads of 64 float32
KV_BYTES = 64 * 2**20
NUM_VIDEO = 16 * 6 * 6
NUM_REQUESTS = 40
MAX_TOKENS = 12  # they fit in the last block of the prompt, in every group
QUESTION = "What moves through the picture?"
COMMON = {
    "kv_cache_memory_bytes": KV_BYTES,
    "block_size": BLOCK_SIZE,
    "max_model_len": 1024,
    "max_num_batched_tokens": 32768,  # whatever fits in the KV cache is prefilled in one step
    "max_num_seqs": 96,
}


@pytest.fixture(scope="module")
def long_video(judge: Judge) -> dict:
    """16 slices of 6 x 6 tokens: 576 video tokens."""
    messages = [user(video(5, 32, 168, 168), {"type": "text", "text": QUESTION})]
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
    full = math.ceil(prompt_len / BLOCK_SIZE)
    kept = prompt_len - NUM_VIDEO + round(NUM_VIDEO * RATIO)
    compact = math.ceil(kept / BLOCK_SIZE)
    assert stock.first_blocks["r0"] == (full,)
    assert dpp.first_blocks["r0"] == (full, compact, compact)  # groups of two layers each

    left = PRUNE_LAYER / LAYERS + (1 - PRUNE_LAYER / LAYERS) * kept / prompt_len
    layer_blocks = full * PRUNE_LAYER + compact * (LAYERS - PRUNE_LAYER)
    assert layer_blocks / (full * LAYERS) == pytest.approx(left, rel=0.05)

    # One block is vLLM's null block. Fewer requests at once take more waves of decode steps.
    stock_slots = (KV_BYTES // (PAGE_BYTES * LAYERS) - 1) // full
    dpp_slots = (KV_BYTES // (PAGE_BYTES * 2) - 1) // (full + 2 * compact)
    for traffic, slots in ((stock, stock_slots), (dpp, dpp_slots)):
        assert traffic.peak_running == slots < NUM_REQUESTS
        waves = math.ceil(NUM_REQUESTS / slots)
        assert traffic.working_steps == pytest.approx(waves * MAX_TOKENS, rel=0.05)
        assert (traffic.preemptions, traffic.blocks_held, traffic.plans_left) == (0, 0, 0)
    assert dpp.peak_running / stock.peak_running == pytest.approx(1 / left, rel=0.05)
