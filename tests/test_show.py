"""`vllm-dpp show`: the picture shows what the record says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_dpp import show
from vllm_dpp.toy.video import write_mp4

SLICES, ROWS, COLUMNS = 3, 2, 4
KEEP = [0, 5, 8, 9, 10, 11, 23]  # slice 0: 2 of 8, slice 1: 4, slice 2: 1


@pytest.fixture
def record(tmp_path: Path) -> Path:
    videos = [
        {"start": 90, "grid": [1, 1, 1], "keep": [0]},
        {"start": 7, "grid": [SLICES, ROWS, COLUMNS], "keep": KEEP},
    ]
    path = tmp_path / "chatcmpl-1.kept.json"
    path.write_text(json.dumps({"request_id": "chatcmpl-1", "videos": videos}))
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """White frames, but for frame 4 of 12, the first of slice 1, which is mid-grey."""
    frames = np.full((12, ROWS * 28, COLUMNS * 28, 3), 255, dtype=np.uint8)
    frames[4] = 128
    return write_mp4(tmp_path / "video.mp4", frames, fps=4)


def cell_centres(tile: Image.Image) -> np.ndarray:
    """[rows, columns] brightness in the middle of every cell."""
    pixels = np.asarray(tile.convert("L"), dtype=float)
    height, width = pixels.shape[0] // ROWS, pixels.shape[1] // COLUMNS
    return pixels[height // 2 :: height, width // 2 :: width]


def test_videos_of_a_record_are_in_prompt_order(record: Path) -> None:
    first, second = (show.KeptVideo.load(record, index) for index in (0, 1))
    assert first.kept.shape == (SLICES, ROWS, COLUMNS)
    assert np.flatnonzero(first.kept).tolist() == KEEP
    assert second.kept.tolist() == [[[True]]]
    assert first.title == "chatcmpl-1, video 1 of 2"


def test_kept_cells_are_bright_and_dropped_ones_dark(record: Path, video: Path) -> None:
    kept = show.KeptVideo.load(record).kept
    frames = show.read_frames(video, SLICES)
    for frame, keep, brightness in zip(frames, kept, (255, 128, 255), strict=True):
        centres = cell_centres(show.draw_slice(frame, keep))
        np.testing.assert_allclose(centres[keep], brightness, atol=8)
        np.testing.assert_allclose(centres[~keep], brightness * show.DARKENED, atol=8)


def test_both_stages_are_drawn(record: Path, video: Path) -> None:
    """`keep` counts what entered; what entered and was dropped is less dark than the rest."""
    entered = list(range(0, 24, 2))
    videos = [
        {
            "start": 7,
            "grid": [SLICES, ROWS, COLUMNS],
            "num_entered": 12,
            "entered": entered,
            "keep": [0, 5, 11],
        }
    ]
    record.write_text(json.dumps({"request_id": "r", "videos": videos}))
    shown = show.KeptVideo.load(record)
    assert np.flatnonzero(shown.kept).tolist() == [0, 10, 22]
    assert shown.entered is not None and np.flatnonzero(shown.entered).tolist() == entered
    frames = show.read_frames(video, SLICES)
    centres = cell_centres(show.draw_slice(frames[0], shown.kept[0], shown.entered[0]))
    dropped = shown.entered[0] & ~shown.kept[0]
    np.testing.assert_allclose(centres[dropped], 255 * show.ENTERED, atol=8)
    np.testing.assert_allclose(centres[~shown.entered[0]], 255 * show.DARKENED, atol=8)
    assert show.draw(shown, frames).size == show.draw(show.KeptVideo(shown.kept, "r"), frames).size

    del videos[0]["keep"]  # nothing is dropped in the middle
    record.write_text(json.dumps({"request_id": "r", "videos": videos}))
    assert np.flatnonzero(show.KeptVideo.load(record).kept).tolist() == entered
    videos[0]["num_entered"] = 15
    record.write_text(json.dumps({"request_id": "r", "videos": videos}))
    with pytest.raises(ValueError, match="3 of its tokens came from the prefix cache"):
        show.KeptVideo.load(record)


def test_kept_areas_have_an_outline_and_dropped_cells_none(record: Path, video: Path) -> None:
    keep = show.KeptVideo.load(record).kept[0]  # the cells (0, 0) and (1, 1)
    pixels = np.asarray(show.draw_slice(show.read_frames(video, SLICES)[0], keep))
    accent = (pixels == show.ACCENT).all(axis=-1)
    cell = pixels.shape[1] // COLUMNS
    outline = 4 * (cell - 1)
    assert accent[:cell, :cell].sum() == accent[cell:, cell : 2 * cell].sum() == outline
    assert accent.sum() == 2 * outline


def test_the_command_writes_the_picture(record: Path, video: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.png"
    arguments = ["--record", record, "--video", video, "--output", output, "--columns", "2"]
    assert show.main([str(argument) for argument in arguments]) == 0
    wide = show.draw(show.KeptVideo.load(record), show.read_frames(video, SLICES), columns=3)
    with Image.open(output) as picture:
        assert picture.height > wide.height and picture.width < wide.width


@pytest.mark.parametrize(
    ("num_frames", "num_slices", "expected"),
    [(64, 4, [0, 16, 32, 48]), (24, 12, list(range(0, 24, 2))), (25, 3, [0, 8, 16])],
)
def test_slices_lie_evenly(num_frames: int, num_slices: int, expected: list[int]) -> None:
    assert show.slice_positions(num_frames, num_slices) == expected


@pytest.mark.parametrize(("num_frames", "fps"), [(96, 8.0), (301, 25.0), (451, 30.0), (7, 1.0)])
def test_slices_are_where_vllm_samples(num_frames: int, fps: float) -> None:
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.multimodal.video_decoders.base import VideoSourceMetadata, VideoTargetMetadata

    loader = VIDEO_LOADER_REGISTRY.load("qwen2_vl")
    sampled = loader.compute_frames_index_to_sample(
        VideoSourceMetadata(num_frames, fps, num_frames / fps), VideoTargetMetadata(-1, 2, 300)
    )
    positions = show.slice_positions(num_frames, len(sampled) // 2)
    np.testing.assert_allclose(positions, sampled[::2], atol=1)  # vLLM counts in float32


def test_bad_input_is_named(record: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 videos"):
        show.KeptVideo.load(record, 2)
    record.write_text(json.dumps({"videos": [{"start": 0, "grid": [1, 1, 1], "keep": [1]}]}))
    with pytest.raises(ValueError, match="not a record of kept tokens"):
        show.KeptVideo.load(record)
    with pytest.raises(OSError, match="nothing.mp4"):
        show.read_frames(tmp_path / "nothing.mp4", 3)
