"""A worker that computes nothing: it keeps what a real one would keep and checks every promise."""

from collections.abc import Callable, Iterator
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.serving.scheduling.contents import Pages, of_group, of_kept, of_prefixes
from tests.serving.scheduling.row import Row
from tests.serving.scheduling.scenario import Ask, Scenario, said
from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.step import ScheduledRequest, StepLayout, lay_out


class BrokenPromiseError(AssertionError):
    """The scheduler sent a step that a worker cannot run, or would run wrongly."""


def check(holds: bool, complaint: str) -> None:
    if not holds:
        raise BrokenPromiseError(complaint)


class Worker:
    """Checks the steps of one engine.

    Args:
        plan_of: The prune plan of a request, as a real worker makes it.
        deferred: Rows of the buffer for ranges that are read over several steps.
    """

    def __init__(
        self,
        scenario: Scenario,
        kv_cache: KVCacheConfig,
        encoder_cache: int,
        encoder_budget: int,
        plan_of: Callable[[Ask], Any],
        deferred: int,
    ) -> None:
        self.shape = scenario.shape
        self.asks = {ask.name: ask for ask in scenario.asks}
        self.plan_of = plan_of
        self.compact = [
            isinstance(group.kv_cache_spec, CompactAttentionSpec)
            for group in kv_cache.kv_cache_groups
        ]
        self.pages = Pages(kv_cache.num_blocks, self.shape.block_size)
        self.encoder_cache_size = encoder_cache
        self.encoder_budget = encoder_budget
        self.deferred = deferred
        self.encoded: dict[str, int] = {}
        self.rows: dict[str, Row] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step.

        Raises:
            BrokenPromiseError: It cannot be run.
        """
        for name in output.free_encoder_mm_hashes:
            self.encoded.pop(name, None)
        self._forget(output)
        for new in output.scheduled_new_reqs:
            self._enter(new.req_id, new.prefill_token_ids or new.prompt_token_ids, new)
        self._go_on(output)
        self._encode(output)
        scheduled = output.num_scheduled_tokens
        self._check_sizes(scheduled, output.total_num_scheduled_tokens)
        self._defer(scheduled)
        self._write(scheduled)
        return self._answer(scheduled)

    def _forget(self, output: SchedulerOutput) -> None:
        for name in output.finished_req_ids:
            row = self.rows.pop(name, None)
            if row is not None and row.resident:
                self._verify(row)
        for name in output.preempted_req_ids or ():
            self.rows[name].leave()

    def _enter(self, name: str, token_ids: list[int], data: Any) -> None:
        """A new request, or one that comes back (V2)."""
        ask = self.asks[name]
        if name not in self.rows:
            plan = self.plan_of(ask)
            prefixes = of_prefixes(ask.identities)
            kept = of_kept(prefixes, () if plan is None else plan.turns)
            contents = [of_group(i, kept if c else prefixes) for i, c in enumerate(self.compact)]
            self.rows[name] = Row(ask, plan, self.compact, contents)
        check(token_ids == ask.tokens[: len(token_ids)].tolist(), f"{name} has wrong tokens")
        self._start(self.rows[name], data.block_ids, len(token_ids), data.num_computed_tokens)

    def _start(self, row: Row, block_ids: Any, known: int, num_computed: int) -> None:
        inside = row.start(block_ids, known, num_computed)
        check(inside is None, f"{row.ask.name} starts at {num_computed}, inside of {inside}")

    def _go_on(self, output: SchedulerOutput) -> None:
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            row, ids, num_computed = (
                self.rows[name],
                cached.new_block_ids[i],
                cached.num_computed_tokens[i],
            )
            if name in cached.resumed_req_ids:
                self._start(row, ids, len(cached.all_token_ids[name]), num_computed)
                continue
            check(row.resident, f"{name} goes on without having been resumed")
            check(num_computed == row.computed, f"{name}: {row.computed} computed, {num_computed}?")
            for table, group in zip(row.tables, ids or ([],) * len(row.tables), strict=True):
                table += group

    def _encode(self, output: SchedulerOutput) -> None:
        made = 0
        for name, indices in output.scheduled_encoder_inputs.items():
            for index in indices:
                _, item = self.rows[name].ask.media[index]
                self.encoded[item.name] = item.length
                made += item.length
        check(made <= self.encoder_budget, f"{made} embeddings in a step of {self.encoder_budget}")
        held = sum(self.encoded.values())
        check(held <= self.encoder_cache_size, f"the encoder cache holds {held}")

    def _check_sizes(self, scheduled: dict[str, int], total: int) -> None:
        check(total == sum(scheduled.values()), "the sum is wrong")
        check(total <= self.shape.budget, f"{total} tokens in a step of {self.shape.budget}")
        check(all(n > 0 for n in scheduled.values()), f"an empty chunk in {scheduled}")
        check(len(scheduled) <= self.shape.max_num_seqs, f"{len(scheduled)} requests in a step")
        for name, count in scheduled.items():
            self._check_chunk(name, self.rows[name], count)

    def _check_chunk(self, name: str, row: Row, count: int) -> None:
        start, end = row.computed, row.computed + count
        check(row.resident, f"{name} is scheduled while preempted")
        check(end <= row.known, f"{name}: {end} tokens of {row.known}")
        for first, item in row.ask.media:
            if start < first + item.length and first < end:
                check(item.name in self.encoded, f"{name} reads {item.name}: not in the cache")
        for table, compact in zip(row.tables, self.compact, strict=True):
            need = -(-row.length(compact, end) // self.shape.block_size)
            check(len(table) >= need, f"{name}: {len(table)} blocks for {end} tokens, not {need}")
            check(0 not in table, f"{name} was given the null block")

    def _defer(self, scheduled: dict[str, int]) -> None:
        """Rows of the buffer: a range takes its rows before those decided give back theirs."""
        for name, count in scheduled.items():
            self.rows[name].open_ranges(count)
        taken = sum(sum(row.open.values()) for row in self.rows.values())
        check(taken <= self.deferred, f"{taken} rows deferred, of {self.deferred}")
        decode = all(n == 1 and self.rows[name].computed for name, n in scheduled.items())
        for name, count in scheduled.items():
            reads = self.rows[name].close_ranges(count)
            graph = self.shape.graphs and decode and reads
            check(not graph, f"{name} reads a range in what vLLM takes for a decode step")

    def _write(self, scheduled: dict[str, int]) -> None:
        """Write the step's KV; then what a request brought along from the cache must be right."""
        self._check_owners(scheduled)
        for name, count in scheduled.items():
            row = self.rows[name]
            end = row.computed + count
            for table, _, contents in row.groups(compact=False):
                self.pages.write(table, row.computed, contents[row.computed : end])
        if any(self.compact):
            self._write_compact(scheduled)
        for name, count in scheduled.items():
            row = self.rows[name]
            if row.computed == row.entered:
                self._verify(row)
            row.computed += count

    def _check_owners(self, scheduled: dict[str, int]) -> None:
        owner: dict[int, str] = {}
        size = self.shape.block_size
        for name, count in scheduled.items():
            row = self.rows[name]
            for table, compact in zip(row.tables, self.compact, strict=True):
                start, end = (row.length(compact, n) for n in (row.computed, row.computed + count))
                for block in table[start // size : -(-end // size)] if start < end else ():
                    other = owner.setdefault(block, name)
                    check(other == name, f"{name} and {other} write to a block")

    def _write_compact(self, scheduled: dict[str, int]) -> None:
        """Write the upper layers' KV, pass by pass."""
        names = list(scheduled)
        for requests, first, counts in self._passes(names, scheduled):
            chosen = [
                (self.rows[names[i]], a, n) for i, a, n in zip(requests, first, counts, strict=True)
            ]
            for row, at, count in chosen:
                for table, _, contents in row.groups(compact=True):
                    self.pages.write(table, at, contents[at : at + count])
            for row, at, count in chosen:
                if row.computed == row.entered:
                    self._verify(row, compact=True, length=at + count)

    def _passes(self, names: list[str], scheduled: dict[str, int]) -> Iterator[Any]:
        """What each run of the upper layers computes: requests, first positions, counts."""
        layout = lay_out(
            [
                ScheduledRequest(name, self.rows[name].plan, self.rows[name].computed, count)
                for name, count in scheduled.items()
            ],
            self.shape.budget,
        )
        if layout is None:
            first = [self.rows[name].computed for name in names]
            yield range(len(names)), first, list(scheduled.values())
            return
        self._check_layout(layout, scheduled)
        for one in layout.passes:
            yield one.requests.tolist(), one.first_position.tolist(), one.num_scheduled.tolist()

    def _check_layout(self, layout: StepLayout, scheduled: dict[str, int]) -> None:
        grown = 0
        for name, count in scheduled.items():
            row = self.rows[name]
            grown += row.length(True, row.computed + count) - row.length(True, row.computed)
        rows = sum(one.num_rows for one in layout.passes)
        check(layout.num_compact_rows == rows == grown, f"{rows} rows go up, not {grown}")
        fits = all(one.num_rows <= self.shape.budget for one in layout.passes)
        check(fits, "a pass of the upper layers has more rows than a step")

    def _verify(self, row: Row, compact: bool | None = None, length: int | None = None) -> None:
        """Whether all KV of the computed tokens, or of a part of them, is what it must be."""
        for table, kind, contents in row.groups(compact):
            end = row.length(kind, row.computed) if length is None else length
            wrong = self.pages.differs(table, contents[:end])
            layers = "upper" if kind else "lower"
            check(wrong is None, f"{row.ask.name}: wrong KV of {layers} layers at {wrong}")

    def _answer(self, scheduled: dict[str, int]) -> ModelRunnerOutput:
        if not scheduled:
            return EMPTY_MODEL_RUNNER_OUTPUT
        sampled = []
        for name in scheduled:
            row = self.rows[name]
            complete = row.computed == row.known
            sampled.append([int(said(row.known, 1)[0])] if complete else [])
            row.known += complete
        return ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={name: i for i, name in enumerate(scheduled)},
            sampled_token_ids=sampled,
        )
