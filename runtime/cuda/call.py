"""A call of an engine on ONNX Runtime's CUDA provider, on fixed arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from runtime.cuda.device_call import DeviceCall, Layout
from runtime.cuda.staging import Staging
from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.cuda.engine import CudaEngine

logger = logging.getLogger(__name__)

# A call becomes a CUDA graph when it comes again after so many runs: capturing costs as much as several.
RUNS_BEFORE_CAPTURE = 2
# Graphs that an engine keeps: ONNX Runtime has no way to give one up.
MOST_GRAPHS = 256


class CudaCall(DeviceCall):
    _engine: CudaEngine

    def __init__(self, engine: CudaEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._binding: Any = None
        self._options: Any = None
        self._graph = 0
        super().__init__(engine, inputs, outputs)

    def close(self) -> None:
        """Let go of the session and of memory: it may not run any more."""
        staging, self._layout, self._binding, self._staging = self._staging, None, None, None
        # What the device may still be copying into is not for others.
        if staging is not None and not self._under_way:
            self._engine.staging.give(staging)

    def _launch(self, layout: Layout, staging: Staging) -> None:
        staging.send(0, layout.sent)
        self._run()
        staging.fetch(layout.sent, layout.fetched)

    def _run(self) -> None:
        engine = self._engine
        captures = self._wants_graph()
        if captures:
            self._graph, engine.graphs_left = next(engine.graphs), engine.graphs_left - 1
            self._options = engine.run_options(self._graph)
        try:
            with engine.stream.cuda.undisturbed if captures else nullcontext():
                engine.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            self._failed(error, captures)
            engine.session.run_with_iobinding(self._binding, self._options)

    def _wants_graph(self) -> bool:
        tokens = self._inputs.get("input_ids")
        repeats = self._runs >= RUNS_BEFORE_CAPTURE and self._graph == 0 and self._engine.graphs_left > 0
        return self._engine.captures and repeats and tokens is not None and tokens.shape[1] == 1

    def _failed(self, error: Exception, captures: bool) -> None:
        """Raise why a run failed; return where it was the capture alone, after which it can run without."""
        engine = self._engine
        text = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        # A lost device says so at the next call.
        engine.stream.record(engine.stream.cuda.event())
        if not captures:
            raise EngineError(f"{engine.name} failed on device {engine.stream.cuda}: {text}") from error
        logger.warning("steps of %s run one kernel at a time, as no CUDA graph can be captured: %s", engine.name, text)
        engine.graphs_left, self._graph = 0, 0
        self._options = engine.run_options(0)

    def _prepare(self) -> Layout:
        engine = self._engine
        self.close()
        layout = Layout.of(self._inputs, self._outputs)
        staging = self._take(layout)
        binding = self._binding = engine.session.io_binding()
        for name, array in {**self._inputs, **self._outputs}.items():
            offset = layout.offsets.get(name)
            place = array.address if offset is None else staging.device.address + offset
            put = binding.bind_input if name in self._inputs else binding.bind_output
            put(name, "cuda", engine.stream.cuda.index, engine.element_type(name), list(array.shape), place)
        self._options, self._graph, self._runs = engine.run_options(0), 0, 0
        self._layout = layout
        return layout
