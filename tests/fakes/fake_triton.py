"""What a decoupled Python model sees of Triton, by its documentation: `install` puts it where the model imports it.

Stricter than Triton: what the documentation forbids, or what config.pbtxt does not say, is an AssertionError.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

NAME = "triton_python_backend_utils"
FINAL = 1
DTYPES = {"text": np.object_, "exited": np.bool_}


class Tensor:
    def __init__(self, name: str, numpy_array: np.ndarray) -> None:
        assert numpy_array.dtype.type != np.str_, "strings are np.object_ of bytes"
        self._name, self._array = name, numpy_array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = 1) -> None:
        self.text, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.error, self.tensors = error, {each.name(): each.as_numpy() for each in output_tensors or []}
        assert error is not None or {name: array.dtype.type for name, array in self.tensors.items()} == DTYPES
        assert all(array.shape == (1,) for array in self.tensors.values())


class Request:
    """`responses` in the order in which they were sent. It is cancelled after `patience` of them."""

    def __init__(self, patience: int = 10**9, **inputs: np.ndarray) -> None:
        self.inputs = [Tensor(name, array) for name, array in inputs.items()]
        self.responses: list[InferenceResponse] = []
        self.ended, self._patience = False, patience

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return len(self.responses) >= self._patience

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended, "a response after the final one"
        assert response is not None or flags == FINAL, "no response and no flag"
        self.ended = flags == FINAL
        if response is not None:
            self.responses.append(response)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType(NAME)
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    module.get_input_tensor_by_name = lambda request, name: next(
        (tensor for tensor in request.inputs if tensor.name() == name), None
    )
    monkeypatch.setitem(sys.modules, NAME, module)
