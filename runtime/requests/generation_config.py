"""Sampling values that a bundle's generation_config.json recommends."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

from runtime.errors import BundleError, OptionError
from runtime.json_file import read_object
from runtime.options import GenerationOptions

GENERATION_CONFIG = "generation_config.json"
LARGEST_CONFIG = 4 << 20  # bytes
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_defaults(bundle: Path, listed: Container[str] = (GENERATION_CONFIG,)) -> dict[str, Any]:
    """The values of NAMES that the file gives; none where there is no file, or it is not `listed` in the manifest.

    BundleError where one cannot be used.
    """
    file = bundle / GENERATION_CONFIG
    if GENERATION_CONFIG not in listed or not file.exists():
        return {}
    content = read_object(file, "convert the checkpoint again", limit=LARGEST_CONFIG)
    values = {name: content[name] for name in NAMES if content.get(name) is not None}
    try:
        GenerationOptions(do_sample=True, **values)
    except OptionError as error:
        raise BundleError(f"{file}: {str(error)[:300]}; or pass your own") from None
    return values


def with_defaults(options: GenerationOptions, defaults: dict[str, Any]) -> GenerationOptions:
    """`options` with what it leaves open filled in: only for sampling, which is what the values are for."""
    if not options.samples:
        return options
    return dataclasses.replace(
        options, **{name: value for name, value in defaults.items() if getattr(options, name) is None}
    )
