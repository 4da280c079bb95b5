"""One engine that answers rows as a server of the same flags would.

It is vLLM's own server without its HTTP, set up as `vllm run-batch` sets it up: chat template,
decoding of videos, defaults of sampling and refusals are the server's, and need no copy here.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_dpp.batch.rows import RATIOS

if TYPE_CHECKING:
    from argparse import Namespace

    import pyarrow

COLUMNS = {
    "answer": "string",
    "error": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "replica": "string",
}
"""What an answered row has beside its own columns, with Arrow's types: either `answer` or `error`
is null. `prompt_tokens` counts what entered the decoder; `replica` is the actor that answered."""

SHAPING = (
    *("model", "revision", "hf_overrides", "additional_config", "dtype", "quantization"),
    *("chat_template", "generation_config", "media_io_kwargs", "mm_processor_kwargs"),
)
"""Of vLLM's options, those that a run shares with the one that it goes on from. Others, such as
memory and concurrency, may be changed between runs."""


INTERNAL_ERROR = 500


def parse_serve(arguments: Sequence[str]) -> "Namespace":
    """vLLM's own reading of `vllm serve ARGUMENTS`.

    Local videos may lie anywhere unless `--allowed-local-media-path` says where: who runs a batch
    names the files himself.

    Raises:
        ValueError: A flag is not for batches.
        SystemExit: vLLM does not take the arguments; it has said why.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    args.model = args.model_tag or args.model
    if args.data_parallel_size not in (None, 1) or args.headless:
        raise ValueError("--data-parallel-size and --headless are not for batches: --replicas is")
    args.allowed_local_media_path = args.allowed_local_media_path or "/"
    if args.tensor_parallel_size > 1 and args.distributed_executor_backend is None:
        args.distributed_executor_backend = "mp"  # the GPUs that Ray has given to this process
    return args


class Replica:
    """Answers batches of rows; Ray Data makes one in each actor.

    Args:
        arguments: Of `vllm serve`: the model and flags.
        body: Fields of every request, such as `max_tokens`.
    """

    def __init__(self, arguments: Sequence[str], body: Mapping[str, Any]) -> None:
        self._arguments, self._body = list(arguments), dict(body)
        self._starting: asyncio.Task[Any] | None = None
        self._engine: Any = None

    async def __call__(self, batch: "pyarrow.Table") -> AsyncIterator["pyarrow.Table"]:
        """Answer all rows of a batch at once.

        Args:
            batch: Columns `video` (an absolute path or a URL) and `question`; those of `RATIOS`,
                if they are there, with null for the engine's own; and any others, which stay.

        Yields:
            The batch with `COLUMNS`.

        Raises:
            RuntimeError: The engine has ended.
        """
        import pyarrow

        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        chat = await asyncio.shield(self._starting)
        found = await asyncio.gather(*(self._answer(chat, row) for row in batch.to_pylist()))
        for name, kind in COLUMNS.items():
            values = pyarrow.array([each.get(name) for each in found], getattr(pyarrow, kind)())
            batch = batch.append_column(name, values)
        yield batch

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()  # it has processes of its own

    async def _start(self) -> Any:
        """Returns what a server answers chats with."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.v1.engine.async_llm import AsyncLLM

        args = parse_serve(self._arguments)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        state: Any = SimpleNamespace()
        tasks = await self._engine.get_supported_tasks()
        await init_app_state(self._engine, state, args, tasks)
        return state.openai_serving_chat

    async def _answer(self, chat: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of one row; what is wrong with it alone is its error."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        reply = await self._ask(chat, row)
        if isinstance(reply, ErrorResponse) and reply.error.code >= INTERNAL_ERROR:
            reply = await self._ask(chat, row)  # as clients do if vLLM has lost a video's features
        found: dict[str, Any] = {"replica": _actor()}
        if isinstance(reply, ErrorResponse):
            return found | {"error": reply.error.message}
        (choice,) = reply.choices
        return found | {
            "answer": choice.message.content or "",
            "finish_reason": choice.finish_reason,
            "prompt_tokens": reply.usage.prompt_tokens,
            "completion_tokens": reply.usage.completion_tokens,
        }

    async def _ask(self, chat: Any, row: Mapping[str, Any]) -> Any:
        """Returns vLLM's answer, or its `ErrorResponse`."""
        from vllm.entrypoints.serve import create_error_response

        try:
            reply = await chat.create_chat_completion(_request(row, self._body))
        except Exception as error:
            reply = create_error_response(error)
        if self._engine.errored:
            raise RuntimeError(f"the engine has ended: {self._engine.dead_error}")
        return reply


def _request(row: Mapping[str, Any], body: Mapping[str, Any]) -> Any:
    """The request that asks a server for a row."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    video = row["video"]
    url = Path(video).as_uri() if video.startswith("/") else video
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": row["question"]},
    ]
    ratios = {f"dpp_{name}": row[name] for name in RATIOS if row.get(name) is not None}
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": content}], vllm_xargs=ratios or None, **body
    )


def _actor() -> str:
    import ray

    return ray.get_runtime_context().get_actor_id()
