from __future__ import annotations

import pytest
from checkpoints import CASES, PROMPTS
from conftest import Bundles

from freeexport.costs.forced_drafts import ForcedDraftSession
from runtime.adaptation.draft_length import DraftLength

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_drafts_are_right_at_the_rate_asked_for_and_the_tokens_those_of_full(
    name: str, rate: float, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftLength, "plan", lambda pace, most: (min(most, 2), False))
    asked = {"max_new_tokens": 40, "ignore_eos": True}
    exits = {**asked, "mode": "lossless", "drafts": "exit"}
    with ForcedDraftSession(bundle(BY_NAME[name]), threads=1) as session:
        full = session.generate(list(PROMPTS[0]), mode="full", **asked)
        with session.drafting(full.token_ids, rate):
            drafted = session.generate(list(PROMPTS[0]), threshold=0.5, **exits)
        undrafted = session.generate(list(PROMPTS[0]), threshold=1.0, **exits)
    assert drafted.token_ids == undrafted.token_ids == full.token_ids
    tried = drafted.stats.exits + drafted.stats.rejected
    assert tried > 20
    assert undrafted.stats.exits + undrafted.stats.rejected == 0
    # A draft behind a wrong one is discarded with it.
    assert drafted.stats.acceptance == pytest.approx({0.0: 0.0, 0.5: 0.35, 1.0: 1.0}[rate], abs=0.2)
