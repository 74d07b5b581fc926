"""Behind 4,000 tokens, with keys and values in 16 or 8 bits, lossless decodes what full does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import LONG, Bundles
from draft_plans import draft_exits, draft_texts

from runtime import Session

LENGTH = 4000


@pytest.mark.parametrize(("instructions", "kv_cache"), [("", None), ("scalar-bf16", None), ("", "int8")])
def test_lossless_equals_full_after_a_long_prompt(
    instructions: str, kv_cache: str | None, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", instructions)
    path = bundle(LONG, 1, precision="int8", capacity=4096, kv_cache=kv_cache)
    length = LENGTH if not instructions else 200  # which are slow
    prompt = np.random.default_rng(0).integers(3, 250, length)
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "output_logprobs": True}
    with Session(path, threads=1, slots=1) as session:
        assert session.manifest.cache_type == (kv_cache or "fp16")
        full = session.generate(prompt.tolist(), mode="full", **options)
        # An expected text that is wrong here and there.
        expected = [1 if n % 9 == 8 else token for n, token in enumerate(full.token_ids)]
        for drafts, choose, more in (
            ("exit", draft_exits, {}),
            ("lookup", draft_texts, {"predicted_output": expected}),
        ):
            with monkeypatch.context() as patch:
                choose(patch)
                session.forget_drafts()
                lossless = session.generate(prompt.tolist(), mode="lossless", drafts=drafts, **options, **more)
            assert (lossless.token_ids, lossless.logprobs) == (full.token_ids, full.logprobs)
            assert lossless.stats.sync_passes < full.stats.sync_passes  # drafts were accepted
