"""Time to the first token where prompts begin alike: keys and values reused, or read again.

python -m tools.speed.prefixes BUNDLE
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import numpy as np

from freeexport.system.idle import require_idle
from runtime import Session
from runtime.machine.machine import usable_cores


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--shared", type=int, default=400, help="Tokens that all prompts begin with.")
@click.option("--own", type=int, default=20, help="Tokens of each prompt's own behind them.")
@click.option("--rounds", type=int, default=9)
@click.option("--force", is_flag=True)
def main(bundle: Path, shared: int, own: int, rounds: int, force: bool) -> None:
    """Milliseconds to the first token of two sessions in turn, of which one keeps prefixes; tokens must be equal."""
    idle = require_idle(force)
    times: dict[int, list[float]] = {0: [], 256: []}
    draw = np.random.default_rng(0)
    with ExitStack() as stack:
        sessions = {size: stack.enter_context(Session(bundle, slots=1, prefix_cache_mb=size)) for size in times}
        highest = sessions[0].manifest.vocab_size
        for session in sessions.values():
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


if __name__ == "__main__":
    main()
