"""ONNX Runtime on the CPU for graphs with bfloat16, which it lacks: they run in fp32, every result rounded.

The part of a device in the fakes. Arrays of bfloat16 are uint16 here, as everywhere in the runtime.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from graphs.widen import widen

BF16 = ir.DataType.BFLOAT16


class Graph:
    """The graph at `path`. `inputs` and `outputs` have `name`, `type` and `shape`, as a session's do."""

    def __init__(self, path: str, options: Any) -> None:
        model = ir.load(path)
        self._halves = {str(value.name) for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype == BF16}
        if self._halves:
            widen(model.graph, BF16, rounds=True)
            # Beside its weights, in a bundle that other tests use too: only while it is read.
            widened = Path(path).with_name(f".{Path(path).stem}.widened.onnx")
            ir.save(model, widened)
            path = str(widened)
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        finally:
            if self._halves:
                Path(path).unlink()
        self.inputs, self.outputs = (
            [self._typed(value) for value in values]
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )

    def compute(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        """On these arrays, in place."""
        binding = self._session.io_binding()
        wide: dict[str, np.ndarray] = {}
        for name, array in inputs.items():
            given = array.view(ml_dtypes.bfloat16).astype(np.float32) if name in self._halves else array
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(given))
        for name, array in outputs.items():
            wide[name] = np.zeros(array.shape, np.float32) if name in self._halves else array
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(wide[name]))
        self._session.run_with_iobinding(binding)
        for name in self._halves & outputs.keys():
            outputs[name][...] = wide[name].astype(ml_dtypes.bfloat16).view(np.uint16)

    def _typed(self, value: Any) -> SimpleNamespace:
        type_ = "tensor(bfloat16)" if value.name in self._halves else value.type
        return SimpleNamespace(name=value.name, type=type_, shape=value.shape)
