"""Stock vLLM with EVS answers differently warm and cold: `python examples/evs_cache.py`.

EVS chooses which tokens stay after it has seen the video, and vLLM then rewrites the positions of
the request. A request that finds the video in the prefix cache is not rewritten: its later tokens
stand at other positions. So `vllm-dpp bench chat` starts its EVS server with
`--no-enable-prefix-caching`. Without pruning warm answers are the cold ones, to rounding.

It needs no GPU and downloads nothing: the model is small and its weights are random.
"""

import argparse
import os
import tempfile
from pathlib import Path

# Read as vLLM starts. One process, so that EVS can be mended on a CPU (patches/evs-on-cpu.md).
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams  # noqa: E402  (after the environment is set)

from vllm_dpp.bench.evs_on_cpu import mend_evs_on_cpu  # noqa: E402
from vllm_dpp.toy.checkpoint import make_checkpoint  # noqa: E402
from vllm_dpp.toy.spec import TINY  # noqa: E402
from vllm_dpp.toy.video import render_frames, vllm_video  # noqa: E402

USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
LONG = "Tell me in some detail what it is that moves through the picture and where it goes."
TURN_1 = f"{USER}{VIDEO}{LONG}{END}"
TURN_2 = f"{TURN_1}A disc. {LONG}<|im_end|>\n{USER}And then? {LONG}{END}"
SAMPLING = SamplingParams(temperature=0, max_tokens=4, logprobs=20, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.5])
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "tiny", TINY)
        for rate in parser.parse_args().rates:
            compare(model, rate)


def compare(model: Path, rate: float) -> None:
    """Ask for turn 2 cold, again, and after turn 1."""
    llm = start(model, rate)
    cold = ask(llm, TURN_2)
    report(rate, "the same prompt again", ask(llm, TURN_2), cold)
    llm.reset_prefix_cache()
    ask(llm, TURN_1)
    report(rate, "turn 2 after turn 1", ask(llm, TURN_2), cold)


def start(model: Path, rate: float) -> LLM:
    """Stock vLLM with prefix caching; EVS cuts the share ``rate`` of a video's tokens."""
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        enable_prefix_caching=True,
        **({"video_pruning_rate": rate} if rate else {}),
    )
    mend_evs_on_cpu(llm.llm_engine.model_executor.driver_worker.worker)
    return llm


def ask(llm: LLM, prompt: str):
    video = vllm_video(render_frames(5, 32, 112, 112), 2.0)
    request = {"prompt": prompt, "multi_modal_data": {"video": [video]}}
    return llm.generate(request, SAMPLING, use_tqdm=False)[0]


def report(rate: float, name: str, warm, cold) -> None:
    """Print how far the first token's log-probabilities and the tokens are from the cold ones."""
    mine, theirs = (output.outputs[0] for output in (warm, cold))
    first, expected = mine.logprobs[0], theirs.logprobs[0]
    common = first.keys() & expected.keys()
    apart = max((abs(first[t].logprob - expected[t].logprob) for t in common), default=0.0)
    same = "equal" if list(mine.token_ids) == list(theirs.token_ids) else "DIFFERENT"
    print(
        f"EVS rate {rate:g}, {name}: {warm.num_cached_tokens} of {len(warm.prompt_token_ids)} "
        f"prompt tokens cached, log-probabilities {apart:.2g} apart, tokens {same}: "
        f"{list(mine.token_ids)}, cold {list(theirs.token_ids)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
