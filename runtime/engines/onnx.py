"""An engine on ONNX Runtime: one session a graph, and calls whose inputs and outputs stay bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime import kernels as own_kernels
from runtime.errors import EngineError, first_line
from runtime.machine.device import CPU, Device


class OnnxEngine:
    """One graph of a bundle, loaded for `device` with `threads` CPU threads. Safe to call from many threads.
    `provider_options` are those of ONNX Runtime's provider for a GPU. `profile` begins the name of the file to which
    `session.end_profiling()` writes the time of every kernel. `kernels`: the version of our own operators that it
    needs, if any. EngineError where it cannot be loaded, or would run elsewhere."""

    def __init__(
        self,
        path: Path,
        threads: int,
        device: Device = CPU,
        provider_options: Mapping[str, str] | None = None,
        profile: Path | None = None,
        kernels: int | None = None,
    ) -> None:
        ort = import_onnxruntime()
        providers = device.providers(ort, provider_options or {})
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # The engines of a bundle take turns: a pool that spins on after its call would slow the next engine down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self._spread = None
        if kernels is not None:
            own_kernels.register(options, kernels)
            self._spread = own_kernels.spread_logits()
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            upgrade = "; upgrade freeexport" if "is not a registered function/op" in str(error) else ""
            raise EngineError(f"{path.name} cannot be loaded: {first_line(error)}{upgrade}") from error
        device.check_active(self.session, path.name)
        self.file = path.name

    @property
    def output_shapes(self) -> dict[str, tuple[Any, ...]]:
        """The shape of each output; dimensions that are free have a name."""
        return {output.name: tuple(output.shape) for output in self.session.get_outputs()}

    def run(self, outputs: list[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """One call with arrays of any shape, copied in and out. EngineError where it fails."""
        try:
            results: list[np.ndarray] = self.session.run(outputs, dict(inputs))
        except Exception as error:
            raise _failed(self.file, error) from error
        return results

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        """A call on fixed buffers: numpy arrays, or values made by `value`."""
        return Call(self.session, inputs, outputs, self.file, self._spread)


class Call:
    """One engine call with everything bound: change the arrays in place, run, read the arrays. `file`: the graph's
    name, for the EngineError of a run that fails. `spread`: what tells our operators whether logits are bound."""

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        file: str = "an engine",
        spread: Callable[[int], int] | None = None,
    ) -> None:
        self._session, self._file, self._spread = session, file, spread
        self._binding = session.io_binding()
        # Bound memory belongs to the arrays: they must live as long as the call.
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self.rebind(inputs, outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Bind other arrays, of any shape, for these names; the others stay."""
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
    """An array as a value of ONNX Runtime, on the same memory; values pass through."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(item) if isinstance(item, np.ndarray) else item


def import_onnxruntime() -> Any:
    """The package `onnxruntime`. EngineError where it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({first_line(error)}); install one wheel: pip install 'freeexport[cpu]'"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError("the ONNX Runtime package is damaged (two wheels over each other?); run freeexport doctor")
    return onnxruntime


def _failed(file: str, error: Exception) -> EngineError:
    return EngineError(f"ONNX Runtime cannot run {file}: {first_line(error)}")
