"""Steps that replay piecewise CUDA graphs answer as those that do not.

Without a GPU the graphs are played: a stack reads its inputs where they lay the first time.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS
from vllm_dpp.serving.settings import ServingSettings

from .conftest import CUDA

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

RATIOS = (1.0, 0.25)
LAYER = 3


@pytest.fixture(scope="module", params=["v2", CUDA])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    with engine_host(request.param) as started:
        yield started


def test_replayed_steps_are_exact(host: EngineHost, judge: Judge, tiny_checkpoint: Path) -> None:
    """Texts, prefills that prune and ones that do not, decode steps beside them, twice."""
    played = host.runner == "v2"
    settings = ServingSettings(prune_layer=LAYER)
    host.load(tiny_checkpoint, {"prune_layer": LAYER}, enforce_eager=played)
    if played:
        host.call("play_graphs")
    for name in ("first", "again"):
        arrivals = [
            Arrival(
                f"{name} {chat} {ratio}",
                judge.engine_prompts[chat],
                extra_args={"dpp_retention_ratio": ratio},
                step=2 * number,
            )
            for number, (chat, ratio) in enumerate((c, r) for c in CHATS for r in RATIOS)
        ]
        traffic = host.run(arrivals)
        for chat in CHATS:
            for ratio in RATIOS:
                keep = judge.keep(chat, ratio, LAYER, settings)
                answer = traffic.answers[f"{name} {chat} {ratio}"]
                assert judge.difference(answer, chat, LAYER, keep) <= TOLERANCE, (chat, ratio)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
    if played:
        assert min(host.call("replays")) > 0
