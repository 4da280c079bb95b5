"""What enters the decoder is selected before it, and everything after is as exact as without.

Full-vocabulary log-probabilities in float32 against a transformers model to which the other tokens
were never shown, on both model runners.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS
from tests.reference.prompt import MediaItem
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
RATIOS = (1.0, 0.5)


def name_of(chat: str, ratio: float) -> str:
    return f"{chat} {ratio}".replace(" ", "-").replace(".", "_")


def know(judge: Judge, ratio: float, settings: ServingSettings) -> dict[str, str]:
    """Make the judge know all chats with this fraction of their videos; their names by chat."""
    names = {chat: f"{chat} of which {ratio} enters" for chat in CHATS}
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
    for again in ("", " again"):  # from the cache, if there is one
        arrivals = [
            Arrival(
                name_of(chat + again, ratio),
                judge.engine_prompts[chat],
                extra_args={"dpp_retention_ratio": ratio, "dpp_record": 1},
            )
            for chat in CHATS
            for ratio in RATIOS
        ]
        traffic = host.run(arrivals)
        for chat, name in names.items():
            for ratio in RATIOS:
                keep = judge.keep(name, ratio, settings.split_layer, settings, block_size)
                request = name_of(chat + again, ratio)
                answer = traffic.answers[request]
                found = judge.difference(answer, name, settings.split_layer, keep)
                assert found <= TOLERANCE, (chat, ratio)
                if list(tmp_path.glob(f"{request}-*.kept.json")):
                    recorded = host.call("record", str(tmp_path), request)
                    check_record(recorded, judge.prompts[name].videos, keep)
                else:  # all of its videos came from the cache
                    assert block_size or not judge.prompts[name].videos
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)


def check_record(
    recorded: list[dict[str, Any]], videos: Sequence[MediaItem], keep: Sequence[list[int]]
) -> None:
    """What the record says of each video, as far as it was computed for this request."""
    by_start = {video.start: (video, kept) for video, kept in zip(videos, keep, strict=True)}
    for entry in recorded:
        video, kept = by_start[entry["start"]]
        assert prod(entry["grid"]) == prod(video.grid_thw) // 4
        if "entered" in entry:
            assert entry["num_entered"] == video.length
            assert set(entry["entered"]) <= set(video.entered or ())
            whole = len(entry["entered"]) == video.length
            assert not whole or tuple(entry["entered"]) == video.entered
        if "keep" in entry:
            assert entry["keep"] == kept
