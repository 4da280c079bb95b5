"""`vllm-dpp batch`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vllm_dpp.batch.answers import Answers
from vllm_dpp.batch.pipeline import answers_of, connect, require_ray
from vllm_dpp.batch.replica import COLUMNS, SHAPING, parse_serve
from vllm_dpp.batch.rows import Row, read_rows
from vllm_dpp.serve_command import serve_command

INTERRUPTED = 130


def main(options: argparse.Namespace, settings: dict[str, Any], rest: Sequence[str]) -> int:
    """Answer what is missing.

    Args:
        options, settings, rest: As `vllm_dpp.batch.options.parse` gives them.

    Returns:
        0 when every row has an answer or an error; 1 where replicas ended before; 130 where the
        user stopped it.

    Raises:
        ValueError: An argument is wrong, or no row can be asked; nothing has been started.
        OSError: A file cannot be read or written.
    """
    require_ray()
    rows = read_rows(options.input, options.question)
    arguments = serve_command(settings, rest)[2:]
    serve = parse_serve(arguments)
    body = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    with Answers(options.output, {n: getattr(serve, n) for n in SHAPING} | body) as answers:
        if options.retry_errors:
            answers.forget_errors()
        missing = answers.missing(rows)
        print(f"{len(rows)} rows, {len(rows) - len(missing)} done before", flush=True)
        empty = dict.fromkeys(COLUMNS)
        answers.add(row.as_dict() | empty | {"error": row.fault} for row in missing if row.fault)
        askable = [row for row in missing if not row.fault]
        status = _answer(askable, answers, arguments, body, options) if askable else 0
        if not status and options.format == "parquet":
            answers.write_parquet(rows)
        _report(rows, answers)
    return status


def _answer(
    rows: Sequence[Row],
    answers: Answers,
    arguments: Sequence[str],
    body: dict[str, Any],
    options: argparse.Namespace,
) -> int:
    """Answer the rows, with a bar of progress on stderr. Returns the status."""
    import ray
    from tqdm import tqdm

    connect(options.address, options.replicas)
    batches = answers_of(
        rows,
        arguments=arguments,
        replicas=options.replicas,
        gpus_per_replica=options.gpus_per_replica,
        rows_in_flight=options.rows_in_flight,
        **body,
    )
    try:
        with tqdm(total=len(rows), unit="row", smoothing=0.1) as bar:
            for batch in batches:
                bar.update(answers.add(batch))
                bar.set_postfix(errors=answers.num_errors)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except (ray.exceptions.RayError, RuntimeError) as error:
        print(f"the replicas ended: {error}\nthe same command goes on", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


def _report(rows: Sequence[Row], answers: Answers) -> None:
    found = [answers.records[row.id] for row in rows if row.id in answers.records]
    bad = sum(record["error"] is not None for record in found)
    text = f"{len(found) - bad} answered, {bad} errors, {len(rows) - len(found)} missing"
    hint = "; --retry-errors asks those with errors again" if bad else ""
    print(f"{answers.folder}: {text}{hint}")
