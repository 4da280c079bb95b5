"""Requests that wait for each other, and requests that wait for ever."""

from dataclasses import replace

import pytest
from vllm.config import VllmConfig

from tests.serving.scheduling.play import Play, play
from tests.serving.scheduling.scenario import Ask, Media, Scenario, Shape, Text, TurnEnd
from vllm_dpp.serving import vllm_versions

A, B, C, D = (Media(name, 576) for name in "ABCD")
QUESTION = (Text(1, 3), TurnEnd())


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return request.param


def both(base: VllmConfig, scenario: Scenario, limit: int = 2000) -> tuple[Play, Play]:
    """Ours, and vLLM's own."""
    return play(base, scenario, limit=limit), play(base, scenario, ours=False)


def test_two_requests_with_half_of_each_others_encoder_space(
    base: VllmConfig, asynchronous: bool
) -> None:
    """Each has one of its videos in the encoder cache and finds no room for the other one.

    The cache holds two videos and a bit. A is in it, and C, which a third request still reads when
    the two come to their videos. If they keep what they have and wait for what they lack, they
    wait for ever.
    """
    shape = Shape(budget=1296, kv_tokens=8192, retention_ratio=0.25, caching=False)
    asks = (
        Ask("A is encoded", (Text(0, 4), A, *QUESTION)),
        Ask("first", (Text(0, 200), A, B, *QUESTION), step=5),
        Ask("second", (Text(0, 200), C, D, *QUESTION), step=5),
        Ask("third", (Text(0, 400), C, *QUESTION), step=5, ratio=1.0),
    )
    ours, stock = both(base, Scenario(replace(shape, asynchronous=asynchronous), asks), limit=60)
    assert ours.steps <= stock.steps + 5


@pytest.mark.parametrize("prefix", [0, 4])
def test_a_video_of_a_whole_step_does_not_wait_for_a_long_answer(
    base: VllmConfig, asynchronous: bool, prefix: int
) -> None:
    """One token of every step goes to a stream of 600, so 288 are never free; 287 will do."""
    shape = Shape(budget=288, kv_tokens=4096, retention_ratio=0.25, asynchronous=asynchronous)
    video = (Text(0, prefix), Media("video", 288 - len(QUESTION) - 2), *QUESTION)
    asks = (
        Ask("stream", (Text(1, 8),), max_tokens=600),
        Ask("video", video, step=5),
        Ask("text", (Text(2, 50),), step=6),
    )
    ours, stock = both(base, Scenario(shape, asks))
    for name in ("video", "text"):
        late = ours.stories[name].finished - stock.stories[name].finished
        assert late <= 3, name


def test_a_video_that_waits_for_rows_stops_nobody_and_has_its_turn(
    base: VllmConfig, asynchronous: bool
) -> None:
    """The buffer holds one of three long videos, or that and the short one, whose turn is later.

    Questions without a video come and go meanwhile.
    """
    video = Media("long", 500)
    shape = Shape(budget=64, kv_tokens=8192, deferred=560, asynchronous=asynchronous)
    videos = tuple(
        Ask(f"video{i}", (Text(10 + i, 5), video, Text(i, 8), TurnEnd()), max_tokens=2, step=i)
        for i in range(3)
    )
    texts = tuple(Ask(f"text{i}", (Text(i, 20),), max_tokens=4, step=5 + 5 * i) for i in range(6))
    short = Ask("short", (Text(9, 3), Media("short", 30), *QUESTION), step=4)
    ours, stock = both(base, Scenario(shape, (*videos, *texts, short)))
    assert ours.steps <= stock.steps + 10
    for text in texts:
        assert ours.stories[text.name].finished <= text.step + 12, text.name
    order = [ours.stories[ask.name].started for ask in (*videos, short)]
    assert order == sorted(order), "nobody with a video overtakes one that waits"


@pytest.mark.parametrize("budget", [16, 64, 300])
def test_a_video_of_the_whole_buffer_runs(base: VllmConfig, budget: int) -> None:
    """And one that needs a row more is refused, while the rest goes on."""
    shape = Shape(budget=budget, kv_tokens=4096, deferred=203)
    asks = tuple(
        Ask(name, (Text(0, 3), Media(name, length), *QUESTION))
        for name, length in (("fits", 199), ("does not", 200), ("fits too", 199))
    )
    stories = play(base, Scenario(shape, asks)).stories
    assert {name: story.reason for name, story in stories.items()} == {
        "fits": "length",
        "does not": "error",
        "fits too": "length",
    }


@pytest.mark.parametrize("graphs", [False, True])
def test_an_item_that_no_chunk_can_hold_is_refused(
    base: VllmConfig, asynchronous: bool, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 would wait for ever for it. What just fits runs, beside a stream."""
    monkeypatch.setattr(vllm_versions, "MAY_SPLIT_MEDIA_AT_THEIR_START", False)
    shape = Shape(
        budget=100, chunk_limit=50, whole_media=True, asynchronous=asynchronous, graphs=graphs
    )
    longest = 50 - graphs
    asks = (
        Ask("stream", (Text(0, 3),), max_tokens=40),
        Ask("too long", (Text(0, 3), Media("long", longest + 1), *QUESTION), step=2),
        Ask("fits", (Text(0, 3), Media("fits", longest), *QUESTION), step=3),
        Ask("image", (Text(0, 3), Media("image", longest + 1, "image"), *QUESTION), step=4),
    )
    stories = play(base, Scenario(shape, asks)).stories
    assert [stories[ask.name].reason for ask in asks] == ["length", "error", "length", "error"]


def test_nobody_overtakes_a_chunk_that_waits_for_a_second_row(
    base: VllmConfig, asynchronous: bool
) -> None:
    """A stream leaves one token of each step; a new text comes in every step and would take it.

    The video cannot, since a step of single rows may replay a graph. vLLM 0.33 goes on to those
    who wait behind a request that gets nothing.
    """
    shape = Shape(budget=8, max_num_seqs=64, kv_tokens=4096, asynchronous=asynchronous, graphs=True)
    streams = tuple(Ask(f"stream{i}", (Text(i, 1),), max_tokens=60) for i in range(7))
    video = Ask("video", (Media("video", 40), *QUESTION), step=10)
    texts = tuple(Ask(f"text{i}", (Text(20 + i, 1),), step=11 + i) for i in range(40))
    ours = play(base, Scenario(shape, (*streams, video, *texts)))
    started = ours.stories["video"].started
    assert all(ours.stories[text.name].started >= started for text in texts)
