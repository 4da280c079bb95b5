"""What a request may not ask for. Each refusal names what was asked, the setting and the remedy.

Most of it is known before the request's media are read (:class:`Demand`), and is then refused
without touching them; the length of a range is known only once the prompt has been expanded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from vllm_dpp.serving.front.metrics import Reason
from vllm_dpp.serving.request_plan import (
    ARG_PREFIX,
    ENTRY_RATIO_ARG,
    KNOWN_ARGS,
    RECORD_ARG,
    RETENTION_RATIO_ARG,
    VIDEO_SHARE_ARG,
    RequestOptions,
    media_of,
    plan_prompt,
)
from vllm_dpp.serving.settings import MODALITIES, ServingSettings

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

UNPRUNED = f"ask for {RETENTION_RATIO_ARG}=1"
_ENTRY_ONLY = (
    f"this server leaves tokens out before the decoder alone (--entry-only): of {ARG_PREFIX}* a "
    f"request may choose {VIDEO_SHARE_ARG} or {ENTRY_RATIO_ARG}; leave the others out"
)


class UnservableError(ValueError):
    """A request asks for what cannot be had.

    Args:
        reason: What it is about.
        message: Why, and what to do about it.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for, as far as that is known without its media.

    Args:
        options: Its arguments of ours.
        scored: Modalities in its prompt, if it wants a logprob for every token of that.
        beam_search: Whether vLLM searches with beams, whose requests carry no arguments.
    """

    options: RequestOptions
    scored: frozenset[str]
    beam_search: bool = False

    @classmethod
    def of_http_request(cls, request: Any) -> Self:
        """Read the body of any of vLLM's generating endpoints.

        Raises:
            ValueError: One of our arguments is unknown or has a bad value.
        """
        params = getattr(request, "sampling_params", None)
        if params is not None:  # /inference/v1/generate takes the engine's own
            extra_args, scores_prompt = params.extra_args, _scores_prompt(params)
        else:
            extra_args = getattr(request, "vllm_xargs", None)
            # An echo is scored like a prompt.
            scores_prompt = getattr(request, "echo", False) or (
                getattr(request, "prompt_logprobs", None) is not None
            )
        return cls(
            options=RequestOptions.from_extra_args(extra_args),
            scored=_brought(request) if scores_prompt else frozenset(),
            beam_search=bool(getattr(request, "use_beam_search", False)),
        )

    @classmethod
    def of_engine_request(cls, request: "EngineCoreRequest") -> Self:
        """Read a request on its way to the engine.

        Raises:
            ValueError: One of our arguments is unknown or has a bad value.
        """
        params, features = request.sampling_params, request.mm_features or ()
        if params is None:
            return cls(RequestOptions(), scored=frozenset())
        return cls(
            options=RequestOptions.from_extra_args(params.extra_args),
            scored=frozenset(f.modality for f in features if _scores_prompt(params)),
        )

    def check(self, settings: ServingSettings) -> None:
        """Raise ``ValueError`` where an engine of ``settings`` refuses it."""
        options, low = self.options, settings.min_retention_ratio
        ratio = options.retention_ratio
        if settings.entry_only and options not in (RequestOptions(), RequestOptions(1.0)):
            raise UnservableError("entry_only", _ENTRY_ONLY)
        options.settings(settings)
        if self.beam_search and options != RequestOptions():
            raise UnservableError(
                "beam_search",
                f"beam search does not pass {', '.join(KNOWN_ARGS)} on to its beams: leave them "
                "out, or use_beam_search",
            )
        if ratio is not None and ratio < low:
            raise UnservableError(
                "min_retention_ratio",
                f"{RETENTION_RATIO_ARG} {ratio} is below this server's min_retention_ratio {low}: "
                "ask for more, or start the server with a lower --min-retention-ratio",
            )
        if options.record and settings.record_dir is None:
            raise UnservableError(
                "record_dir",
                f"{RECORD_ARG} needs a server with a record_dir: start it with --record-dir, or "
                f"leave {RECORD_ARG} out",
            )
        lost = self.scored.intersection(settings.prunes)
        if lost and (settings.retention_ratio if ratio is None else ratio) < 1:
            raise UnservableError(
                "prompt_logprobs",
                "prompt_logprobs (and echo, which asks for them) do not exist for tokens of "
                f"{' and '.join(sorted(lost))} that were pruned: leave them out, or {UNPRUNED}",
            )


def check_prompt(
    request: "EngineCoreRequest", options: RequestOptions, settings: ServingSettings
) -> None:
    """Raise ``ValueError`` where the expanded prompt cannot be served.

    Neither block size nor step budget matters: a front end need not know what the engine makes of
    them.
    """
    if settings.entry_only:
        return
    limit = settings.max_deferred_tokens
    if not request.mm_features or (limit is None and not request.resumable):
        return
    tokens = request.prompt_token_ids or ()
    media = media_of(tokens, request.mm_features, settings)
    plan = plan_prompt(tokens, media, options, settings, None)
    if plan is None:
        return
    if request.resumable:
        raise UnservableError(
            "streaming_input", f"a video in a streaming-input session cannot be pruned: {UNPRUNED}"
        )
    longest = max(turn.end - turn.start for turn in plan.turns)
    if limit is not None and longest > limit:
        raise UnservableError(
            "max_deferred_tokens",
            f"a video with its question takes {longest} tokens, more than max_deferred_tokens "
            f"{limit} of this server: send a shorter video, start the server with a larger "
            f"--max-deferred-tokens, or {UNPRUNED}",
        )


def _scores_prompt(params: "SamplingParams") -> bool:
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


def _brought(request: Any) -> frozenset[str]:
    """The modalities in the body of a request: in features, messages or content parts."""
    features = getattr(request, "features", None)
    found = {m for m in MODALITIES if features is not None and features.mm_hashes.get(m)}
    for name in ("messages", "input", "content_parts"):
        found |= _held(getattr(request, name, None))
    return frozenset(found)


def _held(value: Any) -> set[str]:
    """The modalities that a JSON value holds a part of, by its type or one of its keys."""
    if isinstance(value, list | tuple):
        return {modality for item in value for modality in _held(item)}
    if not isinstance(value, Mapping):
        return set()
    names = [str(value.get("type")), *map(str, value)]
    own = {m for m in MODALITIES if any(m in name for name in names)}
    return own | _held(value.get("content"))
