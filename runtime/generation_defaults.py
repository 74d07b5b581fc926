"""Sampling values that a bundle's generation_config.json recommends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from runtime.errors import BundleError, OptionError
from runtime.options import GenerationOptions

GENERATION_CONFIG = "generation_config.json"
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_defaults(bundle: Path) -> dict[str, Any]:
    """The values of NAMES that the file gives; none where there is no file. BundleError where one cannot be used."""
    file = bundle / GENERATION_CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({str(error)[:200]}); convert the checkpoint again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{file} holds {type(content).__name__}, not an object; convert the checkpoint again")
    values = {name: content[name] for name in NAMES if content.get(name) is not None}
    try:
        GenerationOptions(do_sample=True, **values)
    except OptionError as error:
        raise BundleError(f"{file}: {error}; or pass your own") from None
    return values


def with_defaults(options: GenerationOptions, defaults: dict[str, Any]) -> GenerationOptions:
    """`options` with what it leaves open filled in: only for sampling, which is what the values are for."""
    if not options.samples:
        return options
    return dataclasses.replace(
        options, **{name: value for name, value in defaults.items() if getattr(options, name) is None}
    )
