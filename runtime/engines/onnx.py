"""An engine on ONNX Runtime: one session per graph, and calls with bound inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engines import kernels as own_kernels
from runtime.errors import EngineError, first_line
from runtime.machine.device import CPU, Device

# Microseconds that an engine's threads spin without work. The default is about 30 ms. Operators of
# one call follow each other much faster.
SPIN = "1000"


class OnnxEngine:
    """One graph of a bundle in an ONNX Runtime session. Safe to call from many threads.

    Args:
        path: The graph.
        threads: CPU threads per call.
        device: Device to run on.
        provider_options: Options of ONNX Runtime's CUDA provider.
        kernels: Version of this project's operators that the graph needs. Default: none.

    Raises:
        EngineError: If the graph cannot be loaded, or would run on another device.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        device: Device = CPU,
        provider_options: Mapping[str, str] | None = None,
        kernels: int | None = None,
    ) -> None:
        ort = import_onnxruntime()
        providers = device.providers(ort, provider_options or {})
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Engines take turns. Threads that keep spinning after a call would slow down the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # New threads spin as well, and would slow down the rest of opening.
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
        self._spread = None
        if kernels is not None:
            own_kernels.register(options, kernels)
            self._spread = own_kernels.spread_logits()
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            message = f"{path.name} cannot be loaded: {first_line(error)}"
            if "is not a registered function/op" in str(error):
                message += "; upgrade freeexport"
            raise EngineError(message) from error
        device.check_active(self.session, path.name)
        self.file = path.name

    @property
    def output_shapes(self) -> dict[str, tuple[Any, ...]]:
        """Shape of each output. Free dimensions are names."""
        return {output.name: tuple(output.shape) for output in self.session.get_outputs()}

    @cached_property
    def shares_prompts(self) -> bool:
        """True if neighboring sequences can share the keys and values of one prompt.

        `cross_lengths` and `cross.*` then have a batch size of their own.
        """
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        return shapes.get("cross_lengths", shapes.get("query_lengths")) != shapes.get(
            "query_lengths"
        )

    def run(self, outputs: list[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one call on arrays of any shape, which are copied.

        Raises:
            EngineError: If it fails.
        """
        try:
            results: list[np.ndarray] = self.session.run(outputs, dict(inputs))
        except Exception as error:
            raise _failed(self.file, error) from error
        return results

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        """Return a call on fixed buffers: numpy arrays, or values created by `value`."""
        return Call(self.session, inputs, outputs, file=self.file, spread=self._spread)


class Call:
    """A call on bound buffers: change the inputs in place, run, read the outputs.

    Args:
        session: Session of ONNX Runtime.
        inputs: Arrays or values by input name.
        outputs: Arrays or values by output name.
        file: Name of the graph, for error messages.
        spread: Sets whether this project's operators expand logits to the whole vocabulary, and
            returns the previous setting. They need not if logits are not bound.
    """

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        file: str = "an engine",
        spread: Callable[[int], int] | None = None,
    ) -> None:
        self._session = session
        self._file = file
        self._spread = spread
        self._binding = session.io_binding()
        # Arrays must live as long as the call, which only binds their memory.
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self.rebind(inputs, outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Bind other buffers, of any shape, by name. The others stay bound."""
        try:
            for name, item in inputs.items():
                self._binding.bind_ortvalue_input(name, value(item))
            for name, item in outputs.items():
                self._binding.bind_ortvalue_output(name, value(item))
        except Exception as error:
            raise _failed(self._file, error) from error
        self._inputs.update(inputs)
        self._outputs.update(outputs)

    def run(self) -> None:
        spread = None if "logits" in self._outputs else self._spread
        before = spread(0) if spread else 0
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise _failed(self._file, error) from error
        finally:
            if spread:
                spread(before)


def value(item: Any) -> Any:
    """Return an array as a value of ONNX Runtime that shares its memory. Values are returned
    unchanged.
    """
    if not isinstance(item, np.ndarray):
        return item
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(item)


def import_onnxruntime() -> Any:
    """Import the package `onnxruntime`.

    Raises:
        EngineError: If it cannot be imported, or is damaged.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({first_line(error)}); "
            "install one wheel: pip install 'freeexport[cpu]'"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError(
            "the ONNX Runtime package is damaged (are two wheels installed?); run freeexport doctor"
        )
    return onnxruntime


def _failed(file: str, error: Exception) -> EngineError:
    return EngineError(f"ONNX Runtime cannot run {file}: {first_line(error)}")
