"""Chats over small synthetic media, for the tests of this package and of the engine."""

from typing import Any

from PIL import Image

from vllm_dpp.toy.video import render_frames

Part = dict[str, Any]


def video(seed: int, num_frames: int, height: int, width: int, fps: float = 2.0) -> Part:
    frames = render_frames(seed, num_frames, height, width)
    return {"type": "video", "video": frames, "fps": fps}


def image(seed: int, height: int, width: int) -> Part:
    return {"type": "image", "image": Image.fromarray(render_frames(seed, 1, height, width)[0])}


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def user(*parts: Part) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


CHATS = {
    "text": [user(text("What is it?"))],
    "video": [user(video(0, 8, 112, 112), text("What moves?"))],
    "question first": [user(text("What moves?"), video(0, 8, 112, 112))],
    "two videos": [user(video(0, 7, 84, 112), video(1, 4, 140, 56, fps=30.0), text("Which?"))],
    "image and video": [user(image(2, 140, 84), text("this or"), video(0, 8, 84, 84), text("?"))],
    "two turns": [
        {"role": "system", "content": "Be brief."},
        user(video(0, 8, 112, 84, fps=0.5), text("What moves?"), image(3, 56, 84), text("And?")),
        assistant("A disc."),
        user(video(1, 6, 56, 112), text("And now?")),
    ],
}
"""Grids of 4x4x4, 4x3x4 and 2x5x2 merged patches and the like, so that no two axes are alike."""
