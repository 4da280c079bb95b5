"""Runs the arms, engine by engine, and keeps what they answered in a file."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from vllm_dpp.bench.provenance import UNKNOWN, git_state
from vllm_dpp.bench.quality.arms import Arm, Engine
from vllm_dpp.bench.quality.checkpoints import Checkpoint
from vllm_dpp.bench.quality.test_set import TestSet, make_test_set


@dataclass(frozen=True)
class Run:
    """One model on one test set.

    Args:
        checkpoint: the model.
        split: of the test set.
        per_kind: questions of each kind.
        kinds: that are asked.
    """

    checkpoint: Checkpoint
    split: str
    per_kind: int
    kinds: tuple[str, ...]

    def test_set(self) -> TestSet:
        """The same each time."""
        return make_test_set(self.split, self.per_kind, self.kinds)

    @property
    def key(self) -> dict[str, Any]:
        """What an answer depends on besides its arm. The model is known by its weights."""
        return {
            "weights": self.checkpoint.weights,
            "split": self.split,
            "per_kind": self.per_kind,
            "kinds": list(self.kinds),
        }


class AnswerFile:
    """Answers of arms, a line of JSON each. An arm that is in it is not run again.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, run: Run) -> dict[tuple[str, float], dict[str, Any]]:
        """By method and budget, the records of a run: kept, share, right, commit.

        What was added last is passed over if it was cut off: it has no line end.
        """
        if not self.path.exists():
            return {}
        whole = self.path.read_text().rpartition("\n")[0]
        records = [json.loads(line) for line in whole.splitlines()]
        key = run.key
        return {
            (record["method"], record["budget"]): record
            for record in records
            if record["run"] == key
        }

    def add(self, run: Run, arm: Arm, answers: Any, seconds: float) -> None:
        """Appends what an arm answered, with the commit that gave it."""
        commit, is_dirty = git_state()
        record = {
            "run": run.key,
            "commit": f"{commit or UNKNOWN}{'+changes' if is_dirty else ''}",
            "method": arm.method.name,
            "budget": arm.budget,
            **asdict(answers),
            "right": "".join("01"[right] for right in answers.right),
            "seconds": round(seconds, 2),
        }
        text = self.path.read_text() if self.path.exists() else ""
        with self.path.open("a") as file:
            file.truncate(len(text.rpartition("\n")[0]) + 1 if "\n" in text else 0)
            file.write(json.dumps(record) + "\n")


def run_arms(run: Run, arms: Sequence[Arm], file: AnswerFile) -> None:
    """Answers with every arm that `file` lacks, each engine in a process of its own."""
    done = file.read(run)
    missing = [arm for arm in arms if (arm.method.name, arm.budget) not in done]
    context = multiprocessing.get_context("spawn")  # a fork would inherit an initialised vLLM
    for engine in dict.fromkeys(arm.engine for arm in missing):
        own = [arm for arm in missing if arm.engine == engine]
        with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
            pool.submit(_run_engine, run, engine, own, file).result()


def _run_engine(run: Run, engine: Engine, arms: Iterable[Arm], file: AnswerFile) -> None:
    """In a process of its own."""
    from vllm_dpp.bench.quality.engine import QualityEngine

    started = QualityEngine(run.checkpoint, engine, run.test_set())
    for arm in arms:
        began = time.monotonic()
        answers = started.answer(arm)
        seconds = time.monotonic() - began
        file.add(run, arm, answers, seconds)
        right = sum(answers.right) / len(answers.right)
        print(
            f"{run.split}: {arm.method.name} at {arm.budget}: {answers.kept} tokens, "
            f"share {answers.share:.3f}, right {100 * right:.1f} %, {seconds:.0f} s",
            flush=True,
        )


def end_with_parent() -> None:
    """Let this process end when its parent does, however that ends.

    One of a pool would wait for more work from a parent that was killed.
    """

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
