"""Tools for early-exit bundles: conversion, verification, generation, and the command line.

Every public name of `runtime` is also available here: `from freeexport import Session` is `from
runtime import Session`. Names are imported on first use, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import *  # noqa: F403 - `runtime.__all__` lists them

__version__ = "0.2.0"
INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells report it


def __getattr__(name: str) -> Any:
    # `from freeexport import cli` looks the module up here before importing it.
    if name != "__all__" and not name[0].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import runtime

    public = getattr(runtime, "__all__", None)
    if public is None:
        place = runtime.__file__ or next(iter(runtime.__path__), "another folder")
        raise ImportError(
            f"{place} hides the package runtime that freeexport installs; rename it, or run from "
            "another folder"
        )
    if name == "__all__":
        return public
    if name not in public:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(runtime, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
