"""Prefix caching through pruned videos: nothing is computed twice, and nothing wrong is found.

Every answer is the reference's, wherever it came from; stock vLLM with the same flags says how many
tokens a turn has to compute.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Answer, Arrival
from tests.reference.chats import assistant, image, text, user, video
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE, PRUNE_LAYER = 32, 2
ENGINE = {"enable_prefix_caching": True, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 160}
DPP = {"prune_layer": PRUNE_LAYER, "slices_per_segment": 8, "retention_ratio": 0.25}
MOVIE, CLIP = video(5, 32, 112, 112), video(6, 12, 84, 112)  # 256 and 72 tokens
WHAT = "What moves through the picture, and where does it go?"
TURN_1 = [user(MOVIE, text(WHAT))]
TURN_2 = [*TURN_1, assistant("A disc, to the left."), user(text("And what comes after it?"))]
TURN_3 = [*TURN_2, assistant("Nothing."), user(CLIP, image(3, 56, 84), text("And here?"))]
TURN_4 = [*TURN_3, assistant("A square."), user(text("Are you sure of that?"))]
TURNS = {"turn 1": TURN_1, "turn 2": TURN_2, "turn 3": TURN_3, "turn 4": TURN_4}
OTHERS = {
    "short question": [user(MOVIE, text("?"))],
    "other question": [user(MOVIE, text("How many discs are there?"))],
    "video last": [user(text("What moves?"), MOVIE)],
}


@pytest.fixture(scope="module", autouse=True)
def chats(judge: Judge) -> None:
    for name, messages in (TURNS | OTHERS).items():
        judge.add(name, messages)


class Asker:
    """Asks one engine and checks every answer.

    Args:
        host: The engine.
        judge: The reference.
        dpp: The engine's settings; ``None`` for stock vLLM, whose answers are not checked.
    """

    def __init__(self, host: EngineHost, judge: Judge, dpp: dict[str, Any] | None) -> None:
        self.host, self.judge = host, judge
        self.settings = None if dpp is None else ServingSettings(**dpp)

    def __call__(self, *chats: str, ratio: float = 0.25, salt: str | None = None) -> list[Answer]:
        """Ask all of them in one step."""
        salted = {} if salt is None else {"cache_salt": salt}
        arrivals = [
            Arrival(
                f"{i}",
                self.judge.engine_prompts[chat] | salted,
                extra_args=None if self.settings is None else {"dpp_retention_ratio": ratio},
            )
            for i, chat in enumerate(chats)
        ]
        traffic = self.host.run(arrivals)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
        answers = [traffic.answers[arrival.name] for arrival in arrivals]
        for chat, answer in zip(chats, answers, strict=True):
            if self.settings is not None:
                keep = self.judge.keep(chat, ratio, PRUNE_LAYER, self.settings, BLOCK_SIZE)
                difference = self.judge.difference(answer, chat, PRUNE_LAYER, keep)
                assert difference <= TOLERANCE, (chat, ratio, difference)
        return answers

    def computed(self, *chats: str, **how: Any) -> list[int]:
        """Prompt tokens that the cache did not supply."""
        answers = self(*chats, **how)
        return [len(a.prompt_token_ids) - (a.num_cached_tokens or 0) for a in answers]


@pytest.fixture(scope="module")
def stock(host: EngineHost, judge: Judge, tiny_checkpoint: Path) -> dict[str, int]:
    """What stock vLLM computes of each turn of a chat, and of each turn sent again."""
    host.load(tiny_checkpoint, None, **ENGINE)
    ask = Asker(host, judge, None)
    first = {turn: ask.computed(turn)[0] for turn in TURNS}
    return first | {f"{turn} again": ask.computed(turn)[0] for turn in TURNS}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_conversation_costs_one_prefill(
    host: EngineHost,
    judge: Judge,
    tiny_checkpoint: Path,
    stock: dict[str, int],
    asynchronous: bool,
) -> None:
    host.load(tiny_checkpoint, DPP, async_scheduling=asynchronous, **ENGINE)
    ask = Asker(host, judge, DPP)
    computed = {turn: ask.computed(turn)[0] for turn in TURNS}
    computed |= {f"{turn} again": ask.computed(turn)[0] for turn in TURNS}
    assert computed["turn 1"] == stock["turn 1"]
    for turn, tokens in computed.items():
        assert tokens <= stock[turn] + 2 * BLOCK_SIZE, (turn, computed, stock)
    assert computed["turn 2"] < 0.5 * computed["turn 1"]

    # In one step: three times the same, a turn behind it, and other ratios beside them.
    again = ask.computed("turn 4", "turn 4", "turn 2", "turn 4")
    assert again[0] == again[1] == again[3] == computed["turn 4 again"]

    # No hit across ratios, in either direction; each has its own.
    before_the_video = ask("turn 1")[0].prompt_token_ids.index(
        ask("turn 1")[0].prompt_token_ids[judge.prompts["turn 1"].videos[0].start]
    )
    for ratio in (0.5, 1.0):
        cached = [answer.num_cached_tokens for answer in ask("turn 2", ratio=ratio)]
        assert cached[0] <= before_the_video, (ratio, cached)
        assert ask.computed("turn 2", ratio=ratio)[0] <= stock["turn 2 again"] + 2 * BLOCK_SIZE
    assert ask.computed("turn 2")[0] <= stock["turn 2 again"] + 2 * BLOCK_SIZE

    # Nor across salts.
    assert ask("turn 2", salt="a")[0].num_cached_tokens == 0
    assert ask.computed("turn 2", salt="a")[0] <= stock["turn 2 again"] + 2 * BLOCK_SIZE

    # Short questions, and another question: the video is decided anew, and found again after.
    for chat in OTHERS:
        first, second = ask(chat)[0], ask(chat)[0]
        video = judge.prompts[chat].videos[0]
        assert first.num_cached_tokens <= video.start < second.num_cached_tokens, chat
        assert second.num_cached_tokens >= video.end // BLOCK_SIZE * BLOCK_SIZE


def test_any_question_finds_a_video_that_was_decided_without_one(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    dpp = DPP | {"relevance": "none"}
    host.load(tiny_checkpoint, dpp, **ENGINE)
    ask = Asker(host, judge, dpp)
    video = judge.prompts["turn 1"].videos[0]
    assert ask("turn 1")[0].num_cached_tokens == 0
    for chat in ("short question", "other question", "turn 2", "turn 4", "turn 1"):
        assert ask(chat)[0].num_cached_tokens >= video.end // BLOCK_SIZE * BLOCK_SIZE, chat


@pytest.mark.parametrize("group", ["lower", "upper"])
def test_what_one_group_has_lost_is_computed_again(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, group: str
) -> None:
    """All or nothing inside a turn's pruned videos, whichever block was evicted."""
    host.load(tiny_checkpoint, DPP, **ENGINE)
    ask = Asker(host, judge, DPP)
    video = judge.prompts["turn 1"].videos[0]
    ask("turn 2")
    warm = ask("turn 2")[0]
    assert warm.num_cached_tokens > video.end
    for index in (0, 2, 3):  # of the blocks that are cached
        host.call("evict", group, index)
        cached = ask("turn 2")[0].num_cached_tokens
        assert cached < warm.num_cached_tokens
        assert cached <= video.start or cached >= video.end // BLOCK_SIZE * BLOCK_SIZE
        assert ask("turn 2")[0].num_cached_tokens == warm.num_cached_tokens, "found again"


def test_records_say_what_came_from_the_cache(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    host.load(tiny_checkpoint, DPP | {"record_dir": str(tmp_path)}, **ENGINE)
    for name in ("first", "second"):
        prompt = judge.engine_prompts["turn 2"]
        host.run([Arrival(name, prompt, extra_args={"dpp_record": 1})])
    (entry,) = host.call("record", str(tmp_path), "first")
    keep = judge.keep("turn 2", 0.25, PRUNE_LAYER, ServingSettings(**DPP), BLOCK_SIZE)
    assert entry["keep"] == keep[0]
    (entry,) = host.call("record", str(tmp_path), "second")
    assert entry["from_cache"] and "keep" not in entry


def test_a_video_from_the_cache_can_be_read_after_a_preemption(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    """Blocks and encoding are gone when the request comes back: its pixels must not be."""
    host.load(tiny_checkpoint, DPP, num_gpu_blocks_override=52, max_model_len=512, **ENGINE)
    ask = Asker(host, judge, DPP)
    ask("turn 1")
    host.call("forget_encoder_outputs")
    texts = [
        Arrival(f"text {i}", judge.engine_prompts["text"], max_tokens=130, logprobs=False)
        for i in range(3)
    ]
    again = Arrival(
        "again",
        judge.engine_prompts["turn 1"],
        max_tokens=40,
        extra_args={"dpp_retention_ratio": 0.25},
        step=30,
    )
    traffic = host.run([*texts, again])
    assert traffic.preemptions
    assert traffic.answers["again"].num_cached_tokens > judge.prompts["turn 1"].videos[0].end
    keep = judge.keep("turn 1", 0.25, PRUNE_LAYER, ask.settings, BLOCK_SIZE)
    difference = judge.difference(traffic.answers["again"], "turn 1", PRUNE_LAYER, keep)
    assert difference <= TOLERANCE
    assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
