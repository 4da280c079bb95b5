"""What enters the decoder is selected before it, and everything after is as exact as without.

Full-vocabulary log-probabilities in float32 against a transformers model to which the other tokens
were never shown, on both model runners.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.exactness import check_chats
from tests.engines.host import EngineHost
from tests.engines.judge import Judge
from tests.reference.chats import CHATS, assistant, text, user, video
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
RATIOS = (1.0, 0.5)
MOVIE = video(5, 48, 112, 112)  # 384 tokens, of which blocks are lost wherever some enter
MORE = {
    "movie": [user(MOVIE, text("What moves?"))],
    "movie and clip": [user(MOVIE, video(6, 12, 84, 112), text("Which?"))],
    "later": [user(MOVIE, text("What moves?")), assistant("A disc."), user(text("And then?"))],
}


def know(judge: Judge, ratio: float, settings: ServingSettings) -> dict[str, str]:
    """Make the judge know all chats with this fraction of their videos; their names by chat."""
    for chat, messages in MORE.items():
        judge.add(chat, messages)
    names = {chat: f"{chat} of which {ratio} enters" for chat in (*CHATS, *MORE)}
    for chat, name in names.items():
        judge.enter(name, chat, ratio, settings.entry_config)
    return names


@pytest.mark.parametrize(
    ("dpp", "engine"),
    [
        (
            {"prune_layer": 2, "entry_ratio": 0.5, "slices_per_segment": 2},
            {"mm_processor_cache_gb": 0},
        ),
        (
            {"prune_layer": 3, "entry_ratio": 0.3, "relevance": "none", "entry_rule": "dpp"},
            {"enable_prefix_caching": True, "async_scheduling": True},
        ),
        (
            {"prune_layer": 1, "entry_ratio": 0.6, "segment_by": "scene", "num_segments": 2},
            {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
        ),
    ],
    ids=["K2-no-media-cache", "K3-question-free-caching-async", "K1-scenes-caching-chunked"],
)
def test_every_answer_equals_the_reference(
    host: EngineHost,
    judge: Judge,
    tiny_checkpoint: Path,
    tmp_path: Path,
    dpp: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    settings = ServingSettings(**dpp)
    names = know(judge, settings.entry_ratio, settings)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(tiny_checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    assert check_chats(host, judge, names, RATIOS, settings, block_size, tmp_path) > 5
