"""The file of answers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_dpp.bench.provenance import git_state  # noqa: E402
from vllm_dpp.bench.quality.arms import Arm, parse_method  # noqa: E402
from vllm_dpp.bench.quality.checkpoints import Checkpoint  # noqa: E402
from vllm_dpp.bench.quality.engine import Answers  # noqa: E402
from vllm_dpp.bench.quality.runs import AnswerFile, Run  # noqa: E402
from vllm_dpp.quality.model import CHECKPOINTS  # noqa: E402

RUN = Run(Checkpoint(CHECKPOINTS[0], 8), "standard", 1, ("colour", "count"))
ANSWERS = Answers(5, 0.4, (True, False))


def arm(budget: float) -> Arm:
    return Arm(parse_method("dpp@3"), budget)


def test_answers_come_back_with_the_commit_that_gave_them(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    assert file.read(RUN) == {}
    file.add(RUN, arm(0.6), ANSWERS, 1.0)
    (found,) = file.read(RUN).values()
    assert (found["kept"], found["right"]) == (5, "10")
    commit, _ = git_state()
    assert found["commit"].startswith(commit or "unknown")
    other = Run(RUN.checkpoint, "dense", RUN.per_kind, RUN.kinds)
    assert file.read(other) == {}


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_answered_again(tmp_path: Path, cut: int) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    for budget in (0.6, 0.4):
        file.add(RUN, arm(budget), ANSWERS, 1.0)
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    assert list(file.read(RUN)) == [("dpp@3", 0.6)]
    file.add(RUN, arm(0.4), ANSWERS, 1.0)
    assert list(file.read(RUN)) == [("dpp@3", 0.6), ("dpp@3", 0.4)]
    lines = file.path.read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line) for line in lines)


def test_the_first_line_cut_off(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.path.write_text('{"run": ')
    assert file.read(RUN) == {}
    file.add(RUN, arm(0.4), ANSWERS, 1.0)
    assert list(file.read(RUN)) == [("dpp@3", 0.4)]


def test_a_benchmark_that_is_killed_leaves_no_process() -> None:
    code = (
        "import os, time, multiprocessing; from concurrent.futures import ProcessPoolExecutor\n"
        "from vllm_dpp.bench.quality.runs import end_with_parent\n"
        "context = multiprocessing.get_context('spawn')\n"
        "pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().decode().strip()
        assert child.exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()
