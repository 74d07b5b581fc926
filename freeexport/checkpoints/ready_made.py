"""Ready-made exits: find those that fit a model, and apply one in memory.

An applied exit is an overlay. The checkpoint reads the model's tensors from the model's own files,
and the exit's from its file. A LoRA adapter in the file is merged into the tensors that are read.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.eagle import CONFIG, apply_eagle_head, read_eagle_head
from freeexport.checkpoints.exit_file import open_exit_weights, read_exit_file
from freeexport.checkpoints.lora_adapter import MergedWeights
from freeexport.checkpoints.packed_exit import SUFFIX, PackedExit, PackedFile, Sizes, read_packed
from freeexport.checkpoints.weight_files import CheckpointError
from graphs.exit_head import EXIT
from graphs.families import describe
from runtime.bundle.hub import HubName, hub_file
from runtime.bundle.manifest import Manifest, ReadyMadeExit

READY_MADE = Path(__file__).parents[1] / "exits"
HUB_EXIT = "exit.freeexport.safetensors"  # in a repository of the hub


def ready_made() -> list[Path]:
    """Return the files of the exits in this package."""
    return sorted(READY_MADE.glob(f"*{SUFFIX}"))


def find_exit(name: str) -> Path:
    """Return the file of a ready-made exit, of one on the hub, or `name` if it is a file.

    Args:
        name: Name of an exit in this package, a file, the directory of an EAGLE-3 head, or
            "owner/name" or "owner/name@revision" on the hub.

    Raises:
        CheckpointError: If there is no such exit and no such file.
        HubError: If it cannot be downloaded.
    """
    known = {path.stem: path for path in ready_made()}
    if name in known:
        return known[name]
    with suppress(OSError, ValueError):  # not a valid file name
        if Path(name).is_file() or (Path(name) / CONFIG).is_file():
            return Path(name)
    if (named := HubName.parse(name)) is not None:
        return hub_file(named, HUB_EXIT)
    listed = f"known are {', '.join(known)}" if known else "this freeexport brings none"
    raise CheckpointError(
        f"there is no exit {name[:100]}, and no such file; {listed} (freeexport exits)"
    )


def recorded_results(record: ReadyMadeExit) -> str:
    """Return what the file of an exit in this package says about its speed.

    "" for an exit that is not in the package, or is another version.
    """
    path = READY_MADE / f"{record.name}{SUFFIX}"
    if record.file is not None or not path.is_file():
        return ""
    packed = read_packed(path)
    return packed.about.results if packed.sha256 == record.sha256 else ""


def misfit(packed: PackedExit, checkpoint: Checkpoint) -> str | None:
    """Return the reason why an exit cannot fit a model, by family and sizes. None if it can.

    Reads no weights.
    """
    description = describe(checkpoint.config, checkpoint)
    if description.family != packed.family:
        return (
            f"it is for {packed.family} models, of {packed.model}, and {checkpoint.name} is a "
            f"{description.family} model"
        )
    found = asdict(Sizes.of(description))
    wanted = found if packed.sizes is None else asdict(packed.sizes)
    for size, value in wanted.items():
        if found[size] != value:
            return (
                f"it is for models of other sizes, of {packed.model}: {size} {value}, and "
                f"{checkpoint.name} has {found[size]}"
            )
    return None


def fitting_exits(checkpoint: Checkpoint) -> list[PackedExit]:
    """Return the ready-made exits that were trained on the weights of a checkpoint.

    A checkpoint that has an exit or an adapter fits none. Weights are read only if an exit has the
    same family and sizes.
    """
    if checkpoint.adapter is not None or checkpoint.exit is not None:
        return []
    found = [read_packed(path).about for path in ready_made()]
    possible = [packed for packed in found if misfit(packed, checkpoint) is None]
    return [one for one in possible if one.weights_sha256 == checkpoint.weights_sha256]


def apply_exit(base: Checkpoint, packed: PackedFile) -> Checkpoint:
    """Return a checkpoint with a ready-made exit applied to `base`, whose own exit is left out.

    The hash of the base's weights is not compared.

    Raises:
        CheckpointError: If the model is a LoRA adapter, or family, sizes or shapes do not fit.
    """
    about = packed.about
    if base.adapter is not None:
        raise CheckpointError(
            f"{base.name} is a LoRA adapter; merge it into its base with peft, then apply an exit"
        )
    if (reason := misfit(about, base)) is not None:
        raise CheckpointError(does_not_fit(about, base, reason))
    speaks = describe(base.config, base).spectrogram is not None
    if about.samples and speaks != bool(packed.sounds):
        kind = "without recordings" if speaks else "with recordings"
        raise CheckpointError(
            f"{packed.path} is damaged: it has samples {kind}, for a {about.family} model; get the "
            "file again"
        )
    own = {name: file for name, file in base.tensors.items() if not name.startswith(EXIT)}
    plain = replace(base, tensors=own, exit=None, exit_weights=None)
    checkpoint = plain
    if packed.adapter is not None:
        weights, config = packed.adapter
        merged = MergedWeights(weights, config, plain)
        checkpoint = replace(
            plain,
            files=[*plain.files, merged],
            tensors=plain.tensors | dict.fromkeys(merged.shapes, merged),
        )
    in_package = packed.path.parent == READY_MADE
    record = ReadyMadeExit(
        name=about.name,
        sha256=packed.sha256,
        file=None if in_package else packed.path.name,
        agreement=about.agreement,
    )
    return replace(
        checkpoint.with_exit(about.exit, packed.weights),
        ready_made=record,
        base=plain,
        phrases=packed.phrases,
        sample_prompts=packed.prompts,
    )


def does_not_fit(packed: PackedExit, checkpoint: Checkpoint, reason: str) -> str:
    """Return the message of a refusal."""
    model = checkpoint.path if checkpoint.path.exists() else checkpoint.name
    return f"exit {packed.name} does not fit: {reason}; choose another (freeexport exits {model})"


def open_source(model: str, manifest: Manifest, exit_file: str | None = None) -> Checkpoint:
    """Open the checkpoint of a bundle, with the ready-made exit that its manifest records, if any.

    The caller compares the hash of the result with `source_sha256` of the manifest.

    Args:
        model: The checkpoint.
        manifest: The manifest of the bundle.
        exit_file: Name, file or directory of the exit. Default: the one that the manifest names.

    Raises:
        CheckpointError: If the checkpoint cannot be opened, or the file of the exit is missing or
            has other content.
    """
    checkpoint = open_checkpoint(model)
    record = manifest.ready_made_exit
    if record is None:
        if exit_file is not None:
            raise CheckpointError(
                f"this bundle was converted without a ready-made exit, and --exit is "
                f"{exit_file[:100]}; omit it"
            )
        return checkpoint
    if exit_file is not None:
        path = find_exit(exit_file)
    elif record.file is not None:
        path = Path(record.file)
    else:
        path = READY_MADE / f"{record.name}{SUFFIX}"
    if path.is_dir():
        head = read_eagle_head(path)
        _check_version(record, head.sha256, path)
        return apply_eagle_head(checkpoint, head)
    if not path.is_file():
        place = "in freeexport/exits" if record.file is None else "in this directory"
        raise CheckpointError(
            f"this bundle was converted with exit {record.name}, whose file {path.name} is not "
            f"{place}; name it with --exit, or convert again"
        )
    packed = read_packed(path)
    _check_version(record, packed.sha256, path)
    return apply_exit(checkpoint, packed)


def _check_version(record: ReadyMadeExit, sha256: str, path: Path) -> None:
    if sha256 != record.sha256:
        raise CheckpointError(
            f"this bundle was converted with another version of exit {record.name} (sha256 "
            f"{record.sha256[:12]}..., that of {path} has {sha256[:12]}...); put that "
            "version back, or convert again"
        )


def begin_with(opened: Checkpoint, name: str) -> Checkpoint:
    """Return the checkpoint with another exit, as the start of a training.

    The exit may have been trained on other weights of the same shape.

    Args:
        opened: The checkpoint.
        name: A directory that `train --tune exit` wrote, or name or file of a ready-made exit.

    Raises:
        CheckpointError: If there is no such exit, it requires a LoRA adapter, shapes differ, or the
            checkpoint already has an exit.
    """
    if opened.exit is not None and opened.exit.has_parameters:
        raise CheckpointError(
            f"{opened.name} has an exit of its own, which training goes on with; leave "
            "--exit-from out"
        )
    directory = Path(name)
    if directory.is_dir():
        exit_file = read_exit_file(directory)
        if exit_file is None or not exit_file.has_parameters:
            raise CheckpointError(
                f"{directory} has no exit with weights of its own; name what --tune exit wrote"
            )
        return opened.with_exit(
            replace(exit_file, base_sha256=opened.sha256), open_exit_weights(directory)
        )
    packed = read_packed(find_exit(name))
    if packed.adapter is not None:
        raise CheckpointError(
            f"exit {name} goes with a LoRA adapter of {packed.about.model}; choose another to "
            "begin with"
        )
    return opened.with_exit(replace(packed.about.exit, base_sha256=opened.sha256), packed.weights)
