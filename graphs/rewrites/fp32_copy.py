"""A bundle for a GPU as one that computes in fp32, to be run on the CPU for a while."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from graphs.rewrites.widen import HALVES, Widen
from runtime.bundle.bundle import Bundle, engine_files, sha256_of
from runtime.bundle.manifest import MANIFEST, File


@contextmanager
def fp32_copy(bundle: Bundle, rounds: bool) -> Iterator[Bundle]:
    """The graphs of a bundle, widened from half precision to fp32, and the weights that it has; gone at the end.

    `rounds`: see graphs.rewrites.widen.Widen. A bundle that computes in fp32 is its own copy.
    """
    manifest = bundle.manifest
    if manifest.float_type == "fp32":
        yield bundle
        return
    beside = bundle.path.resolve().parent
    place = beside if os.access(beside, os.W_OK) else None
    with TemporaryDirectory(prefix=f".{bundle.path.name}.fp32-", dir=place) as name:
        directory = Path(name)
        change = Widen(HALVES[manifest.float_type], rounds)
        graphs, files = engine_files(manifest), dict(manifest.files)
        for file in files:
            if file in graphs:
                model = ir.load(bundle.path / file)
                change(model)
                ir.save(model, directory / file)
                files[file] = File((directory / file).stat().st_size, sha256_of(directory / file))
            else:
                _link(bundle.path / file, directory / file)
        widened = replace(manifest, compute="fp32", files=files)
        (directory / MANIFEST).write_text(widened.to_json(), encoding="utf-8")
        yield Bundle.open(directory)


def _link(source: Path, target: Path) -> None:
    """ONNX Runtime follows no symbolic links out of a graph's folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)
