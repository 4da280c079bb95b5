"""What a pruned Qwen2.5-VL must answer, written plainly on top of transformers.

The engine is tested against this package, which shares no code with it: positions, counts and the
layer loop are its own. Only the choice of tokens is injected; by default it is the float64
selection of `vllm_dpp.pruning`.
"""

from .media import MediaItem
from .plan import VideoPlan, plan_videos
from .positions import mrope_positions
from .prompt import Prompt, chat_text, multi_modal_data, prompt_from_messages
from .reference import Reference, ReferenceResult
from .selection import Select, naive_selection

__all__ = [
    "MediaItem",
    "Prompt",
    "Reference",
    "ReferenceResult",
    "Select",
    "VideoPlan",
    "chat_text",
    "mrope_positions",
    "multi_modal_data",
    "naive_selection",
    "plan_videos",
    "prompt_from_messages",
]
