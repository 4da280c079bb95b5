"""The command line of batches."""

import importlib.util
from pathlib import Path

import pytest

from vllm_dpp import cli
from vllm_dpp.batch.options import OWN, parse
from vllm_dpp.batch.pipeline import in_flight, require_ray
from vllm_dpp.batch.replica import SHAPING, parse_serve

NEEDED = ["model", "--input", "rows.jsonl", "--output", "out"]


def test_three_kinds_of_arguments() -> None:
    options, settings, rest = parse(
        [*NEEDED, "--video_share", "0.3", "--replicas=2", "--max-model-len", "4096", "--dtype=half"]
    )
    assert (options.input, options.output) == (Path("rows.jsonl"), Path("out"))
    assert (options.replicas, options.rows_in_flight, options.format) == (2, 64, "jsonl")
    assert settings == {"video_share": 0.3}
    assert rest == ["model", "--max-model-len", "4096", "--dtype=half"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas must be an integer >= 1, got 0"),
        (["--rows-in-flight", "0"], "--rows-in-flight must be an integer >= 1"),
        (["--max-tokens", "0"], "--max-tokens must be an integer >= 1"),
        (["--gpus-per-replica", "-1"], "--gpus-per-replica must be an integer >= 0"),
        (["--temperature", "-1"], "--temperature must be a number >= 0"),
        (["--format", "csv"], "invalid choice: 'csv'"),
        (["--replicas", "two"], "invalid int value: 'two'"),
    ],
)
def test_bad_numbers(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(["batch", *NEEDED, *arguments]) == 2
    except SystemExit as exit_:
        assert exit_.code == 2
    assert message in capsys.readouterr().err


def test_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["batch", "model"])
    assert "--input, --output" in capsys.readouterr().err


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "ray" else found(n))
    with pytest.raises(ValueError, match=r"pip install 'vllm-dpp\[ray\]'"):
        require_ray()


def test_no_flag_of_ours_hides_one_of_vllms() -> None:
    pytest.importorskip("vllm")
    served = vars(parse_serve(["model"]))
    assert not set(OWN) & served.keys()
    assert set(SHAPING) <= served.keys()


def test_what_a_batch_takes_of_serve() -> None:
    pytest.importorskip("vllm")
    assert parse_serve(["model"]).allowed_local_media_path == "/"
    assert (
        parse_serve(["model", "--allowed-local-media-path", "/v"]).allowed_local_media_path == "/v"
    )
    for refused in (["--data-parallel-size", "2"], ["--headless"]):
        with pytest.raises(ValueError, match="not for batches: --replicas is"):
            parse_serve(["model", *refused])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 1000])
def test_rows_in_flight(rows: int) -> None:
    size, calls = in_flight(rows)
    assert rows <= size * calls < rows + size
    assert calls >= min(rows, 4)
