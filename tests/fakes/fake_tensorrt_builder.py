"""The part of the fake of `tensorrt` that parses and builds: an "engine" names the graph that it was built from."""

from __future__ import annotations

import json
from typing import Any

from fake_cuda_graphs import GraphCuda


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class _Network:
    path = ""


class _Parser:
    num_errors = 0

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        self._network.path = model
        return True


class _OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class _Config:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[_OptimizationProfile] = []
        self.flags: set[Any] = set()

    def add_optimization_profile(self, profile: _OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        class Cache:
            def serialize(self) -> bytes:
                return b"timings"

        return Cache()

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return True

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)


class _Builder:
    _cuda: GraphCuda
    _version: str

    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _OptimizationProfile:
        return _OptimizationProfile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 2)
        for step in range(2):
            monitor.step_complete("build", step)
        monitor.phase_finish("build")
        content = {
            "graph": network.path,
            "profiles": [profile.shapes for profile in config.profiles],
            "version": self._version,
            "architecture": self._cuda.architecture,
        }
        return json.dumps(content).encode()
