"""An execution context of a TensorRT engine, and what is set in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.cuda.driver import Stream
from runtime.errors import EngineError


class Context:
    """Of engine `name`, for the profile of this number; runs are put into `stream`, and `log` has TensorRT's reasons.

    Shapes and addresses stay set, so only what changes is set again.
    """

    def __init__(self, context: Any, name: str, profile: int, stream: Stream, log: Any) -> None:
        self._context, self._name, self._stream, self._log = context, name, int(stream.handle), log
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        if not context.set_optimization_profile_async(profile, self._stream):
            raise self._error("cannot use a profile")

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Of all inputs. EngineError where one fits no profile."""
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._shapes.pop(name, None)
                if not self._context.set_input_shape(name, shape):
                    raise self._error(f"refuses shape {list(shape)} of {name}")
                self._shapes[name] = shape

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._error(f"refuses the memory of {name}")
                self._addresses[name] = address

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, once those of the inputs are set."""
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self) -> None:
        """Put a run into the engine's stream."""
        if not self._context.execute_async_v3(self._stream):
            raise self._error("did not run")

    def _error(self, what: str) -> EngineError:
        return EngineError(f"the TensorRT engine {self._name} {what}: {self._log.reason()}")
