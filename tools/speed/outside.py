"""Time outside the engines, and gaps between streamed tokens, of two source trees on one bundle, in turns.

python -m tools.speed.outside BUNDLE --against /path/to/another/checkout

Each round runs each tree in a process of its own. Rows show the median over rounds and their spread; the best round is
what a busy machine leaves comparable.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parents[2]

# Runs in either tree, with what both offer to applications.
MEASURE = """
import json, statistics, sys, threading
from time import perf_counter
from runtime import Session

bundle, tokens, threads, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, [5, 6, 7, 8, 9]
found = {}

def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]

with Session(bundle, slots=4, threads=threads) as session:
    def request(**options):
        return dict(max_new_tokens=tokens, ignore_eos=True, **options)

    for name, options in {"full": {"mode": "full"}, "free": {"mode": "free", "threshold": 0.5}}.items():
        for _ in range(2):
            session.generate(prompt, **request(**options))
        walls, outside, gaps = [], [], []
        for _ in range(6):
            began = perf_counter()
            result = session.generate(prompt, **request(**options))
            walls.append((perf_counter() - began) / tokens)
            outside.append(result.stats.overhead_seconds / tokens)
            last = None
            for token in session.stream(prompt, **request(**options)):
                now = perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
        found[f"{name}: outside, a token"] = min(outside)
        found[f"{name}: generate, a token"] = min(walls)
        found[f"{name}: stream, gap p50"] = quantile(gaps, 0.5)
        found[f"{name}: stream, gap p95"] = quantile(gaps, 0.95)
    starts = []
    for _ in range(40):
        began = perf_counter()
        result = session.generate(prompt, max_new_tokens=1, mode="full")
        starts.append(perf_counter() - began - result.stats.seconds)
    found["request: beside its slot"] = statistics.median(starts)
    began = perf_counter()
    session.generate([prompt] * 16, **request(mode="full"))
    found["list of 16: a token"] = (perf_counter() - began) / (16 * tokens)
print(json.dumps(found))
"""


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@click.option("--tokens", type=click.IntRange(min=2), default=64)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0: a thread a core.")
def main(bundle: Path, against: Path, rounds: int, tokens: int, threads: int) -> None:
    """Compare this tree with another on BUNDLE."""
    trees = {"this": HERE, "other": against.resolve()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(rounds):
        for name in sorted(trees, reverse=bool(number % 2)):
            found[name].append(_measured(trees[name], bundle, tokens, threads))
    click.echo(f"{'microseconds':28} {'this':>9} {'other':>9} {'ratio':>6}   {'best':>9} {'best':>9} {'ratio':>6}")
    for row in found["this"][0]:
        this, other = ([1e6 * each[row] for each in found[name]] for name in ("this", "other"))
        middle, best = [statistics.median(this), statistics.median(other)], [min(this), min(other)]
        click.echo(
            f"{row:28} {middle[0]:9.1f} {middle[1]:9.1f} {middle[0] / middle[1]:6.2f}   "
            f"{best[0]:9.1f} {best[1]:9.1f} {best[0] / best[1]:6.2f}"
        )


def _measured(tree: Path, bundle: Path, tokens: int, threads: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(bundle.resolve()), str(tokens), str(threads)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
