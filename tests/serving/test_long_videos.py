"""Videos of any length: read over many steps, in passes, in pieces; and nobody waits for ever.

A step of 64 tokens against a video of 256: its rows wait in the buffer, and what it keeps goes up
in several passes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival, Traffic
from tests.reference.chats import CHATS, text, user, video
from tests.reference.plan import plan_videos
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.vllm_versions import MAY_SPLIT_MEDIA_AT_THEIR_START

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PRUNE_LAYER = 2
DPP = {"prune_layer": PRUNE_LAYER, "slices_per_segment": 4, "retention_ratio": 0.5}
MOVIE, CLIP = video(5, 32, 112, 112), video(6, 12, 84, 112)  # 256 and 72 tokens
WHAT = "What moves through the picture, and where does it go? " * 4  # longer than a step
LONG = {
    "long question": [user(MOVIE, text(WHAT))],
    "movie and clip": [user(text("First"), MOVIE, text("then"), CLIP, text("Which?"))],
    "movie": [user(MOVIE, text("?"))],
}


@pytest.fixture(scope="module", autouse=True)
def chats(judge: Judge) -> None:
    for name, messages in LONG.items():
        judge.add(name, messages)


def check(traffic: Traffic, judge: Judge, dpp: dict[str, Any], *chats: str) -> None:
    settings = ServingSettings(**dpp)
    for chat in chats:
        keep = judge.keep(chat, settings.retention_ratio, PRUNE_LAYER, settings)
        assert judge.difference(traffic.answers[chat], chat, PRUNE_LAYER, keep) <= TOLERANCE, chat
    assert (traffic.blocks_held, traffic.plans_left) == (0, 0)


def arrivals(judge: Judge, *chats: str, **how: Any) -> list[Arrival]:
    return [Arrival(chat, judge.engine_prompts[chat], **how) for chat in chats]


def test_a_video_read_in_chunks_is_the_video_read_at_once(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    """Bit for bit where stock vLLM agrees with itself: rounding follows a product's shape.

    On a GPU it agrees with itself nowhere, and the largest difference of any chat is the bound.
    """
    chats = (*LONG, "two turns")

    def ask(dpp: dict[str, Any] | None, budget: int) -> dict[str, Any]:
        host.load(tiny_checkpoint, dpp, max_num_batched_tokens=budget, max_num_seqs=16)
        return {chat: host.run(arrivals(judge, chat)).answers[chat] for chat in chats}

    def differences(chunked: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
        assert all(chunked[chat].tokens == whole[chat].tokens for chat in chats)
        return {c: float(np.abs(chunked[c].logprobs - whole[c].logprobs).max()) for c in chats}

    stock = differences(ask(None, 64), ask(None, 1024))
    pruned = differences(ask(DPP, 64), ask(DPP, 1024))
    if host.runner == "cuda":
        stock = dict.fromkeys(stock, max(stock.values()))
    else:
        assert 0 in stock.values()
    for chat in chats:
        assert pruned[chat] <= 2 * stock[chat], (chat, pruned, stock)


def test_videos_of_any_length_are_exact(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    host.load(tiny_checkpoint, DPP, max_num_batched_tokens=64, max_num_seqs=16)
    for chats in (["long question"], [*LONG, *CHATS]):
        check(host.run(arrivals(judge, *chats)), judge, DPP, *chats)
        assert host.call("rows_taken") == 0, "no row of the buffer is left behind"
    features = 1024 * 256 * 4  # of a video as long as the model's longest prompt
    assert features < host.call("profiled_workspace") < 100 * features


def test_a_video_waits_for_room_without_stopping_anybody(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    """Room for one of two: the second waits for the first, and text goes on meanwhile."""
    room = max(
        plan.decision_point - plan.start for plan in plan_videos(judge.prompts["movie"], 0.5)
    )
    dpp = DPP | {"max_deferred_tokens": room}
    host.load(tiny_checkpoint, dpp, max_num_batched_tokens=64, max_num_seqs=16)
    movies = [Arrival(f"movie {i}", judge.engine_prompts["movie"]) for i in range(2)]
    traffic = host.run([*movies, *arrivals(judge, "text", "video")])
    for movie in movies:
        keep = judge.keep("movie", 0.5, PRUNE_LAYER, ServingSettings(**DPP))
        assert judge.difference(traffic.answers[movie.name], "movie", PRUNE_LAYER, keep) < TOLERANCE
    check(traffic, judge, DPP, "text", "video")
    started = traffic.first_steps
    assert started["text"] < started["movie 1"], "text overtakes a video that waits"
    assert started["movie 1"] <= 8 and traffic.working_steps <= 20, traffic

    # What no buffer can hold is refused, by name; skipped here, the scheduler ends it.
    refused = host.run(arrivals(judge, "long question")).answers["long question"]
    assert "max_deferred_tokens" in refused.error and "dpp_retention_ratio" in refused.error
    host.call("skip_admission")
    traffic = host.run(arrivals(judge, "long question", "text"))
    assert traffic.answers["long question"].finish_reason == "error"
    check(traffic, judge, DPP, "text")


@pytest.mark.parametrize("longest_chunk", [270, 100])
def test_media_that_no_chunk_may_split(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, longest_chunk: int
) -> None:
    """Whole where a chunk holds them; what none can hold vLLM 0.32 splits, and 0.33 cannot."""
    host.load(
        tiny_checkpoint,
        DPP,
        disable_chunked_mm_input=True,
        long_prefill_token_threshold=longest_chunk,
        max_num_batched_tokens=2048,
        max_num_seqs=16,
    )
    traffic = host.run(arrivals(judge, *LONG, "text"))
    if longest_chunk >= 256 or MAY_SPLIT_MEDIA_AT_THEIR_START:
        check(traffic, judge, DPP, *LONG, "text")
    else:
        check(traffic, judge, DPP, "text")
        assert all(traffic.answers[chat].finish_reason == "error" for chat in LONG)


@pytest.mark.parametrize("caching", [False, True], ids=["", "caching"])
def test_a_video_can_be_decided_in_pieces_as_it_is_read(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path, caching: bool
) -> None:
    """Each piece of 96 tokens is a problem of its own; the total is that of the whole video."""
    dpp = DPP | {"relevance": "none", "decide_every": 96, "retention_ratio": 0.25}
    host.load(
        tiny_checkpoint,
        dpp | {"record_dir": str(tmp_path)},
        max_num_batched_tokens=64,
        enable_prefix_caching=caching,
    )
    traffic = host.run(arrivals(judge, "movie", extra_args={"dpp_record": 1}))
    (entry,) = host.call("record", str(tmp_path), "movie")
    (item,) = judge.prompts["movie"].videos
    pieces = judge.pieces("movie", 0.25, PRUNE_LAYER, 96, 32 if caching else None)
    assert entry["keep"] == pieces
    difference = judge.difference(traffic.answers["movie"], "movie", PRUNE_LAYER, [pieces])
    assert difference <= TOLERANCE
    if not caching:
        assert len(pieces) == item.length // 4
    assert host.call("rows_taken") == 0
