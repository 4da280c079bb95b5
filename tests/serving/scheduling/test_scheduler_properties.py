"""Thousands of small schedules: everything admitted ends, every step can be run, nothing is left.

A worker stands behind the scheduler that keeps what a real one keeps and checks what it is sent,
down to whether the KV that a prefix-cache hit brings is what the request would have computed. A
seed that fails prints itself; ``python -m tests.serving.scheduling.soak`` shrinks it.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from vllm.config import VllmConfig

from tests.serving.scheduling.draw import draw, may_be_kept_whole
from tests.serving.scheduling.play import VictimOfItsStepError, play
from tests.serving.scheduling.properties import Seen, check_ends, compare
from tests.serving.scheduling.scenario import Scenario
from vllm_dpp.serving import vllm_versions


def each(seeds: range, test: Callable[[Scenario], object]) -> None:
    """Run a test on every seed's scenario, and say which seed failed."""
    for seed in seeds:
        scenario = draw(seed)
        try:
            test(scenario)
        except VictimOfItsStepError:
            continue
        except Exception as error:
            error.add_note(f"seed {seed}: {scenario}")
            raise


def test_the_worker_believes_the_scheduler_of_vllm(base: VllmConfig) -> None:
    each(range(200), lambda scenario: play(base, scenario, ours=False))


def test_pruning_keeps_up_with_the_scheduler_of_vllm(base: VllmConfig) -> None:
    seen = Seen()
    each(range(300), lambda scenario: compare(base, scenario, seen))
    for kind in ("preemptions", "hit tokens", "aborted", "refused", "pruned tokens"):
        assert seen.counts[kind] > 0, seen.counts


@pytest.mark.slow
def test_every_schedule_comes_to_its_end(base: VllmConfig) -> None:
    each(range(300, 2500), lambda scenario: check_ends(base, scenario, play(base, scenario)))


def test_media_that_no_chunk_may_split(base: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk holds an item from its start to its end or not at all, as vLLM 0.33 has it."""
    monkeypatch.setattr(vllm_versions, "MAY_SPLIT_MEDIA_AT_THEIR_START", False)
    tried = 0

    def keep_whole(scenario: Scenario) -> None:
        nonlocal tried
        if may_be_kept_whole(scenario.shape, scenario.longest_item):
            scenario = replace(scenario, shape=replace(scenario.shape, whole_media=True))
            check_ends(base, scenario, play(base, scenario))
            tried += 1

    each(range(2500, 3100), keep_whole)
    assert tried > 200
