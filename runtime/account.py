"""What drafts have won and lost: they never spend more than they have won, but for a little."""

from __future__ import annotations

# In tokens of mode full: what drafts may lose before they have won anything, and the share of all tokens that makes
# up for it afterwards.
GRANT, GRANT_SHARE = 0.3, 0.0075
# The most that is put by: what may be lost again where drafts no longer pay.
MOST = 8.0


class Account:
    """`balance` in tokens of mode full."""

    def __init__(self) -> None:
        self.balance = GRANT

    def bears(self, loss: float) -> bool:
        """Whether so many tokens may be lost. As much as is granted always may, before or after."""
        return self.balance >= min(loss, GRANT)

    def book(self, tokens: float, cost: float) -> None:
        """`tokens` were made for what as many as `cost` take in mode full."""
        self.balance = min(MOST, self.balance + tokens - cost)
        self.grant(tokens)

    def grant(self, tokens: float) -> None:
        """`tokens` were made, as mode full makes them."""
        if self.balance < GRANT:
            self.balance = min(GRANT, self.balance + GRANT_SHARE * tokens)
