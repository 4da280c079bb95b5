"""Prune without a server, through vLLM's `LLM`: `python examples/offline.py`.

It needs no GPU and downloads nothing: the toy checkpoint and the videos are made on the spot, so
the answers are noise. For a real model, change `MODEL`; the settings are those of `vllm-dpp serve`.
"""

import json
import os
import shutil
from pathlib import Path

# Read as vLLM starts, and only on a CPU: GiB for the KV cache.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams  # noqa: E402  (after the environment is set)

from vllm_dpp.toy.checkpoint import make_checkpoint  # noqa: E402
from vllm_dpp.toy.video import render_frames, vllm_video  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "demo"
MODEL, RECORDS = FOLDER / "checkpoint", FOLDER / "offline_records"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PROMPT = "<|im_start|>user\n{videos}{question}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    """Ask about one video at the engine's ratio, and about two at a ratio of the request's own."""
    make_checkpoint(MODEL)
    shutil.rmtree(RECORDS, ignore_errors=True)
    llm = LLM(
        str(MODEL),
        hf_overrides={"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]},
        additional_config={
            "dpp": {"prune_layer": 2, "retention_ratio": 0.25, "record_dir": str(RECORDS)}
        },
        max_model_len=8192,
        max_num_batched_tokens=8192,
        block_size=32,
        enforce_eager=True,
    )
    for num_videos, extra in ((1, {}), (2, {"dpp_retention_ratio": 0.5})):
        sampling = SamplingParams(max_tokens=16, extra_args={"dpp_record": True, **extra})
        (output,) = llm.generate(make_prompt(num_videos), sampling, use_tqdm=False)
        print(f"\n{num_videos} video(s), {extra or 'the ratio of the engine'}")
        print(f"  answer: {output.outputs[0].text!a}")
        report(output.request_id)


def make_prompt(num_videos: int) -> dict[str, object]:
    frames = [render_frames(i, num_frames=16, height=168, width=224) for i in range(num_videos)]
    return {
        "prompt": PROMPT.format(videos=VIDEO * num_videos, question="What moves?"),
        "multi_modal_data": {"video": [vllm_video(video, fps=2) for video in frames]},
    }


def report(request_id: str) -> None:
    """Print what the engine wrote down about a request."""
    (path,) = RECORDS.glob(f"{request_id}-*.kept.json")
    for video in json.loads(path.read_text())["videos"]:
        slices, rows, columns = video["grid"]
        total = slices * rows * columns
        print(f"  video at token {video['start']}: kept {len(video['keep'])} of {total} tokens")


if __name__ == "__main__":
    main()
