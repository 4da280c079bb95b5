"""The process behind an :class:`~tests.engines.host.EngineHost`: one engine at a time."""

import gc
import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.engines import runners
from tests.engines.traffic import Answer, Arrival, Traffic
from vllm_dpp.serving.front.families import family_of


def serve(connection: Any, runner: str) -> None:
    """Answer (method, arguments) messages until ``stop``; errors travel back as text."""
    runners.choose(runner)
    worker = EngineWorker(runner)
    while True:
        try:
            name, args, kwargs = connection.recv()
        except EOFError:
            name = "stop"
        if name == "stop":
            worker.unload()
            return
        try:
            connection.send(("ok", getattr(worker, name)(*args, **kwargs)))
        except Exception as error:
            connection.send(("error", "".join(traceback.format_exception(error))))


@contextmanager
def frozen_as_it_is() -> Iterator[None]:
    """Collections look at what an engine has made alone.

    vLLM freezes the heap when an engine has started and thaws all of it when it ends, and then
    collects nine times: half of the time that a small engine takes is spent on imported modules.
    """
    with patch.object(gc, "freeze", int), patch.object(gc, "unfreeze", int):
        yield


class EngineWorker:
    """Builds engines in this process and drives them step by step."""

    def __init__(self, runner: str) -> None:
        self.llm: Any = None
        self.runner = runner

    def load(self, checkpoint: str, dpp: dict[str, Any] | None, **engine_args: Any) -> None:
        """Start an engine; ``dpp`` are our settings, ``None`` starts the stock model."""
        from vllm import LLM

        self.unload()
        plugin: dict[str, Any] = {}
        if dpp is not None:
            config = json.loads((Path(checkpoint) / "config.json").read_text())
            variant = family_of(config["architectures"][0]).variant
            plugin["hf_overrides"] = {"architectures": [variant]}
            plugin["additional_config"] = {"dpp": dpp}
        defaults = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_batched_tokens": 4096,
            "max_num_seqs": 64,
            "block_size": 32,
            "enable_prefix_caching": False,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": 256 * 2**20,
            "seed": 0,
            "limit_mm_per_prompt": {"video": 4, "image": 4},
        }
        if self.runner == "cuda":
            defaults["gpu_memory_utilization"] = 0.08  # so that others may run beside it
            if engine_args.get("dtype", defaults["dtype"]) == "float32":
                defaults["attention_backend"] = "TRITON_ATTN"
        arguments = defaults | plugin | engine_args
        with frozen_as_it_is():
            self.llm = LLM(checkpoint, **arguments)

    def unload(self) -> None:
        if self.llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        with frozen_as_it_is():
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()
        gc.freeze()  # nearly all that is left is imported: later collections may skip it

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def model(self) -> Any:
        """The model, or ``None`` where the workers are processes of their own."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        driver = getattr(executor, "driver_worker", None)
        return None if driver is None else driver.worker.model_runner.get_model()

    def run(self, arrivals: Sequence[Arrival]) -> Traffic:
        """Play requests against the engine, abort those that say so, and look inside."""
        from vllm.exceptions import VLLMValidationError

        engine, probe = self.llm.llm_engine, SchedulerProbe(self.scheduler)
        waiting = sorted(arrivals, key=lambda a: a.step)
        leaving: list[tuple[int, str]] = []
        answers: dict[str, Answer] = {}
        step = 0
        try:
            while waiting or engine.has_unfinished_requests():
                while waiting and waiting[0].step <= step:
                    arrival = waiting.pop(0)
                    try:
                        engine.add_request(
                            arrival.name,
                            arrival.prompt,
                            arrival.sampling_params(),
                            lora_request=arrival.lora_request(),
                            priority=arrival.priority,
                        )
                    except VLLMValidationError as error:
                        answers[arrival.name] = Answer(error=str(error))
                        continue
                    if arrival.abort_after is not None:
                        leaving.append((step + arrival.abort_after, arrival.name))
                leaving, due = (
                    [x for x in leaving if x[0] > step],
                    [name for when, name in leaving if when <= step],
                )
                engine.abort_request(due)
                for output in engine.step():
                    if output.finished:
                        answers[output.request_id] = Answer.of(output)
                step += 1
        finally:
            probe.remove()
        self._tell_workers()
        self._flush_records()
        return Traffic(answers=answers, steps=step, **probe.findings(), **self._leftovers())

    def _leftovers(self) -> dict[str, int]:
        scheduler = self.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        left = [
            len(getattr(scheduler, "planned", ())),
            sum(map(len, scheduler.encoder_cache_manager.cached.values())),
        ]
        if hasattr(scheduler, "deferred_rows"):
            left.append(len(scheduler.deferred_rows.held))
        context = getattr(self.model, "pruning", None)
        if context is not None:
            left += [len(context.requests), context.buffer.num_taken]
        return {
            "blocks_held": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "plans_left": sum(left),
        }

    def _tell_workers(self) -> None:
        """One more step, in which the workers hear of the last finished requests."""
        self.llm.llm_engine.engine_core.engine_core.step_fn()

    def _flush_records(self) -> None:
        """Let the files be there when a test looks for them."""
        pruning = getattr(self.model, "pruning", None)
        if pruning is not None:
            pruning.records.flush()

    def skip_admission(self) -> None:
        """Let every request through to the scheduler."""
        from vllm_dpp.serving.front import admission

        admission.check_engine_request = lambda request, settings: None

    def kept(self, folder: str, name: str) -> dict[int, list[int] | None]:
        """Kept indices of a request's videos, by first position, from its record.

        ``None`` for one that came from the prefix cache.
        """
        return {video["start"]: video.get("keep") for video in self.record(folder, name)}

    def record(self, folder: str, name: str) -> list[dict[str, Any]]:
        """The videos of a request's record, in order of position."""
        (path,) = Path(folder).glob(f"{name}-*.kept.json")
        return json.loads(path.read_text())["videos"]

    def rows_taken(self) -> int:
        """Rows of the range buffer that a request holds."""
        return self.model.pruning.buffer.num_taken

    def profiled_workspace(self) -> int:
        """Bytes that vLLM's memory profile holds for selections."""
        selector, seen = self.model.language_model.model.selector, []
        inner = selector.bytes_at_once
        selector.bytes_at_once = lambda *args: seen.append(inner(*args)) or seen[-1]
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        executor.driver_worker.worker.model_runner.profile_run()
        selector.bytes_at_once = inner
        return seen[0]

    def evict(self, kind: str, index: int) -> None:
        """Drop one block of the lower or upper groups, and its copies, from the prefix cache."""
        from vllm.v1.core.kv_cache_utils import get_group_id

        from vllm_dpp.serving.engine.kv_cache import CompactAttentionManager

        manager = self.scheduler.kv_cache_manager
        groups = [
            i
            for i, one in enumerate(manager.coordinator.single_type_managers)
            if isinstance(one, CompactAttentionManager) == (kind == "upper")
        ]
        blocks = [
            block
            for block in manager.block_pool.blocks
            if block.block_hash is not None and get_group_id(block.block_hash) in groups
        ]
        chosen = list(dict.fromkeys(block.block_hash for block in blocks))[index]
        manager.evict_blocks({b.block_id for b in blocks if b.block_hash == chosen})

    def forget_encoder_outputs(self) -> None:
        """Let every image and video be encoded anew."""
        self.llm.llm_engine.engine_core.reset_encoder_cache()

    def reload(self, checkpoint: str) -> None:
        """Take the weights of another checkpoint, as after a step of training."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
        self.llm.llm_engine.engine_core.reset_encoder_cache()
        assert self.llm.reset_prefix_cache(), "blocks are still held"

    def sleep(self, level: int) -> None:
        """Give the GPU's memory back, and take it again; level 2 forgets the weights as well."""
        self.llm.sleep(level=level)
        self.llm.wake_up()
        if level == 2:
            self.llm.collective_rpc("reload_weights")

    def force_kept(self, kept: list[list[int]] | None) -> None:
        """Let the next videos keep these indices, in order, whatever the selection says."""
        import torch

        from vllm_dpp.pruning.pruner import keep_indices

        selector = self.model.language_model.model.selector
        if kept is None:
            selector.select = keep_indices
            return
        queue = [torch.tensor(indices) for indices in kept]
        selector.select = lambda videos, config: [queue.pop(0) for _ in videos]

    def force_entering(self, chosen: list[list[int]]) -> None:
        """Let these tokens of the next videos enter, in order, whatever the selection says."""
        import torch

        from vllm_dpp.serving.worker.models import entry

        self.forget_encoder_outputs()
        queue = [torch.tensor(indices) for indices in chosen]
        entry.keep_indices = lambda videos, config: [queue.pop(0) for _ in videos]

    def play_graphs(self) -> None:
        """Let the steps run as piecewise CUDA graphs would; ``replays`` counts them."""
        from tests.engines.graphs import play_graphs

        self.played = play_graphs(self.model.language_model.model)

    def replays(self) -> list[int]:
        """Of each stack."""
        return [graph.replays for graph in self.played]


class SchedulerProbe:
    """Reads the scheduler after every step, without changing what it does."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.inner = scheduler.schedule
        self.preemptions = self.peak_running = self.working_steps = 0
        self.first_steps: dict[str, int] = {}
        self.blocks: dict[str, tuple[int, ...]] = {}
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.preemptions += len(output.preempted_req_ids or ())
        self.peak_running = max(self.peak_running, len(self.scheduler.running))
        self.working_steps += output.total_num_scheduled_tokens > 0
        for request_id in output.num_scheduled_tokens:
            self.first_steps.setdefault(request_id.rsplit("-", 1)[0], self.working_steps)
        for request in self.scheduler.running:
            ids = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            name = request.request_id.rsplit("-", 1)[0]
            self.blocks.setdefault(name, tuple(len(group) for group in ids))
        return output

    def remove(self) -> None:
        del self.scheduler.schedule

    def findings(self) -> dict[str, Any]:
        return {
            "preemptions": self.preemptions,
            "peak_running": self.peak_running,
            "working_steps": self.working_steps,
            "first_steps": self.first_steps,
            "first_blocks": self.blocks,
        }
