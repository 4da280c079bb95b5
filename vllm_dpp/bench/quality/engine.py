"""One vLLM engine, in this process, that answers the test set arm by arm."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_dpp.bench.evs_on_cpu import mend_evs_on_cpu
from vllm_dpp.bench.quality.arms import FRAMES, RESOLUTION, Arm, Engine
from vllm_dpp.bench.quality.checkpoints import ARCHITECTURE, Checkpoint
from vllm_dpp.bench.quality.test_set import Asked, TestSet, fewer_frames, smaller_frames
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.quality.packing import AFTER_VIDEO, BEFORE_VIDEO, chat_text
from vllm_dpp.quality.shapes import CELL
from vllm_dpp.serving.cost_model import kv_share
from vllm_dpp.serving.front.families import family_of
from vllm_dpp.serving.request_plan import ENTRY_RATIO_ARG, RECORD_ARG, RETENTION_RATIO_ARG
from vllm_dpp.serving.settings import SECTION
from vllm_dpp.show import KeptVideo
from vllm_dpp.toy.tokenizer import VIDEO_PAD
from vllm_dpp.toy.video import Frames, vllm_video

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    "block_size": 32,
    "enable_prefix_caching": False,  # where it is on, whole blocks are pruned, not exact budgets
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
}


AT_ONCE = 128
"""Requests that an engine is given: the pixels of a film are 20 MB."""


@dataclass(frozen=True)
class Answers:
    """What one arm answered.

    Args:
        kept: tokens of a video from layer K on, or that entered the decoder.
        share: of the video's LM prefill and KV that was really left.
        right: by question.
    """

    kept: int
    share: float
    right: tuple[bool, ...]


class QualityEngine:
    """A running engine.

    Args:
        checkpoint: the model.
        engine: what it must be started with.
        test_set: what it is asked.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine, test_set: TestSet) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        from vllm import LLM  # reads the environment

        from vllm_dpp.bench.quality import stock_rules

        stock_rules.register()
        self.test_set, self.num_layers = test_set, checkpoint.num_layers
        self._prunes = engine.layer is not None
        self._records = TemporaryDirectory(prefix="vllm-dpp-quality-")
        own_args = _own_args(engine, self._records.name)
        self._llm = LLM(str(checkpoint.folder), **ENGINE_ARGS, **own_args)
        self._worker: Any = self._llm.llm_engine.model_executor.driver_worker.worker
        mend_evs_on_cpu(self._worker)
        self._token_id = self._llm.get_tokenizer().convert_tokens_to_ids(VIDEO_PAD)

    def answer(self, arm: Arm) -> Answers:
        """Asks everything at one method and budget.

        Raises:
            RuntimeError: the engine did not keep as many tokens as the method says.
        """
        outputs = self._ask(arm, self.test_set.asked)
        right = tuple(
            output.outputs[0].text.strip() == item.question.answer
            for output, item in zip(outputs, self.test_set.asked, strict=True)
        )
        answers = self._answers(arm, outputs[0].prompt_token_ids.count(self._token_id), right)
        if self._prunes and (kept := int(self.kept(arm, 0)[0].kept.sum())) != answers.kept:
            raise RuntimeError(f"{arm}: {kept} tokens of a video were kept, not {answers.kept}")
        return answers

    def kept(self, arm: Arm, index: int) -> tuple[KeptVideo, str]:
        """What is kept for one question by an engine that prunes, and the answer."""
        (output,) = self._ask(arm, [self.test_set.asked[index]], record=True)
        # Another thread writes them, one stage after the other.
        self._worker.model_runner.get_model().pruning.records.flush()
        (found,) = Path(self._records.name).glob("*.kept.json")
        video = KeptVideo.load(found)
        found.unlink()
        return video, output.outputs[0].text.strip()

    def _ask(self, arm: Arm, asked: Sequence[Asked], record: bool = False) -> list[Any]:
        """vLLM's outputs, of so many at once as there is memory for their pixels."""
        from vllm import SamplingParams

        extra: dict[str, Any] = {}
        entry_ratio, ratio = arm.method.ratios(arm.budget, self.num_layers)
        if self._prunes:
            extra = {RETENTION_RATIO_ARG: ratio, RECORD_ARG: record, **arm.choices}
        sampling = SamplingParams(max_tokens=1, temperature=0.0, extra_args=extra or None)
        outputs = []
        for first in range(0, len(asked), AT_ONCE):
            prompts = list(_prompts(self.test_set, asked[first : first + AT_ONCE], arm))
            if arm.method.entry is not None:
                for prompt in prompts:
                    prompt["mm_processor_kwargs"] = {ENTRY_RATIO_ARG: entry_ratio}
            outputs += self._llm.generate(prompts, sampling, use_tqdm=False)
        return outputs

    def _answers(self, arm: Arm, entered: int, right: tuple[bool, ...]) -> Answers:
        frames, height, width, _ = self.test_set.videos[0].shape
        total = frames // 2 * (height // CELL) * (width // CELL)
        if arm.method.selector is None:
            return Answers(entered, entered / total, right)
        kept = num_kept(entered, arm.method.ratios(arm.budget, self.num_layers)[1])
        share = kv_share(arm.method.layer or 0, self.num_layers, kept / entered)
        return Answers(kept, share * entered / total, right)


def _own_args(engine: Engine, records: str) -> dict[str, Any]:
    if engine.layer is not None:
        settings = {"prune_layer": engine.layer, "record_dir": records, **dict(engine.settings)}
        return {
            "hf_overrides": {"architectures": [family_of(ARCHITECTURE).variant]},
            "additional_config": {SECTION: settings},
        }
    if engine.evs_share < 1:
        rate = round(1 - engine.evs_share, 6)
        # A chunk that ends at <|vision_start|> ends stock vLLM (recompute_mrope_positions).
        whole = {"enable_chunked_prefill": False}
        return {"video_pruning_rate": rate, "video_pruning_method": "evs", **whole}
    return {}


def _prompts(test_set: TestSet, asked: Sequence[Asked], arm: Arm) -> Iterator[dict[str, Any]]:
    videos: dict[int, tuple[Frames, float]] = {}
    for item in asked:
        if item.video not in videos:
            videos[item.video] = _shown(test_set.videos[item.video], test_set.fps, arm)
        frames, fps = videos[item.video]
        text = BEFORE_VIDEO + VIDEO_PAD + AFTER_VIDEO + chat_text(item.chat)
        name = f"{test_set.split} {item.video} {frames.shape} {fps}"
        yield {
            "prompt": text,
            "multi_modal_data": {"video": [vllm_video(frames, fps)]},
            "multi_modal_uuids": {"video": [name]},
        }


def _shown(frames: Frames, fps: float, arm: Arm) -> tuple[Frames, float]:
    if arm.method.name == FRAMES:
        return fewer_frames(frames, fps, arm.budget)
    if arm.method.name == RESOLUTION:
        return smaller_frames(frames, arm.budget), fps
    return frames, fps
