from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, Case
from conftest import Bundles

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs.per_layer import analytic
from freeexport.costs.roofline import engine_bytes, measure_bandwidth, token_bytes
from graphs.families import describe
from runtime.bundle.bundle import Bundle
from runtime.kernels import missing

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["llama-tied", "t5-gated-tied"])
def test_weights_of_engines_are_those_of_their_layers_and_the_head(
    name: str, bundle: Bundles, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    known = analytic(describe(opened.config, opened), opened)
    made = Bundle.open(bundle(BY_NAME[name]))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    layers = known.layer * made.manifest.layers
    # Norms and tables of relative positions are a little more.
    assert layers <= shallow.layers + deep.layers <= 1.15 * layers
    for head in (shallow.head, deep.head):
        assert known.head <= head <= 1.15 * known.head


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 4),
        pytest.param(
            {"precision": "int8", "kernels": "freeexport"},
            1,
            marks=pytest.mark.skipif(missing() is not None, reason="the kernels are not built"),
        ),
    ],
)
def test_an_embedding_that_rows_are_taken_from_is_not_read(options: dict[str, Any], size: int, bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"], **options))
    embedding = made.manifest.vocab_size * made.manifest.hidden_size * size
    stored = sum(file.size for name, file in made.manifest.files.items() if name.endswith(".data"))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    # Tied: it stands once, as the head of both.
    assert shallow.head >= embedding
    assert shallow.layers + deep.layers + deep.head == pytest.approx(stored, rel=0.05)


def test_bytes_of_a_token(bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"]))
    manifest = made.manifest
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    full = token_bytes(made, 0, 0, exits=False, passes=1)
    assert full == shallow.layers + deep.layers + deep.head
    assert token_bytes(made, 10, 0, False, 1) == full + 10 * manifest.kv_bytes_per_token
    # Cross-attention reads keys and values of the same size.
    assert token_bytes(made, 4, 6, False, 1) == token_bytes(made, 10, 0, False, 1)
    assert token_bytes(made, 0, 0, True, 0) == shallow.layers + shallow.head
    assert token_bytes(made, 0, 0, True, 0.25) == round(shallow.layers + shallow.head + (deep.layers + deep.head) / 4)


def test_bandwidth_is_of_this_world() -> None:
    assert 1e8 < measure_bandwidth(1, size=1 << 22, passes=1) < 1e13
