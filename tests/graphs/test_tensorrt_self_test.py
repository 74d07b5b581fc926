"""After a build the engines are run against their graphs, on the fake of a GPU: a wrong one is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import fake_device
import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles
from command_line import error, invoke, succeed
from device_cases import EXITS

from freeexport.conversion.convert import build_and_test
from graphs.errors import BuildError
from graphs.tensorrt.self_test import TOLERANCE
from runtime.engines.tensorrt.files import DIRECTORY

T5, LLAMA = BY_NAME["t5-relu-tied"], BY_NAME["llama-tied"]
OPTIONS = (
    (T5, {"precision": "fp16"}),
    (T5, {"precision": "int4"}),
    (EXITS[0], {"precision": "int8"}),
    (LLAMA, {"precision": "bf16"}),
    (LLAMA, {"precision": "int8"}),
    (LLAMA, {"precision": "fp8", "compute": "bf16"}),
)


@pytest.mark.parametrize(("case", "options"), OPTIONS, ids=lambda value: getattr(value, "name", str(value)))
def test_correct_engines_pass_the_self_test_in_every_profile(
    case: Any, options: dict[str, str], copied: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(case, target="tensorrt", **options)
    fake = fake_device.install(monkeypatch)
    built, tested = build_and_test(path, 3)
    assert tested.ran
    # Other kernels round otherwise, and about as much; those of bf16 are here what they are compared with.
    assert {engine.plan.engine for engine in built} == tested.largest.keys()
    assert all(0.1 < found <= TOLERANCE / 1.5 for found in tested.largest.values())
    assert not list(path.parent.glob(".*"))
    runs = set(__import__("tensorrt").runs)
    assert {(name, profile) for name, profile, _ in runs} == {
        (engine.plan.engine, index) for engine in built for index in range(len(engine.plan.profiles))
    }
    assert fake.allocated == 0


def wrong(engine: str, factor: float) -> Callable[[str, np.ndarray], None]:
    """An error of a compiler in one engine's outputs, or, if it is small, a coarser type than the engine's."""

    def change(name: str, array: np.ndarray) -> None:
        array *= factor if name == engine else 1

    return change


@pytest.mark.parametrize(
    ("engine", "factor", "precision", "message"),
    [
        ("shallow", 1.08, "fp16", "shallow differs .* times what fp16 explains .*limit 3"),
        ("shallow", 1.08, "bf16", "shallow differs .* times what bf16 explains .*limit 3"),
        ("shallow", np.nan, "fp16", r"differs from shallow\.onnx by inf"),
        ("deep", 2.0, "fp16", "self-test: the TensorRT engine deep differs"),
    ],
)
def test_error_beyond_the_type_tolerance_is_reported_in_one_line(
    engine: str, factor: float, precision: str, message: str, copied: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(LLAMA, target="tensorrt", precision=precision)
    fake_device.install(monkeypatch)
    monkeypatch.setattr("fake_tensorrt.OUTPUT", wrong(engine, factor))
    shown = error(invoke("convert", path, "--build", "1"))
    assert re.search(message, shown)
    assert not list(path.parent.glob(".*"))


def test_wrong_engine_is_an_error_and_deleted(copied: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(T5, target="tensorrt")
    fake_device.install(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("fake_tensorrt.OUTPUT", wrong("deep", 2.0))
        with pytest.raises(
            BuildError, match=r"self-test: the TensorRT engine deep differs from deep.onnx by .*removed"
        ):
            build_and_test(path, 2)
    left = {file.name.partition("-")[0] for file in (path / DIRECTORY).glob("*.engine*")}
    assert left == {"encoder", "prologue", "shallow"}
    built, tested = build_and_test(path, 2)
    assert tested.ran
    assert [engine.plan.engine for engine in built if not engine.reused] == ["deep"]


def test_self_test_without_a_gpu_reports_that_it_did_not_run(copied: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(LLAMA, target="tensorrt")
    fake_device.install(monkeypatch, devices=0)
    result = succeed("convert", path, "--build", "1")
    assert "self-test: not run, there is no GPU to run on" in result.output
    shown = invoke("convert", path, "--build", "1", "--json")
    content = json.loads(shown.output)
    assert [engine["reused"] for engine in content["engines"]] == [True, True]
    assert content["self_test"]["largest"] == {}
