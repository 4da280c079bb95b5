"""The benchmark of bookkeeping, in small."""

import json
from pathlib import Path

import pytest

from vllm_dpp.bench import growth


def test_the_median_round_counts() -> None:
    rounds = [{"8": {"schedule": seconds, "step": 9 - seconds}} for seconds in (3.0, 1.0, 2.0)]
    assert growth.median_of(rounds) == {"8": {"schedule": 2.0, "step": 7.0}}


def test_no_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "growth.json"
    small = ["--running", "2", "--prompts", "1000", "2000", "--rounds", "1", "--json", str(output)]
    assert growth.main(small) == 0
    assert "of it" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    for arm, parts in (("stock", 3), ("dpp", 4)):
        assert set(document["steps"][arm]) == {"2"}
        for found in document["steps"][arm].values():
            assert len(found) == parts and 0 < found["schedule"] < found["step"]
    for found in document["prompts"].values():
        assert min(found.values()) > 0
