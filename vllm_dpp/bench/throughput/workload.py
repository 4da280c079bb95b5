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
        num_frames: Frames of a video; 0 asks without one.
        height: Pixels.
        width: Pixels.
        output_tokens: Tokens that each request generates, greedily; the end token does not stop it.
        seed: Of the first video; the others follow.
        encoded_before: Whether what the vision encoder makes of the videos is there already.
    """

    num_requests: int
    num_frames: int
    height: int
    width: int
    output_tokens: int
    seed: int = 0
    encoded_before: bool = False

    def of_round(self, index: int) -> "Workload":
        """The same amount of work on other videos, so that no cache knows them."""
        return replace(self, seed=(index + 1) * SEEDS_PER_ROUND)

    def prompts(self, tokenizer: Any) -> list[dict[str, Any]]:
        """One vLLM prompt for each request.

        Args:
            tokenizer: The checkpoint's; its chat template says where the video stands.
        """
        return [self._prompt(i, tokenizer) for i in range(self.num_requests)]

    def _prompt(self, index: int, tokenizer: Any) -> dict[str, Any]:
        from vllm_dpp.toy.video import render_frames, vllm_video

        question = {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]}
        content = [{"type": "video"}, question] if self.num_frames else [question]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if not self.num_frames:
            return {"prompt": text}
        frames = render_frames(self.seed + index, self.num_frames, self.height, self.width)
        video = vllm_video(frames, FRAMES_PER_SECOND)
        return {"prompt": text, "multi_modal_data": {"video": [video]}}
