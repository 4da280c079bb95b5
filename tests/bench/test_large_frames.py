"""The benchmark of large frames, on small ones."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from vllm_dpp.bench import large_frames, shots  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.model import TRAINED, load_model  # noqa: E402  (likewise)
from vllm_dpp.quality.scene import GRID, NUM_CELLS  # noqa: E402  (likewise)


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    small = ["--videos", "1", "--tiles", "2", "--shots", "1", "--shares", "0.05", "0.9"]
    assert large_frames.main([*small, "--json", str(output)]) == 0
    assert "8 slices of 64 tokens" in capsys.readouterr().out
    few, nearly_all = json.loads(output.read_text())["rows"]
    assert len(few["things"]) == len(large_frames.cuts(64)) == 3
    for part in ("things", "kept"):
        for name, seen in nearly_all[part].items():
            assert 0 < few[part][name] < seen <= 1
    assert set(few["kept"]) == set(large_frames.SECOND)


def test_frames_have_their_videos_side_by_side() -> None:
    model, _ = load_model(TRAINED)
    with torch.inference_mode():
        large = large_frames.side_by_side(model, 3, 2, 1)
        parts = [shots.make_video(model, 12 + tile, 1) for tile in range(4)]
    slices = large.num_slices
    frames = large.features.reshape(slices, 2 * GRID, 2 * GRID, -1)
    of_second = frames[:, :GRID, GRID:].reshape(slices * NUM_CELLS, -1)
    assert torch.equal(of_second, parts[1].features)
    things = large.things.reshape(slices, 2 * GRID, 2 * GRID)
    of_third = things[:, GRID:, :GRID].flatten()
    assert torch.equal(of_third < 0, parts[2].things < 0)
    assert not set(of_third.tolist()) & set(things[:, :GRID].flatten().tolist()) - {-1}


def test_bad_shares_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        large_frames.main(["--shares", "0"])
    assert stopped.value.code == 2
    assert "--shares must lie between 0 and 1" in capsys.readouterr().err
