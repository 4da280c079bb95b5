"""How many tokens of a video enter the decoder: the front end's side of the stage before it.

The prompt gets as many placeholders as tokens enter, so that everything after counts these alone:
step budget, model length, KV blocks, hashes. Which tokens they are is decided on the worker, once
the vision encoder has run (``worker.models.entry``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdate

from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.checks import require_ratio
from vllm_dpp.serving.request_plan import ENTRY_RATIO_ARG

NUM_ENTERED = "video_num_entered"
"""Key of what the processor adds to each video: [1] int64, tokens that enter."""


class WholeVideosProcessorMixin:
    """Mixed into a model's multimodal processor whose videos cannot enter in part."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        ratio = hf_kwargs.get(ENTRY_RATIO_ARG)
        if ratio not in (None, 1):
            raise ValueError(
                f"mm_processor_kwargs: {ENTRY_RATIO_ARG} {ratio!r}: videos of this model enter the "
                "decoder as a whole; leave it out"
            )
        return super()._apply_hf_processor_main(mm_items, without_ratio(hf_kwargs))  # type: ignore[misc]


class EntryProcessorMixin:
    """Mixed into a model's multimodal processor whose videos are one run of placeholders."""

    info: Any

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, without_ratio(hf_kwargs))  # type: ignore[misc]
        grids = outputs.get("video_grid_thw")
        if grids is not None:
            ratio = self._entry_ratio(hf_kwargs)
            merged = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
            counts = [num_kept(int(grid.prod()) // merged, ratio) for grid in grids]
            outputs[NUM_ENTERED] = torch.tensor(counts)
        return outputs

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

            def entering(item: int) -> list[int]:
                number = out_mm_kwargs["video"][item][NUM_ENTERED].data
                return update.replacement(item)[: int(number)]

            return replace(update, replacement=entering)

        return [shortened(update) for update in updates]

    def _entry_ratio(self, hf_kwargs: Mapping[str, Any]) -> float:
        """The request's own ratio, or the server's."""
        ratio = hf_kwargs.get(ENTRY_RATIO_ARG)
        if ratio is None:
            return getattr(self.info.get_hf_config(), ENTRY_RATIO_ARG, 1.0)
        require_ratio(f"mm_processor_kwargs: {ENTRY_RATIO_ARG}", ratio)
        return ratio


def without_ratio(hf_kwargs: Mapping[str, object]) -> dict[str, object]:
    """What is for the model's own processor."""
    return {name: value for name, value in hf_kwargs.items() if name != ENTRY_RATIO_ARG}
