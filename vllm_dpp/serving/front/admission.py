"""Refuse a request that cannot be served with HTTP 400, and leave no trace of it.

vLLM asks nobody about a request's arguments, so this module wraps parts of its front end
(``patches/request-admission.md``, ``patches/refused-media.md``):

- ``GenerateBaseServing._check_model``, with which HTTP endpoints begin: what can be known from the
  body is refused before media are read, and before a stream has begun;
- ``InputProcessor.process_inputs``, which every request passes on its way to the engine: the whole
  check, on what the engine would get, where a prompt that is to be scored keeps all of its tokens;
- ``validate_request_mm_kwargs``, which keeps clients from setting up the processor: our own
  argument, which takes no more than the whole video does, passes;
- ``add_request`` of both engine clients: see :mod:`vllm_dpp.serving.front.media`.

They act only where an engine of ours is asked (``ServingSettings.of_engine``).
"""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_dpp.serving.front import media, metrics
from vllm_dpp.serving.front.entry import without_ratio
from vllm_dpp.serving.front.rules import (
    Demand,
    UnservableError,
    check_prompt,
    keep_all,
)
from vllm_dpp.serving.front.shares import spread
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.v1.engine import EngineCoreRequest

Method = Callable[..., Any]


class RefusedRequestError(VLLMValidationError):
    """Becomes HTTP 400 for this request alone.

    Args:
        message: Why, and what to do about it.
        request: What the engine would have got.
    """

    def __init__(self, message: str, request: "EngineCoreRequest") -> None:
        super().__init__(message)
        self.request = request


class AdmissionProcessorMixin:
    """Mixed into a model's multimodal processor, which every front end of the model builds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install()


def install() -> None:
    """Wrap vLLM's methods, once in a process.

    A front end has imported what it will use by the time it builds a processor; workers and engines
    build one, too, and import none of it.
    """
    for (module, owner, name), wrapper in WRAPPERS.items():
        if found := sys.modules.get(module):
            _wrap(getattr(found, owner) if owner else found, name, wrapper)


def check_http_request(request: Any, settings: ServingSettings) -> None:
    """Raise ``ValueError`` where the body of ``request`` says enough to refuse it."""
    Demand.of_http_request(request).check(settings)


def check_engine_request(request: "EngineCoreRequest", settings: ServingSettings) -> None:
    """Raise ``ValueError`` where ``request`` cannot be served.

    One that cannot lose tokens at layer K, and says nothing about it, is made to keep them.
    """
    demand = Demand.of_engine_request(request)
    demand.check(settings)
    if demand.needs_all is not None and settings.retention_ratio < 1:
        keep_all(request)
        return
    check_prompt(request, demand.options, settings)


def _wrap(owner: Any, name: str, wrapper: Callable[[Method], Method]) -> None:
    inner = getattr(owner, name)
    if not hasattr(inner, "admits"):
        wrapped = functools.wraps(inner)(wrapper(inner))
        wrapped.admits = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _checking_http(inner: Method) -> Method:
    async def _check_model(self: Any, request: Any) -> "ErrorResponse | None":
        refusal = await inner(self, request)
        settings = ServingSettings.of_engine(self.engine_client.vllm_config)
        if refusal is None and settings is not None:
            try:
                decoder = self.engine_client.vllm_config.model_config.hf_text_config
                spread(request, settings, decoder.num_hidden_layers)
                check_http_request(request, settings)
            except ValueError as error:
                _count(error)
                raise VLLMValidationError(str(error)) from error
        return refusal

    return _check_model


def _checking(inner: Method) -> Method:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> "EngineCoreRequest":
        request = inner(self, *args, **kwargs)
        settings = ServingSettings.of_engine(self.vllm_config)
        if settings is not None:
            try:
                check_engine_request(request, settings)
            except ValueError as error:
                _count(error)
                raise RefusedRequestError(str(error), request) from error
        return request

    return process_inputs


def _count(error: ValueError) -> None:
    metrics.refused(error.reason if isinstance(error, UnservableError) else "argument")


def _delivering_async(inner: Method) -> Method:
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await inner(self, *args, **kwargs)
        except RefusedRequestError as refusal:
            if request := media.delivery(self, refusal.request):
                await self.engine_core.add_request_async(request)
            self.renderer._mm_executor.submit(media.let_go, self, refusal.request)
            raise

    return add_request


def _delivering(inner: Method) -> Method:
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(self, *args, **kwargs)
        except RefusedRequestError as refusal:
            if request := media.delivery(self, refusal.request):
                self.engine_core.add_request(request)
            media.let_go(self, refusal.request)
            raise

    return add_request


def _letting_ratio_through(inner: Method) -> Method:
    def validate_request_mm_kwargs(*, mm_processor_kwargs: Any, **others: Any) -> None:
        inner(mm_processor_kwargs=without_ratio(mm_processor_kwargs or {}), **others)

    return validate_request_mm_kwargs


WRAPPERS: dict[tuple[str, str | None, str], Callable[[Method], Method]] = {
    ("vllm.entrypoints.generate.base.serving", "GenerateBaseServing", "_check_model"): (
        _checking_http
    ),
    ("vllm.renderers.online_renderer", None, "validate_request_mm_kwargs"): _letting_ratio_through,
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"): _checking,
    ("vllm.v1.engine.async_llm", "AsyncLLM", "add_request"): _delivering_async,
    ("vllm.v1.engine.llm_engine", "LLMEngine", "add_request"): _delivering,
}
"""By module, class (``None`` for the module's own) and function."""
