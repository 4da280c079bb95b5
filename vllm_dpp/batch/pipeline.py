"""Replicas under Ray Data: from a dataset of rows to one of answers.

Only names of videos travel through Ray; a replica decodes them itself, as a server does.
"""

import importlib.util
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_dpp.batch.replica import Replica
from vllm_dpp.batch.rows import Row

if TYPE_CHECKING:
    from ray.data import Dataset

NO_RAY = "batches need Ray Data: pip install 'vllm-dpp[ray]'"
MOST_ROWS = 16
"""Of a block: what Ray does anew if a replica ends, and what the driver hears of at once."""
STORE_BYTES = 128 << 20
"""Of Ray's object store where it is our own. Rows are short texts."""
FORWARDED = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE")
LISTENER_TIMEOUT_S = 10
SECRET = ("VLLM_API_KEY",)


def require_ray() -> None:
    """Raise `ValueError` where Ray Data is not installed."""
    if None in map(importlib.util.find_spec, ("ray", "pyarrow")):
        raise ValueError(NO_RAY)


def connect(address: str | None, replicas: int) -> None:
    """Join a cluster, or start Ray on this machine.

    Args:
        address: Of the cluster; `None` starts one of our own, which ends with this process.
        replicas: How many processes have to find room in one of our own.

    Raises:
        ValueError: No cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    environment = {"env_vars": _environment()}
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # an engine is no background job
        ray.init(
            "local",
            num_cpus=max(os.cpu_count() or 1, replicas),
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            runtime_env=environment,
        )
        return
    try:
        _require_listener(address)
        ray.init(address, runtime_env=environment)
    except OSError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster answers ({error}); for one that "
            "asks for a token set RAY_AUTH_MODE=token"
        ) from error


def ask(
    dataset: "Dataset",
    arguments: Sequence[str],
    *,
    replicas: int = 1,
    gpus_per_replica: int | None = None,
    rows_in_flight: int = 64,
    **body: Any,
) -> "Dataset":
    """The dataset with an answer in each row; nothing runs before it is read.

    Args:
        dataset: Columns `video` and `question`, and those that `Replica` names.
        arguments: Of `vllm serve`: the model and flags, as `serve_command` makes them.
        replicas: Engines, each in an actor.
        gpus_per_replica: Of each; `None` is `gpus_of`.
        rows_in_flight: That each has at once.
        body: Fields of every request, such as `max_tokens`.

    Raises:
        ValueError: The cluster lacks the GPUs.
    """
    from ray.data import ActorPoolStrategy

    gpus = gpus_of(arguments) if gpus_per_replica is None else gpus_per_replica
    rows, calls = in_flight(rows_in_flight)
    return dataset.map_batches(
        Replica,
        fn_constructor_args=(list(arguments), body),
        batch_size=rows,
        batch_format="pyarrow",
        num_gpus=gpus or None,
        num_cpus=1,
        compute=ActorPoolStrategy(
            size=replicas,
            max_tasks_in_flight_per_actor=calls,
            max_concurrent_calls_per_actor=calls,
        ),
    )


def answers_of(rows: Sequence[Row], **options: Any) -> Iterator[list[dict[str, Any]]]:
    """Answered rows, as they are answered, in no order.

    Args:
        rows: What is asked.
        options: Of `ask`.

    Raises:
        RuntimeError: A replica could not start, or has ended.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; the command counts rows
    size, _ = in_flight(options["rows_in_flight"])
    blocks = math.ceil(len(rows) / size)
    dataset = ray.data.from_items([row.as_dict() for row in rows], override_num_blocks=blocks)
    for batch in ask(dataset, **options).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield batch.to_pylist()


def in_flight(rows: int) -> tuple[int, int]:
    """Rows of a batch, and batches at once, that make so many rows in flight."""
    size = min(MOST_ROWS, math.ceil(rows / 4))
    return size, math.ceil(rows / size)


def gpus_of(arguments: Sequence[str]) -> int:
    """What one replica takes: as many as tensor-parallel ranks; none in a cluster without GPUs."""
    import ray

    from vllm_dpp.batch.replica import parse_serve

    if not ray.cluster_resources().get("GPU"):
        return 0
    return parse_serve(arguments).tensor_parallel_size


def _require_listener(address: str) -> None:
    """Raise `OSError` at once where nobody listens, to which Ray would come after minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), LISTENER_TIMEOUT_S).close()


def _environment() -> Mapping[str, str]:
    """Of replicas: vLLM's own variables here, which a cluster's machines do not have."""
    forwarded = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith("VLLM_") or name in FORWARDED) and name not in SECRET
    }
    # Every replica's threads would be bound to the same cores of a CPU.
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    return defaults | forwarded
