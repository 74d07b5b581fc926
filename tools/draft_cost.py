"""Measures what a draft of the exit costs, by engine call, beside a token of mode full.

    python -m tools.draft_cost BUNDLE [BUNDLE ...] --save costs.json

Each round runs a token of mode full, a chain of drafts after it, and a text draft of each length,
of all bundles in turn. A deep pass comes before each of them, so the processor's caches are cold,
as in decoding. Times are 10 % quantiles, because other processes only make calls slower. Those of
one thread are processor time, and those of more are wall-clock time, on an idle machine. The file
is also the `--costs` of tools.draft_replay. --against names a library of the kernels from another
build: each bundle is opened with both, which take turns. Run from the root of the repository.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import click
import numpy as np

from freeexport.system.load import load_note, other_load
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.decoding.calls import finish
from runtime.decoding.decoder import Decoder
from runtime.engines import kernels, runner
from tools.data.splits import run_tool
from tools.timings import save_timings

QUANTILE = 0.1
CONTEXT = 64  # tokens of the prompt
CATCH_UP = 8
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # of a sync pass


class DraftTimer:
    """Times the calls of one bundle. Seconds are kept by name of the part.

    Args:
        decoder: Decoder of a session in which nothing else runs.
        chain: Drafts of the exit after each other.
        clock: Returns the current time in seconds.
    """

    def __init__(
        self, decoder: Decoder, vocab_size: int, chain: int, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._decoder = decoder
        self._chain = chain
        decoder.reset()
        decoder.want_logits(False)
        decoder.only_sequence = True
        prompt = np.arange(CONTEXT, dtype=np.int64) % vocab_size
        self._token = decoder.prefill(prompt, head=False, exits=True).token

    def round(self) -> None:
        """Time a token of mode full, a chain of drafts, and a text draft of each length."""
        self._full()
        for rows in ROWS:
            self._verify(rows)
        self._full()
        step = self._timed(lambda: self._decoder.step(self._token, head=False))
        self._full()
        draft = self._timed(self._draft)
        for _ in range(CATCH_UP):  # tokens that the exit's layers do not read
            self._token_of_full()
        late = self._timed(lambda: self._decoder.step(self._token, head=True))
        self.seconds["step"].append(step[1])
        self.seconds["late"].append(late[1])
        self.seconds["draft"].append(draft[0] / self._chain)
        self.seconds["draft_engines"].append(draft[1] / self._chain)

    def _full(self) -> None:
        whole, shallow, deep = self._timed(self._token_of_full)
        self.seconds["token"].append(whole)
        self.seconds["token_engines"].append(shallow + deep)

    def _token_of_full(self) -> None:
        self._decoder.step(self._token, head=False)
        self._decoder.sync()

    def _draft(self) -> None:
        token = self._token
        for _ in range(self._chain):
            token = self._decoder.step(token, head=True).token

    def _verify(self, rows: int) -> None:
        tokens = [self._token] * rows

        def run() -> None:
            finish(self._decoder.stepping(tokens, head=False))
            self._decoder.sync(rows, tokens[1:])

        _, shallow, deep = self._timed(run)
        self.seconds[f"step {rows}"].append(shallow)
        self.seconds[f"pass {rows}"].append(deep)

    def _timed(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """Return the seconds of `run`, of its shallow and exit calls, and of its deep calls."""
        stats = self._decoder.stats
        shallow = stats.shallow_seconds
        deep = stats.deep_seconds
        began = self._clock()
        run()
        whole = self._clock() - began
        self._decoder.trim(CONTEXT)
        return whole, stats.shallow_seconds - shallow, stats.deep_seconds - deep

    def report(self) -> dict[str, Any]:
        """Return milliseconds by part. `draft` is a draft of the exit, with its Python."""
        quick = {
            name: round(1000 * float(np.quantile(times, QUANTILE)), 4)
            for name, times in self.seconds.items()
        }
        rows = [int(name.split()[1]) for name in quick if name.startswith("pass ")]
        return {
            "token": quick["token"],
            "python_of_token": quick["token"] - quick["token_engines"],
            "draft": quick["draft"],
            "shallow_of_draft": quick["step"],
            "exit_of_draft": max(0.0, quick["draft_engines"] - quick["step"]),
            "row_of_exit": max(0.0, quick["late"] - quick["draft_engines"]) / CATCH_UP,
            "python_of_draft": quick["draft"] - quick["draft_engines"],
            "step": {count: quick[f"step {count}"] for count in rows},
            "pass": {count: quick[f"pass {count}"] for count in rows},
        }


def measure_drafts(
    bundles: tuple[Path, ...], rounds: int, chain: int, threads: int, against: Path | None = None
) -> list[dict[str, Any]]:
    """Return a row for each bundle and library of the kernels, of interleaved rounds."""
    libraries = {"this": kernels.LIBRARY} | ({"other": against} if against else {})
    cases = [*product(bundles, libraries)]
    # One thread runs engines in its own time.
    clock = thread_time if threads == 1 else perf_counter
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(runner, "perf_counter", clock))
        timers = []
        manifests = []
        for path, library in cases:
            with mock.patch.object(kernels, "LIBRARY", libraries[library]):
                opened = Session(
                    path, slots=1, threads=threads, draft_memory_mb=0, prefix_cache_mb=0
                )
            session = stack.enter_context(opened)
            decoder = stack.enter_context(session._scheduler.borrowed())
            manifests.append(session.manifest)
            timers.append(DraftTimer(decoder, session.manifest.vocab_size, chain, clock))
        for timer in timers:  # binds the calls
            timer.round()
            timer.seconds.clear()
        for _ in range(rounds):
            for timer in timers:
                timer.round()
    rows = []
    for (path, library), manifest, timer in zip(cases, manifests, timers, strict=True):
        rows.append(
            {
                "bundle": path.name,
                **({"library": library} if against else {}),
                "precision": manifest.precision,
                "source_sha256": manifest.source_sha256,
                **timer.report(),
            }
        )
    return rows


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=250, type=click.IntRange(1), help="Rounds, of all bundles.")
@click.option("--chain", default=3, type=click.IntRange(1, 8), help="Drafts after each other.")
@click.option("--threads", default=1, type=click.IntRange(1), help="Threads of an engine call.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True),
    help="Library of the kernels to compare with.",
)
@click.option("--save", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    bundles: tuple[Path, ...],
    rounds: int,
    chain: int,
    threads: int,
    against: Path | None,
    save: Path | None,
) -> None:
    for path in bundles:
        manifest = Bundle.open(path, "sizes").manifest
        if manifest.encoder_capacity or manifest.speech is not None:
            raise click.UsageError(
                f"{path} is an encoder-decoder; give bundles of decoder-only models"
            )
    with other_load() as load:
        rows = measure_drafts(bundles, rounds, chain, threads, against)
    for row in rows:
        click.echo(
            f"{row['bundle']}, {row.get('library', row['precision'])}: "
            f"a token {row['token']:.3f} ms, "
            f"a draft {row['draft']:.3f} ms ({row['draft'] / row['token']:.2f} of it): "
            f"shallow {row['shallow_of_draft']:.3f}, exit {row['exit_of_draft']:.3f}, "
            f"Python {row['python_of_draft']:.3f}"
        )
    if load_note(load.cores):
        click.echo(load_note(load.cores))
    if save is not None:
        command = f"python -m tools.draft_cost {' '.join(path.name for path in bundles)}"
        command += f" --rounds {rounds} --chain {chain} --threads {threads}"
        command += " --against OTHER" if against else ""
        clock = "processor time" if threads == 1 else "wall-clock time"
        save_timings(save, command, load.cores, rows, clock)


if __name__ == "__main__":
    run_tool(main)
