"""Calls into the code of a request's caller, which must not wait for the session that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any


class _Call:
    def __init__(self, owner: object) -> None:
        self.owner, self.running = owner, True


# Of this context and those it was copied from: tasks of an event loop and asyncio.to_thread begin with a copy.
_CALLS: ContextVar[tuple[_Call, ...]] = ContextVar("freeexport callbacks", default=())


def guarded(callback: Callable[..., Any], owner: object) -> Callable[..., Any]:
    """The same callback, which `inside(owner)` knows of while it runs."""

    def call(*arguments: Any) -> Any:
        here = _Call(owner)
        token = _CALLS.set((*_CALLS.get(), here))
        try:
            return callback(*arguments)
        finally:
            here.running = False
            _CALLS.reset(token)

    return call


def inside(owner: object) -> bool:
    """Whether this code runs within a callback of `owner`, or in a task or thread that carries its context."""
    return any(call.running and call.owner is owner for call in _CALLS.get())
