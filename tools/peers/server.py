"""This project's end of a comparison: a bundle, or its checkpoint in transformers, served as a peer serves itself.

python -m tools.peers.server
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tools.peers.catalog import SCRIPTS
from tools.peers.wire import Emit, Generate, serve, versions


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """Load a bundle for the fields of a BenchSetting and a `device`, or a checkpoint for `{"checkpoint": True}`."""
    return _transformers(path, threads) if options.get("checkpoint") else _bundle(Path(path), threads, options)


def _bundle(path: Path, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    from freeexport.measure.bench import BenchSetting, decode, full_tokens, open_session

    device = options.pop("device")
    setting = BenchSetting(**options)
    session = open_session(path, setting, threads, device)
    whole: dict[tuple[int, ...], tuple[int, ...]] = {}

    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        key = tuple(prompt)
        if setting.right is not None and len(whole.get(key, ())) < count:  # the warm-up round pays for it
            whole[key] = full_tokens(session, [prompt], count)[0]
        run = decode(session, setting, prompt, count, whole.get(key), emit)
        sizes = {str(rows): passes for rows, passes in run.sync_sizes.items()}
        return {
            "exit_rate": run.exit_rate,
            "acceptance": run.acceptance,
            "sync_sizes": sizes,
            "overhead": run.overhead,
            "predicted": run.predicted,
        }

    return generate, {"versions": versions("onnxruntime", "numpy")}


def _transformers(path: str, threads: int) -> tuple[Generate, dict[str, Any]]:
    import torch

    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.transformers_model import reference_model

    # The peers' scripts import each other from where they stand.
    sys.path.insert(0, str(SCRIPTS))
    from run_transformers import generator

    torch.set_num_threads(threads)
    return generator(reference_model(open_checkpoint(path)), {}), {"versions": versions("torch", "transformers")}


if __name__ == "__main__":
    serve(load)
