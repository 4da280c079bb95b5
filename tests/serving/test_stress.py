"""Random traffic on a starved engine: exact answers, real preemptions, nothing left behind."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival, Traffic
from tests.reference.chats import CHATS
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=2, segment_by="slices", slices_per_segment=2)
BLOCK_SIZE = 32
STARVED = {
    "enable_prefix_caching": True,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 52,  # about three of the longer chats
    "max_num_batched_tokens": 128,  # every prompt but the shortest is chunked
    "max_num_seqs": 12,
    "max_model_len": 512,
}


def random_traffic(judge: Judge, seed: int, count: int) -> list[Arrival]:
    """Chats at random ratios and lengths, arriving over time; some are aborted in flight."""
    rng = np.random.default_rng(seed)
    arrivals = []
    for i in range(count):
        chat = str(rng.choice(list(CHATS)))
        ratio = float(rng.choice([1.0, 0.5, 0.25]))
        arrivals.append(
            Arrival(
                name=f"{chat}|{ratio}|{i}",
                prompt=judge.engine_prompts[chat],
                max_tokens=int(rng.choice([4, 24, 40])),
                extra_args={"dpp_retention_ratio": ratio},
                step=int(rng.integers(0, 4 * count)),
                abort_after=int(rng.integers(1, 20)) if rng.random() < 0.15 else None,
                logprobs=bool(rng.random() < 0.3),
            )
        )
    return arrivals


def check(traffic: Traffic, judge: Judge, arrivals: list[Arrival]) -> Counter[str]:
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
        keep = judge.keep(chat, float(ratio), SETTINGS.prune_layer, SETTINGS, BLOCK_SIZE)
        assert judge.difference(answer, chat, SETTINGS.prune_layer, keep) <= TOLERANCE
        counts["exact"] += 1
        counts["from cache"] += bool(answer.num_cached_tokens)
    return counts


@pytest.mark.parametrize(
    ("runner", "count", "seeds"), [("v1", 70, (0, 1, 2)), ("v2", 30, (3,))], ids=["v1", "v2"]
)
def test_starved_engine_stays_exact(
    runner: str, count: int, seeds: tuple[int, ...], judge: Judge, tiny_checkpoint: Path
) -> None:
    total: Counter[str] = Counter()
    with engine_host(runner) as host:
        for seed in seeds:
            load(host, tiny_checkpoint, asynchronous=seed % 2 == 1)
            arrivals = random_traffic(judge, seed, count)
            traffic = host.run(arrivals)
            assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
            total += check(traffic, judge, arrivals)
            total["preempted"] += traffic.preemptions
    assert total["exact"] + total["aborted"] == count * len(seeds)
    assert total["preempted"] > 0 and total["aborted"] > 0 and total["from cache"] > 0, total
    assert total["exact"] >= 0.8 * count * len(seeds), total


def load(host: EngineHost, checkpoint: Path, asynchronous: bool) -> None:
    settings = {"prune_layer": 2, "segment_by": "slices", "slices_per_segment": 2}
    host.load(checkpoint, settings, async_scheduling=asynchronous, **STARVED)
