"""BART and its kin as transformers decodes them: tokens that are forced or never given, and languages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import BY_NAME, KIN, LANGUAGES, PROMPTS, Bundles, Case, Model

from runtime import OptionError, Session

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 9
NLLB = BY_NAME["nllb"]


def theirs(model: Any, prompt: Any, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 1, "renormalize_logits": True} | options
    (found,) = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    found = found[1:].tolist()
    return found[: found.index(1) + 1] if 1 in found else found


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("case", [*KIN, BY_NAME["marian"]], ids=lambda case: case.name)
def test_every_mode_forces_and_suppresses_the_tokens_of_transformers(
    case: Case, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    model = source_model(case)
    with Session(bundle(case, case.exit_layers[-1], dialect=dialect), threads=1, slots=1) as session:
        for prompt in PROMPTS[:2]:
            full = theirs(model, prompt)
            for options in ({"mode": "full"}, {"mode": "full", "output_logprobs": True}, {"mode": "lossless"}):
                ours = session.generate(prompt, max_new_tokens=TOKENS, **options)
                assert list(ours.token_ids) == full
            assert list(session.generate(prompt, max_new_tokens=TOKENS, num_beams=3).token_ids) == theirs(
                model, prompt, num_beams=3
            )
            for mode in ("free", "shallow", "rollback"):
                options = {"rollback_threshold": 2.0} if mode == "rollback" else {}
                ours = session.generate(prompt, mode=mode, threshold=0.0, max_new_tokens=TOKENS, **options)
                first, last = session.manifest.forced_first_token_id, session.manifest.forced_last_token_id
                assert first in (None, ours.token_ids[0])
                assert last is None or last in ours.token_ids
                assert case.name != "marian" or 0 not in ours.token_ids


def test_source_and_target_languages_are_options(bundle: Bundles, source_model: Model) -> None:
    with Session(bundle(NLLB, 1), threads=1, slots=1) as session:
        text = [259, *(3 + byte for byte in b"x"), 1]
        assert session.encode("x")[0] == LANGUAGES["eng_Latn"]
        german, french = LANGUAGES["deu_Latn"], LANGUAGES["fra_Latn"]
        ours = session.generate("x", mode="full", max_new_tokens=TOKENS, src_lang="fra_Latn", tgt_lang="deu_Latn")
        prompt = [french, *session.encode("x")[1:]]
        assert list(ours.token_ids) == theirs(source_model(NLLB), prompt, forced_bos_token_id=german)
        assert session.generate("x", max_new_tokens=2).token_ids[0] == french
        with pytest.raises(OptionError, match="tgt_lang is 'deu'; this bundle has 3 languages, as deu_Latn"):
            session.generate("x", tgt_lang="deu")
        with pytest.raises(OptionError, match=r"src_lang .* for a prompt of text"):
            session.generate(text, src_lang="fra_Latn")
        limited = session.generate("x", regex="a+", max_new_tokens=4)
        assert limited.token_ids[0] == french
        assert set(limited.text) == {"a"}
    with (
        Session(bundle(BY_NAME["bart"], 1), threads=1, slots=1) as session,
        pytest.raises(OptionError, match="no language tokens"),
    ):
        session.generate("x", tgt_lang="de")


def test_start_token_of_mbart_is_the_target_language(bundle: Bundles, source_model: Model) -> None:
    case = BY_NAME["mbart"]
    with Session(bundle(case, 1), threads=1, slots=1) as session:
        ours = session.generate("x", mode="full", max_new_tokens=TOKENS, tgt_lang="fra_Latn")
        start = LANGUAGES["fra_Latn"]
        assert list(ours.token_ids) == theirs(source_model(case), session.encode("x"), decoder_start_token_id=start)
