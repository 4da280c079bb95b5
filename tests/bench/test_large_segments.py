"""The benchmark of long segments, on short ones."""

import json
from pathlib import Path

import pytest

from vllm_dpp.bench import large_segments

SMALL = ["--lengths", "16", "40", "--dim", "24", "--projections", "8", "--repeats", "2"]


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert large_segments.main([*SMALL, "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "exact / projected" in printed and "alone / shared" in printed
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    for row in document["projected"]:
        [found] = row["projections"].values()
        assert len(row["exact_seconds"]) == len(found["seconds"]) == 2
        assert 0 < found["same_share"] <= 1 and found["log_det_lost_per_token"] >= -1e-9
    assert [row["same"] for row in document["shared"]] == [True, True]


def test_bad_sizes_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        large_segments.main(["--projections", "0"])
    assert stopped.value.code == 2
    assert "--projections must be at least 4" in capsys.readouterr().err
