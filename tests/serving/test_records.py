"""Record files: names that stay in their folder, turns that add up, disks that fail."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_dpp.serving import records


@pytest.mark.parametrize("request_id", ["../../etc/passwd", "/etc/x", "a/b", "..", "x" * 500])
def test_no_request_id_leaves_the_folder(tmp_path: Path, request_id: str) -> None:
    path = records.path_of(tmp_path, request_id, "kept")
    assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert len(path.name) < 255


def test_a_later_turn_adds_to_the_record(tmp_path: Path) -> None:
    first, second = {"start": 3, "keep": [0]}, {"start": 90, "keep": [1, 2]}
    records.write_kept(tmp_path, "r-1", [first])
    records.write_kept(tmp_path, "r-1", [second])
    records.write_kept(tmp_path, "r-1", [first | {"keep": [5]}])  # computed again
    written = json.loads((tmp_path / "r-1.kept.json").read_text())
    assert sorted((v["start"], v["keep"]) for v in written["videos"]) == [(3, [5]), (90, [1, 2])]
    assert list(tmp_path.iterdir()) == [tmp_path / "r-1.kept.json"]


def test_a_missing_folder_costs_only_the_record(tmp_path: Path) -> None:
    records.write_kept(tmp_path / "gone", "r-1", [{"start": 0, "keep": []}])
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("extra_args", [None, {}, {"dpp_nonsense": 1}, {"dpp_record": 0}])
def test_blocks_are_written_only_where_asked(tmp_path: Path, extra_args: dict | None) -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))
    records.write_blocks(tmp_path, request, None, [], [])
    assert list(tmp_path.iterdir()) == []
