"""Times requests to several decoders in turn, and computes a row for each decoder and request."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from freeexport.costs.timing import interleave, spread
from freeexport.system.child import PACKAGES
from runtime.bundle.bundle import Bundle
from runtime.errors import FreeExportError
from tools.peers.worker import PeerError, Worker

# Time limit for one answer, in seconds. A large model takes minutes to load.
LIMIT = 600.0
# Pause before a decoder's turn, in seconds. Threads of some libraries keep spinning after their
# work: CTranslate2's for 0.2 s.
SETTLE = 0.3

MEMORY = ("peak_bytes", "own_bytes")

# Prompts of a request, one for each row, and requests of a decoder's turn. A prompt is token ids,
# or the path of a recording.
Prompts = Sequence[Any]
Block = Sequence[Prompts]
Answer = dict[str, Any]
Describe = Callable[[Sequence[Answer]], Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A request that all decoders answer.

    Attributes:
        read: Tokens of each prompt. 0 for sample texts.
        written: Tokens to generate for each prompt.
        beams: Number of beams.
        rows: Number of prompts at once.
    """

    read: int
    written: int
    beams: int = 1
    rows: int = 1

    def blocks(self, texts: Block, rounds: int, vocabulary: int, end: int | None) -> list[Block]:
        """Return the requests of the warm-up and of each round.

        Sample texts are the same in all rounds. Random prompts are new in each, so that no decoder
        finds a prefix in a cache. They end with the token `end`, if there is one.
        """
        if not self.read:
            return [texts[:1], *[texts] * rounds]
        last = [] if end is None else [end]
        draw = np.random.default_rng(self.read)
        end_of_words = vocabulary - min(200, vocabulary // 4)  # special tokens are first or last
        size = self.rows, self.read - len(last)
        prompts = draw.integers(
            vocabulary - end_of_words, end_of_words, (rounds + 1, *size)
        ).tolist()
        return [[[[*prompt, *last] for prompt in request]] for request in prompts]


@dataclass(frozen=True)
class Contender:
    """A decoder in the comparison.

    Attributes:
        name: Name in the table.
        precision: Precision shown in the table.
        command: Command of its process.
        model: Path that it loads.
        options: Options for loading.
        bundle: The bundle. None for peers, whose failures are reported in the table.
        build: Variables that its library was built with.
    """

    name: str
    precision: str
    command: Sequence[str]
    model: str
    options: dict[str, Any]
    bundle: Bundle | None = None
    build: str = ""

    def load(self, threads: int) -> tuple[Worker, dict[str, Any]]:
        """Start the process and load the model. Returns the process, and its versions and flags.

        Raises:
            PeerError: If it fails.
        """
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        variables = {
            # The packages may be in a source tree that is only on this process's path.
            "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # Hide GPUs, which libraries would use.
            "CUDA_VISIBLE_DEVICES": "",
        }
        worker = Worker(self.command, variables)
        # All use the same processors, if there are enough.
        request = {"op": "load", "model": self.model, "threads": threads, "options": self.options}
        request["cpus"] = usable[:threads] if threads <= len(usable) else []
        try:
            facts = worker.ask(request, LIMIT)
        except PeerError:
            worker.close()
            raise
        return worker, {**facts, "flags": ", ".join(filter(None, [self.build, facts["flags"]]))}


def ask(worker: Worker, prompts: Prompts, tokens: int, beams: int = 1) -> Answer:
    """Let a decoder's process answer a request. Returns the answer (tools/peers/decoders.py)."""
    request = {"op": "generate", "prompts": list(prompts), "tokens": tokens, "beams": beams}
    return worker.ask(request, LIMIT)


class Decoders:
    """Running decoders, and why others do not run.

    Args:
        contenders: Decoders to start, our bundles first.
        threads: Threads of each.

    Attributes:
        facts: Versions and flags of those that run, by name.
        failed: Reasons of the others, by name.

    Raises:
        FreeExportError: If one of our own decoders fails.
    """

    def __init__(self, contenders: Sequence[Contender], threads: int) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self._contenders = {one.name: one for one in contenders}
        self._workers: dict[str, Worker] = {}
        for one in contenders:
            try:
                self._workers[one.name], self.facts[one.name] = one.load(threads)
            except PeerError as error:
                self._fail(one.name, error)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def _fail(self, name: str, error: PeerError) -> None:
        if self._contenders[name].bundle is not None:
            self.__exit__()
            raise FreeExportError(f"{name}: {error}") from None
        self.failed[name] = str(error)

    def answers(
        self, name: str, block: Block, tokens: int, beams: int = 1, settle: float = 0.0
    ) -> list[Answer] | None:
        """Let a decoder answer requests after a pause. Returns None if it does not run or fails."""
        if name not in self._workers:
            return None
        time.sleep(settle)
        try:
            return [ask(self._workers[name], prompts, tokens, beams) for prompts in block]
        except PeerError as error:
            self._fail(name, error)
            return None

    def rows(
        self,
        cell: Cell,
        blocks: Sequence[Block],
        describe: Describe | None = None,
        settle: float = SETTLE,
    ) -> list[dict[str, Any]]:
        """Answer the requests of all blocks in turn, the first to warm up. Returns a row a decoder.

        Args:
            cell: The kind of request.
            blocks: The requests of each round.
            describe: Returns further fields of a decoder's row from its answers of the first round.
            settle: Pause before a decoder's turn, in seconds.
        """
        names = list(self._workers)

        def turn(name: str, block: Block) -> list[Answer]:
            return self.answers(name, block, cell.written, cell.beams, settle) or []

        turns = list(interleave(names, blocks, 1, turn, warm_up=0))[1:]
        rows: list[dict[str, Any]] = []
        base: dict[str, list[float]] = {}
        for number, name in enumerate(names):
            answers = [one.runs[number] for one in turns]
            if not all(answers):
                continue
            seconds = _seconds(answers, cell)
            base = base or seconds
            contender = self._contenders[name]
            row = {
                "name": name,
                "precision": contender.precision,
                **asdict(cell),
                **{figure: summary(each, base[figure]) for figure, each in seconds.items()},
                "peak_bytes": answers[-1][-1]["peak_bytes"],
                **(describe(answers[0]) if describe else {}),
                **self.facts[name],
            }
            rows.append(row)
        return rows


def _seconds(rounds: Sequence[Sequence[Answer]], cell: Cell) -> dict[str, list[float]]:
    """Return the mean seconds in each round, of a request, to the first token, and of a token."""
    found = {"request": [fmean(one["seconds"] for one in done) for done in rounds]}
    if cell.beams > 1:  # not all libraries stream them
        return found
    found["first"] = [fmean(one["first"] for one in done) for done in rounds]
    if cell.written > 1:
        found["token"] = [
            sum(one["last"] - one["first"] for one in done)
            / sum(max(1, len(one["tokens"][0]) - 1) for one in done)
            for done in rounds
        ]
    return found


def summary(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Summarize seconds over rounds, and their ratios to our own of the same rounds."""
    ratios = [one / own for one, own in zip(seconds, base, strict=True)]
    return {
        "seconds": median(seconds),
        "spread": spread(seconds),
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def opening(
    contenders: Sequence[Contender],
    prompt: list[int],
    rounds: int,
    threads: int,
    settle: float = SETTLE,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the time from the start of a process to its first token, and its memory after it.

    Returns a row for each decoder, and why others have none.

    Raises:
        FreeExportError: If one of our own decoders fails.
    """
    failed: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}

    def turn(contender: Contender, number: int) -> Answer:
        time.sleep(settle)
        began = time.perf_counter()
        with Decoders([contender], threads) as running:
            loaded = time.perf_counter() - began
            answers = running.answers(contender.name, [[prompt]], tokens=2)
            failed.update(running.failed)
            facts.update(running.facts)
        (answer,) = answers or [{"first": 0.0, **dict.fromkeys(MEMORY, 0)}]
        return {**answer, "first": loaded + answer["first"]}

    # The first round reads files into the system's cache.
    turns = list(interleave(contenders, range(rounds + 1), 1, turn, warm_up=0))[1:]
    rows: list[dict[str, Any]] = []
    base: list[float] = []
    for number, one in enumerate(contenders):
        if one.name in failed:
            continue
        found = [done.runs[number] for done in turns]
        seconds = [answer["first"] for answer in found]
        base = base or seconds
        row = {
            "name": one.name,
            "precision": one.precision,
            "first": summary(seconds, base),
            **{name: round(median(answer[name] for answer in found)) for name in MEMORY},
            **facts[one.name],
        }
        rows.append(row)
    return rows, failed


def with_options(contender: Contender, **options: Any) -> Contender:
    """Return a contender with further options for loading."""
    return replace(contender, options={**contender.options, **options})
