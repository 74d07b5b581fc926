"""A checkpoint as the plain directory that other tools read: float32 safetensors, config.json, tokenizer.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.system.child import ChildError, run_child
from freeexport.system.output_directory import output_directory
from runtime.errors import FreeExportError
from runtime.json_file import read_object
from runtime.machine.user_cache import user_cache

MARKER = "config.json"


def plain_checkpoint(checkpoint: Checkpoint, model: str) -> Path:
    """The checkpoint's own directory where it is plain; else one in the user's cache, written now unless it is there.

    `model` is what `checkpoint` was opened from. An exit's own parameters are left out. Raises FreeExportError.
    """
    if checkpoint.adapter is None and checkpoint.path.is_dir() and any(checkpoint.path.glob("*.safetensors")):
        return checkpoint.path
    place = user_cache("peers", "models", checkpoint.sha256[:16], "plain")
    if not (place / MARKER).is_file():
        try:
            run_child("freeexport.benchmark.peers.plain_checkpoint", model, str(place))
        except ChildError as error:
            raise FreeExportError(f"{checkpoint.name} cannot be written as a plain checkpoint: {error}") from None
    return place


def main(arguments: Sequence[str]) -> None:
    """Write the checkpoint named first to the directory named second, complete or not at all."""
    # torch takes a second to import, and all of the model's memory goes with this process.
    from freeexport.checkpoints.transformers_model import reference_model

    source, place = arguments
    checkpoint = open_checkpoint(source)
    with output_directory(Path(place), MARKER, overwrite=True) as partial:
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
