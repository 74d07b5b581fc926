"""Contenders in turn on the same prompts, in interleaved rounds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from freeexport.benchmark.contenders import Contender, Loaded, Run, cpus_for
from freeexport.benchmark.peers.environment import PeerError
from freeexport.system.progress import progress
from runtime.errors import FreeExportError

# Seconds between contenders: threads of some libraries spin on after their work.
SETTLE = 0.3


@dataclass
class Measured:
    """Of each contender by name: a list a round of a run a prompt; the versions that served it; or the reason why it
    could not run."""

    rounds: dict[str, list[list[Run]]] = field(default_factory=lambda: defaultdict(list))
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], tokens: int, rounds: int, settle: float = SETTLE
) -> Measured:
    """Every contender decodes every prompt to `tokens` tokens, `rounds` times after a round to warm up.

    Who fails says why and the others go on; FreeExportError where that one is required.
    """
    found = Measured()
    running: dict[str, Loaded] = {}
    with ExitStack() as stack, progress("measuring", (rounds + 2) * len(contenders)) as advance:
        for contender in contenders:
            with _reported(contender, found, running):
                loaded = Loaded(contender, cpus_for(contender.threads))
                stack.callback(loaded.close)
                running[contender.name] = loaded
                found.versions[contender.name] = loaded.versions
            advance()
        for turn in range(rounds + 1):
            # The order turns, so that none always follows the same other.
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                if contender.name in running:
                    with _reported(contender, found, running):
                        time.sleep(settle)
                        runs = [running[contender.name].run(prompt, tokens) for prompt in prompts]
                        if turn:
                            found.rounds[contender.name].append(runs)
                advance()
    return found


@contextmanager
def _reported(contender: Contender, found: Measured, running: dict[str, Loaded]) -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        if contender.required:
            raise FreeExportError(f"{contender.name}: {error}") from None
        found.failed[contender.name] = str(error)
        found.rounds.pop(contender.name, None)
        running.pop(contender.name, None)
