"""This project's end of a benchmark: a bundle, or its checkpoint in transformers, served as a peer serves itself.

python -m freeexport.own_server
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from freeexport.peer_catalog import SCRIPTS
from freeexport.peers.wire import Emit, Generate, serve, versions


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """`options` are those of a generation, with `replay` a trace of exits; or `{"checkpoint": True}`."""
    if options.pop("checkpoint", False):
        return _transformers(path, threads, options)
    return _bundle(path, threads, options)


def _bundle(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    from freeexport.replay import ReplaySession
    from runtime import Session

    trace = options.pop("replay", None)
    given: dict[str, Any] = {"threads": threads, "slots": 1}
    session = Session(path, **given) if trace is None else ReplaySession(Path(path), trace, **given)

    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        stream = session.stream(prompt, max_new_tokens=count, ignore_eos=True, **options)
        for token in stream:
            emit(token.id)
        stats = stream.result.stats
        return {
            "exit_rate": stats.exit_rate,
            "acceptance": stats.acceptance,
            "sync_sizes": {str(rows): count for rows, count in sorted(stats.sync_sizes.items())},
            "overhead": stats.overhead_seconds,
        }

    return generate, {"versions": versions("onnxruntime", "numpy")}


def _transformers(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch

    from freeexport.checkpoint import open_checkpoint
    from freeexport.reference import reference_model

    # The peers' scripts import each other from where they stand.
    sys.path.insert(0, str(SCRIPTS))
    from run_transformers import generator

    torch.set_num_threads(threads)
    return generator(reference_model(open_checkpoint(path)), options), {"versions": versions("torch", "transformers")}


if __name__ == "__main__":
    serve(load)
