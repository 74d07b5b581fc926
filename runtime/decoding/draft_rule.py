"""Constants of the rule that decides when a lossless request drafts, from where, and how much.

docs/decoding.md, "When to draft", explains the rule: what is measured, what is compared, and when a
source is tried again. runtime/decoding/drafts.py applies it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftRule:
    """Constants of the rule.

    Times are in units of one token in mode "full".
    """

    # Drafts from text

    lengths: tuple[int, ...] = (1, 2, 3, 7, 15)
    """Lengths of drafts from text.

    Few, because engine calls are bound once per number of rows, and binding takes as long as a
    token.
    """

    first_length: int = 3
    """Maximum length of a request's first draft from a source, as its acceptance is unknown."""

    tried_agreement: int = 3
    """Agreement in tokens from which a lookup is tried regardless of earlier requests.

    A text that repeats is thus found in the first request too. Shorter matches are often
    coincidence.
    """

    sure_agreement: int = 8
    """Agreement in tokens from which a lookup is tried even after drafts have used up their grant.

    Such a match is rarely a coincidence.
    """

    confirmed: float = 0.9
    """Minimum acceptance rate assumed of a text after a draft from it was accepted in full.

    The text is being repeated. Also the rate from which the memory is tried after drafts have used
    up their grant.
    """

    hopeless: float = 0.1
    """Probability of acceptance below which no more candidates are searched for.

    A row of a deep pass costs more on every machine measured.
    """

    most_agreement: int = 8
    """Agreement in tokens up to which acceptance rates are kept separately."""

    phrase_prior: tuple[float, ...] = (0.5, 0.6, 0.85)
    """Acceptance rate of a phrase relative to the share of its occurrences, by its length.

    Assumed until it was measured. Measured on chat prompts: other texts follow a short phrase.
    """

    search_share: float = 0.005
    """Share of the time spent on searching the text while its drafts do not pay."""

    longest_rest: int = 32
    """Maximum number of tokens without a search.

    Bounds the delay until a text that begins to repeat is found.
    """

    # Limits on the time that drafts lose

    grant: float = 0.5
    """Time that drafts of a kind, from text or from the exit, may lose in a request.

    Half a token is not noticeable. The kinds have separate accounts: otherwise an exit could lose
    what the text has saved, and the request would be slower than with drafts from text alone.
    """

    grant_share: float = 0.015
    """Share of a request's tokens that is added to `grant`.

    Long requests keep trying, and lose at most this share.
    """

    most_saved: float = 8.0
    """Maximum time saved by earlier drafts of a kind that later ones may lose again.

    A text that repeated once thus does not pay for misses in the rest of the request.
    """

    margin: float = 1.01
    """Minimum speedup over mode "full" that a draft must promise, unless it is always tried.

    Smaller gains are within the error of the estimates.
    """

    stray: float = 2.0
    """Largest factor between the measured and the expected time of a draft that is counted.

    Beyond it, something else occupied the machine.
    """

    # Drafts from the exit

    # fmt: off
    confidence_bins: tuple[float, ...] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
    )
    # fmt: on
    """Boundaries of the confidence bins in which acceptance is measured.

    They are denser near 1, because most predictions are there, and acceptance matters most for long
    drafts.
    """

    probe_share: float = 0.005
    """Maximum share of the time spent on probing an exit while its drafts do not pay."""

    probe_tokens: int = 16
    """Minimum number of tokens between two probes, for exits whose head is almost free."""

    first_exit_draft: tuple[float, float] = (2.0, 1.5)
    """Final tokens and time assumed of a draft from an exit that was never tried."""

    # Chosen once for each request: the order of drafts, and an exit with layers of its own

    alternating: int = 6
    """First requests of a setting, which alternate between both choices."""

    retry: int = 16
    """One request in this many makes the choice that was slower, as it may be faster now."""

    order_tokens: int = 4096
    """Tokens after which the speed of an order has faded. An average needs many requests, because
    their speeds differ."""

    early_retry: int = 4
    """One request in this many uses the order that seems slower, until it has `early_tokens`."""

    early_tokens: int = 1024
    """Tokens before which the speed of an order is uncertain. After three requests of each order,
    the wrong one was chosen for records in int4."""

    compare: int = 64
    """One request in this many skips an exit that pays, to measure a token without its layers."""

    saving_tokens: int = 2048
    """Tokens after which what the exit saved has faded, so that the choice follows recent traffic.
    """

    # Measuring

    timed: int = 8
    """One in this many tokens without a draft is timed. Timing adds Python between engine calls."""

    recent: int = 64
    """Number of observations over which acceptance rates are averaged."""

    most_settings: int = 64
    """Maximum number of settings (threshold and sampling) whose acceptance a session remembers."""


RULE = DraftRule()
