"""From a vLLM request to its prune plan, alike for the front end, the scheduler and the workers."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_dpp.serving.plan import MediaSpan, PrunePlan, build_plan
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams

ARG_PREFIX = "dpp_"
RETENTION_RATIO_ARG = "dpp_retention_ratio"
RECORD_ARG = "dpp_record"
RELEVANCE_ARG = "dpp_relevance"
ENTRY_RATIO_ARG = "dpp_entry_ratio"
"""Of ``mm_processor_kwargs``, which enter the hash of a request's media; and the name under which
the start-up hook leaves the server's ratio in the model's ``hf_config``, all that a processor and a
worker both see."""
VIDEO_SHARE_ARG = "dpp_video_share"
"""Of requests over HTTP: one number for both stages."""
CHOICES = ("rule", "relevance", "relevance_sign", "relevance_floor")
"""Settings that a request may choose for itself, under their names with our prefix.

They say which tokens are kept, and take no more memory than the server has set aside.
"""
KNOWN_ARGS = (RETENTION_RATIO_ARG, RECORD_ARG, *(ARG_PREFIX + name for name in CHOICES))


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request may choose.

    Args:
        retention_ratio: Fraction of video tokens to keep, in (0, 1]; ``None`` takes the server's.
        record: Write down what was kept.
        choices: Names and values of ``CHOICES``, sorted; the others are the server's.
    """

    retention_ratio: float | None = None
    record: bool = False
    choices: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Read ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP); ``None`` is not asked.

        Raises:
            ValueError: An argument with our prefix is unknown or has a bad value.
        """
        ours = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(ARG_PREFIX)}
        for key in ours:
            if key in (ENTRY_RATIO_ARG, VIDEO_SHARE_ARG):
                raise ValueError(
                    f"{key} is an argument of HTTP requests: here, what enters the decoder is "
                    f"set by {ENTRY_RATIO_ARG} in the prompt's mm_processor_kwargs, and what is "
                    f"kept by {RETENTION_RATIO_ARG}"
                )
            if key not in KNOWN_ARGS:
                known = (*KNOWN_ARGS, ENTRY_RATIO_ARG, VIDEO_SHARE_ARG)
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"unknown request argument {key!r}{hint}; known: {', '.join(known)}"
                )
        chosen = {name: ours.get(ARG_PREFIX + name) for name in CHOICES}
        return cls(
            retention_ratio=_ratio(ours.get(RETENTION_RATIO_ARG)),
            record=_flag(ours.get(RECORD_ARG)),
            choices=tuple(sorted((k, v) for k, v in chosen.items() if v is not None)),
        )

    def settings(self, of_server: ServingSettings) -> ServingSettings:
        """The server's settings with what the request chose.

        One that chooses nothing about layer K has the server's `default_relevance` there.

        Raises:
            ValueError: A choice has a bad value, or does not go with the server's settings.
        """
        chosen = dict(self.choices)
        if not chosen:
            if self.retention_ratio is not None or of_server.default_relevance is None:
                return of_server
            return replace(of_server, relevance=of_server.default_relevance)
        try:
            if chosen.get("relevance") == "question" and not of_server.reads_question:
                raise ValueError("this server was started with --relevance none")
            return replace(of_server, **chosen)
        except ValueError as error:
            names = ", ".join(ARG_PREFIX + name for name, _ in self.choices)
            raise ValueError(f"{names}: {error}") from error


def media_spans(
    prompt_token_ids: Sequence[int],
    placeholders: Iterable[tuple[str, "PlaceholderRange"]],
    settings: ServingSettings,
) -> list[MediaSpan]:
    """Media spans in prompt order.

    Args:
        prompt_token_ids: The expanded prompt.
        placeholders: (modality, placeholder range) pairs. Where a range does not say which of its
            positions are a video's own, as of one that enters in part, the tokens do.
        settings: Say which modalities are pruned, and the token of a video's own positions.
    """

    def span(modality: str, place: "PlaceholderRange") -> MediaSpan:
        length, own = place.length, settings.video_token_id
        if modality == "video":
            length -= settings.video_end_length or 0
        num_own = length if place.is_embed is None else place.get_num_embeds()
        if modality == "video" and place.is_embed is None and own is not None:
            num_own = list(prompt_token_ids[place.offset : place.offset + length]).count(own)
        return MediaSpan(place.offset, length, modality in settings.prunes, length - num_own)

    spans = [span(*placeholder) for placeholder in placeholders]
    return sorted(spans, key=lambda span: span.start)


def media_of(
    prompt_token_ids: Sequence[int],
    mm_features: Sequence["MultiModalFeatureSpec"],
    settings: ServingSettings,
) -> list[MediaSpan]:
    """Media spans of a request, in prompt order."""
    placeholders = [(f.modality, f.mm_position) for f in mm_features]
    return media_spans(prompt_token_ids, placeholders, settings)


def plan_prompt(
    prompt_token_ids: Sequence[int],
    media: Sequence[MediaSpan],
    options: RequestOptions,
    settings: ServingSettings,
    block_size: int | None,
) -> PrunePlan | None:
    """The plan of a prompt under one request's options.

    Args:
        prompt_token_ids: The expanded prompt.
        media: Every image and video, in prompt order.
        options: What the request chose.
        settings: The server's.
        block_size: As in ``build_plan``.
    """
    if not media:
        return None
    ratio, asked = options.retention_ratio, options.settings(settings)
    return build_plan(
        prompt_token_ids,
        media,
        retention_ratio=settings.retention_ratio if ratio is None else ratio,
        turn_end_token_id=settings.turn_end if asked.reads_question else None,
        block_size=block_size,
        piece_length=settings.decide_every,
    )


def plan_request(
    prompt_token_ids: Sequence[int] | None,
    mm_features: Sequence["MultiModalFeatureSpec"] | None,
    sampling_params: "SamplingParams | None",
    settings: ServingSettings,
    block_size: int | None,
) -> tuple[PrunePlan | None, RequestOptions]:
    """The plan of a request as the scheduler and the workers hold it, and what it asked for.

    Raises:
        ValueError: The request's arguments are wrong; the front end refuses such requests first.
    """
    if not mm_features or prompt_token_ids is None or sampling_params is None:
        return None, RequestOptions()
    options = RequestOptions.from_extra_args(sampling_params.extra_args)
    media = media_of(prompt_token_ids, mm_features, settings)
    return plan_prompt(prompt_token_ids, media, options, settings, block_size), options


def _ratio(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"{RETENTION_RATIO_ARG} must be a number in (0, 1], where 1 keeps every token; "
            f"got {value!r}"
        )
    return float(value)


def _flag(value: Any) -> bool:
    if value not in (None, 0, 1, "true", "false"):
        raise ValueError(f"{RECORD_ARG} must be true or false, got {value!r}")
    return value in (1, "true")
