"""Steps that only a rare meeting of chunks, media and caches makes; random schedules found them."""

import pytest
from vllm.config import VllmConfig

from tests.serving.scheduling.play import play
from tests.serving.scheduling.scenario import Ask, Media, Scenario, Shape, Text, TurnEnd

QUESTION = (Text(1, 10), TurnEnd())


def test_a_hit_on_what_this_very_step_decides(base: VllmConfig) -> None:
    """Two passes of the upper layers: the one that fills the blocks must run before who reads them.

    The first request has read its video and 4 tokens of the question when the second one finds the
    blocks up to the end of the video, which the first one is about to decide. So the second one has
    fewer tokens computed (128) than the first (132), although it reads what the first one writes.
    """
    shape = Shape(budget=33, block_size=16, retention_ratio=0.5)
    prompt = (Media("video", 128), *QUESTION)
    asks = (Ask("fills", prompt, max_tokens=2), Ask("reads", prompt, step=4))
    assert play(base, Scenario(shape, asks)).hit_tokens == 128


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("budget", [39, 40, 41, 42, 43])
def test_no_row_of_a_range_is_left_for_a_decode_step(
    base: VllmConfig, budget: int, gap: int
) -> None:
    """The second video has no room in the encoder cache until the first one has been read.

    So chunks end before it, and wherever the chunk before that one ended, this one must not be a
    single row: it would replay a CUDA graph for decoding, in which nothing can be deferred.
    """
    shape = Shape(budget=budget, encoder_cache=1, encoder_budget=1, asynchronous=True, graphs=True)
    parts = (Media("one", 40), Text(2, gap), Media("two", 43), *QUESTION)
    play(base, Scenario(shape, (Ask("videos", parts),)))


@pytest.mark.parametrize("budget", [30, 31, 32, 33])
def test_no_row_of_a_piece_waits_for_the_next_piece(base: VllmConfig, budget: int) -> None:
    """The buffer holds one piece of a video, and a piece begins where the one before it ends."""
    shape = Shape(budget=budget, relevance="none", piece=32, deferred=40, graphs=True)
    play(base, Scenario(shape, (Ask("pieces", (Media("video", 200), *QUESTION)),)))
