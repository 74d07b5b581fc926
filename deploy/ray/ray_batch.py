"""Offline batch generation on a Ray cluster for rows of Parquet or JSONL files.

    python deploy/ray/ray_batch.py /bundle prompts.parquet answers \\
        --id id --column prompt --workers 8 --threads 2

Run the command again with the same OUTPUT to resume an interrupted job.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from runtime import (
    BatchError,
    Bundle,
    FreeExportError,
    GenerationOptions,
    OptionError,
    PromptError,
    Session,
)

# Files in OUTPUT: IDs of the finished rows, and the options of the job.
DONE = "_done"
MADE_WITH = "_made_with.json"


class Generate:
    """Ray actor with one session.

    Adds `answer`, `finish_reason`, `tokens` and `error` to each row of a batch. If a row fails,
    only its own `error` is set.
    """

    def __init__(
        self, bundle: str, column: str, threads: int, slots: int, options: dict[str, Any]
    ) -> None:
        self._session = Session(bundle, threads=threads, slots=slots, queue=slots)
        self._column = column
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = batch[self._column].tolist()
        results = iter(self._results([prompt for prompt in prompts if isinstance(prompt, str)]))
        rows = [
            _row(
                next(results)
                if isinstance(prompt, str)
                else PromptError(f"the prompt is {prompt!r}, no text")
            )
            for prompt in prompts
        ]
        return {**batch, **{name: [row[name] for row in rows] for name in rows[0]}}

    def _results(self, prompts: list[str]) -> list[Any]:
        try:
            return self._session.generate(prompts, **self._options) if prompts else []
        except BatchError as error:
            return error.results


def _row(result: Any) -> dict[str, Any]:
    if isinstance(result, BaseException):
        return {"answer": "", "finish_reason": "error", "tokens": 0, "error": str(result)}
    return {
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "tokens": len(result.token_ids),
        "error": "",
    }


def read(source: Path, columns: set[str]) -> tuple[Dataset, str]:
    """Return the rows of a file or a folder, and the suffix of the files.

    Args:
        source: A file, or a folder of files of one kind.
        columns: Columns that must exist.

    Raises:
        OptionError: If the files are not all .parquet or all .jsonl, or a column is missing or
            taken.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    kinds = {file.suffix for file in files}
    if kinds not in ({".parquet"}, {".jsonl"}):
        raise OptionError(
            f"{source} has {' and '.join(sorted(kinds)) or 'no'} files; "
            "give .parquet or .jsonl files"
        )
    (kind,) = kinds
    names = list(map(str, files))
    # Reading and writing reserve no core, because sessions may use all but one.
    rows = (
        ray.data.read_parquet(names, num_cpus=0)
        if kind == ".parquet"
        else ray.data.read_json(names, lines=True, num_cpus=0)
    )
    there = set(rows.schema().names)
    for missing in columns - there:
        raise OptionError(f"{source} has no column {missing!r}; it has {', '.join(sorted(there))}")
    for twice in there & set(_row(ValueError())):
        raise OptionError(f"{source} has a column {twice!r}, which this job writes; rename it")
    return rows, kind


def check_cores(needed: int) -> None:
    """Check that the cluster has enough free cores.

    Ray needs one core to list files, and would wait for it forever.

    Args:
        needed: Cores of all sessions.

    Raises:
        OptionError: If there are too few.
    """
    ray.init(ignore_reinit_error=True)
    free = ray.available_resources().get("CPU", 0)
    if needed + 1 > free:
        raise OptionError(
            f"{needed} cores for sessions and 1 for Ray are needed, {free:g} are free; "
            "use fewer --workers"
        )


def check_claim(output: Path, made_with: dict[str, Any]) -> None:
    """Create the output folder, or check that it belongs to a job with the same options.

    Raises:
        OptionError: If `output` has files of another job or of no job.
    """
    record = output / MADE_WITH
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != made_with:
        raise OptionError(
            f"{output} was written with other options or another bundle ({record}); "
            "choose another OUTPUT"
        )
    if (
        not record.exists()
        and output.exists()
        and any(path.name != DONE for path in output.iterdir())
    ):
        raise OptionError(
            f"{output} is not empty and not the output of a job; choose another OUTPUT"
        )
    output.mkdir(parents=True, exist_ok=True)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--id", "key", default="id", show_default=True, help="Column that identifies a row.")
@click.option(
    "--column", default="prompt", show_default=True, help="Column with the prompts, as text."
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of sessions in the cluster.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU cores per session."
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Rows that a session decodes concurrently.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Rows per output file. A restarted job repeats only files that are not complete.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--mode", default="free", show_default=True)
@click.option("--threshold", type=click.FloatRange(0, 1))
def main(
    bundle: Path,
    source: Path,
    output: Path,
    key: str,
    column: str,
    workers: int,
    threads: int,
    slots: int,
    rows: int,
    **options: Any,
) -> None:
    """Generate an answer for every row of SOURCE, a file or a folder. Write files to OUTPUT."""
    try:
        GenerationOptions(**options)
        check_cores(workers * threads)
        output = output.resolve()
        made_with = {"bundle": Bundle.open(bundle).sha256, "column": column, **options}
        # Set before the rows are read, because datasets copy the context.
        DataContext.get_current().checkpoint_config = CheckpointConfig(
            key, str(output / DONE), delete_checkpoint_on_success=False
        )
        check_claim(output, made_with)
        data, kind = read(source, {key, column})
        (output / MADE_WITH).write_text(json.dumps(made_with), encoding="utf-8")
        answers = data.repartition(target_num_rows_per_block=rows).map_batches(
            Generate,
            fn_constructor_args=(str(bundle.resolve()), column, threads, slots, options),
            batch_size=None,
            num_cpus=threads,
            compute=ActorPoolStrategy(size=workers),
        )
        write = answers.write_parquet if kind == ".parquet" else answers.write_json
        write(str(output), ray_remote_args={"num_cpus": 0})
    except FreeExportError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
