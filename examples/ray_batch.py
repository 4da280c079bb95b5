"""Batches in a Ray Data pipeline of your own: `python examples/ray_batch.py`.

`vllm-dpp batch` does this for folders and tables, and resumes. This is the step alone, between
whatever reads and writes. It needs no GPU and downloads nothing, see `offline.py`.
"""

from pathlib import Path

import ray

from vllm_dpp.batch.pipeline import ask, connect
from vllm_dpp.quality.model import TRAINED
from vllm_dpp.quality.questions import make_questions
from vllm_dpp.quality.render import FPS, render
from vllm_dpp.quality.scene import DENSE, make_scene
from vllm_dpp.serve_command import serve_command
from vllm_dpp.toy.video import write_mp4

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "demo" / "ray_batch"


def main() -> None:
    """Four questions about each of two videos, half of them at a share of their own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in (200_012, 200_013):
        scene = make_scene(seed, DENSE)
        video = write_mp4(FOLDER / f"{seed}.mp4", render(scene), FPS)
        for number, question in enumerate(make_questions(scene)[:4]):
            row = {"video": str(video), "question": question.text, "right": question.answer}
            rows.append(row | {"video_share": 0.2 if number % 2 else None})

    connect(address=None, replicas=1)  # "auto" joins the cluster of this machine
    flags = ["--max-model-len", "1024", "--enforce-eager"]
    command = serve_command({"video_share": 0.4}, [str(TRAINED), *flags])
    asked = ask(ray.data.from_items(rows), command[2:], max_tokens=16, temperature=0.0)
    asked.write_parquet(str(FOLDER / "answers"))
    for row in ray.data.read_parquet(str(FOLDER / "answers")).iter_rows():
        tokens = row["prompt_tokens"]
        print(f"{row['question']} {row['answer']} (right: {row['right']}, {tokens} tokens)")


if __name__ == "__main__":
    main()
