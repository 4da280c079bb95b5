"""Prune without a server, through vLLM's `LLM`: `python examples/offline.py`.

It needs no GPU and downloads nothing: the model comes with the project and knows a few kinds of
questions about videos of shapes. For another one change `TRAINED`; the settings are those of
`vllm-dpp serve`.
"""

import json
import os
import shutil
import time
from pathlib import Path

# Read as vLLM starts, and only on a CPU: GiB for the KV cache.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams  # noqa: E402  (after the environment is set)

from vllm_dpp.quality.model import TRAINED  # noqa: E402
from vllm_dpp.quality.questions import make_questions  # noqa: E402
from vllm_dpp.quality.render import FPS, render  # noqa: E402
from vllm_dpp.quality.scene import DENSE, make_scene  # noqa: E402
from vllm_dpp.toy.video import vllm_video  # noqa: E402

RECORDS = Path(__file__).resolve().parents[1] / ".cache" / "demo" / "offline_records"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PROMPT = f"<|im_start|>user\n{VIDEO}{{question}}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    """Ask one question at the engine's ratio, and again at a ratio of the request's own."""
    shutil.rmtree(RECORDS, ignore_errors=True)
    llm = LLM(
        str(TRAINED),
        hf_overrides={"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]},
        additional_config={
            "dpp": {"prune_layer": 4, "retention_ratio": 0.25, "record_dir": str(RECORDS)}
        },
        max_model_len=1024,
        max_num_batched_tokens=1024,
        block_size=32,
        enforce_eager=True,
    )
    scene = make_scene(200_012, DENSE)
    question = next(q for q in make_questions(scene) if q.kind == "spelled")
    prompt = {
        "prompt": PROMPT.format(question=question.text),
        "multi_modal_data": {"video": [vllm_video(render(scene), FPS)]},
    }
    for extra in ({}, {"dpp_retention_ratio": 0.5}):
        sampling = SamplingParams(temperature=0, extra_args={"dpp_record": True, **extra})
        (output,) = llm.generate(prompt, sampling, use_tqdm=False)
        print(f"\n{question.text} At {extra or 'the ratio of the engine'}")
        print(f"  answer: {output.outputs[0].text.strip()!a} (right: {question.answer!a})")
        report(output.request_id)


def report(request_id: str) -> None:
    """Print what the engine wrote down about a request."""
    for _ in range(50):  # nobody waits for a record, so it may come a moment later
        if found := list(RECORDS.glob(f"{request_id}-*.kept.json")):
            break
        time.sleep(0.1)
    (path,) = found
    for video in json.loads(path.read_text())["videos"]:
        slices, rows, columns = video["grid"]
        total = slices * rows * columns
        print(f"  video at token {video['start']}: kept {len(video['keep'])} of {total} tokens")


if __name__ == "__main__":
    main()
