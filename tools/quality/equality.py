"""Are the tokens of lossless those of full, and are the tokens of a row those that it has alone?

    python -m tools.quality.equality BUNDLE --data prompts.jsonl --samples 200

Every prompt is decoded alone in mode full and in free, to --tokens/2 to --tokens tokens; then in lossless, alone and by
--batch threads, and in full and free by --batch threads: rows of common calls join and leave at any time. Lossless
drafts as much as it may, whether that pays or not. Each difference is listed with how far apart the two best choices
were. Ends with 1 where there is one, but for ties of k rows against one in float32, below 1e-4. With quantized weights
there is none on our own kernels, and now and then one on ONNX Runtime's.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from freeexport.benchmark.benchmark import bench_prompts
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.bundle import Bundle
from tools.quality.token_equality import TIE, Equality, run, settings_of


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with an `input`.  [default: random ids]")
@click.option("--samples", type=click.IntRange(1), default=200, help="Prompts.")
@click.option("--threshold", "thresholds", type=click.FloatRange(0, 1), multiple=True, default=(0.0, 0.5, 0.8))
@click.option("--batch", type=click.IntRange(2), default=8, help="Slots of the session.")
@click.option("--tokens", type=click.IntRange(1), default=48)
@click.option("--threads", type=click.IntRange(1), default=1)
def main(
    bundle: Path, data: Path | None, samples: int, thresholds: tuple[float, ...], batch: int, tokens: int, threads: int
) -> None:
    manifest = Bundle.open(bundle).manifest
    prompts = random_prompts(manifest.vocab_size, samples)
    if data is not None:
        prompts = bench_prompts(Bundle.open(bundle), data, samples)
    settings = settings_of(thresholds)
    with Session(bundle, threads=threads, slots=batch) as session, progress("comparing", len(settings)) as advance:
        equality = Equality(session, prompts, tokens, batch, ignore_eos=data is None)
        found = run(equality, settings, advance)
    tie = TIE if manifest.precision == "fp32" else 0.0
    wrong = [one for one in found if not one.distance < tie]
    click.echo(
        f"{manifest.source}, {manifest.precision}: {len(prompts)} prompts, up to {tokens} tokens, {batch} slots, "
        f"{equality.drafts} drafts; a tie is below {tie:.2g}"
    )
    for name, count in equality.compared.items():
        different = sum(difference.setting == name for difference in found)
        click.echo(f"  {name}: {count - different} of {count} the same")
    for one in found:
        click.echo(f"  prompt {one.prompt} differs at token {one.place} in {one.setting}: distance {one.distance:.2g}")
    if wrong:
        raise SystemExit(f"error: {len(wrong)} differences are not ties")


def random_prompts(vocab_size: int, count: int, longest: int = 40, seed: int = 1) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [source.integers(3, vocab_size, source.integers(1, longest)).tolist() for _ in range(count)]


if __name__ == "__main__":
    main()
