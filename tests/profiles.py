"""What hypothesis tries: the same examples in every run, or others and more of them, in search of a failure.

`pytest -m hypothesis --hypothesis-profile search` searches among 20 times as many examples, or FREEEXPORT_SEARCH_TIMES.
With `--hypothesis-seed N` every search with this seed tries the same ones.
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

# How long an example takes says something about the machine, not about the code.
settings.register_profile(REPEATED, deadline=None, derandomize=True)
settings.register_profile(SEARCH, deadline=None, max_examples=TIMES * USUAL, print_blob=True)


def tries(count: int, **others: Any) -> settings:
    """Decorates a property test: try `count` examples, in the search `TIMES` as many."""
    return settings(max_examples=count * settings.default.max_examples // USUAL, **others)


_constants_of_modules = providers._get_local_constants


def _constants() -> Constants:
    """Numbers and texts of the modules imported so far, which depend on the tests before: for the search alone."""
    return Constants() if settings.default.derandomize else _constants_of_modules()


providers._get_local_constants = _constants
