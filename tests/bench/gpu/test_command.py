"""The command for a GPU, in small and without one."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dpp.bench.gpu import command, marked_tests
from vllm_dpp.bench.gpu.model import PREFILL, TEXT

CLEAN = ("0" * 40, False)


def run(out: Path, *arguments: str) -> int:
    return command.main(["--small", "--out", str(out), *arguments])


def read(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / f"{stage}.json").read_text())


def rewrite(out: Path, stage: str, **changes: Any) -> None:
    document = read(out, stage) | changes
    document["provenance"] |= {"commit": CLEAN[0], "dirty": CLEAN[1]}
    (out / f"{stage}.json").write_text(json.dumps(document))


def test_kernels_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole result of the same commit is not made again; half of one is."""
    assert run(tmp_path, "--stages", "kernels") == 0
    document = read(tmp_path, "kernels")
    assert document["is_complete"] and set(document["runs"]) == {"128"}
    report = (tmp_path / command.REPORT).read_text()
    assert "## kernels" in report and "256 in segments of 128" in report
    monkeypatch.setattr(command, "git_state", lambda: CLEAN)
    rewrite(tmp_path, "kernels")
    capsys.readouterr()
    assert run(tmp_path, "--stages", "kernels") == 0
    assert "kernels: done before" in capsys.readouterr().out
    rewrite(tmp_path, "kernels", is_complete=False)
    assert not command._is_done(tmp_path / "kernels.json")


def test_a_stage_that_takes_too_long_does_not_stop_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--stages", "kernels", "--stage-seconds", "0") == 1
    assert "kernels: more than 0 s" in capsys.readouterr().out
    assert (tmp_path / command.REPORT).exists()


@pytest.mark.slow
@pytest.mark.e2e
def test_model(tmp_path: Path) -> None:
    assert run(tmp_path, "--stages", "model") == 0
    document = read(tmp_path, "model")
    assert document["is_complete"]
    assert list(document["workloads"]) == [TEXT, PREFILL, "2 at once"]
    prefill = document["workloads"][PREFILL]["arms"]
    assert prefill["two-stages@0.4"]["prompt_tokens"] < prefill["stock"]["prompt_tokens"]
    assert all(arm["ttft"] > 0 for arm in prefill.values())
    assert document["expected_prefill_speedup"] == {"stock": 1, "two-stages@0.4": 2.5}


def test_outcomes_of_tests(tmp_path: Path) -> None:
    """One that fails is in the report, and the stage is not done."""
    output, test = tmp_path / "tests.json", tmp_path / "test_it.py"
    test.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    arguments = ["--select", "not gpu", "--paths", str(test), "--output", str(output)]
    assert marked_tests.main(arguments) == 1
    document = read(tmp_path, "tests")
    assert sorted(document["outcomes"].values()) == ["failure", "passed"]
    assert not document["is_complete"]
    assert "1 failure, 1 passed" in marked_tests.render(document)
