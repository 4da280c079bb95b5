"""Ask a running server about a video, and print the answer as it comes.

    vllm-dpp serve Qwen/Qwen2.5-VL-3B-Instruct
    python examples/chat_client.py video.mp4 "What happens here?" --retention-ratio 0.1

The ratio holds for this request alone; without it the server's own holds, and 1 keeps every token.
"""

import argparse
import base64
import sys
import time
from pathlib import Path

from openai import OpenAI, OpenAIError


def main() -> int:
    """Send one chat request; 1 if the server refuses it or is not there."""
    args = parse_arguments()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    started = time.monotonic()
    try:
        stream = client.chat.completions.create(
            model=args.model or client.models.list().data[0].id,
            messages=[{"role": "user", "content": video_and_text(args.video, args.question)}],
            max_tokens=args.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=request_arguments(args.retention_ratio),
        )
        first = usage = None
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - started
                print(chunk.choices[0].delta.content, end="", flush=True)
            if chunk.usage:
                usage = chunk.usage
    except OpenAIError as error:
        print(f"{args.base_url}: {error}", file=sys.stderr)
        return 1
    assert usage is not None  # asked for by include_usage
    begun = "" if first is None else f"first text after {first:.2f} s, "
    print(
        f"\n[{usage.prompt_tokens} prompt tokens before pruning, {usage.completion_tokens} "
        f"answered; {begun}all after {time.monotonic() - started:.2f} s]"
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", type=Path, help="an mp4")
    parser.add_argument("question", nargs="?", default="Describe this video.")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--retention-ratio", type=float, help="in (0, 1]; default: the server's")
    parser.add_argument("--max-tokens", type=int, default=256)
    return parser.parse_intermixed_args()


def request_arguments(retention_ratio: float | None) -> dict[str, dict[str, float]]:
    """What the request says to this plugin."""
    if retention_ratio is None:
        return {}
    return {"vllm_xargs": {"dpp_retention_ratio": retention_ratio}}


def video_and_text(video: Path, text: str) -> list[dict[str, object]]:
    """The content of a user's message; the video travels inside it."""
    url = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    return [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": text},
    ]


if __name__ == "__main__":
    sys.exit(main())
