"""Pruned serving equals a transformers model that drops the same tokens.

Full-vocabulary log-probabilities in float32, for every prune layer, several ratios in one batch,
every kind of segment, with and without prefix caching, synchronous and asynchronous scheduling, on
both model runners.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.exactness import check_chats, name_of
from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS, image, text, user, video
from vllm_dpp.pruning.rules import RULES
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
MOVIE, CLIP = video(5, 32, 112, 112), video(6, 12, 84, 112)  # 256 and 72 tokens
MANY_IMAGES = [image(seed, 224, 280 - 56 * (seed % 3)) for seed in range(4)]  # 48 to 80 tokens
CACHING = {"enable_prefix_caching": True, "async_scheduling": True}
RATIOS = (1.0, 0.5, 0.25, 0.1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "K0-one-segment": ({"prune_layer": 0, "segment_by": "one"}, {}),
    "K1-two-segments-no-relevance-gains-async": (
        {
            "prune_layer": 1,
            "segment_by": "count",
            "num_segments": 2,
            "relevance": "none",
            "budget": "gains",
        },
        {"async_scheduling": True},
    ),
    "K2-segment-per-slice-caching": (
        {"prune_layer": 2, "segment_by": "slices", "slices_per_segment": 1},
        {"enable_prefix_caching": True},
    ),
    "K3-three-segments-cdpruner-relevance-caching-async": (
        {
            "prune_layer": 3,
            "segment_by": "count",
            "num_segments": 3,
            "relevance_sign": "negative",
            "relevance_floor": 0.0,
        },
        {"enable_prefix_caching": True, "async_scheduling": True},
    ),
    "K4-four-scenes-budget-by-relevance-hidden-states": (
        {
            "prune_layer": 4,
            "segment_by": "scene",
            "num_segments": 4,
            "budget": "relevance",
            "similarity": "hidden_states",
        },
        {},
    ),
    "K5-parts-of-slices-async": (
        {"prune_layer": 5, "segment_by": "slices", "max_segment_tokens": 10},
        {"async_scheduling": True},
    ),
}


def ask(judge: Judge, chat: str, ratio: float, **more: Any) -> Arrival:
    return Arrival(
        name_of(chat, ratio),
        judge.engine_prompts[chat],
        extra_args={"dpp_retention_ratio": ratio, "dpp_record": 1},
        **more,
    )


def kept_by_engine(host: EngineHost, folder: Path, chat: str, ratio: float, judge: Judge):
    """Kept indices of each video; a video without a record kept everything."""
    files = list(folder.glob(f"{name_of(chat, ratio)}-*.kept.json"))
    kept = host.call("kept", str(folder), name_of(chat, ratio)) if files else {}
    videos = judge.prompts[chat].videos
    return [kept.get(v.start, list(range(v.length))) for v in videos]


@pytest.mark.parametrize("case", CASES)
def test_every_answer_equals_the_reference(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path, case: str
) -> None:
    dpp, engine = CASES[case]
    together, alone = tmp_path / "together", tmp_path / "alone"
    host.load(tiny_checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    settings = ServingSettings(**dpp)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None

    batch = host.run([ask(judge, chat, ratio) for chat in CHATS for ratio in RATIOS])
    move_records(tmp_path, together)
    assert batch.peak_running == len(CHATS) * len(RATIOS)
    worst = 0.0
    for chat in CHATS:
        for ratio in RATIOS:
            keep = judge.keep(chat, ratio, settings.prune_layer, settings, block_size)
            kept = kept_by_engine(host, together, chat, ratio, judge)
            assert agree(kept, keep, may_be_cached=block_size is not None), (chat, ratio)
            answer = batch.answers[name_of(chat, ratio)]
            worst = max(worst, judge.difference(answer, chat, settings.prune_layer, keep))
    assert worst <= TOLERANCE

    for chat in CHATS:
        single = host.run([ask(judge, chat, 0.25)])
        keep = judge.keep(chat, 0.25, settings.prune_layer, settings, block_size)
        difference = judge.difference(
            single.answers[name_of(chat, 0.25)], chat, settings.prune_layer, keep
        )
        assert difference <= TOLERANCE
        move_records(tmp_path, alone)
        kept = kept_by_engine(host, alone, chat, 0.25, judge)
        assert agree(kept, keep, may_be_cached=block_size is not None), chat
        assert (single.blocks_held, single.plans_left) == (0, 0)


def test_images_may_be_segments(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    dpp = {"prune_layer": 3, "prune_images": True}
    host.load(
        tiny_checkpoint, dpp | {"record_dir": str(tmp_path)}, **CACHING, max_num_batched_tokens=64
    )
    judge.add("many images", [user(*MANY_IMAGES, text("Which one is it?"))])
    chats = {chat: f"{chat}, pruned" for chat in ("many images", "image and video", "two turns")}
    for chat, name in chats.items():
        judge.prune_images(name, chat)
    ratios = (1.0, 0.5, 0.1)
    assert (
        check_chats(host, judge, chats, ratios, ServingSettings(**dpp), BLOCK_SIZE, tmp_path) > 12
    )


@pytest.mark.parametrize("chunked", [{}, {"max_num_batched_tokens": 64}], ids=["", "chunked"])
def test_rules_in_one_batch(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path, chunked: dict[str, Any]
) -> None:
    """Every request has its own rule; with prefix caching, none finds another's."""
    host.load(
        tiny_checkpoint,
        {"prune_layer": 2, "record_dir": str(tmp_path)},
        enable_prefix_caching=True,
        **chunked,
    )
    judge.add("movie and clip", [user(MOVIE, CLIP, text("Which?"))])
    settings = {
        f"{rule}-{round(10 * floor)}": ServingSettings(rule=rule, relevance_floor=floor)
        for rule, floor in (*((rule, 0.1) for rule in RULES), ("dpp", 0.9))
    } | {"unasked": ServingSettings(relevance="none")}
    for name in ("together", "again"):
        arrivals = [
            Arrival(
                f"{name}-{key}",
                judge.engine_prompts["movie and clip"],
                extra_args={
                    "dpp_retention_ratio": 0.5,
                    "dpp_record": 1,
                    "dpp_rule": one.rule,
                    "dpp_relevance": one.relevance,
                    "dpp_relevance_floor": one.relevance_floor,
                },
            )
            for key, one in settings.items()
        ]
        traffic = host.run(arrivals)
        for key, one in settings.items():
            keep = judge.keep("movie and clip", 0.5, 2, one, BLOCK_SIZE)
            answer = traffic.answers[f"{name}-{key}"]
            assert judge.difference(answer, "movie and clip", 2, keep) <= TOLERANCE, key
            kept = host.call("kept", str(tmp_path), f"{name}-{key}")
            movie = judge.prompts["movie and clip"].videos[0]
            found = kept[movie.start]  # the clip is too short to lose a block
            assert found == (None if name == "again" else keep[0]), key
    different = {
        str(judge.keep("movie and clip", 0.5, 2, one, BLOCK_SIZE)) for one in settings.values()
    }
    assert len(different) == len(settings), "no two chose alike"


def agree(kept: list[list[int] | None], keep: list[list[int]], *, may_be_cached: bool) -> bool:
    """Whether the engine kept what the reference keeps, where it had to select."""
    return all(
        one == other or (one is None and may_be_cached)
        for one, other in zip(kept, keep, strict=True)
    )


def move_records(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.glob("*.json"):
        path.replace(target / path.name)


def test_ratio_one_is_the_stock_model(
    host: EngineHost, judge: Judge, tiny_checkpoint: Path
) -> None:
    """Bit for bit: the same kernels see the same numbers."""

    def answers(ratio: float | None):
        args = None if ratio is None else {"dpp_retention_ratio": ratio}
        runs = {
            chat: host.run([Arrival("a", judge.engine_prompts[chat], extra_args=args)])
            for chat in CHATS
        }
        return {chat: run.answers["a"] for chat, run in runs.items()}

    host.load(tiny_checkpoint, None)
    stock = answers(None)
    host.load(tiny_checkpoint, {"retention_ratio": 0.25})
    plugin = answers(1.0)
    for chat in CHATS:
        assert plugin[chat].tokens == stock[chat].tokens
        assert (plugin[chat].logprobs == stock[chat].logprobs).all()
