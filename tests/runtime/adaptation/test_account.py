from __future__ import annotations

import pytest

from runtime.adaptation.draft_length import GRANT, GRANT_SHARE, MOST, DraftBudget


def test_what_is_granted_may_be_lost_and_comes_back_slowly() -> None:
    account = DraftBudget()
    assert account.bears(GRANT)
    assert account.bears(5.0)  # or what costs more than is granted could never be tried
    account.book(0, GRANT / 2)
    assert not account.bears(GRANT)
    assert account.bears(GRANT / 2)
    account.grant(10)
    assert account.balance == pytest.approx(GRANT / 2 + 10 * GRANT_SHARE)
    account.grant(1e6)
    assert account.balance == GRANT


def test_what_was_won_may_be_lost_again_up_to_a_limit() -> None:
    account = DraftBudget()
    account.book(5, 3)
    assert account.balance == pytest.approx(GRANT + 2)
    account.grant(1000)
    assert account.balance == pytest.approx(GRANT + 2)
    account.book(1000, 1)
    assert account.balance == MOST
