"""Compares the inputs and outputs of a bundle's graphs with the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.errors import BundleError

INT32, INT64, FLOAT = "tensor(int32)", "tensor(int64)", "tensor(float)"
_FLOATS = {"fp32": FLOAT, "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
PARTS = ("key", "value")


class Tensor(NamedTuple):
    """A type as ONNX Runtime names it, and a shape; a dimension that is free has a name."""

    type: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        text = f"{self.type} [{', '.join(map(str, self.shape))}]"
        return (text if text.isprintable() else ascii(text))[:200]


class Contract(NamedTuple):
    """The inputs and outputs of an engine by name: those of docs/architecture.md."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def contract(manifest: Manifest, engine: str) -> Contract:
    """Inputs and outputs of encoder, prologue, shallow or deep."""
    compute = _FLOATS[manifest.float_type]
    if engine in ("encoder", "prologue"):
        hidden = {"hidden": Tensor(compute, ("B", "E", manifest.hidden_size))}
        if engine == "prologue":
            return Contract(hidden, _cross(manifest, range(manifest.layers)))
        return Contract({"input_ids": Tensor(INT64, ("B", "E")), "lengths": Tensor(INT32, ("B",))}, hidden)
    shallow = engine == "shallow"
    layers = manifest.shallow_layers if shallow else manifest.deep_layers
    caches = manifest.shallow_caches if shallow else layers
    inputs = {
        "past_lengths": Tensor(INT32, ("B",)),
        "query_lengths": Tensor(INT32, ("B",)),
        "head_rows": Tensor(INT64, ("R",)),
        **_cache(manifest, caches, "past"),
        **(_cross(manifest, layers) if manifest.encoder_decoder else {}),
        **({"cross_lengths": Tensor(INT32, ("B",))} if manifest.encoder_decoder else {}),
    }
    outputs = {
        "token": Tensor(INT64, ("R",)),
        "confidence": Tensor(FLOAT, ("R",)),
        "logits": Tensor(FLOAT, ("R", manifest.vocab_size)),
        **_cache(manifest, caches, "present"),
    }
    if shallow:
        inputs["input_ids"] = Tensor(INT64, ("B", "q"))
        outputs["hidden"] = Tensor(FLOAT, ("B", "q", manifest.hidden_size))
        if manifest.exit_layers:
            inputs["exit_lengths"] = Tensor(INT32, ("B",))
    else:
        inputs |= {"hidden": Tensor(FLOAT, ("B", "k", manifest.hidden_size)), "emitted": Tensor(INT64, ("R",))}
        outputs["nll"] = Tensor(FLOAT, ("R",))
    return Contract(inputs, outputs)


def check_contract(manifest: Manifest, engine: str, session: Any) -> None:
    """BundleError where a session of ONNX Runtime takes or gives anything else than the manifest says."""
    wanted = contract(manifest, engine)
    _compare(engine, "input", _tensors(session.get_inputs()), wanted.inputs)
    _compare(engine, "output", _tensors(session.get_outputs()), wanted.outputs)


def _compare(engine: str, kind: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if name in found and name in wanted and _fits(found[name], wanted[name]):
            continue
        has = f"{kind} {name[:80]!r} {found[name]}" if name in found else f"no {kind} {name!r}"
        says = str(wanted[name]) if name in wanted else "there is none"
        raise BundleError(
            f"{engine}.onnx has {has}, {MANIFEST} says {says}: they are not of one model; convert the checkpoint again"
        )


def _fits(found: Tensor, wanted: Tensor) -> bool:
    """A dimension that is free in the graph takes any size; one that must be free may not be fixed."""
    if found.type != wanted.type or len(found.shape) != len(wanted.shape):
        return False
    sizes = zip(found.shape, wanted.shape, strict=True)
    return all(not isinstance(size, int) or size == needed for size, needed in sizes)


def _tensors(values: list[Any]) -> dict[str, Tensor]:
    shapes = {value.name: tuple("?" if size is None else size for size in value.shape) for value in values}
    return {value.name: Tensor(value.type, shapes[value.name]) for value in values}


def _cache(manifest: Manifest, layers: Iterable[int | str], prefix: str) -> dict[str, Tensor]:
    rows = manifest.capacity + manifest.max_pending if manifest.target == "tensorrt" else "cache"
    shape = ("B", manifest.kv_heads, rows, manifest.head_dim)
    return _layers(manifest, layers, prefix, shape)


def _cross(manifest: Manifest, layers: range) -> dict[str, Tensor]:
    return _layers(manifest, layers, "cross", ("B", manifest.kv_heads, "E", manifest.head_dim))


def _layers(
    manifest: Manifest, layers: Iterable[int | str], prefix: str, shape: tuple[int | str, ...]
) -> dict[str, Tensor]:
    tensor = Tensor(_FLOATS[manifest.float_type], shape)
    return {f"{prefix}.{layer}.{part}": tensor for layer in layers for part in PARTS}
