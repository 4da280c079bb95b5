"""What a request over HTTP says about the stage before the decoder, put where vLLM reads it.

``vllm_xargs`` reach the engine, too late for a video's placeholders. So the arguments about what
enters go into ``mm_processor_kwargs`` of the same request, before its media are read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_dpp.pruning.checks import require_ratio
from vllm_dpp.serving.front.rules import scores_prompt
from vllm_dpp.serving.request_plan import (
    ARG_PREFIX,
    CHOICES,
    ENTRY_RATIO_ARG,
    RELEVANCE_ARG,
    RETENTION_RATIO_ARG,
    VIDEO_SHARE_ARG,
    RequestOptions,
)
from vllm_dpp.serving.settings import ServingSettings


def spread(request: Any, settings: ServingSettings, num_layers: int) -> None:
    """Give each stage its ratio; the request is changed, and has no such argument afterwards.

    Args:
        request: Body of any of vLLM's generating endpoints.
        settings: The server's.
        num_layers: Of its decoder.

    Raises:
        ValueError: A ratio is bad, or there are two for a stage.
    """
    given = getattr(request, "vllm_xargs", None) or {}
    kwargs = getattr(request, "mm_processor_kwargs", None) or {}
    if (of_processor := kwargs.get(ENTRY_RATIO_ARG)) is not None:
        require_ratio(f"mm_processor_kwargs: {ENTRY_RATIO_ARG}", of_processor)
        choices = {k: v for k, v in given.items() if k not in (VIDEO_SHARE_ARG, ENTRY_RATIO_ARG)}
        _check_together(choices, of_processor, settings)
    ratios = {name: given.get(name) for name in (VIDEO_SHARE_ARG, ENTRY_RATIO_ARG)}
    ratios = {name: value for name, value in ratios.items() if value is not None}
    if not ratios and not given.keys() & {VIDEO_SHARE_ARG, ENTRY_RATIO_ARG}:
        return
    for name, value in ratios.items():
        require_ratio(name, value)
    xargs = {k: v for k, v in given.items() if k not in (VIDEO_SHARE_ARG, ENTRY_RATIO_ARG)}
    entry = ratios.get(ENTRY_RATIO_ARG)
    if share := ratios.get(VIDEO_SHARE_ARG):
        if entry is not None or xargs.get(RETENTION_RATIO_ARG) is not None:
            raise ValueError(
                f"{VIDEO_SHARE_ARG} sets {ENTRY_RATIO_ARG} and {RETENTION_RATIO_ARG}: leave "
                "those out, or it"
            )
        entry, kept = settings.ratios_at(share, num_layers)
        if scores_prompt(request):  # so all that enters is kept
            entry, kept = share, 1.0
        xargs[RETENTION_RATIO_ARG] = kept
        is_free = not any(ARG_PREFIX + name in xargs for name in CHOICES)
        if is_free and settings.relevance_at(share) != settings.relevance:
            xargs[RELEVANCE_ARG] = settings.relevance_at(share)
    request.vllm_xargs = xargs
    if entry is not None:
        if not hasattr(request, "mm_processor_kwargs"):
            raise ValueError(f"this endpoint takes no {', '.join(ratios)}")
        _check_together(xargs, entry, settings)
        if of_processor not in (None, entry):
            raise ValueError(f"mm_processor_kwargs: {ENTRY_RATIO_ARG} contradicts vllm_xargs")
        request.mm_processor_kwargs = {**kwargs, ENTRY_RATIO_ARG: entry}


def _check_together(xargs: Mapping[str, Any], entry: float, settings: ServingSettings) -> None:
    """Raise ``ValueError`` where what a request chooses does not go with what enters."""
    replace(RequestOptions.from_extra_args(xargs).settings(settings), entry_ratio=entry)
