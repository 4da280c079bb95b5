"""How many tokens of a video enter the decoder: the front end's side of the stage before it.

The prompt gets as many placeholders as tokens enter, so that everything after counts these alone:
step budget, model length, KV blocks, hashes. Which tokens they are is decided on the worker, once
the vision encoder has run (``worker.models.entry``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails

from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.checks import require_ratio
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.request_plan import ENTRY_RATIO_ARG

NUM_ENTERED = "video_num_entered"
"""Key of what the processor adds to each video: int64, tokens that enter."""

POSITIONS_PER_TOKEN = 4
"""Most positions that a video which enters in part takes up, by the length of what is left of it:
as many as vLLM provides for where it prunes (``mrope_positions_factor``)."""


class EntryProcessorMixin:
    """Mixed into a model's multimodal processor.

    As it stands videos are one run of placeholders; `TimedEntryProcessorMixin` is for others.
    """

    info: Any

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, without_ratio(hf_kwargs))  # type: ignore[misc]
        if grids := self.video_grids(outputs):
            ratio = self._entry_ratio(hf_kwargs)
            counts = [
                self._num_entering(grid, ratio, outputs, item) for item, grid in enumerate(grids)
            ]
            outputs[NUM_ENTERED] = torch.tensor(counts)
        return outputs

    def video_grids(self, outputs: Any) -> list[Grid]:
        """Slices, rows and columns of the tokens of each video that the processor has made."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grids = outputs.get("video_grid_thw")
        return [] if grids is None else [(t, h // merge, w // merge) for t, h, w in grids.tolist()]

    def _num_entering(self, grid: Grid, ratio: float, outputs: Any, item: int) -> int:
        """How many tokens of a video enter.

        Args:
            grid: Its slices, rows and columns of tokens.
            ratio: The fraction that is to enter.
            outputs: Of the processor, for all videos.
            item: Which of them it is.
        """
        return num_kept(prod(grid), ratio)

    def _placeholders(self, whole: Any, number: int) -> Any:
        """What stands in the prompt for a video of which so many tokens enter.

        Args:
            whole: What stands there for all of it.
            number: How many enter.
        """
        return whole[:number]

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(  # type: ignore[misc]
            hf_inputs, without_ratio(hf_processor_mm_kwargs)
        )
        return {**fields, NUM_ENTERED: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, without_ratio(hf_processor_mm_kwargs), out_mm_kwargs
        )

        def shortened(update: Any) -> Any:
            if update.modality != "video":
                return update

            def entering(item: int) -> Any:
                whole = update.replacement(item)
                number = out_mm_kwargs["video"][item].get(NUM_ENTERED)  # none of sent embeddings
                return whole if number is None else self._placeholders(whole, int(number.data))

            return replace(update, replacement=entering)

        return [shortened(update) for update in updates]

    def _entry_ratio(self, hf_kwargs: Mapping[str, Any]) -> float:
        """The request's own ratio, or the server's."""
        ratio = hf_kwargs.get(ENTRY_RATIO_ARG)
        if ratio is None:
            return getattr(self.info.ctx.model_config.hf_config, ENTRY_RATIO_ARG, 1.0)
        require_ratio(f"mm_processor_kwargs: {ENTRY_RATIO_ARG}", ratio)
        return ratio


class TimedEntryProcessorMixin(EntryProcessorMixin):
    """The same where text stands between the slices of a video.

    How many tokens of each slice enter is known on the worker alone. So the whole placeholder is
    for the encoder's output to fill, text included, in its true order; in the prompt all tokens
    stand in the first slice, as vLLM's own pruning has them.
    """

    def _num_entering(self, grid: Grid, ratio: float, outputs: Any, item: int) -> int:
        """All where leaving some out would not pay for the text, which then is the encoder's.

        And where slices are so wide that positions would outrun what is left
        (`POSITIONS_PER_TOKEN`).
        """
        number, whole = super()._num_entering(grid, ratio, outputs, item), prod(grid)
        if number == whole:
            return whole
        num_text = len(self.text_between(outputs, item))
        length, positions = number + num_text, self.num_positions(grid, number, num_text)
        if length >= whole or positions > POSITIONS_PER_TOKEN * length:
            return whole
        return number

    def _placeholders(self, whole: Any, number: int) -> Any:
        pad = self.video_token_id()
        if whole.full.count(pad) == number:
            return whole
        first = whole.full.index(pad)
        text = [token for token in whole.full[first:] if token != pad]
        return PromptUpdateDetails.from_seq([*whole.full[:first], *[pad] * number, *text])

    def video_token_id(self) -> int:
        """What stands in the prompt for a token of a video."""
        return self.info.get_hf_config().video_token_id

    def num_positions(self, grid: Grid, number: int, num_text: int) -> int:
        """How many positions a video takes up of whose tokens ``number`` enter; here by M-RoPE."""
        return num_text + grid[0] * max(grid[1:])

    def text_between(self, outputs: Any, item: int) -> Sequence[int]:
        """Token ids of the text of a video, all slices together.

        Args:
            outputs: Of the processor, for all videos.
            item: Which of them it is.
        """
        raise NotImplementedError


def without_ratio(hf_kwargs: Mapping[str, object]) -> dict[str, object]:
    """What is for the model's own processor."""
    return {name: value for name, value in hf_kwargs.items() if name != ENTRY_RATIO_ARG}
