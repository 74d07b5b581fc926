"""One row against many: noise of another processor passes, faults of positions, rows and scales do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles

from freeexport.verification.batches import FULL, QUICK, Extent, sample_batch
from freeexport.verification.checks import Check
from freeexport.verification.engines import EnginePair
from freeexport.verification.row_parity import BEST, FACTOR, ROWS, STEP, Moved, measure_noise, row_checks
from freeexport.verification.verification import verify
from runtime.bundle.bundle import Bundle

# What attention differs by from kernel to kernel, as a share.
LAST_BITS = 5e-7

Call = dict[str, np.ndarray]
Run = Callable[..., Call]


def checks(path: Path, extent: Extent = FULL) -> list[Check]:
    """Checks of the engines against themselves."""
    found = verify(Bundle.open(path), None, extent=extent)["checks"]
    return [Check(**{name: value for name, value in check.items() if name != "passed"}) for check in found]


def failed(found: list[Check]) -> list[str]:
    return [f"{check.name}: {check.tensor}, {check.measure}" for check in found if not check.passed]


def change_cache(pair: EnginePair, engine: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for array in pair.caches[engine].arrays.values():
        array[:] = change(array)


def shifted_position(run: Run, pair: EnginePair, name: str, *arguments: Any) -> Call:
    """A single step stands one position too early, and writes there."""
    lengths, width = arguments[2:]
    if width > 1:
        return run(pair, name, *arguments)
    cache = pair.caches[name]
    right = cache.lengths.copy()
    cache.lengths[:] = np.maximum(right - 1, 0)
    outputs = run(pair, name, *arguments)
    cache.lengths[:] = right + lengths
    return outputs


def another_rows_cache(run: Run, pair: EnginePair, name: str, *arguments: Any) -> Call:
    if arguments[-1] == 1:
        change_cache(pair, name, lambda array: array[[1, 0, *range(2, len(array))]])
    return run(pair, name, *arguments)


def lost_row(run: Run, pair: EnginePair, name: str, *arguments: Any) -> Call:
    """Single steps do not see the first row of the cache."""
    if arguments[-1] == 1:
        for array in pair.caches[name].arrays.values():
            array[:, :, 0] = 0
    return run(pair, name, *arguments)


def wrong_scale(run: Run, pair: EnginePair, name: str, *arguments: Any) -> Call:
    """Single steps scale attention's scores by half."""
    keys = [array for part, array in pair.caches[name].arrays.items() if part.endswith("key")]
    if arguments[-1] > 1:
        return run(pair, name, *arguments)
    kept = [array.copy() for array in keys]
    lengths = pair.caches[name].lengths.copy()
    for array in keys:
        array *= 0.5
    outputs = run(pair, name, *arguments)
    for array, old in zip(keys, kept, strict=True):
        for row, length in enumerate(lengths):
            array[row, :, :length] = old[row, :, :length]
    return outputs


def swapped_rows(run: Run, pair: EnginePair, name: str, *arguments: Any) -> Call:
    """A sync pass gives its last two rows in the wrong order."""
    after_a_past = name == "deep" and bool(pair.caches[name].lengths.any())
    outputs = run(pair, name, *arguments)
    width = arguments[-1]
    if after_a_past and width > 1:
        logits = outputs["logits"].reshape(pair.rows, width, -1)
        logits[:, [width - 2, width - 1]] = logits[:, [width - 1, width - 2]]
    return outputs


def test_noise_of_an_int8_cache_is_that_of_a_float16_cache(bundle: Bundles) -> None:
    means = []
    for kv_cache in (None, "int8"):
        opened = Bundle.open(
            bundle(BY_NAME["llama-tied"], 1, precision="int8", kernels="freeexport", kv_cache=kv_cache)
        )
        text = sample_batch(opened, 20)
        pair = EnginePair(opened, rows=len(text.tokens), threads=1)
        means.append(measure_noise(pair, text, STEP["8 bits"], draws=2)[1].divergence.mean())
    assert 0 < means[1] < 4 * means[0]


FAULTS = (shifted_position, another_rows_cache, lost_row, wrong_scale, swapped_rows)


@pytest.mark.parametrize(
    ("name", "precision", "extent"),
    [
        ("llama-tied", "int8", FULL),
        ("llama-tied", "int4", QUICK),
        ("llama-tied", "fp32", QUICK),
        ("t5-relu-tied", "mixed", QUICK),
    ],
)
def test_injected_faults_fail(
    name: str, precision: str, extent: Extent, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(BY_NAME[name], 2, precision=precision)
    assert failed(checks(path, extent)) == []
    run = EnginePair._run
    for fault in FAULTS:
        with monkeypatch.context() as patched:
            patched.setattr(
                EnginePair,
                "_run",
                lambda pair, *given, lengths, width, fault=fault: fault(run, pair, *given, lengths, width),
            )
            found = failed(checks(path, extent))
        where = "sync pass" if fault is swapped_rows else "stepping against prefill"
        assert any(line.startswith(where) and line.endswith("divergence") for line in found), (fault.__name__, found)


@pytest.mark.parametrize(("name", "precision", "seed"), [("llama-tied", "int8", 0), ("t5-relu-tied", "mixed", 1)])
def test_last_bit_differences_of_another_processor_pass(
    name: str, precision: str, seed: int, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single steps read what attention differs by from kernel to kernel, 8 times over, in the caches of every layer."""
    generator = np.random.default_rng(seed)

    def changed(array: np.ndarray) -> np.ndarray:
        return array * (1 + 8 * LAST_BITS * generator.uniform(-1, 1, array.shape)).astype(np.float32)

    def another_processor(pair: EnginePair, engine: str, inputs: Call, outputs: Call, lengths: Any, width: int) -> Call:
        if width == 1:
            change_cache(pair, engine, changed)
            inputs = {part: changed(array) if part == "hidden" else array for part, array in inputs.items()}
        return run(pair, engine, inputs, outputs, lengths, width)

    run = EnginePair._run
    monkeypatch.setattr(EnginePair, "_run", another_processor)
    found = checks(bundle(BY_NAME[name], 2, precision=precision))
    assert failed(found) == []
    # And something did tip over.
    assert max(check.error for check in found if check.measure == "divergence") > 1e-7


def moved(divergence: np.ndarray, other_best: np.ndarray | None = None, gap: float = 1.0) -> Moved:
    count = len(divergence)
    best = np.zeros(count, bool) if other_best is None else other_best
    return Moved(divergence, np.zeros(count), np.full(count, gap), np.full(count, 0.1), best, np.zeros(count))


def failures(found: Moved, noise: Moved) -> set[str]:
    return {check.measure for check in row_checks("a", "b", found, noise) if not check.passed}


def test_limits_are_multiples_of_the_noise() -> None:
    noise = moved(np.full(200, 1e-3))
    assert failures(moved(np.full(200, 0.9 * FACTOR * 1e-3)), noise) == set()
    assert "divergence" in failures(moved(np.full(200, 1.1 * FACTOR * 1e-3)), noise)
    few = np.zeros(200)
    few[: int(200 * ROWS) + 1] = 5e-2
    assert failures(moved(few), noise) == {"rows"}
    other = np.zeros(200, bool)
    other[: int(200 * BEST) + 1] = True
    assert "best" in failures(moved(np.zeros(200), other), noise)
    # The two best are as near as noise moves them.
    assert "best" not in failures(moved(np.zeros(200), other, gap=0.3), noise)
    # What is not a number passes nowhere.
    assert {"divergence", "rows"} <= failures(moved(np.full(200, np.nan)), noise)
    assert "divergence" in failures(moved(np.zeros(200)), moved(np.full(200, np.nan)))


def test_divergence_and_nats_follow_their_definitions() -> None:
    before = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], np.float32))
    after = np.log(np.array([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2]], np.float32))
    found = Moved.between(before, after, np.array([0, 2]))
    expected = [0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.2 / 0.3), (0.5 - 0.3) * np.log(0.5 / 0.3)]
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-5)
    np.testing.assert_allclose(found.nats, [np.log(0.7 / 0.6), 0], atol=1e-6)
    assert found.other_best.tolist() == [False, True]
    np.testing.assert_allclose(found.gap, np.log([0.7 / 0.2, 0.5 / 0.3]), rtol=1e-5)
