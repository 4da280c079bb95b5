"""The benchmark of shares among segments, on one short video."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from vllm_dpp.bench import share_out, shots  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.scene import NUM_CELLS  # noqa: E402  (likewise)

SMALL = ["--videos", "1", "--shots", "2", "--slices-per-segment", "4", "16", "--shares", "0.1"]


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert share_out.main([*SMALL, "--json", str(output)]) == 0
    assert "things of the video" in capsys.readouterr().out
    of_four, of_all = json.loads(output.read_text())["rows"]
    for row in (of_four, of_all):
        assert row["ways"]["whole video"] == row["ways"]["whole video"] | {
            "log_det_lost_per_token": 0.0,
            "same_share": 1.0,
        }
        assert all(0 < own["things"] <= 1 for own in row["ways"].values())
    # One segment is the whole video, whoever shares out; and four of them are not.
    assert len({json.dumps(own) for own in of_all["ways"].values()}) == 1
    assert len({json.dumps(own) for own in of_four["ways"].values()}) > 2
    assert of_four["ways"]["gains"]["log_det_lost_per_token"] > 0


def test_gains_are_the_greedy_selection_where_segments_have_nothing_in_common() -> None:
    torch.manual_seed(0)
    cells, slices = NUM_CELLS, 4
    features = torch.zeros(slices * cells, 2 * 64)
    half = slices * cells // 2
    features[:half, :64], features[half:, 64:] = torch.randn(2, half, 64)
    video = shots.LongVideo(features, torch.zeros(slices * cells).long(), slices)
    for share in (0.1, 0.3, 0.6):
        whole, by_gains = (
            share_out._keep(video, way, slices // 2, share) for way in (share_out.WHOLE, "gains")
        )
        assert whole.tolist() == by_gains.tolist()


def test_bad_shares_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        share_out.main(["--shares", "2"])
    assert stopped.value.code == 2
    assert "--shares must lie between 0 and 1" in capsys.readouterr().err
