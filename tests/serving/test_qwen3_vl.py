"""Qwen3-VL: text between the slices, DeepStack, norms of queries and keys; pruned in the middle.

Full-vocabulary log-probabilities in float32 against a transformers model that drops the same
tokens, on both model runners.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3", TINY_QWEN3)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Iterator[Judge]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    judge = Judge(checkpoint)
    for name, messages in MORE.items():
        judge.add(name, messages)
    yield judge
    torch.set_num_threads(threads)


def name_of(chat: str, ratio: float) -> str:
    return f"{chat} {ratio}".replace(" ", "-").replace(".", "_")


@pytest.mark.parametrize("case", CASES)
def test_every_answer_equals_the_reference(
    host: EngineHost, judge: Judge, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    dpp, engine = CASES[case]
    settings = ServingSettings(**dpp)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    chats, pruned = [*CHATS, *MORE], 0
    for again in ("", " again"):  # from the cache, if there is one
        arrivals = [
            Arrival(
                name_of(chat + again, ratio),
                judge.engine_prompts[chat],
                extra_args={"dpp_retention_ratio": ratio, "dpp_record": 1},
            )
            for chat in chats
            for ratio in RATIOS
        ]
        traffic = host.run(arrivals)
        for chat in chats:
            for ratio in RATIOS:
                keep = judge.keep(chat, ratio, settings.split_layer, settings, block_size)
                request = name_of(chat + again, ratio)
                answer = traffic.answers[request]
                found = judge.difference(answer, chat, settings.split_layer, keep)
                assert found <= TOLERANCE, (chat, ratio)
                kept: dict[int, list[int] | None] = {}
                if list(tmp_path.glob(f"{request}-*.kept.json")):
                    kept = host.call("kept", str(tmp_path), request)
                for item, expected in zip(judge.prompts[chat].videos, keep, strict=True):
                    recorded = kept.get(item.start, expected)
                    assert recorded == expected or (recorded is None and block_size), chat
                    pruned += len(expected) < item.length
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
    assert pruned > 10


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
        ({"entry_ratio": 0.5}, "entry_ratio 0.5: videos of Qwen3VL"),
        ({"video_share": 0.4}, "retention_ratio instead of a video_share"),
        ({"decide_every": 64, "relevance": "none"}, "decide_every 64: videos of Qwen3VL"),
    ],
    ids=["below DeepStack", "entry", "share", "pieces"],
)
def test_what_it_cannot_do_is_refused_at_start(
    host: EngineHost, checkpoint: Path, dpp: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        host.load(checkpoint, dpp)
