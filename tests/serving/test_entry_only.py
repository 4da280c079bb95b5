"""Where tokens are left out before the decoder alone, the rest of the engine is vLLM's own.

Full-vocabulary log-probabilities in float32 against a transformers model to which the other tokens
were never shown.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.serving.test_entry import know
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = {"entry_only": True, "entry_ratio": 0.4, "slices_per_segment": 2}


def check(host: EngineHost, judge: Judge) -> None:
    """All chats at once, and again."""
    settings = ServingSettings(**SETTINGS)
    names = know(judge, settings.entry_ratio, settings)
    for again in ("", " again"):
        traffic = host.run(
            [
                Arrival(chat + again, judge.engine_prompts[chat], step=i)
                for i, chat in enumerate(names)
            ]
        )
        for chat, name in names.items():
            keep = judge.keep(name, 1.0, 1, settings)
            answer = traffic.answers[chat + again]
            assert judge.difference(answer, name, 1, keep) <= TOLERANCE, chat
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)


@pytest.mark.parametrize(
    "engine",
    [{"enable_prefix_caching": True, "max_num_batched_tokens": 64, "async_scheduling": True}, {}],
    ids=["caching-chunked-async", "whole"],
)
def test_the_engine_is_stock(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, engine: dict[str, Any]
) -> None:
    host.load(tiny_checkpoint, SETTINGS, **engine)
    check(host, judge)


def test_two_pipeline_stages(
    judge: Judge, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, and over several steps: where rows stand gets from one stage to the next."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine_host("v1") as host:
        host.load(
            tiny_checkpoint,
            SETTINGS,
            pipeline_parallel_size=2,
            enforce_eager=False,
            max_num_batched_tokens=64,
        )
        check(host, judge)
