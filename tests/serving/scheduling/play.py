"""Plays a scenario against a scheduler, step by step as vLLM's engine core does."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.serving.scheduling.build import build, plan_of, request_of
from tests.serving.scheduling.leftovers import leftovers
from tests.serving.scheduling.scenario import PLENTY, Scenario
from tests.serving.scheduling.worker import Worker, check

PATIENCE = 3
"""Steps in a row without a single token, and nothing under way, that prove a deadlock."""


class StuckError(AssertionError):
    """Requests are left, and nothing will ever move them."""


class VictimOfItsStepError(Exception):
    """vLLM preempted a request that it had scheduled in the same step (policy ``priority``).

    Its encoder inputs and its KV blocks then count as cached, though nobody computed them: a fault
    of vLLM's own (0.32) that has nothing to do with pruning. What follows proves nothing.
    """


@dataclass
class Story:
    """What happened to one request, in steps."""

    arrived: int
    started: int | None = None
    finished: int | None = None
    reason: str | None = None
    tokens: int = 0
    last: int = 0
    longest_wait: int = 0


@dataclass
class Play:
    """What happened to all of them."""

    steps: int = 0
    preemptions: int = 0
    hit_tokens: int = 0
    stories: dict[str, Story] = field(default_factory=dict)


class Engine:
    """One scheduler, one worker, and the steps that are under way."""

    def __init__(self, base: VllmConfig, scenario: Scenario, ours: bool) -> None:
        self.scenario = scenario
        self.scheduler: Scheduler = build(base, scenario, ours)
        self.worker = Worker(
            scenario,
            self.scheduler.kv_cache_config,
            self.scheduler.encoder_cache_manager.cache_size,
            self.scheduler.max_num_encoder_input_tokens,
            plan_of(base, scenario) if ours else lambda ask: None,
            PLENTY if scenario.shape.deferred is None else scenario.shape.deferred,
        )
        self.under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.play = Play()
        self.idle = 0
        self.given: set[str] = set()
        self._watch_allocations()
        self.arriving = sorted(scenario.asks, key=lambda ask: ask.step)
        self.resets = list(scenario.resets)
        self.leaving = [ask for ask in scenario.asks if ask.abort_at is not None]

    def run(self, limit: int) -> Play:
        """Until all requests are done and the worker has heard of it.

        Raises:
            StuckError: That takes more than ``limit`` steps, or for ever.
            BrokenPromiseError: The worker was sent a step that it cannot run.
            VictimOfItsStepError: vLLM's own fault; the play says nothing.
        """
        while self.arriving or self.scheduler.has_unfinished_requests() or self.under_way:
            self._arrive()
            if self.resets and self.resets[0] <= self.play.steps:
                self.resets.pop(0)
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            self._step(limit)
        self._step(limit)  # in which the worker hears of the last ones
        while self.under_way:
            self._receive()
        left = leftovers(self.scheduler, self.worker)
        check(not left, f"left behind: {left}")
        return self.play

    def _watch_allocations(self) -> None:
        manager = self.scheduler.kv_cache_manager
        allocate = manager.allocate_slots

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
            blocks = allocate(request, *args, **kwargs)
            if blocks is not None:
                self.given.add(request.request_id)
            return blocks

        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]

    def _arrive(self) -> None:
        while self.arriving and self.arriving[0].step <= self.play.steps:
            ask = self.arriving.pop(0)
            self.play.stories[ask.name] = Story(arrived=self.play.steps, last=self.play.steps)
            arrival_time = float(len(self.play.stories))
            self.scheduler.add_request(request_of(ask, self.scenario.shape, arrival_time))

    def _step(self, limit: int) -> None:
        if self.scheduler.has_requests():
            self.given.clear()
            output = self.scheduler.schedule()
            if self.given & (output.preempted_req_ids or set()):
                raise VictimOfItsStepError
            self._note(output, limit)
            self.under_way.append((output, self.worker.execute(output)))
            depth = 2 if self.scenario.shape.asynchronous else 1
            more = output.total_num_scheduled_tokens or self.scheduler.has_requests()
            if len(self.under_way) < depth and more:
                return
        else:
            self.play.steps += 1
        if self.under_way:
            self._leave()
            self._receive()

    def _note(self, output: SchedulerOutput, limit: int) -> None:
        play = self.play
        play.steps += 1
        play.preemptions += len(output.preempted_req_ids or ())
        for name in output.num_scheduled_tokens:
            story = play.stories[name]
            story.started = play.steps if story.started is None else story.started
            story.longest_wait = max(story.longest_wait, play.steps - story.last)
            story.last = play.steps
        for new in output.scheduled_new_reqs:
            play.hit_tokens += new.num_computed_tokens
        running = any(step.total_num_scheduled_tokens for step, _ in self.under_way)
        if output.total_num_scheduled_tokens or running or self.arriving:
            self.idle = 0
        else:
            self.idle += 1
        unfinished = self.scheduler.has_unfinished_requests()
        if unfinished and (self.idle > PATIENCE or play.steps > limit):
            raise StuckError(f"step {play.steps}: {self._describe()}")

    def _describe(self) -> str:
        manager = self.scheduler.encoder_cache_manager
        states = [
            f"{request.request_id} {request.status.name} {request.num_computed_tokens}"
            f"/{request.num_tokens}, media {sorted(manager.get_cached_input_ids(request))}"
            for request in self.scheduler.requests.values()
        ]
        return f"{'; '.join(states)}; encoder space {manager.num_freeable_slots}"

    def _leave(self) -> None:
        due = [a for a in self.leaving if (a.abort_at or 0) <= self.play.steps]
        names = [ask.name for ask in due if ask.name in self.play.stories]
        self.leaving = [ask for ask in self.leaving if ask not in due]
        for request in self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED):
            self._end(request.request_id, "abort")

    def _receive(self) -> None:
        for outputs in self.scheduler.update_from_output(*self.under_way.popleft()).values():
            for output in outputs.outputs:
                story = self.play.stories[output.request_id]
                story.tokens += len(output.new_token_ids)
                if output.finish_reason is not None:
                    self._end(output.request_id, str(output.finish_reason))

    def _end(self, name: str, reason: str) -> None:
        story = self.play.stories[name]
        check(story.finished is None, f"{name} finished twice")
        story.finished, story.reason = self.play.steps, reason


def play(base: VllmConfig, scenario: Scenario, ours: bool = True, limit: int = 10_000) -> Play:
    """Play a scenario; see :meth:`Engine.run`."""
    return Engine(base, scenario, ours).run(limit)
