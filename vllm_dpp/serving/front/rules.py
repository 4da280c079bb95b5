"""What a request may not ask for. Each refusal names what was asked, the setting and the remedy.

Most of it is known before the request's media are read (:class:`Demand`), and is then refused
without touching them; the length of a range is known only once the prompt has been expanded.
"""

import copy
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
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

UNPRUNED = f"ask for {RETENTION_RATIO_ARG}=1"
_NEEDS_ALL: dict[Reason, str] = {
    "prompt_logprobs": (
        "prompt_logprobs (and echo, which asks for them) do not exist for tokens that were pruned: "
        f"leave them out, or {RETENTION_RATIO_ARG}, or {UNPRUNED}"
    ),
    "streaming_input": (
        "a video in a streaming-input session cannot be pruned at layer K: leave "
        f"{RETENTION_RATIO_ARG} out, or {UNPRUNED}"
    ),
}
"""What cannot be had of a request that lost tokens at layer K, and what to do about it."""
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
        scores_prompt: Whether it wants a logprob for every token of its prompt.
        is_session: Whether its prompt comes in parts.
        beam_search: Whether vLLM searches with beams, whose requests carry no arguments.
    """

    options: RequestOptions
    scores_prompt: bool = False
    is_session: bool = False
    beam_search: bool = False

    @classmethod
    def of_http_request(cls, request: Any) -> Self:
        """Read the body of any of vLLM's generating endpoints.

        Raises:
            ValueError: One of our arguments is unknown or has a bad value.
        """
        params = getattr(request, "sampling_params", None)
        # /inference/v1/generate takes the engine's own
        extra_args = params.extra_args if params else getattr(request, "vllm_xargs", None)
        return cls(
            options=RequestOptions.from_extra_args(extra_args),
            scores_prompt=scores_prompt(params or request),
            beam_search=bool(getattr(request, "use_beam_search", False)),
        )

    @classmethod
    def of_engine_request(cls, request: "EngineCoreRequest") -> Self:
        """Read a request on its way to the engine.

        Raises:
            ValueError: One of our arguments is unknown or has a bad value.
        """
        params = request.sampling_params
        return cls(
            options=RequestOptions.from_extra_args(params.extra_args if params else None),
            scores_prompt=scores_prompt(params),
            is_session=request.resumable,
        )

    @property
    def needs_all(self) -> Reason | None:
        """Why it cannot lose tokens at layer K, if it cannot."""
        if self.scores_prompt:
            return "prompt_logprobs"
        return "streaming_input" if self.is_session else None

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
        if self.needs_all is not None and ratio is not None and ratio < 1:
            raise UnservableError(self.needs_all, _NEEDS_ALL[self.needs_all])
        if options.record and settings.record_dir is None:
            raise UnservableError(
                "record_dir",
                f"{RECORD_ARG} needs a server with a record_dir: start it with --record-dir, or "
                f"leave {RECORD_ARG} out",
            )


def keep_all(request: "EngineCoreRequest") -> None:
    """Have a request keep at layer K all that entered.

    It gets parameters of its own: its caller may use the others again.
    """
    params = copy.copy(request.sampling_params)
    if params is not None:
        params.extra_args = {**(params.extra_args or {}), RETENTION_RATIO_ARG: 1.0}
    request.sampling_params = params


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
    if not request.mm_features or limit is None:
        return
    tokens = request.prompt_token_ids or ()
    media = media_of(tokens, request.mm_features, settings)
    plan = plan_prompt(tokens, media, options, settings, None)
    if plan is None:
        return
    longest = max(turn.end - turn.start for turn in plan.turns)
    if longest > limit:
        raise UnservableError(
            "max_deferred_tokens",
            f"a video with its question takes {longest} tokens, more than max_deferred_tokens "
            f"{limit} of this server: send a shorter video, start the server with a larger "
            f"--max-deferred-tokens, or {UNPRUNED}",
        )


def scores_prompt(asked: Any) -> bool:
    """Whether a body, or sampling parameters, want a logprob for every token of the prompt.

    An echo is scored like a prompt.
    """
    names = ("prompt_logprobs", "prompt_logprob_token_ids")
    wanted = any(getattr(asked, name, None) is not None for name in names)
    return wanted or bool(getattr(asked, "echo", False))
