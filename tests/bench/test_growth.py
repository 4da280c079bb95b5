"""The benchmark of bookkeeping, in small."""

import json
from pathlib import Path

import pytest

from vllm_dpp.bench import growth


def test_steps_are_paired() -> None:
    stock = [{"schedule": seconds, "update": 1.0} for seconds in (10.0, 50.0, 20.0)]
    ours = [{"schedule": seconds, "update": 2.0, "layout": 0.5} for seconds in (13.0, 52.0, 90.0)]
    assert growth.more_seconds({"stock": stock, "dpp": ours}) == 3 + 1 + 0.5


@pytest.mark.parametrize(("steps", "named"), [("0", "at least 1"), ("401", "at most 400")])
def test_too_few_steps_or_too_many(
    steps: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--steps", steps])
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "growth.json"
    small = ["--running", "2", "--prompts", "1000", "2000", "--steps", "3", "--json", str(output)]
    assert growth.main(small) == 0
    assert "of it" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    for arm, parts in (("stock", 3), ("dpp", 4)):
        steps = document["steps"]["2"][arm]
        assert len(steps) == 3
        for found in steps:
            assert len(found) == parts and 0 < found["schedule"] < found["step"]
    for found in document["prompts"].values():
        assert min(found.values()) > 0
