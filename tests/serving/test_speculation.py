"""Drafts by ngram: the answers are those without them, in fewer steps.

Not on the V2 runner without a GPU: vLLM's own kernel for drafts does not run in Triton's
interpreter.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.chats import text, user, video
from tests.serving.conftest import CUDA
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

BLOCK_SIZE = 32
DPP = {"prune_layer": 2, "retention_ratio": 0.25}
SETTINGS = ServingSettings(**DPP)
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
MOVIE = video(5, 32, 112, 112)  # 256 tokens
CHATS = {
    "movie": [user(MOVIE, text("What moves through the picture?"))],
    "movie and clip": [user(MOVIE, text("then"), video(6, 12, 84, 112), text("Which?"))],
    "clip": [user(video(6, 12, 84, 112), text("What?"))],
}
MAX_TOKENS = 24


@pytest.fixture(scope="module", params=["v1", CUDA])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    with engine_host(request.param) as started:
        yield started


def test_drafts_change_no_answer(host: EngineHost, judge: Judge, tiny_checkpoint: Path) -> None:
    """Videos are read, in several steps, while others decode; the second time from the cache."""
    for name, messages in CHATS.items():
        judge.add(name, messages)
    arrivals = [
        Arrival(f"{chat} {start}", judge.engine_prompts[chat], max_tokens=MAX_TOKENS, step=start)
        for start in (0, 7, 14)
        for chat in CHATS
    ]
    steps = []
    for drafts in (None, NGRAM):
        host.load(
            tiny_checkpoint,
            DPP,
            speculative_config=drafts,
            enable_prefix_caching=True,
            max_num_batched_tokens=160,
        )
        traffic = host.run(arrivals)
        steps.append(traffic.working_steps)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
        for arrival in arrivals:
            chat = arrival.name.rsplit(" ", 1)[0]
            keep = judge.keep(chat, 0.25, 2, SETTINGS, BLOCK_SIZE)
            difference = judge.difference(traffic.answers[arrival.name], chat, 2, keep)
            assert difference <= TOLERANCE, (arrival.name, difference)
    assert steps[1] < steps[0], "drafts were taken"
