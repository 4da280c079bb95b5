"""In bfloat16, with quantised weights or KV, pruned serving adds no error of its own.

Rounding decides close calls, so the kept tokens and the answer are forced: what is left is the
arithmetic of the same tokens (``tests.engines.precision``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import Judge
from tests.engines.precision import Errors, check_growth, everything_of
from tests.engines.quantised import four_bit
from tests.engines.traffic import Arrival
from tests.reference.chats import text, user, video
from tests.reference.reference import Reference
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHATS = ["video", "question first", "two videos", "image and video", "two turns"]
MORE_VIDEOS, FEWER_VIDEOS = range(10, 20), range(10, 16)
RATIO = 0.25
LAYER = {"v1": 1, "v2": 3, "cuda": 3}
needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has this on CPUs with AVX-512 alone"
)


def test_error_is_no_larger_than_stock(host: EngineHost, tiny_checkpoint: Path) -> None:
    check_error(host, tiny_checkpoint, tiny_checkpoint, MORE_VIDEOS)


@needs_avx512
def test_nor_with_four_bit_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    four_bit(tiny_checkpoint, tmp_path / "quantised", tmp_path / "rounded")
    with engine_host("v1") as host:
        check_error(host, tmp_path / "quantised", tmp_path / "rounded", FEWER_VIDEOS)
        dpp = {"prune_layer": 3, "rule": "attention", "record_dir": str(tmp_path)}
        host.load(tmp_path / "quantised", dpp, dtype="bfloat16")
        judge = Judge(tmp_path / "rounded", engine_dtype=torch.bfloat16)
        judge.add("movie", [user(video(5, 32, 112, 112), text("What moves?"))])
        host.run([Arrival("a", judge.engine_prompts["movie"], extra_args={"dpp_record": 1})])
        (kept,) = host.call("kept", str(tmp_path), "a").values()
    settings = ServingSettings(prune_layer=3, rule="attention")
    (expected,) = judge.keep("movie", RATIO, 3, settings)
    common = len({*kept} & {*expected})
    assert common > 0.9 * len(expected), "rounding decides close calls alone"


@needs_avx512
def test_nor_with_awq_for_gptq(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same weights in the files of either give the same answers, pruned, to the last bit."""
    answers = []
    with engine_host("v1") as host:
        for file_format in ("gptq", "awq"):
            quantised, rounded = tmp_path / file_format, tmp_path / "rounded"
            four_bit(tiny_checkpoint, quantised, rounded, file_format)
            host.load(quantised, {"prune_layer": 3}, dtype="bfloat16")
            prompts = Judge(rounded).engine_prompts
            traffic = host.run([Arrival(chat, prompts[chat]) for chat in CHATS])
            answers.append([traffic.answers[chat] for chat in CHATS])
    for gptq, awq in zip(*answers, strict=True):
        assert gptq.tokens == awq.tokens and (gptq.logprobs == awq.logprobs).all()


@needs_avx512
def test_nor_with_eight_bit_kv(tiny_checkpoint: Path) -> None:
    with engine_host("v1") as host:
        check_error(host, tiny_checkpoint, tiny_checkpoint, FEWER_VIDEOS, kv_cache_dtype="fp8")


@pytest.mark.gpu
def test_nor_with_eight_bit_weights(tiny_checkpoint: Path) -> None:
    """Stock vLLM rounds them just the same, which the reference does not know."""
    with engine_host("cuda") as host:
        check_error(host, tiny_checkpoint, tiny_checkpoint, MORE_VIDEOS, quantization="fp8")


def check_error(
    host: EngineHost, checkpoint: Path, meant: Path, videos: Sequence[int], **engine: Any
) -> None:
    """Hold an engine's error to stock vLLM's under the same arguments.

    Args:
        host: Runs both.
        checkpoint: What they serve.
        meant: The same in float32.
        videos: Seeds of videos that are asked about, beside the usual chats.
        engine: Arguments of both.
    """
    torch.set_num_threads(1)
    judge = Judge(meant, engine_dtype=torch.bfloat16)
    rounded = Reference(meant, dtype=torch.bfloat16, engine_dtype=torch.bfloat16)
    errors = Errors(judge, rounded)
    chats = [*CHATS, *map(str, videos)]
    for seed in videos:
        judge.add(str(seed), [user(video(seed, 8, 84, 112), text("What moves?"))])
    host.load(checkpoint, None, dtype="bfloat16", **engine)
    stock, stock_reference = errors.of(host, everything_of(judge, chats), prune_layer=0)
    assert stock.min() > 1e-4, "bfloat16 must differ from float32 at all"
    layer = LAYER[host.runner]
    settings = ServingSettings(prune_layer=layer)
    keeps = {chat: judge.keep(chat, RATIO, layer, settings) for chat in chats}
    host.load(checkpoint, {"prune_layer": layer}, dtype="bfloat16", **engine)
    pruned, pruned_reference = errors.of(host, keeps, layer)
    print(f"layer {layer}: {pruned.mean():.5f}, stock {stock.mean():.5f}; in transformers")
    print(f"         {pruned_reference.mean():.5f} and {stock_reference.mean():.5f}")
    check_growth(pruned / stock, pruned_reference / stock_reference)
