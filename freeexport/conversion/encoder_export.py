"""Export an encoder without a builder of its own from transformers' code.

Uses optimum's exporter if it is installed, otherwise torch.onnx.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.overrides import TorchFunctionMode

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.transformers_model import reference_model
from graphs.description import ForeignEncoder
from graphs.engine_options import FLOAT_TYPES, EngineOptions
from graphs.errors import UnsupportedModelError
from graphs.foreign_encoder import adapt_encoder
from graphs.graph import OPSET
from graphs.weights import WeightFile
from graphs.widen import widen
from runtime.engines.onnx import OnnxEngine
from runtime.errors import first_line
from runtime.machine.machine import usable_cores

# Largest difference between the graph and the model, relative to the largest value. The encoder's
# weights are never rounded to 8 or 4 bits, so only their type matters.
TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 3e-2, ir.DataType.BFLOAT16: 1e-1}


def export_encoder(
    checkpoint: Checkpoint,
    encoder: ForeignEncoder,
    weights: WeightFile,
    directory: Path,
    options: EngineOptions,
) -> int:
    """Export the encoder to encoder.onnx and check it.

    The graph maps `input_ids` int64 [B, E] and `lengths` int32 [B] to `hidden` [B, E, d], for any B
    and E. It is tested at lengths below and above a block.

    Returns:
        Bytes of weights that are stored in half precision and widened to fp32 in memory.

    Raises:
        CheckpointError: If weights are missing or damaged.
        UnsupportedModelError: If the export fails or its results are wrong.
    """
    model = reference_model(checkpoint)
    whole = model.get_encoder()
    # Refuse NaN and missing weights, which transformers would initialise at random. The embedding
    # is shared with the decoder and checked there.
    prefix = next(name for name, part in model.named_modules() if part is whole)
    for name in whole.state_dict():
        if not name.endswith("embed_tokens.weight"):
            checkpoint.read(f"{prefix}.{name}")
    module = _Encoder(whole).eval()
    del model  # frees the decoder
    try:
        # Hide warnings about optional packages and the exporters' internals.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            exported = _export(module, encoder.block, directory)
    except OSError:  # a full disk is not the model's fault
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"the encoder of {checkpoint.name} ({checkpoint.architecture}) cannot be exported: "
            f"{first_line(error)}; try another release of torch or transformers"
        ) from error
    compute = FLOAT_TYPES[options.float_type]
    stored = FLOAT_TYPES.get(options.precision, compute)
    widened = adapt_encoder(exported, encoder.block, weights, stored=stored, compute=compute)
    ir.save(exported, directory / "encoder.onnx")
    weights.flush()
    widen(exported.graph, compute)  # NumPy has no bf16
    copy = directory / "encoder.fp32.onnx"
    ir.save(exported, copy)
    _check_engine(copy, module, encoder.block, TOLERANCE[stored], checkpoint.name)
    copy.unlink()
    return widened


class _Encoder(torch.nn.Module):
    """Map `input_ids` and `attention_mask` int64 [B, N] to hidden states float32 [B, N, d]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with _OneHotByComparison():
            hidden: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[
                0
            ]
        return hidden


class _OneHotByComparison(TorchFunctionMode):
    """Replace one_hot by a comparison.

    torch.export treats its number of classes as a constant, but LongT5 passes a length.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot and len(args) == 2:
            ids, classes = args
            return (ids[..., None] == torch.arange(classes, device=ids.device)).to(torch.int64)
        return func(*args, **(kwargs or {}))


def _export(module: _Encoder, block: int, directory: Path) -> ir.Model:
    try:
        from optimum.exporters.onnx import export
    except ImportError:
        return _export_with_torch(module, block)
    from optimum.exporters.tasks import TasksManager

    model: Any = module.encoder
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx",
        model_type=model.config.model_type,
        task="text2text-generation",
        library_name="transformers",
    )
    config = constructor(model.config).with_behavior("encoder")
    with TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "encoder.onnx"
        export(model, config, path, input_shapes={"batch_size": 2, "sequence_length": 3 * block})
        # The folder is deleted, so weights must not stay there.
        return ir.external_data.load_to_model(ir.load(path))


def _export_with_torch(module: _Encoder, block: int) -> ir.Model:
    batch = torch.export.Dim("B", min=1)
    blocks = torch.export.Dim("blocks", min=1)
    shape = {0: batch, 1: blocks * block if block > 1 else blocks}
    ids = torch.ones(2, 3 * block, dtype=torch.int64)
    program = torch.onnx.export(
        module,
        (ids, torch.ones_like(ids)),
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        dynamic_shapes=(shape, shape),
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
    )
    assert program is not None
    return program.model


def _check_engine(path: Path, module: _Encoder, block: int, tolerance: float, name: str) -> None:
    """Run the engine on prompts shorter and longer than a block, and compare with the model.

    Exporters may turn a length into a constant.
    """
    engine = OnnxEngine(path, usable_cores())
    encoder: Any = module.encoder
    generator = torch.Generator().manual_seed(0)
    for lengths in ([1], [4 * block + 1, block // 2 + 1, 1]):
        ids = torch.randint(
            0, encoder.config.vocab_size, (len(lengths), max(lengths)), generator=generator
        )
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            theirs = encoder(input_ids=ids, attention_mask=mask.to(torch.int64))[0].numpy()
        try:
            (ours,) = engine.run(
                ["hidden"], {"input_ids": ids.numpy(), "lengths": np.array(lengths, np.int32)}
            )
            difference = np.abs(ours.astype(np.float32) - theirs)[mask.numpy()]
            error = float(difference.max() / max(1.0, float(np.abs(theirs).max())))
            reason = f"it differs by {error:.1e} of the largest value"
        except Exception as failure:  # ONNX Runtime's exceptions have no common base
            error = np.inf
            reason = first_line(failure)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"the encoder of {name} was exported, but is wrong for prompts of {lengths} "
                f"tokens: {reason}; this encoder is not supported"
            )
