"""Every family but the first, which has tests of its own, is exact in both stages.

Full-vocabulary log-probabilities in float32 against a transformers model that drops the same
tokens. ``pytest tests/serving/test_families.py --family NAME`` runs all cases of one family, by its
name in ``vllm_dpp.toy``, on both model runners; without it those that differ most from each other
run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.engines.exactness import check_chats, name_of
from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import CHATS, assistant, image, text, user, video
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import Architecture, CheckpointSpec

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
RATIOS = (1.0, 0.5, 0.1)
MOVIE, CLIP = video(5, 24, 128, 128), video(9, 12, 96, 128)  # 192 and 72 tokens
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
STRIP, SLOW = video(9, 24, 56, 56), video(10, 7, 224, 168, fps=0.5)  # 48 and 192 tokens in GLM
ALONE = {
    "film": LARGE["film"],
    "strip": [user(text("So:"), STRIP, text("what moves?"))],
    "image and slow": [user(image(4, 84, 56), SLOW, text("Which?"))],
    "film in the middle": [
        user(text("Hello.")),
        assistant("Hello."),
        user(FILM, text("What moves?")),
        assistant("A disc."),
        user(text("And then?")),
    ],
}
"""For families of which vLLM takes one video a prompt; of the strip all enters."""
SCENE, VIEW = video(5, 6, 352, 416), video(6, 4, 416, 352)  # 429 and 286 tokens
LIFELIKE = {
    "scene": [user(SCENE, text("What moves?"))],
    "view and image and scene": [user(VIEW, text("or"), image(4, 84, 56), SCENE, text("?"))],
    "scene later": [user(SCENE, text("What?")), assistant("A disc."), user(VIEW, text("And?"))],
}
"""For families whose processor makes small frames large, and neighbours alike."""
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
    "K3-images-caching": (
        {"prune_layer": 3, "prune_images": True, "slices_per_segment": 2},
        {"enable_prefix_caching": True},
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


FIRST = ["qwen3_vl"]
OTHERS = ["qwen3_omni_moe", "qwen2_vl", "glm4v", "internvl", "llava_onevision"]
WITH_EXPERTS = ["qwen3_vl_moe", "glm4v_moe"]
ONE_VIDEO = ["glm4v", "glm4v_moe"]
RUN: dict[str | None, tuple[list[str], list[str], list[Any]]] = {
    "case": (FIRST, ["v1"], [*CASES, *ENTRY_CASES]),
    "other_case": (OTHERS, ["v1"], ["K3-scenes-caching-chunked"]),
    "v2_case": ([*FIRST, *WITH_EXPERTS, *OTHERS[-2:]], ["v2"], ["K4-question-free-caching-async"]),
    "tensor_parallel_size": (FIRST, [], [2]),
    "pipeline_parallel_size": (FIRST, [], [2]),
    None: ([*FIRST, *OTHERS], ["v1"], []),
}
"""Families, runners and cases of each test by its argument, unless ``--family`` names one: then all
of its cases, on both runners. Text between slices, DeepStack and norms of queries and keys are in
the first family. Of `ONE_VIDEO` a prompt may have one."""
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")


class Chats(NamedTuple):
    """Names of the chats that are asked."""

    whole: list[str]
    in_part: list[str]
    stock: list[str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = next((name for name in RUN if name in metafunc.fixturenames), None)
    families, runners, cases = RUN[name]
    if wanted := metafunc.config.getoption("--family"):
        families, runners = [wanted], ["v1", "v2"]
        cases = cases if name in ("case", *PARALLEL) else []  # of "case", all
    metafunc.parametrize("family", families, scope="module")
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("host", runners, indirect=True, scope="module")
    if name is not None:
        metafunc.parametrize(name, cases)


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """An engine process on one of vLLM's model runners."""
    with engine_host(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def checkpoint(family: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(architecture=family)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / family, spec)


@pytest.fixture(scope="module")
def chats(family: Architecture) -> Chats:
    """Of the cases without and with a stage before the decoder, and of the stock model."""
    if family == "llava_onevision":  # vLLM makes room for 16 frames, however small a step is
        # Stock vLLM's engine ends at two videos of different lengths in a step.
        survived = [name for name in CHATS if name not in ("two videos", "two turns")]
        return Chats([*CHATS, *LARGE], list(LARGE), survived)
    if family == "qwen3_omni_moe":
        return Chats(["text", *LIFELIKE], list(LIFELIKE), list(CHATS))
    if family not in ONE_VIDEO:
        return Chats([*CHATS, *MORE], list(LARGE), list(CHATS))
    known = CHATS | MORE
    taken = [name for name in known if sum(map(num_videos, known[name])) <= 1]
    return Chats(taken, list(ALONE), [name for name in taken if name in CHATS])


def num_videos(message: dict[str, Any]) -> int:
    return sum(part["type"] == "video" for part in message["content"] if isinstance(part, dict))


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Iterator[Judge]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    judge = Judge(checkpoint)
    for name, messages in (MORE | LARGE | ALONE | LIFELIKE).items():
        judge.add(name, messages)
    yield judge
    torch.set_num_threads(threads)


def test_every_answer_equals_the_reference(
    host: EngineHost, judge: Judge, chats: Chats, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    check_case(host, judge, chats, checkpoint, tmp_path, case)


def test_as_much_of_other_families(
    host: EngineHost, judge: Judge, chats: Chats, checkpoint: Path, tmp_path: Path, other_case: str
) -> None:
    check_case(host, judge, chats, checkpoint, tmp_path, other_case)


def test_the_other_runner(
    host: EngineHost, judge: Judge, chats: Chats, checkpoint: Path, tmp_path: Path, v2_case: str
) -> None:
    check_case(host, judge, chats, checkpoint, tmp_path, v2_case)


def check_case(
    host: EngineHost, judge: Judge, chats: Chats, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    dpp, engine = (CASES | ENTRY_CASES)[case]
    settings = ServingSettings(**dpp)
    block_size = BLOCK_SIZE if engine.get("enable_prefix_caching") else None
    host.load(checkpoint, dpp | {"record_dir": str(tmp_path)}, **engine)
    names = {chat: chat for chat in chats.whole}
    if settings.prune_images:
        names = {chat: f"{chat}, images too" for chat in chats.whole}
        for chat, name in names.items():
            judge.prune_images(name, chat)
    if settings.entry_ratio < 1:
        names = {chat: f"{chat} at {settings.entry_ratio}" for chat in chats.in_part}
        for chat, name in names.items():
            judge.enter(name, chat, settings.entry_ratio, settings.entry_config)
    assert check_chats(host, judge, names, RATIOS, settings, block_size, tmp_path) > 5


def test_videos_with_little_beside_their_text_enter_whole(
    judge: Judge, chats: Chats, family: str
) -> None:
    """In the cases above, of a family that has text in its videos."""
    whole, shares = {}, {}
    for chat in chats.in_part:
        judge.enter(f"{chat} at 0.5", chat, 0.5, ServingSettings().entry_config)
        whole[chat] = [v.entered is None for v in judge.prompts[f"{chat} at 0.5"].videos]
        shares[chat] = [len(v.text) / v.length for v in judge.prompts[chat].videos]
    assert whole == {chat: [share >= 0.5 for share in shares[chat]] for chat in whole}
    assert not any(whole[chats.in_part[0]])
    little = family not in ("qwen2_vl", "qwen3_omni_moe", "internvl", "llava_onevision")
    assert any(map(any, whole.values())) == little


def test_ratio_one_is_the_stock_model(
    host: EngineHost, judge: Judge, chats: Chats, checkpoint: Path
) -> None:
    """Bit for bit: the same kernels see the same numbers."""

    def answers(args: dict[str, Any] | None) -> dict[str, Any]:
        return {
            chat: host.run([Arrival("a", judge.engine_prompts[chat], extra_args=args)]).answers["a"]
            for chat in chats.stock
        }

    host.load(checkpoint, None)
    stock = answers(None)
    host.load(checkpoint, {"retention_ratio": 0.25})
    plugin = answers({"dpp_retention_ratio": 1.0})
    for chat in chats.stock:
        assert plugin[chat].tokens == stock[chat].tokens
        assert (plugin[chat].logprobs == stock[chat].logprobs).all()


def test_compiled_and_on_two_ranks(
    judge: Judge,
    chats: Chats,
    checkpoint: Path,
    tensor_parallel_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    dpp = {"prune_layer": 3, "entry_ratio": 0.5, "shard_selection": True}
    settings = ServingSettings(**dpp)
    with engine_host("v1") as host:
        host.load(
            checkpoint,
            dpp,
            enforce_eager=False,
            tensor_parallel_size=tensor_parallel_size,
            max_num_batched_tokens=64,  # videos are read over several steps
        )
        args = {"dpp_retention_ratio": 0.25}
        traffic = host.run(
            [
                Arrival(name_of(chat, 0.25), judge.engine_prompts[chat], extra_args=args)
                for chat in chats.in_part
            ]
        )
    for chat in chats.in_part:
        name = f"{chat} at 0.5"
        judge.enter(name, chat, 0.5, settings.entry_config)
        keep = judge.keep(name, 0.25, 3, settings)
        answer = traffic.answers[name_of(chat, 0.25)]
        assert judge.difference(answer, name, 3, keep) <= TOLERANCE
    assert traffic.blocks_held == 0


def test_before_the_decoder_alone_in_two_stages_of_a_pipeline(
    judge: Judge,
    chats: Chats,
    checkpoint: Path,
    pipeline_parallel_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    dpp = {"entry_only": True, "video_share": 0.4}
    settings = ServingSettings(**dpp).as_entry_only(6)
    with engine_host("v1") as host:
        host.load(
            checkpoint,
            dpp,
            pipeline_parallel_size=pipeline_parallel_size,
            enforce_eager=False,  # without it stock vLLM's stages lose requests on a CPU
            enable_prefix_caching=True,
            max_num_batched_tokens=64,
        )
        traffic = host.run([Arrival(chat, judge.engine_prompts[chat]) for chat in chats.in_part])
    for chat in chats.in_part:
        name = f"{chat} at 0.4 alone"
        judge.enter(name, chat, 0.4, settings.entry_config)
        everything = judge.keep(name, 1.0, 3, settings)
        assert judge.difference(traffic.answers[chat], name, 3, everything) <= TOLERANCE
