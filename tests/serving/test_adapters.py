"""LoRA adapters in one batch: every answer is that of a checkpoint with the adapter merged."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.engines.adapters import RANK, make_adapter
from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import text, user, video
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
DPP = {"prune_layer": 2, "retention_ratio": 0.25}
SETTINGS = ServingSettings(**DPP)
MOVIE = video(5, 32, 112, 112)  # 256 tokens
CHATS = {
    "movie": [user(MOVIE, text("What moves through the picture?"))],
    "two": [user(text("First"), MOVIE, text("then"), video(6, 12, 84, 112), text("Which?"))],
}
SEEDS = (None, 1, 2)


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: Any) -> dict[int | None, str | None]:
    folder = tmp_path_factory.mktemp("adapters")
    return {s: s and str(make_adapter(tiny_checkpoint, folder, s)[0]) for s in SEEDS}


@pytest.fixture(scope="module")
def judges(
    tiny_checkpoint: Path, adapters: dict[int | None, str | None]
) -> dict[int | None, Judge]:
    judges = {}
    for seed, adapter in adapters.items():
        merged = adapter and Path(adapter).parent / f"merged{seed}"
        judges[seed] = Judge(merged or tiny_checkpoint)
        for name, messages in CHATS.items():
            judges[seed].add(name, messages)
    return judges


def test_adapters_in_a_batch(
    host: EngineHost,
    tiny_checkpoint: Path,
    adapters: dict[int | None, str | None],
    judges: dict[int | None, Judge],
) -> None:
    """Read over several steps, and from the prefix cache of the same adapter alone.

    Requests without one come by themselves on a CPU, where stock vLLM 0.32, too, gives their rows
    another's adapter if it has the step of one that has.
    """
    kept = {
        (chat, seed): judge.keep(chat, 0.25, 2, SETTINGS, BLOCK_SIZE)
        for seed, judge in judges.items()
        for chat in CHATS
    }
    assert len({str(kept["movie", seed]) for seed in SEEDS}) == len(SEEDS), (
        "adapters look elsewhere"
    )
    host.load(
        tiny_checkpoint,
        DPP,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=max(8, RANK),
        enable_prefix_caching=True,
        max_num_batched_tokens=160,
    )
    batches = [SEEDS] if host.runner == "cuda" else [SEEDS[1:], SEEDS[:1]]
    for is_warm, seeds in product((False, True), batches):
        arrivals = [
            Arrival(f"{chat} {seed}", judges[seed].engine_prompts[chat], adapter=adapters[seed])
            for seed in seeds
            for chat in CHATS
        ]
        traffic = host.run(arrivals)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
        for seed, chat in product(seeds, CHATS):
            answer = traffic.answers[f"{chat} {seed}"]
            difference = judges[seed].difference(answer, chat, 2, kept[chat, seed])
            assert difference <= TOLERANCE, (chat, seed, is_warm, difference)
            assert ((answer.num_cached_tokens or 0) > 256) == is_warm
