"""What a worker knows of one request."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.serving.scheduling.contents import Numbers
from tests.serving.scheduling.scenario import Ask


@dataclass
class Row:
    """One request on the worker.

    Args:
        ask: The request.
        prompt_plan: What its prompt says.
        compact: For each KV group, whether it holds kept tokens alone.
        contents: For each KV group, what it must hold by its own positions.
        plan: ``prompt_plan`` after the last hit in the prefix cache.
        tables: For each KV group, its blocks.
        known: Tokens of the prompt and of the answer so far.
        computed: Tokens that went through the model.
        entered: ``computed`` when it last entered the batch: from the prefix cache.
        resident: Whether its blocks are its own: false from preemption to resumption.
        open: Rows of the buffer, for each range by its first position.
    """

    ask: Ask
    prompt_plan: Any
    compact: Sequence[bool]
    contents: list[Numbers]
    plan: Any = None
    tables: list[list[int]] = field(default_factory=list)
    known: int = 0
    computed: int = 0
    entered: int = 0
    resident: bool = True
    open: dict[int, int] = field(default_factory=dict)

    def start(self, block_ids: Any, known: int, num_computed: int) -> Any:
        """Start, or start again; returns the turn that cannot be entered where it does."""
        self.tables = [list(ids) for ids in block_ids]
        self.known, self.computed, self.entered = known, num_computed, num_computed
        self.resident = True
        if self.prompt_plan is None:
            return None
        self.plan = self.prompt_plan.after_hit(num_computed)
        for turn in self.prompt_plan.turns:
            if turn.start < num_computed < turn.decided:
                return turn
        return None

    def leave(self) -> None:
        """Preempted: blocks and rows are lost."""
        self.resident = False
        self.open.clear()

    def groups(self, compact: bool | None = None) -> Iterator[tuple[list[int], bool, Numbers]]:
        """Block table, kind and contents of all KV groups, or of those of one kind."""
        for table, kind, contents in zip(self.tables, self.compact, self.contents, strict=True):
            if compact is None or kind == compact:
                yield table, kind, contents

    def length(self, compact: bool, num_tokens: int) -> int:
        """Positions of ``num_tokens`` tokens in a group."""
        if not compact or self.plan is None:
            return num_tokens
        return int(self.plan.compact_length(num_tokens))

    def open_ranges(self, count: int) -> None:
        """Take rows for the ranges that the next ``count`` tokens enter and do not finish."""
        end = self.computed + count
        for turn in self._turns(end):
            if end < turn.end:
                self.open[turn.start] = turn.end - turn.start

    def close_ranges(self, count: int) -> bool:
        """Give back the rows of those that they finish; whether they are in any range at all."""
        end = self.computed + count
        turns = self._turns(end)
        for turn in turns:
            if turn.end <= end:
                self.open.pop(turn.start, None)
        return bool(turns)

    def _turns(self, end: int) -> list[Any]:
        if self.plan is None:
            return []
        return [t for t in self.plan.turns if self.computed < t.end and t.start < end]
