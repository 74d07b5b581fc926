"""The choice of ONNX Runtime's attention kernels: a test at open, and the unfused ones where the fused ones fail."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import PROMPTS, Bundles
from device_cases import LLAMA
from fake_device import Machine
from onnx import TensorProto, checker, load_from_string

from runtime import Bundle, Session
from runtime.engines.cuda.attention import FUSED, UNFUSED, attention_model, attention_problem, choose_attention
from runtime.errors import EngineError
from runtime.machine.device import Device
from runtime.requests.load_engines import check_bundles

SIZES: dict[str, int] = {"kv_heads": 3, "head_dim": 16, "rows": 136}
CUDA = Device(0)


@pytest.mark.parametrize("float_type", ["fp32", "fp16", "bf16"])
def test_reference_of_the_test_is_attention_in_its_type(float_type: Any) -> None:
    model = load_from_string(attention_model(float_type))
    checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == [*["Cast"] * 4, "Attention", "Cast"]
    types = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    assert {node.attribute[0].i for node in model.graph.node[:4]} == {types[float_type]}
    assert list(model.graph.node[4].input) == ["qc", "kc", "vc", "mc", "", "", "n"]


@pytest.mark.parametrize("float_type", ["fp32", "fp16"])
@pytest.mark.parametrize("rows", [136, 133])
def test_cpu_passes_the_self_test(float_type: Any, rows: int) -> None:
    assert attention_problem(Device(), FUSED, float_type, 3, 16, rows) == ""


@pytest.mark.parametrize(
    ("broken", "options", "problem"),
    [
        ({}, FUSED, ""),
        ({"0": float("nan")}, UNFUSED, "CUDA failure 1: invalid argument"),
        ({"0": 0.2}, UNFUSED, "results differ by 0.2 for 3 heads and 1 queries"),
    ],
)
def test_fused_attention_kernels_are_used_unless_they_fail_the_self_test(
    broken: Any, options: Any, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch).onnxruntime.broken_attention = broken
    chosen = choose_attention(CUDA, "bf16", **SIZES)
    assert chosen == (options, problem)
    assert problem in caplog.text
    assert bool(problem) is ("the unfused kernels are used" in caplog.text)


def test_device_without_a_working_attention_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch).onnxruntime.broken_attention = {"0": float("nan"), "16": 1.0}
    with pytest.raises(EngineError, match=r"attention does not work on device cuda:0 in fp16 \(CUDA failure 1.*1"):
        choose_attention(CUDA, "fp16", **SIZES)


def test_session_engines_use_the_selected_attention_kernels(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ({}, {"0": float("nan")}):
        machine = Machine(monkeypatch)
        machine.onnxruntime.broken_attention = broken
        given, tested = list[Any](), list[Any]()
        real = machine.onnxruntime.InferenceSession

        def spy(
            path: Any, options: Any, providers: Any, real: Any = real, given: Any = given, tested: Any = tested
        ) -> Any:
            if isinstance(path, bytes):
                tested.append(path)
            else:
                given.append(providers[0][1].get("sdpa_kernel"))
            return real(path, options, providers)

        machine.onnxruntime.InferenceSession = spy  # type: ignore[method-assign]
        path = bundle(LLAMA, target="cuda", precision="fp32")
        check_bundles([Bundle.open(path)], CUDA)
        with Session(path, device="cuda:0", threads=1) as session:
            session.generate(list(PROMPTS[1]), max_new_tokens=2)
        assert given == ["16" if broken else None] * 2
        assert len(tested) == (2 if broken else 1)  # once for the check and the session
