"""Deep passes that are padded to few sizes, for CUDA graphs: predictions and caches are those of exact sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Bundles
from device_cases import FEATURES, LLAMA, T5
from fake_device import Machine

from runtime import Session
from runtime.engines.cuda.runner import CudaRunner
from runtime.engines.onnx import OnnxEngine
from runtime.engines.runner import Runner


def pad(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Let runners on the CPU pad as those on a GPU do. Returns the sizes that are used from now on."""
    used = set()

    def padded(runner: Any, slot: int, rows: int, heads: int, most: int) -> tuple[int, int]:
        sizes = CudaRunner.padded(runner, slot, rows, heads, most)
        used.add(sizes)
        return sizes

    monkeypatch.setattr(OnnxEngine, "captures", True, raising=False)
    monkeypatch.setattr(Runner, "padded", padded)
    return used


def decoded(session: Session) -> tuple[list[Any], list[np.ndarray]]:
    """Decode passes of 1 to 5 rows. Returns what they predict, and the valid rows of the caches."""
    said = []
    with session.decoder() as decoder:
        encoded = session.manifest.encoder_decoder
        prompt = np.array(session.manifest.output_begins if encoded else PROMPTS[0])
        said.append(decoder.prefill(prompt, head=True))
        for rows in (3, 1, 5, 2, 3):
            tokens = [7 + rows + row for row in range(rows)]
            said += [decoder.step(token, head=True) for token in tokens]
            said += decoder.sync(heads=min(rows, 3), drafts=tokens[-2:] if rows > 2 else ())
        caches = [(runner.cache, array) for runner in decoder.runners for array in runner.cache.arrays.values()]
        return said, [np.array(array[0, :, : cache.length(0)]) for cache, array in caches]


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("case", [LLAMA, *FEATURES[:1]], ids=lambda case: case.name)
def test_padding_does_not_change_predictions_or_caches(
    case: Any, dialect: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(case, 1, dialect=dialect)
    with Session(path, threads=1) as session:
        want, rows = decoded(session)
    used = pad(monkeypatch)
    with Session(path, threads=1) as session:
        got, ours = decoded(session)
    exits = {(1, 1), (2, 1), (4, 1), (8, 1)}  # an exit's engine predicts at one row
    assert used - exits == {(2, 2), (4, 4), (8, 4)}
    for one, other in zip(got, want, strict=True):
        assert one.token == other.token
        assert (one.confidence, one.nll) == pytest.approx((other.confidence, other.nll), abs=1e-4)
    for mine, its in zip(ours, rows, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4)


def test_passes_at_the_end_of_a_cache_are_not_padded(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    used = pad(monkeypatch)
    path = bundle(LLAMA, 1, capacity=24, max_pending=8)
    with Session(path, threads=1) as session, session.decoder() as decoder:
        decoder.prefill(np.arange(5, 25), head=True)
        for _ in range(2):
            for token in range(5):
                decoder.step(token + 5, head=False)
            decoder.sync(1)
    assert used == {(8, 1), (5, 1)}


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_few_cuda_graphs_cover_all_sizes(case: Any, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    with Session(
        bundle(case, target="cuda", precision="fp32"), device="cuda:0", overlap=False, threads=1, slots=1
    ) as session:
        most = session.manifest.max_pending
        for threshold in (0.3, 0.5, 0.7):
            for _ in range(2):
                session.generate(list(PROMPTS[0]), max_new_tokens=30, ignore_eos=True, threshold=threshold)
    graphs = [binding for each in machine.onnxruntime.sessions for binding in each._graphs.values()]
    deep = [binding.inputs for binding in graphs if "hidden" in binding.inputs]
    sizes = [(inputs["hidden"].shape[1], inputs["head_rows"].shape[0]) for inputs in deep]
    assert len(sizes) == len(set(sizes)) > 1
    assert {size for pair in sizes for size in pair} <= {1, 2, 4, 8, 16, most}
    assert machine.onnxruntime.launches > machine.onnxruntime.runs
