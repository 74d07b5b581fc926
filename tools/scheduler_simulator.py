"""What the scheduler's rules are worth: throughput of requests side by side for given costs, on a clock of its own.

    python -m tools.scheduler_simulator --shallow 0.10 --deep 0.31 --row 0.1
    python -m tools.scheduler_simulator --shallow 2.2 --deep 4.4 --row 0.15 --rates 0.8 --batches 8

The real scheduler runs, over engines that compute nothing: a call over n rows, padding and idle ones included (of deep
passes only where they are --padded), takes (1 + ROW x (n - 1)) times what one row does. Exits are drawn independently
at each rate. Tokens/s as multiples of those with the rules for costs that are not known.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from itertools import product
from typing import Any

import click
import numpy as np

from runtime import decode
from runtime.batch import Batch
from runtime.continuation import Continuation, Step
from runtime.cross_rows import CrossRows
from runtime.decoder import Decoder
from runtime.kv_cache import KVCache
from runtime.lane import Lane
from runtime.result import Token
from runtime.row import Row
from runtime.scheduler import Scheduler
from runtime.shared_calls import Rules
from runtime.work import Waiting

MAX_PENDING = 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


class Engine:
    """Calls that take time and say nothing, except how sure the shallow decoder is."""

    def __init__(self, clock: Clock, cost: float, row: float, rate: float, seed: int, packed: bool) -> None:
        self.clock, self.cost, self.row, self.rate, self.packed = clock, cost, row, rate, packed
        self.chance = random.Random(seed)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        return Call(self, inputs, outputs)


class Call:
    def __init__(self, engine: Engine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine, self._inputs, self._outputs = engine, dict(inputs), dict(outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._inputs.update(inputs)
        self._outputs.update(outputs)

    def run(self) -> None:
        engine = self._engine
        read = self._inputs["input_ids" if "input_ids" in self._inputs else "hidden"]
        lengths = self._inputs["query_lengths"]
        rows = int(lengths.sum()) if engine.packed else read.shape[0] * read.shape[1]
        engine.clock.now += engine.cost * (1 + engine.row * (rows - 1))
        sure = self._outputs.get("confidence")
        if sure is not None:
            sure[:] = [float(engine.chance.random() < engine.rate) for _ in sure]


def tokens_per_second(
    batch: int, rate: float, costs: tuple[float, float, float], rules: Rules, tokens: int = 200
) -> float:
    """Of `batch` requests in flight, four times as many in all, of lengths drawn from half of `tokens` to all. `costs`
    in milliseconds: a shallow step, a deep pass, and what a further row is of either."""
    clock, (shallow, deep, row) = Clock(), costs
    lanes = []
    for seed, (cost, layers) in enumerate(((shallow, range(1)), (deep, range(1, 2)))):
        cache = KVCache(layers, batch, 1, tokens + MAX_PENDING + 2, 1, np.float32)
        engine = Engine(clock, cost, row, rate, seed, rules.packed and seed == 1)
        lanes.append(Lane(engine, cache))  # type: ignore[arg-type]
    decoders = [Decoder(lanes[0], lanes[1], slot, 1, 2, MAX_PENDING) for slot in range(batch)]
    cross = CrossRows(batch)
    batches = {lane: Batch(lane, cross, 1, 2) for lane in lanes}
    scheduler = Scheduler(decoders, batches, cross, 10**6, rules)
    chance, done = random.Random(7), 0
    for _ in range(4 * batch):
        length = chance.randint(tokens // 2, tokens)
        done += length
        scheduler.join(Row(_Request(length).run, lambda: False))
    scheduler.drain()
    return 1e3 * done / clock.now


class _Request:
    def __init__(self, length: int) -> None:
        self._length = length

    def run(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        decoder.reset()
        prompt = np.zeros(1, np.int64)
        first = yield from decoder.prefilling(prompt, head=True)
        count = 0
        for item in decode.free(decoder, first, Continuation(prompt, self._length), 0.5, MAX_PENDING):
            if not isinstance(item, Step):
                yield item
                continue
            count += 1
            yield Token(item.token, "", item.exited, item.confidence)
            if count == self._length:
                return


def _numbers(context: click.Context, parameter: click.Parameter, given: str) -> list[float]:
    try:
        return [float(number) for number in given.split(",")]
    except ValueError:
        raise click.BadParameter(f"{given!r} is not like 0.5,0.8", context, parameter) from None


@click.command(help=__doc__)
@click.option("--shallow", type=click.FloatRange(0, min_open=True), required=True, help="Milliseconds of a step.")
@click.option("--deep", type=click.FloatRange(0, min_open=True), required=True, help="Milliseconds of a deep pass.")
@click.option("--row", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="A further row, as a share.")
@click.option("--rates", callback=_numbers, default="0.5,0.8,0.9", show_default=True, help="Exit rates.")
@click.option("--batches", callback=_numbers, default="2,4,8,16", show_default=True, help="Requests in flight.")
@click.option("--ready", callback=_numbers, default="0.25,0.5,0.75,1", show_default=True)
@click.option("--patience", callback=_numbers, default="2,4,8,16", show_default=True)
@click.option(
    "--padded", is_flag=True, help="Deep passes as of bundles that were converted before padding cost nothing."
)
def main(
    shallow: float,
    deep: float,
    row: float,
    rates: list[float],
    batches: list[float],
    ready: list[float],
    patience: list[float],
    padded: bool,
) -> None:
    costs = shallow, deep, row
    cases = [(int(batch), rate) for rate in rates for batch in batches]
    now = {case: tokens_per_second(*case, costs, Rules(row_cost=row, packed=not padded)) for case in cases}
    click.echo("ready  patience  " + "".join(f"{f'{batch} at {rate:g}':>10}" for batch, rate in cases) + "      mean")
    for share, turns in product(ready, patience):
        ratios = [
            tokens_per_second(*case, costs, Rules(share, int(turns), row, not padded)) / now[case] for case in cases
        ]
        cells = "".join(f"{ratio:>10.3f}" for ratio in ratios)
        click.echo(f"{share:5g}  {int(turns):8}  {cells}{np.mean(ratios):10.3f}")


if __name__ == "__main__":
    main()
