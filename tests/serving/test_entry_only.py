"""Where tokens are left out before the decoder alone, the rest of the engine is vLLM's own.

Full-vocabulary log-probabilities in float32 against a transformers model to which the other tokens
were never shown.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.drafts import make_drafter
from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.serving.test_entry import know
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.spec import TINY

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
SETTINGS = {"entry_only": True, "entry_ratio": 0.4, "slices_per_segment": 2}
OTHERS_OWN = {
    "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
    "disable_hybrid_kv_cache_manager": True,
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
}
"""What is refused where tokens are left out at layer K."""


def check(host: EngineHost, judge: Judge) -> dict[str, int]:
    """All chats at once, and again.

    Returns:
        How many tokens of each were cached at first.
    """
    settings = ServingSettings(**SETTINGS)
    names = know(judge, settings.entry_ratio, settings)
    cached = {}
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
            cached.setdefault(chat, answer.num_cached_tokens)
            assert judge.difference(answer, name, 1, keep) <= TOLERANCE, chat
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
    return cached


@pytest.mark.parametrize(
    "engine",
    [
        {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "async_scheduling": True},
        OTHERS_OWN,
    ],
    ids=["caching-chunked-async", "of-others"],
)
def test_the_engine_is_stock(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, engine: dict[str, Any]
) -> None:
    if engine is OTHERS_OWN and host.runner != "v1":
        pytest.skip("what schedules does not ask which runner")
    host.load(tiny_checkpoint, SETTINGS, **engine)
    check(host, judge)


def test_kv_of_another_engine(judge: Judge, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Through a connector, which addresses KV by tokens and videos."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with engine_host("v1") as host:
        for _ in ("writes", "reads"):
            host.load(tiny_checkpoint, SETTINGS, kv_transfer_config=connector)
            cached = check(host, judge)
    assert cached["movie"] >= BLOCK_SIZE


def test_drafts_change_no_answer(judge: Judge, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of a drafter that reads the layers' outputs; most of its drafts are not taken."""
    drafter = make_drafter(tmp_path / "drafter", TINY, len(judge.reference.processor.tokenizer))
    drafts = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": 2}
    with engine_host("v1") as host:
        host.load(
            tiny_checkpoint,
            SETTINGS,
            speculative_config=drafts,
            enable_prefix_caching=True,
            max_num_batched_tokens=160,
        )
        check(host, judge)
