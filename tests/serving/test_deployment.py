"""Ways to run the engine: compiled, on two ranks, and with the front end's check bypassed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.host import engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=2, slices_per_segment=2)
RATIO = 0.25
TENSOR_PARALLEL = {"tensor_parallel_size": 2, "async_scheduling": True}
STEP = {"max_num_batched_tokens": 64}  # videos are read over several steps


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ({"enforce_eager": False}, replace(SETTINGS, entry_ratio=0.5)),
        (TENSOR_PARALLEL, SETTINGS),
    ],
    ids=["compiled", "tensor parallel"],
)
def test_answers_stay_exact(
    engine: dict[str, Any],
    settings: ServingSettings,
    judge: Judge,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tensor_parallel_size" in engine:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine_host("v1") as host:
        host.load(tiny_checkpoint, settings.as_additional_config()["dpp"], **engine, **STEP)
        args = {"dpp_retention_ratio": RATIO}
        traffic = host.run(
            [Arrival(chat, judge.engine_prompts[chat], extra_args=args) for chat in CHATS]
        )
    for chat in CHATS:
        name = f"{chat} of which {settings.entry_ratio} enters"
        judge.enter(name, chat, settings.entry_ratio, settings.entry_config)
        keep = judge.keep(name, RATIO, settings.split_layer, settings)
        difference = judge.difference(traffic.answers[chat], name, SETTINGS.split_layer, keep)
        assert difference <= TOLERANCE
    assert traffic.blocks_held == 0


def test_the_scheduler_never_gets_stuck(judge: Judge, tiny_checkpoint: Path) -> None:
    """What the front end should have refused is finished with an error; others go on."""
    limits = STEP | {"max_num_seqs": 8}
    with engine_host("v1") as host:
        dpp = {"prune_layer": SETTINGS.prune_layer, "max_deferred_tokens": 64}
        host.load(tiny_checkpoint, dpp, **limits)
        too_long = Arrival("too long", judge.engine_prompts["video"])
        text = Arrival("text", judge.engine_prompts["text"])
        assert "--max-deferred-tokens" in host.run([too_long]).answers["too long"].error
        host.call("skip_admission")
        traffic = host.run([too_long, text])
        assert traffic.answers["too long"].finish_reason == "error"
        assert judge.difference(traffic.answers["text"], "text", SETTINGS.split_layer, []) < 1e-4
        assert traffic.steps < 50
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
