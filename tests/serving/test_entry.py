"""What enters the decoder is selected before it, and everything after is as exact as without.

Full-vocabulary log-probabilities in float32 against a transformers model to which the other tokens
were never shown, on both model runners.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
RATIOS = (1.0, 0.5)


def know(judge: Judge, ratio: float, settings: ServingSettings) -> dict[str, str]:
    """Make the judge know all chats with this fraction of their videos; their names by chat."""
    names = {chat: f"{chat} of which {ratio} enters" for chat in CHATS}
    for chat, name in names.items():
        judge.enter(name, chat, ratio, settings.entry_config)
    return names


@pytest.mark.parametrize(
    ("dpp", "engine"),
    [
        ({"prune_layer": 2, "entry_ratio": 0.5, "slices_per_segment": 2}, {}),
        (
            {"prune_layer": 3, "entry_ratio": 0.3, "relevance": "none", "entry_rule": "dpp"},
            {"enable_prefix_caching": True, "async_scheduling": True},
        ),
        (
            {"prune_layer": 1, "entry_ratio": 0.6, "segment_by": "scene", "num_segments": 2},
            {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
        ),
    ],
    ids=["K2", "K3-question-free-caching-async", "K1-scenes-caching-chunked"],
)
def test_every_answer_equals_the_reference(
    host: EngineHost,
    judge: Judge,
    tiny_checkpoint: Path,
    dpp: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    settings = ServingSettings(**dpp)
    names = know(judge, settings.entry_ratio, settings)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(tiny_checkpoint, dpp, **engine)
    for _ in range(2):  # the second time from the cache, if there is one
        arrivals = [
            Arrival(
                f"{chat}-{ratio}",
                judge.engine_prompts[chat],
                extra_args={"dpp_retention_ratio": ratio},
            )
            for chat in CHATS
            for ratio in RATIOS
        ]
        traffic = host.run(arrivals)
        for chat, name in names.items():
            for ratio in RATIOS:
                keep = judge.keep(name, ratio, settings.split_layer, settings, block_size)
                answer = traffic.answers[f"{chat}-{ratio}"]
                found = judge.difference(answer, name, settings.split_layer, keep)
                assert found <= TOLERANCE, (chat, ratio)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
