"""The answers' folder, whenever a run ended."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from vllm_dpp.batch.answers import LINES, Answers, Record
from vllm_dpp.batch.replica import COLUMNS
from vllm_dpp.batch.rows import Row

SETTINGS = {"model": "m", "hf_overrides": {"architectures": ["A"]}, "max_tokens": 8}
ROWS = [Row(name, f"/{name}.mp4", "What?", video_share=0.5) for name in "abc"]


def answered(row: Row, text: str | None = "a cat", error: str | None = None) -> Record:
    return row.as_dict() | dict.fromkeys(COLUMNS) | {"answer": text, "error": error}


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with Answers(tmp_path, SETTINGS) as answers:
        assert answers.missing(ROWS) == ROWS
        assert answers.add([answered(ROWS[0], "\u2028\x85\r\ud800 “”")]) == 1
        assert answers.add([answered(ROWS[0], "later"), answered(ROWS[1], None, "bad")]) == 1
    with Answers(tmp_path, dict(reversed(SETTINGS.items()))) as answers:
        assert answers.records["a"]["answer"] == "\u2028\x85\r\ud800 “”"
        assert answers.missing(ROWS) == ROWS[2:]
        assert answers.num_errors == 1
        answers.forget_errors()
        assert answers.missing(ROWS) == ROWS[1:]
    assert len((tmp_path / LINES).read_text().splitlines()) == 1


def test_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    with Answers(tmp_path, SETTINGS) as answers:
        answers.add(answered(row) for row in ROWS[:2])
    whole = (tmp_path / LINES).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        (tmp_path / LINES).write_bytes(whole[:length])
        with Answers(tmp_path, SETTINGS) as answers:
            assert answers.missing(ROWS) == ROWS[(length >= first) + (length == len(whole)) :]
            answers.add(answered(row) for row in answers.missing(ROWS[:2]))
        assert (tmp_path / LINES).read_bytes() == whole


def test_answers_to_something_else_are_not_gone_on_from(tmp_path: Path) -> None:
    with Answers(tmp_path, SETTINGS) as answers:
        answers.add([answered(ROWS[0]), answered(ROWS[1], None, "bad")])
    with pytest.raises(ValueError, match="max_tokens was 8, is 9; give another --output"):
        Answers(tmp_path, SETTINGS | {"max_tokens": 9})
    with Answers(tmp_path, SETTINGS) as answers:
        with pytest.raises(ValueError, match=r"row 'a' with video_share 0\.5, not 0\.3"):
            answers.missing([Row("a", "/a.mp4", "What?", video_share=0.3)])
        assert answers.missing([Row("b", "/b.mp4", "Why?")]) == []
    (tmp_path / LINES).write_text("{}\n")
    with pytest.raises(ValueError, match="has a line that is no answer"):
        Answers(tmp_path, SETTINGS)


def test_two_runs_at_once(tmp_path: Path) -> None:
    with (
        Answers(tmp_path, SETTINGS),
        pytest.raises(ValueError, match="another run writes to .*: wait for it, or stop it"),
    ):
        Answers(tmp_path, SETTINGS)
    Answers(tmp_path, SETTINGS).__exit__()


def test_a_table_in_the_order_of_the_rows(tmp_path: Path) -> None:
    with Answers(tmp_path, SETTINGS) as answers:
        answers.add([answered(ROWS[2]), answered(ROWS[0], None, "bad")])
        path = answers.write_parquet(ROWS)
    table = pyarrow.parquet.read_table(path)
    assert table.column("id").to_pylist() == ["a", "c"]
    assert table.column("error").to_pylist() == ["bad", None]
    assert table.schema.field("prompt_tokens").type == "int64"
    assert json.loads((tmp_path / LINES).read_text().splitlines()[0])["id"] == "c"
