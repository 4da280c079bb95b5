"""Drive one in-process engine step by step and read its own counts."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dpp.bench.throughput.workload import Workload

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.multimodal.inputs import PlaceholderRange
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_dpp.bench.throughput.selection_timer import SelectionTimer


@dataclass(slots=True)
class Round:
    """What one arm did with one workload.

    Args:
        seconds: Wall time of all engine steps.
        cpu_seconds: Processor time of the same, which other work on the machine disturbs less.
        submit_seconds: Wall time of the front end (video processing, tokenising), before the steps.
        steps: Steps that scheduled at least one token.
        step_seconds: Wall time of each call of ``LLMEngine.step``, in order.
        prompt_tokens: [num_requests] prompt tokens that enter the decoder.
        video_tokens: [num_requests] video tokens among them.
        video_ends: [num_requests] prompt tokens up to the end of the last video.
        outputs: [num_requests][output_tokens] token ids.
        ttft: [num_requests] seconds from the first step to the first token.
        peak_running: Most requests in vLLM's running queue.
        peak_prefilled: Most of them that hold the KV of their whole prompt. It is less where a
            request joins the queue with a first chunk of its prompt.
        saturated_running: Mean requests in a step while others waited; 0 if none ever did.
        preemptions: Requests sent back to the queue.
        group_blocks: [groups] mean KV blocks of a request at the end of its prefill.
        selection: Seconds of ``SelectionTimer.take`` and ``step_seconds`` of the same steps.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    submit_seconds: float = 0.0
    steps: int = 0
    step_seconds: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    video_tokens: list[int] = field(default_factory=list)
    video_ends: list[int] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    peak_running: int = 0
    peak_prefilled: int = 0
    saturated_running: float = 0.0
    preemptions: int = 0
    group_blocks: list[float] = field(default_factory=list)
    selection: dict[str, float] = field(default_factory=dict)

    @property
    def mean_step_ms(self) -> float:
        return 1000 * self.seconds / max(self.steps, 1)

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def blocks_per_request(self) -> float:
        return sum(self.group_blocks)


class ScheduleRecorder:
    """Stands before ``scheduler.schedule`` and counts; the same work in every arm."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self._schedule = scheduler, scheduler.schedule
        scheduler.schedule = self
        self.reset()

    def reset(self) -> None:
        self.steps = self.peak_running = self.peak_prefilled = self.preemptions = 0
        self.saturated: list[int] = []
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.videos: dict[str, list[PlaceholderRange]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0:
            return output
        running = len(self.scheduler.running)
        prefilled = sum(map(_is_prefilled, self.scheduler.running))
        self.steps += 1
        self.peak_prefilled = max(self.peak_prefilled, prefilled)
        self.peak_running = max(self.peak_running, running)
        self.preemptions += len(output.preempted_req_ids or ())
        if self.scheduler.waiting:
            self.saturated.append(running)
        for request_id in output.num_scheduled_tokens:
            if request_id not in self.blocks:
                self._record_prefill(request_id)
        return output

    def _record_prefill(self, request_id: str) -> None:
        request = self.scheduler.requests[request_id]
        if not _is_prefilled(request):
            return
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        self.blocks[request_id] = tuple(map(len, blocks))
        self.videos[request_id] = [
            feature.mm_position for feature in request.mm_features if feature.modality == "video"
        ]


def _is_prefilled(request: Any) -> bool:
    return request.num_computed_tokens >= request.num_prompt_tokens


class Driver:
    """Runs workloads on one engine.

    Args:
        engine: An engine whose scheduler lives in this process.
        extra_args: Request arguments of the arm.
        timer: Times the selection, in arms that may prune.
    """

    def __init__(
        self,
        engine: "LLMEngine",
        extra_args: dict[str, Any] | None,
        timer: "SelectionTimer | None",
    ) -> None:
        self.engine, self.extra_args, self.timer = engine, extra_args, timer
        self.recorder = ScheduleRecorder(engine.engine_core.engine_core.scheduler)

    def run(self, workload: Workload, wait: Callable[[], object] = lambda: None) -> Round:
        """Submit everything, then step until all is done. Caches are empty at the start.

        Args:
            workload: What to submit.
            wait: Called before each step; its time does not count.
        """
        prompts = workload.prompts(self.engine.get_tokenizer())
        self._reset()
        if workload.encoded_before:
            self._step_through(Round(), self._submit(prompts, workload), lambda: None)
            self.engine.reset_prefix_cache()
            self.recorder.reset()
        done = Round()
        start = time.perf_counter()
        ids = self._submit(prompts, workload)
        done.submit_seconds = time.perf_counter() - start
        gc.collect()
        self._step_through(done, ids, wait)
        self._read_counts(done)
        return done

    def _reset(self) -> None:
        self.engine.reset_prefix_cache()
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()
        self.recorder.reset()
        if self.timer is not None:
            self.timer.take()

    def _submit(self, prompts: Sequence[dict[str, Any]], workload: Workload) -> list[str]:
        ids = [f"{workload.seed}-{i}" for i in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.engine.add_request(request_id, prompt, self._params(workload))
        return ids

    def _params(self, workload: Workload) -> "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=workload.output_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=self.extra_args,
        )

    def _step_through(self, done: Round, ids: Sequence[str], wait: Callable[[], object]) -> None:
        first: dict[str, float] = {}
        finished: dict[str, Any] = {}
        selection_steps = 0.0
        while self.engine.has_unfinished_requests():
            wait()
            passes = 0 if self.timer is None else self.timer.num_passes
            cpu_start, start = time.process_time(), time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            done.cpu_seconds += time.process_time() - cpu_start
            done.step_seconds.append(seconds)
            done.seconds += seconds
            if self.timer is not None and self.timer.num_passes > passes:
                selection_steps += seconds
            for output in outputs:
                first.setdefault(output.request_id, done.seconds)
                if output.finished:
                    finished[output.request_id] = output
        done.ttft = [first[i] for i in ids]
        done.prompt_tokens = [len(finished[i].prompt_token_ids) for i in ids]
        done.outputs = [list(finished[i].outputs[0].token_ids) for i in ids]
        if self.timer is not None:
            done.selection = {**self.timer.take(), "step_seconds": selection_steps}

    def _read_counts(self, done: Round) -> None:
        recorder = self.recorder
        done.steps, done.preemptions = recorder.steps, recorder.preemptions
        done.peak_running, done.peak_prefilled = recorder.peak_running, recorder.peak_prefilled
        if recorder.saturated:
            done.saturated_running = sum(recorder.saturated) / len(recorder.saturated)
        groups = zip(*recorder.blocks.values(), strict=True)
        done.group_blocks = [sum(counts) / len(counts) for counts in groups]
        for videos in recorder.videos.values():
            done.video_tokens.append(sum(video.length for video in videos))
            ends = [video.offset + video.length for video in videos]
            done.video_ends.append(max(ends, default=0))
