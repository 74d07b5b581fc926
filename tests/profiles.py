"""Profiles of hypothesis: the same examples in every run, or a search for failures in many random ones.

`pytest -m hypothesis --hypothesis-profile search` tries 20 times as many examples, or FREEEXPORT_SEARCH_TIMES times as
many. `--hypothesis-seed N` makes a search repeatable.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

REPEATED = "repeated"
SEARCH = "search"
TIMES = int(os.environ.get("FREEEXPORT_SEARCH_TIMES", "20"))
USUAL = settings.get_profile("default").max_examples

# `derandomize` is given in both, because hypothesis turns it on where CI is set.
# No deadline, because the time of an example depends on the machine.
settings.register_profile(REPEATED, deadline=None, derandomize=True)
settings.register_profile(SEARCH, deadline=None, max_examples=TIMES * USUAL, print_blob=True, derandomize=False)


# Hypothesis would also draw constants of the project's modules, which depend on the modules imported by earlier tests.
providers._get_local_constants = Constants


def tries(count: int, **others: Any) -> settings:
    """Return a decorator for a property test: try `count` examples, or TIMES as many in a search."""
    return settings(max_examples=count * settings.default.max_examples // USUAL, **others)
