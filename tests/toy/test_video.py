"""Synthetic videos: deterministic, nowhere flat, and readable as mp4."""

import base64
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
cv2 = pytest.importorskip("cv2")

from vllm_dpp.toy.video import (  # noqa: E402  (needs the two modules above)
    as_data_url,
    render_frames,
    vllm_video,
    write_mp4,
)


def test_frames_are_deterministic() -> None:
    frames = render_frames(3, 6, 56, 84)
    assert frames.shape == (6, 56, 84, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, render_frames(3, 6, 56, 84))
    assert (frames != render_frames(4, 6, 56, 84)).mean() > 0.5


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 33, 57), (16, 112, 112)])
def test_no_two_patches_are_equal(shape: tuple[int, int, int]) -> None:
    num_frames, height, width = shape
    frames = render_frames(0, num_frames, height, width)
    rows, columns = height // 14, width // 14
    patches = frames[:, : rows * 14, : columns * 14].reshape(num_frames, rows, 14, columns, 14, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(num_frames * rows * columns, -1)
    assert len(np.unique(patches, axis=0)) == len(patches)


def test_shapes_appear_and_vanish() -> None:
    frames = render_frames(0, 32, 112, 112).astype(int)
    bright = [(frame.max(axis=-1) > 220).mean() for frame in frames]
    assert max(bright) > min(bright) + 0.01


def test_mp4_round_trip(tmp_path: Path) -> None:
    frames = render_frames(0, 17, 112, 140)
    path = write_mp4(tmp_path / "video.mp4", frames, fps=4)
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(4)
    read = []
    while (got := capture.read())[0]:
        read.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
    assert len(read) == len(frames)
    assert np.abs(np.stack(read).astype(int) - frames).mean() < 15


def test_unwritable_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_mp4(tmp_path / "nowhere" / "video.mp4", render_frames(0, 2, 28, 28), fps=4)


def test_data_url_holds_the_file(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"bytes")
    head, _, body = as_data_url(tmp_path / "video.mp4").partition(",")
    assert head == "data:video/mp4;base64"
    assert base64.b64decode(body) == b"bytes"


def test_vllm_video_uses_every_frame() -> None:
    frames = render_frames(0, 6, 28, 28)
    same, metadata = vllm_video(frames, fps=2)
    assert same is frames
    assert metadata["frames_indices"] == [0, 1, 2, 3, 4, 5]
    assert (metadata["duration"], metadata["total_num_frames"]) == (3, 6)
    assert metadata["do_sample_frames"] is False
