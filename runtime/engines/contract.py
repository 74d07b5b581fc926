"""Checks the inputs and outputs of a bundle's graphs against the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.engines.kv_cache import PARTS
from runtime.errors import BundleError

INT32 = "tensor(int32)"
INT64 = "tensor(int64)"
FLOAT = "tensor(float)"
_TYPES = {
    "fp32": FLOAT,
    "fp16": "tensor(float16)",
    "bf16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}


class TensorSpec(NamedTuple):
    """Type and shape of an input or output.

    Attributes:
        type: Name of the type in ONNX Runtime.
        shape: Sizes. Free dimensions are names.
    """

    type: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        text = f"{self.type} [{', '.join(map(str, self.shape))}]"
        return (text if text.isprintable() else ascii(text))[:200]


TensorSpecs = dict[str, TensorSpec]


def contract(manifest: Manifest, engine: str) -> tuple[TensorSpecs, TensorSpecs]:
    """Return the inputs and outputs of an engine by name, as in docs/architecture.md.

    `engine` is encoder, prologue, shallow, exit or deep.
    """
    compute = _TYPES[manifest.float_type]
    encoded = {"hidden": TensorSpec(compute, ("B", "E", manifest.hidden_size))}
    if engine == "encoder" and manifest.speech is not None:
        sound = ("B", manifest.speech.bins, 2 * manifest.encoder_capacity)
        return {"features": TensorSpec(FLOAT, sound)}, encoded
    if engine == "encoder":
        tokens = TensorSpec(INT64, ("B", "E"))
        return {"input_ids": tokens, "lengths": TensorSpec(INT32, ("B",))}, encoded
    if engine == "prologue":
        layers = (*range(manifest.layers), *manifest.exit_names)
        return encoded, _keys_and_values(manifest, "cross", layers, "E")
    return _decoder_contract(manifest, engine)


def _keys_and_values(
    manifest: Manifest,
    prefix: str,
    layers: Iterable[int | str],
    rows: int | str,
    batch: str = "B",
) -> TensorSpecs:
    shape = (batch, manifest.kv_heads, rows, manifest.cache_width)
    tensor = TensorSpec(_TYPES[manifest.cache_type], shape)
    return {f"{prefix}.{layer}.{part}": tensor for layer in layers for part in PARTS}


def _decoder_contract(manifest: Manifest, engine: str) -> tuple[TensorSpecs, TensorSpecs]:
    width = manifest.hidden_size
    lengths = TensorSpec(INT32, ("B",))
    shallow = engine == "shallow"
    engines: dict[str, Sequence[int | str]] = {
        "shallow": manifest.shallow_caches,
        "exit": manifest.exit_names,
    }
    caches = engines.get(engine, manifest.deep_layers)
    rows = manifest.capacity + manifest.max_pending if manifest.target == "tensorrt" else "cache"
    inputs = {
        "past_lengths": lengths,
        "query_lengths": lengths,
        "head_rows": TensorSpec(INT64, ("R",)),
    }
    inputs |= _keys_and_values(manifest, "past", caches, rows)
    if manifest.encoder_decoder:
        inputs |= _keys_and_values(manifest, "cross", caches, rows="E", batch="P")
        inputs["cross_lengths"] = TensorSpec(INT32, ("P",))
    outputs = {
        "token": TensorSpec(INT64, ("R",)),
        "confidence": TensorSpec(FLOAT, ("R",)),
        "logits": TensorSpec(FLOAT, ("R", manifest.vocab_size)),
        **_keys_and_values(manifest, "present", caches, rows),
    }
    queries = TensorSpec(_TYPES[manifest.float_type], ("M", manifest.heads * manifest.head_dim))
    outputs |= {f"query.{layer}": queries for layer in manifest.query_layers if layer in caches}
    states = TensorSpec(FLOAT, ("B", "q" if shallow else "k", width))
    if shallow:
        inputs["input_ids"] = TensorSpec(INT64, ("B", "q"))
        outputs["hidden"] = states
        if manifest.exit_engine:
            del inputs["head_rows"]
            for name in ("token", "confidence", "logits"):
                del outputs[name]
        elif manifest.exit_layers:
            inputs["exit_lengths"] = lengths
    elif engine == "exit":
        inputs["features"] = TensorSpec(FLOAT, ("B", "k", manifest.feature_size))
        if manifest.exit_embeds:
            inputs["input_ids"] = TensorSpec(INT64, ("B", "k"))
        else:
            inputs["hidden"] = states
        outputs["feature"] = TensorSpec(FLOAT, ("R", manifest.feature_size))
    else:
        inputs |= {"hidden": states, "emitted": TensorSpec(INT64, ("R",))}
        outputs["nll"] = TensorSpec(FLOAT, ("R",))
        if manifest.exit_engine:
            outputs["features"] = TensorSpec(FLOAT, ("B", "k", manifest.feature_size))
    return inputs, outputs


def check_contract(manifest: Manifest, engine: str, session: Any) -> None:
    """Check the inputs and outputs of an ONNX Runtime session.

    Raises:
        BundleError: If they differ from those of the manifest.
    """
    inputs, outputs = contract(manifest, engine)
    _compare(engine, "input", session.get_inputs(), inputs)
    _compare(engine, "output", session.get_outputs(), outputs)


def _compare(engine: str, kind: str, values: list[Any], wanted: Mapping[str, TensorSpec]) -> None:
    found = {}
    for value in values:
        shape = tuple("?" if size is None else size for size in value.shape)
        found[value.name] = TensorSpec(value.type, shape)
    for name in sorted(wanted.keys() | found.keys()):
        if name in found and name in wanted and _fits(found[name], wanted[name]):
            continue
        has = f"{kind} {name[:80]!r} {found[name]}" if name in found else f"no {kind} {name!r}"
        expected = str(wanted[name]) if name in wanted else "none"
        raise BundleError(
            f"{engine}.onnx has {has}, and {MANIFEST} expects {expected}; "
            "convert the checkpoint again"
        )


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Compare types and shapes. A free dimension of the graph accepts any size, a fixed one only
    its own.
    """
    if found.type != wanted.type or len(found.shape) != len(wanted.shape):
        return False
    sizes = zip(found.shape, wanted.shape, strict=True)
    return all(not isinstance(size, int) or size == needed for size, needed in sizes)
