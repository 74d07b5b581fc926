"""Profiles of a token: ONNX Runtime's notes of each kernel, added up by operator and shape."""

from __future__ import annotations

from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from runtime import Bundle
from tools.token_profile import format_profile, main, profile


def test_a_bundle_is_profiled_kernel_by_kernel(bundle: Bundles) -> None:
    path = bundle(BY_NAME["llama-tied"])
    found = profile(path, 1, 6, 8)
    attended = [one for kernels in found.kernels.values() for one in kernels if one.kind == "attention"]
    assert sum(one.per_call for one in attended) == Bundle.open(path).manifest.layers
    assert set(found.engines) == {"shallow", "deep"}
    assert found.token > sum(found.engines.values()) > 0
    assert found.opened > 0
    shown = format_profile(found, 0)
    assert "CachedAttention" in shown
    assert "between them" in shown


def test_the_command_prints_a_table(bundle: Bundles) -> None:
    path = str(bundle(BY_NAME["t5-relu-tied"]))
    result = CliRunner().invoke(main, [path, "--tokens", "6", "--context", "4", "--threads", "1", "--least", "0"])
    assert result.exit_code == 0, result.output
    assert "1 thread(s)" in result.output
    for operator in ("GroupQueryAttention", "MultiHeadAttention", "Gemm"):
        assert operator in result.output
    few = CliRunner().invoke(main, [path, "--tokens", "2"])
    assert "4 or more" in str(few.exception)
