"""The work that every arm does: one synthetic video and one question for each request."""

from dataclasses import dataclass, replace
from typing import Any

QUESTIONS = (
    "What is shown?",
    "Which shape moves the farthest?",
    "What colour is the background?",
    "Which shape vanishes first?",
)
FRAMES_PER_SECOND = 2.0
SEEDS_PER_ROUND = 100_000


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive together. Equal workloads give equal pixels and prompts.

    Args:
        num_requests: One video each.
        num_frames: Frames of a video.
        height: Pixels.
        width: Pixels.
        output_tokens: Tokens that each request generates, greedily; the end token does not stop it.
        seed: Of the first video; the others follow.
    """

    num_requests: int
    num_frames: int
    height: int
    width: int
    output_tokens: int
    seed: int = 0

    def of_round(self, index: int) -> "Workload":
        """The same amount of work on other videos, so that no cache knows them."""
        return replace(self, seed=(index + 1) * SEEDS_PER_ROUND)

    def prompts(self, tokenizer: Any) -> list[dict[str, Any]]:
        """One vLLM prompt for each request.

        Args:
            tokenizer: The checkpoint's; its chat template says where the video stands.
        """
        from vllm_dpp.toy.video import render_frames, vllm_video

        prompts = []
        for i in range(self.num_requests):
            frames = render_frames(self.seed + i, self.num_frames, self.height, self.width)
            video = vllm_video(frames, FRAMES_PER_SECOND)
            content = [{"type": "video"}, {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            prompts.append({"prompt": text, "multi_modal_data": {"video": [video]}})
        return prompts
