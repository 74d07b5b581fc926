"""Compares the inputs and outputs of a bundle's graphs with the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.engines.kv_cache import PARTS
from runtime.errors import BundleError

INT32, INT64, FLOAT = "tensor(int32)", "tensor(int64)", "tensor(float)"
_FLOATS = {"fp32": FLOAT, "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


class Tensor(NamedTuple):
    """A type as ONNX Runtime names it, and a shape; a dimension that is free has a name."""

    type: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        text = f"{self.type} [{', '.join(map(str, self.shape))}]"
        return (text if text.isprintable() else ascii(text))[:200]


Tensors = dict[str, Tensor]


def contract(manifest: Manifest, engine: str) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of encoder, prologue, shallow, exit or deep by name: those of docs/architecture.md."""
    compute, width = _FLOATS[manifest.float_type], manifest.hidden_size

    def layers(prefix: str, numbers: Iterable[int | str], rows: int | str) -> Tensors:
        tensor = Tensor(_FLOATS[manifest.cache_type], ("B", manifest.kv_heads, rows, manifest.head_dim))
        return {f"{prefix}.{layer}.{part}": tensor for layer in numbers for part in PARTS}

    lengths = Tensor(INT32, ("B",))
    encoded = {"hidden": Tensor(compute, ("B", "E", width))}
    if engine == "encoder" and manifest.speech is not None:
        sound = ("B", manifest.speech.bins, 2 * manifest.encoder_capacity)
        return {"features": Tensor(FLOAT, sound)}, encoded
    if engine == "encoder":
        return {"input_ids": Tensor(INT64, ("B", "E")), "lengths": lengths}, encoded
    if engine == "prologue":
        return encoded, layers("cross", (*range(manifest.layers), *manifest.exit_names), "E")
    shallow = engine == "shallow"
    engines: dict[str, Sequence[int | str]] = {"shallow": manifest.shallow_caches, "exit": manifest.exit_names}
    caches = engines.get(engine, manifest.deep_layers)
    rows = manifest.capacity + manifest.max_pending if manifest.target == "tensorrt" else "cache"
    inputs = {"past_lengths": lengths, "query_lengths": lengths, "head_rows": Tensor(INT64, ("R",))}
    inputs |= layers("past", caches, rows)
    if manifest.encoder_decoder:
        inputs |= {**layers("cross", caches, "E"), "cross_lengths": lengths}
    outputs = {
        "token": Tensor(INT64, ("R",)),
        "confidence": Tensor(FLOAT, ("R",)),
        "logits": Tensor(FLOAT, ("R", manifest.vocab_size)),
        **layers("present", caches, rows),
    }
    states = Tensor(FLOAT, ("B", "q" if shallow else "k", width))
    if shallow:
        inputs["input_ids"], outputs["hidden"] = Tensor(INT64, ("B", "q")), states
        if manifest.exit_engine:
            del inputs["head_rows"], outputs["token"], outputs["confidence"], outputs["logits"]
        elif manifest.exit_layers:
            inputs["exit_lengths"] = lengths
    elif engine == "exit":
        inputs["features"] = states
        inputs |= {"input_ids": Tensor(INT64, ("B", "k"))} if manifest.exit_embeds else {"hidden": states}
        outputs["feature"] = Tensor(FLOAT, ("R", width))
    else:
        inputs |= {"hidden": states, "emitted": Tensor(INT64, ("R",))}
        outputs["nll"] = Tensor(FLOAT, ("R",))
        if manifest.exit_engine:
            outputs["features"] = states
    return inputs, outputs


def check_contract(manifest: Manifest, engine: str, session: Any) -> None:
    """BundleError where a session of ONNX Runtime takes or gives anything else than the manifest says."""
    inputs, outputs = contract(manifest, engine)
    _compare(engine, "input", session.get_inputs(), inputs)
    _compare(engine, "output", session.get_outputs(), outputs)


def _compare(engine: str, kind: str, values: list[Any], wanted: Mapping[str, Tensor]) -> None:
    shapes = {value.name: tuple("?" if size is None else size for size in value.shape) for value in values}
    found = {value.name: Tensor(value.type, shapes[value.name]) for value in values}
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
