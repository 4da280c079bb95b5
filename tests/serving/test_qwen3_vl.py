"""Qwen3-VL: text between the slices, DeepStack, norms of queries and keys; both stages.

Full-vocabulary log-probabilities in float32 against a transformers model that drops the same
tokens, on both model runners.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.exactness import check_chats
from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS, assistant, text, user, video
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import TINY_QWEN3, make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
RATIOS = (1.0, 0.5, 0.1)
MOVIE, CLIP = video(5, 24, 128, 128), video(6, 12, 96, 128)  # 192 and 72 tokens
MORE = {
    "movie": [user(MOVIE, text("What moves?"))],
    "movie and clip": [user(MOVIE, CLIP, text("Which?"))],
    "later": [user(MOVIE, text("What moves?")), assistant("A disc."), user(text("And then?"))],
}
FILM, SHOT = video(7, 12, 224, 224), video(8, 6, 192, 256)  # 294 and 144 tokens
LARGE = {
    "film": [user(FILM, text("What moves?"))],
    "clip and shot and film": [user(CLIP, text("See,"), SHOT, FILM, text("which?"))],
    "film later": [
        user(FILM, text("What moves?")),
        assistant("A disc."),
        user(SHOT, text("Now?")),
    ],
}
"""Of the film and the shot less may enter; of the clip there is too little beside its text."""
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "K3": ({"prune_layer": 3, "slices_per_segment": 2}, {}),
    "K4-caching-async": (
        {"prune_layer": 4, "segment_by": "scene", "num_segments": 2},
        {"enable_prefix_caching": True, "async_scheduling": True},
    ),
    "K5-question-free-caching-chunked": (
        {"prune_layer": 5, "relevance": "none"},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
    ),
}


ENTRY_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "K3-no-media-cache": (
        {"prune_layer": 3, "entry_ratio": 0.5, "slices_per_segment": 2},
        {"mm_processor_cache_gb": 0},
    ),
    "K4-question-free-caching-async": (
        {"prune_layer": 4, "entry_ratio": 0.3, "relevance": "none", "entry_rule": "dpp"},
        {"enable_prefix_caching": True, "async_scheduling": True},
    ),
    "K3-scenes-caching-chunked": (
        {"prune_layer": 3, "entry_ratio": 0.6, "segment_by": "scene", "num_segments": 2},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3", TINY_QWEN3)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Iterator[Judge]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    judge = Judge(checkpoint)
    for name, messages in (MORE | LARGE).items():
        judge.add(name, messages)
    yield judge
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_every_answer_equals_the_reference(
    host: EngineHost, judge: Judge, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    dpp, engine = CASES[case]
    settings = ServingSettings(**dpp)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    chats = {chat: chat for chat in (*CHATS, *MORE)}
    assert check_chats(host, judge, chats, RATIOS, settings, block_size, tmp_path) > 10


@pytest.mark.parametrize("case", ENTRY_CASES)
def test_every_answer_equals_the_reference_where_videos_enter_in_part(
    host: EngineHost, judge: Judge, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    dpp, engine = ENTRY_CASES[case]
    settings = ServingSettings(**dpp)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    chats = {chat: f"{chat} at {settings.entry_ratio}" for chat in LARGE}
    for chat, name in chats.items():
        judge.enter(name, chat, settings.entry_ratio, settings.entry_config)
    kinds = [
        video.entered is None for name in chats.values() for video in judge.prompts[name].videos
    ]
    assert set(kinds) == {True, False}, "some videos enter whole"
    assert check_chats(host, judge, chats, RATIOS, settings, block_size, tmp_path) > 5


def test_ratio_one_is_the_stock_model(host: EngineHost, judge: Judge, checkpoint: Path) -> None:
    """Bit for bit: the same kernels see the same numbers."""

    def answers(args: dict[str, Any] | None) -> dict[str, Any]:
        return {
            chat: host.run([Arrival("a", judge.engine_prompts[chat], extra_args=args)]).answers["a"]
            for chat in CHATS
        }

    host.load(checkpoint, None)
    stock = answers(None)
    host.load(checkpoint, {"retention_ratio": 0.25})
    plugin = answers({"dpp_retention_ratio": 1.0})
    for chat in CHATS:
        assert plugin[chat].tokens == stock[chat].tokens
        assert (plugin[chat].logprobs == stock[chat].logprobs).all()


def test_compiled_and_on_two_ranks(
    judge: Judge, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = ServingSettings(prune_layer=3, shard_selection=True)
    with engine_host("v1") as host:
        host.load(
            checkpoint,
            {"prune_layer": 3, "shard_selection": True},
            enforce_eager=False,
            tensor_parallel_size=2,
            max_num_batched_tokens=64,  # videos are read over several steps
        )
        args = {"dpp_retention_ratio": 0.25}
        traffic = host.run(
            [Arrival(chat, judge.engine_prompts[chat], extra_args=args) for chat in CHATS]
        )
    for chat in CHATS:
        keep = judge.keep(chat, 0.25, 3, settings)
        assert judge.difference(traffic.answers[chat], chat, 3, keep) <= TOLERANCE
    assert traffic.blocks_held == 0


@pytest.mark.parametrize(
    ("dpp", "message"),
    [
        ({"prune_layer": 2}, "prune_layer must be at least 3, got 2: DeepStack"),
        ({"decide_every": 64, "relevance": "none"}, "decide_every 64: videos of Qwen3VL"),
    ],
    ids=["below DeepStack", "pieces"],
)
def test_what_it_cannot_do_is_refused_at_start(
    host: EngineHost, checkpoint: Path, dpp: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        host.load(checkpoint, dpp)
