"""Random traffic on a starved engine: exact answers, real preemptions, nothing left behind.

`--stress-requests 210` asks 504 requests in all; without it a third of them are asked.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.host import engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival, Traffic
from tests.reference.chats import CHATS, assistant, text, user, video
from vllm_dpp.serving.settings import ServingSettings

from .conftest import CUDA

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE, PRUNE_LAYER, ENTERING = 32, 2, 0.7
DPP = {"prune_layer": PRUNE_LAYER, "segment_by": "slices", "slices_per_segment": 2}
STARVED = {
    "enable_prefix_caching": True,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 52,  # about three of the longer chats
    "max_num_batched_tokens": 96,  # every prompt but the shortest is chunked, in its videos
    "max_num_seqs": 12,
    "max_model_len": 512,
}
MOVIE = video(5, 16, 84, 112)
QUESTION = [user(MOVIE, text("What moves, and where to?"))]
MORE_CHATS = {
    "turn 1": QUESTION,
    "turn 2": [*QUESTION, assistant("A disc."), user(text("And then?"))],
    "other question": [user(MOVIE, text("How many discs are there in it?"))],
}
RUNS: dict[str, tuple[tuple[dict[str, Any], bool], ...]] = {
    "v1": (({}, False), ({"relevance": "none"}, True)),
    "v2": (({}, True), ({"max_deferred_tokens": 160}, False)),
    "cuda": (({}, True), ({"max_deferred_tokens": 160}, False)),
}
"""For each runner further settings, and whether scheduling is asynchronous."""
SHARE = {"v1": 1.0, "v2": 0.2, "cuda": 1.0}  # of the requests; V2 runs in Triton's interpreter


def named(chat: str, entering: float) -> str:
    """What the judge calls a chat of whose videos this fraction enters."""
    return chat if entering == 1 else f"{chat} in part"


def random_traffic(judge: Judge, seed: int, count: int) -> list[Arrival]:
    """Chats at random ratios of both stages and lengths, arriving over time; some are aborted in
    flight.
    """
    rng = np.random.default_rng(seed)
    arrivals = []
    for i in range(count):
        chat = str(rng.choice([*CHATS, *MORE_CHATS]))
        ratio = float(rng.choice([1.0, 0.5, 0.25]))
        entering = float(rng.choice([1.0, ENTERING]))
        more = {"mm_processor_kwargs": {"dpp_entry_ratio": entering}} if entering < 1 else {}
        more |= {"cache_salt": "mine"} if rng.random() < 0.1 else {}
        arrivals.append(
            Arrival(
                name=f"{named(chat, entering)}|{ratio}|{i}",
                prompt=judge.engine_prompts[chat] | more,
                max_tokens=int(rng.choice([4, 12, 40])),
                extra_args={"dpp_retention_ratio": ratio},
                step=int(rng.integers(0, 2 * count)),
                abort_after=int(rng.integers(1, 20)) if rng.random() < 0.15 else None,
                logprobs=bool(rng.random() < 0.3),
            )
        )
    return arrivals


def check(
    traffic: Traffic, judge: Judge, arrivals: list[Arrival], settings: ServingSettings
) -> Counter[str]:
    """Every finished answer is the reference's; returns how many there were of each kind."""
    counts: Counter[str] = Counter()
    for arrival in arrivals:
        answer = traffic.answers.get(arrival.name)
        if answer is None or answer.finish_reason == "abort":
            assert arrival.abort_after is not None, arrival.name
            counts["aborted"] += 1
            continue
        assert len(answer.tokens) == arrival.max_tokens
        chat, ratio, _ = arrival.name.split("|")
        keep = judge.keep(chat, float(ratio), PRUNE_LAYER, settings, BLOCK_SIZE)
        assert judge.difference(answer, chat, PRUNE_LAYER, keep) <= TOLERANCE
        counts["exact"] += 1
        videos = judge.prompts[chat].videos
        past_a_video = bool(videos) and (answer.num_cached_tokens or 0) > videos[0].start
        counts["from cache, past a video"] += past_a_video and float(ratio) < 1
    return counts


@pytest.mark.parametrize("runner", ["v1", "v2", CUDA])
def test_starved_engine_stays_exact(
    runner: str, judge: Judge, tiny_checkpoint: Path, pytestconfig: pytest.Config
) -> None:
    count = int(SHARE[runner] * pytestconfig.getoption("stress_requests"))
    for name, messages in MORE_CHATS.items():
        judge.add(name, messages)
    entry = ServingSettings(**DPP).entry_config
    for chat in (*CHATS, *MORE_CHATS):
        judge.enter(named(chat, ENTERING), chat, ENTERING, entry)
    total: Counter[str] = Counter()
    with engine_host(runner) as host:
        for seed, (more, asynchronous) in enumerate(RUNS[runner]):
            dpp = DPP | more
            host.load(tiny_checkpoint, dpp, async_scheduling=asynchronous, **STARVED)
            arrivals = random_traffic(judge, seed, count)
            traffic = host.run(arrivals)
            assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
            total += check(traffic, judge, arrivals, ServingSettings(**dpp))
            total["preempted"] += traffic.preemptions
    num_requests = count * len(RUNS[runner])
    assert total["exact"] + total["aborted"] == num_requests
    assert total["exact"] >= 0.8 * num_requests, total
    assert total["preempted"] > 0 and total["aborted"] > 0, total
    assert total["from cache, past a video"] > 0, total
