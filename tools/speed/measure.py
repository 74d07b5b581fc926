"""Measure what the engine contract promises: no copy of the cache, small overhead, bounded memory.

    python tools/speed/measure.py capacity BUNDLE      time of a deep call at capacity 2048 against 256
    python tools/speed/measure.py overhead BUNDLE      microseconds a token spends outside the engine calls
    python tools/speed/measure.py memory BUNDLE        resident memory of an open session after decoding
    python tools/speed/measure.py pages BUNDLE         mode full with its weights in huge pages against without
    python tools/speed/measure.py prefix BUNDLE        time to the first token where prompts begin alike, reused or read

Run on an idle machine. `capacity` needs a bundle of --capacity 2048 or more, `overhead` the bundle to be measured.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from freeexport.system.idle import require_idle
from runtime import GenerationOptions, Session
from runtime.machine.machine import usable_cores

LENGTH = 128  # valid positions at which deep calls are compared


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rows", type=int, default=1, show_default=True, help="Rows of the deep call.")
@click.option("--rounds", type=int, default=60, show_default=True)
@click.option("--force", is_flag=True)
def capacity(bundle: Path, rows: int, rounds: int, force: bool) -> None:
    """The ratio should be 1: an engine that copies its cache would take longer at the larger capacity."""
    idle = require_idle(force)
    sessions = {size: Session(bundle, capacity=size, slots=1) for size in (256, 2048)}
    times: dict[int, list[float]] = {size: [] for size in sessions}
    for session in sessions.values():
        session.settle()
    with ExitStack() as stack:
        decoders = {size: stack.enter_context(session.decoder()) for size, session in sessions.items()}
        for size, decoder in decoders.items():
            prompt = np.random.default_rng(0).integers(0, sessions[size].manifest.vocab_size, LENGTH)
            decoder.prefill(prompt, head=False)
        for turn in range(rounds + 3):
            for size, decoder in decoders.items():
                for token in range(rows):
                    decoder.step(token, head=False)
                before = decoder.stats.deep_seconds
                decoder.sync()
                if turn >= 3:
                    times[size].append(decoder.stats.deep_seconds - before)
                decoder.trim(LENGTH)
    small, large = (median(times[size]) for size in (256, 2048))
    click.echo(
        f"deep call, {rows} rows, {LENGTH} valid positions, {usable_cores()} threads, median of {rounds}: "
        f"capacity 256 {1e3 * small:.2f} ms, capacity 2048 {1e3 * large:.2f} ms, ratio {large / small:.3f}"
        + ("" if idle else " (busy machine)")
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", type=int, default=200, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("--force", is_flag=True)
def overhead(bundle: Path, tokens: int, rounds: int, force: bool) -> None:
    """Decode seconds minus the seconds inside engine runs, per generated token, of one request alone: the loop, the
    text, the bookkeeping. The figure for a model is the one of its own bundle: after an engine call that reads all of
    its weights, nothing of the loop is in the processor's caches."""
    idle = require_idle(force)
    kinds: dict[str, GenerationOptions] = {
        "full": GenerationOptions(mode="full"),
        "free, no token exits": GenerationOptions(threshold=1.0, output_confidence=True),
        "free, every token exits": GenerationOptions(threshold=0.0),
    }
    with Session(bundle, slots=1, overlap=False) as session:
        session.settle()
        for name, options in kinds.items():
            spent = []
            for _ in range(rounds):
                stats = session.generate([5] * 4, options, max_new_tokens=tokens, ignore_eos=True).stats
                spent.append(stats.overhead_seconds / stats.tokens)
            click.echo(
                f"{name}: {1e6 * median(spent):.1f} microseconds a token outside the engines, {tokens} tokens, "
                f"median of {rounds}" + ("" if idle else " (busy machine)")
            )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", type=int, default=64, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("--force", is_flag=True)
def pages(bundle: Path, tokens: int, rounds: int, force: bool) -> None:
    """Tokens a second of two sessions in turn, of which one has its weights in pages of 2 MiB."""
    idle = require_idle(force)
    speeds: dict[bool, list[float]] = {False: [], True: []}
    with ExitStack() as stack:
        sessions = {huge: stack.enter_context(Session(bundle, slots=1, huge_pages=huge)) for huge in speeds}
        began = perf_counter()
        sessions[True].settle()
        moving = perf_counter() - began
        for turn in range(rounds + 1):
            for huge, session in sessions.items():
                result = session.generate([5] * 4, mode="full", max_new_tokens=tokens, ignore_eos=True)
                if turn:
                    speeds[huge].append(result.stats.tokens_per_second)
    small, large = (median(speeds[huge]) for huge in (False, True))
    click.echo(
        f"mode full, {usable_cores()} threads, {tokens} tokens, median of {rounds}: {small:.1f} tokens/s, "
        f"in huge pages {large:.1f}, ratio {large / small:.2f}; moving took {moving:.2f} s"
        + ("" if idle else " (busy machine)")
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--shared", type=int, default=400, show_default=True, help="Tokens that all prompts begin with.")
@click.option("--own", type=int, default=20, show_default=True, help="Tokens of each prompt's own behind them.")
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("--force", is_flag=True)
def prefix(bundle: Path, shared: int, own: int, rounds: int, force: bool) -> None:
    """Milliseconds to the first token of two sessions in turn, of which one keeps prefixes; tokens must be equal."""
    idle = require_idle(force)
    times: dict[int, list[float]] = {0: [], 256: []}
    draw = np.random.default_rng(0)
    with ExitStack() as stack:
        sessions = {size: stack.enter_context(Session(bundle, slots=1, prefix_cache_mb=size)) for size in times}
        highest = sessions[0].manifest.vocab_size
        for session in sessions.values():
            session.settle()
            session.generate([5] * 4, mode="full", max_new_tokens=2)
        beginning = draw.integers(3, highest, shared).tolist()
        for _ in range(rounds + 1):
            prompt = [*beginning, *draw.integers(3, highest, own).tolist()]
            results = [session.generate(prompt, mode="full", max_new_tokens=8) for session in sessions.values()]
            if len({result.token_ids for result in results}) > 1:
                raise click.ClickException(f"tokens differ: {' and '.join(str(each.token_ids) for each in results)}")
            for size, result in zip(times, results, strict=True):
                times[size].append(1e3 * result.stats.first_token_seconds)
    (cold, *read), (keeping, *reused) = times.values()
    click.echo(
        f"{shared} shared tokens and {own} own, {results[1].stats.cached_tokens} reused, {usable_cores()} threads: "
        f"first token after {median(read):.1f} ms, reused {median(reused):.1f} ms, median of {rounds}, ratio "
        f"{median(read) / median(reused):.1f}; the first prompt {cold:.1f} ms, and while it is kept {keeping:.1f} ms"
        + ("" if idle else " (busy machine)")
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def memory(bundle: Path) -> None:
    """Resident memory of a process that opened the bundle and decoded, against the size of the bundle."""
    # A process of its own: this one has imported more than an application would.
    subprocess.run([sys.executable, "-c", MEMORY_PROBE, str(bundle)], check=True)


MEMORY_PROBE = """
import sys
from contextlib import ExitStack
from pathlib import Path
from runtime import Session

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

session = Session(sys.argv[1], slots=1)
session.settle()
for mode in ("full", "free"):
    session.generate([1, 2, 3, 4], mode=mode, threshold=0.5, max_new_tokens=64, ignore_eos=True)
size = sum(path.stat().st_size for path in Path(sys.argv[1]).iterdir())
limit = 1.3 * size + 200e6
now, peak = resident("VmRSS"), resident("VmHWM")
print(f"bundle {size / 1e6:.0f} MB; resident {now / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB; "
      f"1.3 x bundle + 200 MB = {limit / 1e6:.0f} MB: {'within' if peak <= limit else 'ABOVE'}")
"""


if __name__ == "__main__":
    main()
