"""What else vLLM offers, together with pruning: one engine that has it all on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival, Traffic
from tests.reference.chats import text, user, video
from tests.serving.conftest import CUDA
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import CheckpointSpec

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE, PRUNE_LAYER = 32, 2
DPP: dict[str, Any] = {"prune_layer": PRUNE_LAYER, "retention_ratio": 0.25}
SETTINGS = ServingSettings(**DPP)
MOVIE = video(5, 32, 112, 112)  # 256 tokens
CHATS = {
    "movie": [user(MOVIE, text("What moves through the picture?"))],
    "clip": [user(video(6, 12, 84, 112), text("What?"))],
}


@pytest.fixture(scope="module", params=["v1", CUDA])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    with engine_host(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def engine(host: EngineHost, judge: Judge, tiny_checkpoint: Path) -> EngineHost:
    for name, messages in CHATS.items():
        judge.add(name, messages)
    host.load(
        tiny_checkpoint,
        DPP,
        enable_mm_embeds=True,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        max_num_batched_tokens=160,
        max_num_seqs=9,
        kv_cache_memory_bytes=8 * 2**20,
        max_model_len=1024,
    )
    return host


def check(traffic: Traffic, judge: Judge, chats: dict[str, str]) -> None:
    """Answers to chats, by request."""
    for name, chat in chats.items():
        keep = judge.keep(chat, 0.25, PRUNE_LAYER, SETTINGS, BLOCK_SIZE)
        difference = judge.difference(traffic.answers[name], chat, PRUNE_LAYER, keep)
        assert difference <= TOLERANCE, (name, difference)
    assert (traffic.blocks_held, traffic.plans_left) == (0, 0)


@pytest.mark.parametrize("entering", [1, 0.5])
def test_what_the_encoder_made_may_be_sent(
    engine: EngineHost, judge: Judge, entering: float
) -> None:
    """Instead of a video; it is selected from before the decoder, too."""
    prompt, (item,) = judge.engine_prompts["movie"], judge.prompts["movie"].videos
    with torch.inference_mode():
        (made,) = judge.reference.network.media_embeddings(judge.prompts["movie"])
    made_before = {"video_embeds": made, "video_grid_thw": torch.tensor([item.grid_thw])}
    sent = {
        "prompt": prompt["prompt"],
        "multi_modal_data": {"video": made_before},
        "mm_processor_kwargs": {"dpp_entry_ratio": entering},
    }
    judge.enter(f"movie {entering}", "movie", entering, SETTINGS.entry_config)
    traffic = engine.run([Arrival("sent", sent)])
    check(traffic, judge, {"sent": f"movie {entering}"})


def test_a_prompt_may_be_scored(engine: EngineHost, judge: Judge) -> None:
    """It then keeps at layer K what entered, beside a request that does not."""
    judge.enter("half of the movie", "movie", 0.5, SETTINGS.entry_config)
    sent = judge.engine_prompts["movie"] | {"mm_processor_kwargs": {"dpp_entry_ratio": 0.5}}
    scored = Arrival("scored", sent, params={"prompt_logprobs": 0})
    traffic = engine.run([Arrival("pruned", sent), scored, replace(scored, name="again")])
    check(traffic, judge, {"pruned": "half of the movie"})
    for name in ("scored", "again"):
        answer = traffic.answers[name]
        assert judge.prompt_difference(answer, "half of the movie") <= TOLERANCE
        everything = judge.keep("half of the movie", 1.0, PRUNE_LAYER, SETTINGS, BLOCK_SIZE)
        difference = judge.difference(answer, "half of the movie", PRUNE_LAYER, everything)
        assert difference <= TOLERANCE
    refused = engine.run([replace(scored, extra_args={"dpp_retention_ratio": 0.25})])
    assert "prompt_logprobs" in (refused.answers["scored"].error or "")


def test_the_urgent_come_first(engine: EngineHost, judge: Judge) -> None:
    """They take the blocks of others, who start again and answer as if nothing had been."""
    chats = {f"{chat} {i}": chat for i in range(4) for chat in CHATS}
    arrivals = [
        Arrival(name, judge.engine_prompts[chat] | {"cache_salt": name}, max_tokens=20, priority=5)
        for name, chat in chats.items()
    ]
    urgent = Arrival("urgent", judge.engine_prompts["movie"], step=6, priority=0)
    traffic = engine.run([*arrivals, urgent])
    check(traffic, judge, chats | {"urgent": "movie"})
    assert traffic.preemptions, "memory is short"
    later = [name for name in chats if traffic.first_steps[name] > 6]
    assert later and all(
        traffic.first_steps["urgent"] < traffic.first_steps[name] for name in later
    )


def test_weights_may_be_replaced(
    engine: EngineHost, judge: Judge, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In a running engine; nothing of the old ones is left, in a cache or elsewhere."""
    other = make_checkpoint(tmp_path / "other", CheckpointSpec(seed=1))
    learned = Judge(other)
    learned.add("movie", CHATS["movie"])
    arrival = Arrival("asked", judge.engine_prompts["movie"])
    for checkpoint, expected in ((other, learned), (tiny_checkpoint, judge)):
        engine.call("reload", str(checkpoint))
        check(engine.run([arrival]), expected, {"asked": "movie"})


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_sleep(judge: Judge, tiny_checkpoint: Path, level: int) -> None:
    """Whatever lies in memory that is given back is there again, or not needed."""
    judge.add("movie", CHATS["movie"])
    arrival = Arrival("asked", judge.engine_prompts["movie"])
    with engine_host("cuda") as host:
        chunks = {"max_num_batched_tokens": 160, "max_model_len": 1024}
        caching = {"enable_prefix_caching": True, "block_size": BLOCK_SIZE}
        host.load(tiny_checkpoint, DPP, enable_sleep_mode=True, **chunks, **caching)
        for _ in range(2):
            check(host.run([arrival]), judge, {"asked": "movie"})
            host.call("sleep", level)
        check(host.run([arrival]), judge, {"asked": "movie"})
