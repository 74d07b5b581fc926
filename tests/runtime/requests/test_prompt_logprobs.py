"""Log-probabilities of prompts: those of transformers, in every mode, and without a change of the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, Bundles, Case, Model
from exit_layer_case import with_feature

from runtime import OptionError, Session

pytestmark = pytest.mark.usefixtures("one_thread")

# Longer than a deep pass, so that it is read in several pieces.
PROMPT = (PROMPTS[0] * 20)[:70]


@pytest.mark.parametrize(("case", "exit_layer"), [(BY_NAME["llama-tied"], 1), (with_feature("llama-tied", 1), 1)])
def test_prompt_logprobs_match_transformers(case: Case, exit_layer: int, bundle: Bundles, source_model: Model) -> None:
    with torch.no_grad():
        logits = source_model(case)(torch.tensor([PROMPT])).logits[0].double()
    expected = logits.log_softmax(-1)[:-1].numpy()
    with Session(bundle(case, exit_layer), threads=1, prefix_cache_mb=16) as session:
        assert len(PROMPT) > session.manifest.max_pending
        for options in ({"mode": "full"}, {"mode": "free", "threshold": 0.3}, {"mode": "lossless"}):
            more: dict[str, Any] = {"max_new_tokens": 8, **options}
            plain = session.generate(PROMPT, **more)
            ours = session.generate(PROMPT, prompt_logprobs=3, **more)
            assert ours.token_ids == plain.token_ids
            assert ours.stats.cached_tokens == 0
            scored = ours.prompt_logprobs
            assert scored is not None
            assert scored.token_ids == tuple(PROMPT)
            first, *others = scored.logprobs
            assert (first, scored.top_logprobs[0]) == (None, ())
            np.testing.assert_allclose(
                np.array(others, np.float64), expected[np.arange(len(others)), PROMPT[1:]], atol=1e-4
            )
            for best, row in zip(scored.top_logprobs[1:], expected, strict=True):
                np.testing.assert_allclose([value for _, value in best], np.sort(row)[::-1][:3], atol=1e-4)
                np.testing.assert_allclose([row[token] for token, _ in best], np.sort(row)[::-1][:3], atol=1e-4)
        assert plain.prompt_logprobs is None
        alone = session.generate(PROMPT[:1], prompt_logprobs=0, max_new_tokens=1).prompt_logprobs
        assert alone is not None
        assert alone.logprobs == (None,)


def test_encoder_decoder_has_no_prompt_logprobs(t5: Any) -> None:
    with Session(t5, threads=1, slots=1) as session, pytest.raises(OptionError, match="does not predict its prompt"):
        session.generate([5, 6, 7], prompt_logprobs=0)
