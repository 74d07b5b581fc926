"""This project's end of a benchmark: a bundle, or its checkpoint in transformers, served as a peer serves itself.

python -m freeexport.benchmark.server
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freeexport.benchmark.peers.catalog import SCRIPTS
from freeexport.benchmark.peers.wire import Emit, Generate, serve, versions

if TYPE_CHECKING:
    from freeexport.measure.forced import ForcedDraftSession
    from runtime import Session


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """`options` are those of a generation and the `device`, with `replay` a trace of exits or `right` a rate of right
    drafts; or `{"checkpoint": True}`."""
    if options.pop("checkpoint", False):
        return _transformers(path, threads, options)
    return _bundle(path, threads, options)


def _bundle(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    from freeexport.measure.forced import ForcedDraftSession, ForcedExitSession
    from runtime import Session

    trace, rate = options.pop("replay", None), options.pop("right", None)
    given: dict[str, Any] = {"threads": threads, "slots": 1, "device": options.pop("device", "cpu")}
    if rate is not None:
        return _drafting(ForcedDraftSession(path, **given), rate, options), {
            "versions": versions("onnxruntime", "numpy")
        }
    session = Session(path, **given) if trace is None else ForcedExitSession(Path(path), trace, **given)
    return _generating(session, options), {"versions": versions("onnxruntime", "numpy")}


def _drafting(session: ForcedDraftSession, rate: float, options: dict[str, Any]) -> Generate:
    decode = _generating(session, options)
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        # The first round, which warms up, pays for it.
        key = tuple(prompt)
        if len(answers.get(key, ())) < count:
            answers[key] = session.generate(prompt, mode="full", max_new_tokens=count, ignore_eos=True).token_ids
        with session.drafting(answers[key], rate):
            return decode(prompt, count, emit)

    return generate


def _generating(session: Session, options: dict[str, Any]) -> Generate:
    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        stream = session.stream(prompt, max_new_tokens=count, ignore_eos=True, **options)
        for token in stream:
            emit(token.id)
        stats = stream.result.stats
        return {
            "exit_rate": stats.exit_rate,
            "acceptance": stats.acceptance,
            "decided": stats.candidates,
            "sync_sizes": {str(rows): count for rows, count in sorted(stats.sync_sizes.items())},
            "overhead": stats.overhead_seconds,
        }

    return generate


def _transformers(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch

    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.transformers_model import reference_model

    # The peers' scripts import each other from where they stand.
    sys.path.insert(0, str(SCRIPTS))
    from run_transformers import generator

    torch.set_num_threads(threads)
    return generator(reference_model(open_checkpoint(path)), options), {"versions": versions("torch", "transformers")}


if __name__ == "__main__":
    serve(load)
