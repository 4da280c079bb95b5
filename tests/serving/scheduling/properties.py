"""What must hold of every schedule."""

from collections import Counter
from dataclasses import dataclass, field

from vllm.config import VllmConfig

from tests.serving.scheduling.build import plan_of
from tests.serving.scheduling.play import Play, Story, play
from tests.serving.scheduling.scenario import Ask, Scenario
from tests.serving.scheduling.worker import check

SLACK = 30
"""Steps that pruning may take beyond twice the steps of vLLM's own scheduler."""


class StockFailsError(Exception):
    """vLLM's own scheduler does not get through this scenario either."""


@dataclass
class Seen:
    """How much of what the scenarios were to try out did happen."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, ours: Play, stock: Play) -> None:
        self.counts["schedules"] += 1
        for name, one in (("", ours), ("stock ", stock)):
            reasons = Counter(story.reason for story in one.stories.values())
            self.counts[name + "steps"] += one.steps
            self.counts[name + "preemptions"] += one.preemptions
            self.counts[name + "hit tokens"] += one.hit_tokens
            self.counts[name + "aborted"] += reasons["abort"]
            self.counts[name + "refused"] += reasons["error"]
            self.counts[name + "finished"] += reasons["length"]


def compare(base: VllmConfig, scenario: Scenario, seen: Seen | None = None) -> tuple[Play, Play]:
    """Play a scenario with both schedulers.

    Raises:
        AssertionError: A property does not hold.
        StockFailsError: It does not hold of vLLM's own scheduler.
    """
    try:
        stock = play(base, scenario, ours=False)
    except AssertionError as error:
        raise StockFailsError(str(error)) from error
    ours = play(base, scenario, limit=2 * stock.steps + SLACK)
    if seen is not None:
        seen.add(ours, stock)
        plan = plan_of(base, scenario)
        served = [plan(ask) for ask in scenario.asks if not is_refused(base, scenario, ask)]
        seen.counts["pruned tokens"] += sum(one.num_pruned for one in served if one is not None)
    check_ends(base, scenario, ours)
    for ask in scenario.asks:
        check_end(ask, stock.stories[ask.name])
        if not scenario.shape.caching and scenario.shape.deferred is None:
            _check_pace(ask, ours.stories[ask.name], stock.stories[ask.name])
    return ours, stock


def check_ends(base: VllmConfig, scenario: Scenario, ours: Play) -> None:
    """Whether everything that can be served was, and nothing else."""
    for ask in scenario.asks:
        check_end(ask, ours.stories[ask.name], refused=is_refused(base, scenario, ask))


def check_end(ask: Ask, story: Story, refused: bool = False) -> None:
    """Whether a request got what it asked for, unless it was aborted."""
    if ask.abort_at is None:
        end = "error" if refused else "length"
        tokens = 0 if refused else ask.max_tokens
        check(story.reason == end, f"{ask.name} ended with {story.reason}, not {end}")
        check(story.tokens == tokens, f"{ask.name} said {story.tokens} tokens, not {tokens}")


def _check_pace(ask: Ask, ours: Story, stock: Story) -> None:
    """Where neither rows nor the cache make a difference, pruning only takes less memory."""
    if ours.reason == stock.reason == "length":
        assert ours.finished is not None and stock.finished is not None
        took, stock_took = ours.finished - ours.arrived, stock.finished - stock.arrived
        check(took <= 2 * stock_took + SLACK, f"{ask.name} took {took} steps, not {stock_took}")


def is_refused(base: VllmConfig, scenario: Scenario, ask: Ask) -> bool:
    """Whether it asks for nonsense, or for more rows than there are."""
    try:
        plan = plan_of(base, scenario)(ask)
    except ValueError:
        return True
    deferred = scenario.shape.deferred
    if plan is None or deferred is None:
        return False
    return max(turn.length for turn in plan.turns) > deferred
