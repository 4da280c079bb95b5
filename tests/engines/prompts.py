"""The chats of the reference, as prompts for an engine."""

from typing import Any

from tests.reference.chats import CHATS
from tests.reference.prompt import Messages, chat_text, multi_modal_data


def engine_prompt(processor: Any, messages: Messages) -> dict[str, Any]:
    """The prompt that ``LLM.generate`` takes for these messages."""
    prompt: dict[str, Any] = {"prompt": chat_text(processor, messages)}
    media = multi_modal_data(messages)
    return prompt | ({"multi_modal_data": media} if media else {})


def all_prompts(processor: Any) -> dict[str, dict[str, Any]]:
    return {name: engine_prompt(processor, messages) for name, messages in CHATS.items()}
