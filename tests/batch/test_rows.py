"""What a batch reads: folders and tables, and what is wrong with single rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from vllm_dpp.batch.rows import Row, read_rows

GOOD = {"video": "a.mp4", "question": "What?"}


def lines(path: Path, *records: Any) -> Path:
    """A table in JSON lines; a text stands there as it is."""
    texts = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(text + "\n" for text in texts))
    return path


def test_a_folder_is_read_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "deep/a.MKV", "notes.txt"):
        (tmp_path / name).touch()
    assert read_rows(tmp_path, "What?") == [
        Row("b.mp4", str(tmp_path / "b.mp4"), "What?"),
        Row("deep/a.MKV", str(tmp_path / "deep/a.MKV"), "What?"),
    ]


def test_a_table_says_what_it_wants_a_row(tmp_path: Path) -> None:
    table = lines(
        tmp_path / "rows.jsonl",
        GOOD,
        {"id": 0, "video": "/b c.mp4", "question": "Why?\u2028", "video_share": 0.2, "other": [1]},
        {"id": "x", "video": "https://host/c.mp4", "retention_ratio": 1},
    )
    assert read_rows(table, "How?") == [
        Row("a.mp4 What?", str(tmp_path / "a.mp4"), "What?"),
        Row("0", "/b c.mp4", "Why?\u2028", video_share=0.2),
        Row("x", "https://host/c.mp4", "How?", retention_ratio=1.0),
    ]


def test_parquet_lacks_values_as_null_and_as_nan(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "video": ["a.mp4", "b.mp4"],
            "question": [None, "What?"],
            "video_share": [float("nan"), 0.5],
            "retention_ratio": pyarrow.array([None, None], pyarrow.float64()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet", "How?")
    assert (first.question, first.video_share, first.retention_ratio) == ("How?", None, None)
    assert (second.question, second.video_share) == ("What?", 0.5)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("{torn", "must be an object with video and question, got '{torn'"),
        ('["a.mp4"]', "must be an object"),
        ({"video": "a.mp4"}, "question must be a text, got None"),
        ({"question": "What?"}, "video must be a text, got None"),
        ({"video": "", "question": "What?"}, "video must be a text, got ''"),
        ({"video": ["a.mp4"], "question": "What?"}, "video must be a text"),
        ({"video": "a.mp4", "question": "\ud83d"}, "question must be a text"),
        (GOOD | {"video_share": "0.2"}, "video_share must be a number, got '0.2'"),
        (GOOD | {"retention_ratio": True}, "retention_ratio must be a number, got True"),
    ],
)
def test_the_fault_of_a_row_is_its_own(tmp_path: Path, record: Any, fault: str) -> None:
    bad, good = read_rows(lines(tmp_path / "rows.jsonl", record, GOOD))
    assert bad.id == "row 1"
    assert fault in (bad.fault or "")
    assert good.fault is None


def test_a_row_with_a_fault_keeps_its_id(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "rows.jsonl", {"id": "x", "video": 3}, GOOD))
    assert rows[0].id == "x"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "has no rows"),
        ("rows.jsonl", "{}\n{}\n", "row 1: video must be a text, got None"),
        ("rows.jsonl", b"\xff\xfe", "not UTF-8"),
        ("rows.csv", "video,question\n", "must be a folder of videos, a .parquet or a .jsonl"),
        ("rows.parquet", "no parquet", "no parquet file"),
    ],
)
def test_a_table_that_cannot_be_asked(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_two_rows_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two rows have the id 'a\.mp4 What\?'; give each its"):
        read_rows(lines(tmp_path / "rows.jsonl", GOOD, GOOD))


def test_a_folder_needs_videos_and_a_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no videos"):
        read_rows(tmp_path, "What?")
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="needs --question"):
        read_rows(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "rows.jsonl")
