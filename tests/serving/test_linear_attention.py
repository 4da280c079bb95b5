"""Decoders with linear attention, of whose videos tokens are left out before the decoder alone.

vLLM runs linear attention in bfloat16 on a CPU, so what enters is forced and errors are compared
(``tests.engines.precision``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import Judge
from tests.engines.precision import Errors, check_growth, everything_of
from tests.engines.traffic import Arrival
from tests.reference.chats import assistant, text, user, video
from tests.reference.reference import Reference
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import Architecture, CheckpointSpec

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SHARE = 0.3
FILM = video(7, 12, 224, 224)
CHATS_IN_PART = {
    "film": [user(FILM, text("What moves?"))],
    "shot and film": [user(video(8, 8, 192, 256), text("and"), FILM, text("which?"))],
    "large film": [user(text("So:"), video(9, 6, 288, 448), text("Where?"))],
    "film later": [user(FILM, text("What?")), assistant("A disc."), user(text("And then?"))],
    **{str(seed): [user(video(seed, 8, 224, 192), text("Where?"))] for seed in range(10, 26)},
}


def checkpoint_of(family: Architecture, folder: Path) -> Path:
    """Of eight layers, two of which have KV."""
    return make_checkpoint(folder / family, CheckpointSpec(architecture=family, num_layers=8))


@pytest.fixture(scope="module")
def host() -> Iterator[EngineHost]:
    with engine_host("v1") as started:
        yield started


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("qwen3_5", {"enable_prefix_caching": True, "max_num_batched_tokens": 128}),
        ("qwen3_5_moe", {}),
        ("minicpmv4_6", {"enable_prefix_caching": True, "max_num_batched_tokens": 128}),
    ],
)
def test_error_is_no_larger_than_stock(
    host: EngineHost, family: Architecture, engine: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(family, tmp_path)
    torch.set_num_threads(1)
    judge = Judge(checkpoint, engine_dtype=torch.bfloat16)
    rounded = Reference(checkpoint, dtype=torch.bfloat16, engine_dtype=torch.bfloat16)
    errors, num_layers = Errors(judge, rounded), judge.reference.network.num_layers
    settings = ServingSettings(video_share=SHARE).as_entry_only(num_layers)
    for chat, messages in CHATS_IN_PART.items():
        judge.add(chat, messages)
    chats = list(CHATS_IN_PART)
    names = [f"{chat} of which less enters" for chat in chats]
    for name, chat in zip(names, chats, strict=True):
        judge.enter(name, chat, SHARE, settings.entry_config)
    host.load(checkpoint, None, dtype="bfloat16", **engine)
    stock = errors.of(host, everything_of(judge, chats), num_layers)
    host.load(checkpoint, {"video_share": SHARE}, dtype="bfloat16", **engine)
    ours = errors.of(host, everything_of(judge, names), num_layers)
    assert all(v.entered for name in names for v in judge.prompts[name].videos)
    print(f"{ours[0].mean():.5f}, stock {stock[0].mean():.5f}")
    check_growth(ours[0] / stock[0], ours[1] / stock[1])


def test_what_is_sent_as_embeddings_enters_whole(host: EngineHost, tmp_path: Path) -> None:
    checkpoint, width, frames = checkpoint_of("minicpmv4_6", tmp_path), 256, 4
    video = {
        "video_embeds": [torch.randn(frames * 16, width, generator=torch.manual_seed(0))],
        "video_image_sizes": torch.tensor([[[224, 224]] * frames]),
    }
    prompt = {"prompt": "So: <|video_pad|> What?", "multi_modal_data": {"video": video}}
    answers = []
    for settings in (None, {"video_share": SHARE}):
        host.load(checkpoint, settings, dtype="bfloat16", enable_mm_embeds=True)
        answers.append(host.run([Arrival("a", prompt, max_tokens=6)]).answers["a"])
    stock, ours = answers
    assert ours.prompt_token_ids == stock.prompt_token_ids
    assert len(ours.prompt_token_ids) > frames * 16
    assert (ours.logprobs == stock.logprobs).all()
