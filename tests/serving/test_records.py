"""Record files: names that stay in their folder, turns that add up, disks that fail."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_dpp.serving.records import (
    MAX_WAITING,
    RecordWriter,
    asks_for_a_record,
    cached_entry,
    entered_entry,
    kept_entry,
    kept_record,
    path_of,
)

GRID = (2, 2, 2)


def write(folder: Path, request_id: str, *videos: dict, max_records: int = 10) -> None:
    writer = RecordWriter(folder, "kept", max_records)
    writer.write(request_id, lambda: kept_record(request_id, videos))
    writer.flush()


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.kept.json").read_text())["videos"]


@pytest.mark.parametrize("request_id", ["../../etc/passwd", "/etc/x", "a/b", "..", "x" * 500])
def test_no_request_id_leaves_the_folder(tmp_path: Path, request_id: str) -> None:
    path = path_of(tmp_path, request_id, "kept")
    assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert len(path.name) < 255


def test_no_two_requests_share_a_file(tmp_path: Path) -> None:
    ids = ["a/b", "a_b", "a.b", "x" * 300 + "1", "x" * 300 + "2", "x" * 180]
    assert len({path_of(tmp_path, request_id, "kept") for request_id in ids}) == len(ids)
    assert path_of(tmp_path, "chatcmpl-1-a", "kept").name == "chatcmpl-1-a.kept.json"


def test_a_later_turn_and_the_pieces_of_a_video_add_to_the_record(tmp_path: Path) -> None:
    write(tmp_path, "r-1", kept_entry(3, GRID, [0]))
    write(tmp_path, "r-1", kept_entry(90, GRID, [1, 2]))
    write(tmp_path, "r-1", kept_entry(3, GRID, [0, 5]))  # another piece, and one computed again
    assert [(v["start"], v["keep"]) for v in read(tmp_path, "r-1")] == [(3, [0, 5]), (90, [1, 2])]
    assert list(tmp_path.iterdir()) == [tmp_path / "r-1.kept.json"]


def test_a_video_from_the_cache_says_so_unless_it_was_selected_before(tmp_path: Path) -> None:
    write(tmp_path, "r-1", cached_entry(3, GRID))
    assert read(tmp_path, "r-1") == [{"start": 3, "grid": [2, 2, 2], "from_cache": True}]
    write(tmp_path, "r-2", kept_entry(3, GRID, [7]))
    write(tmp_path, "r-2", cached_entry(3, GRID))  # it came back after a preemption
    assert read(tmp_path, "r-2") == [{"start": 3, "grid": [2, 2, 2], "keep": [7]}]


def test_what_entered_in_several_steps_is_one_list(tmp_path: Path) -> None:
    write(tmp_path, "r-1", entered_entry(3, GRID, 4, [0, 3]))
    write(tmp_path, "r-1", kept_entry(3, GRID, [0, 2]))
    write(tmp_path, "r-1", entered_entry(3, GRID, 4, [5, 6]))
    assert read(tmp_path, "r-1") == [
        {"start": 3, "grid": [2, 2, 2], "num_entered": 4, "entered": [0, 3, 5, 6], "keep": [0, 2]}
    ]


def test_the_oldest_records_go_first_those_of_an_earlier_server_too(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path, f"r-{i}", max_records=3)
    (tmp_path / "mine.json").write_text("{}")
    writer = RecordWriter(tmp_path, "kept", 2)
    writer.write("r-3", lambda: kept_record("r-3", []))
    writer.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "mine.json", "r-2.kept.json", "r-3.kept.json"
    ]  # fmt: skip


def test_nobody_waits_for_a_record(tmp_path: Path) -> None:
    """While one is being written the caller goes on, and what cannot be queued is dropped."""
    writer, go_on = RecordWriter(tmp_path, "kept", 10), threading.Event()
    writer.write("slow", lambda: go_on.wait(10) and kept_record("slow", []))
    for _ in range(MAX_WAITING + 10):
        writer.write("next", lambda: kept_record("next", []))
    writer.flush(timeout=0.05)
    assert list(tmp_path.iterdir()) == []
    go_on.set()
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_folder_costs_only_the_record(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "gone", "kept", 10)
    writer.write("r-1", lambda: kept_record("r-1", []))
    writer.flush()
    assert not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()
    writer.write("r-2", lambda: kept_record("r-2", []))
    writer.flush()
    assert [path.name for path in (tmp_path / "gone").iterdir()] == ["r-2.kept.json"]


@pytest.mark.parametrize(
    ("extra_args", "asks"),
    [(None, False), ({}, False), ({"dpp_nonsense": 1}, False), ({"dpp_record": 0}, False),
     ({"dpp_record": 1}, True)],
)  # fmt: skip
def test_records_are_written_only_where_asked(extra_args: dict | None, asks: bool) -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))
    assert asks_for_a_record(request) == asks
