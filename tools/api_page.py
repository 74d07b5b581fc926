"""The page docs/api.md, from the docstrings of runtime's public classes."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import runtime
from runtime import errors
from runtime.result import DraftStats, PassStats, PromptLogprobs

HEAD = """# API

Generated from the docstrings in `runtime/` by `python -m tools.pages`; do not edit.

The public names of `runtime`, which `freeexport` re-exports. They do not need torch.
[Options](options.md) explains `options` and `**keywords` of sessions and requests.
"""
RESULTS: tuple[type[Any], ...] = (
    runtime.GenerationResult,
    runtime.Stats,
    DraftStats,
    PassStats,
    runtime.Token,
    runtime.Segment,
    runtime.Word,
    PromptLogprobs,
)
OTHER_RECORDS: tuple[type[Any], ...] = (
    runtime.DefaultMode,
    runtime.Metrics,
    runtime.Histogram,
    runtime.RequestEvent,
)
WITH_METHODS: tuple[type[Any], ...] = (
    runtime.SegmentStream,
    runtime.Bundle,
    runtime.FreeModelForCausalLM,
)
# Arguments that the page of options explains, and methods for measurements.
OPTIONS = ("options", "**keywords")
INTERNAL = ("listen", "decoder")
WIDTH = 120  # characters of a line, except in tables
_HEADING = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")


def api() -> str:
    """Return the page: a section per class, and a list of the errors."""
    described = [
        *_class(runtime.Session),
        *(part for kind in RESULTS for part in _record(kind)),
        *_class(runtime.Stream),
        f"## `{runtime.AsyncStream.__name__}`",
        f"{_text(runtime.AsyncStream.__doc__ or '')} `result` and `drain` are those of `Stream`.",
        *_method(runtime.AsyncStream, "aclose"),
        *(part for kind in WITH_METHODS for part in _class(kind)),
        f"## `{runtime.FreeModelForSeq2SeqLM.__name__}`",
        f"{_text(runtime.FreeModelForSeq2SeqLM.__doc__ or '')} Its methods are the same.",
        *(part for kind in OTHER_RECORDS for part in _record(kind)),
        *_errors(),
    ]
    return "\n\n".join([HEAD.rstrip(), *described]) + "\n"


def sections(docstring: str) -> dict[str, str]:
    """Split a docstring into its text, under "", and its sections."""
    found = {"": ""}
    name = ""
    for line in inspect.cleandoc(docstring).splitlines():
        if (heading := _HEADING.fullmatch(line)) is not None:
            name = heading[1]
            found[name] = ""
        else:
            found[name] += f"{line}\n"
    return found


def entries(section: str) -> dict[str, str]:
    """Return the names and texts that a section such as "Attributes" lists."""
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section).strip().splitlines():
        if not line.startswith(" "):
            name, _, text = line.partition(": ")
            found[name] = text
        else:
            found[name] += f" {line.strip()}"
    return found


def _text(docstring: str) -> str:
    """Return the paragraphs before the sections, each on one line."""
    return "\n\n".join(_wrapped(part) for part in sections(docstring)[""].strip().split("\n\n"))


def _wrapped(text: str, indent: str = "") -> str:
    """Break a text into lines, all but the first with an `indent`."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False
    )


def _record(kind: type[Any]) -> Iterator[str]:
    """Describe a class by a list of its fields and properties."""
    docstring = inspect.getdoc(kind) or ""
    yield f"## `{kind.__name__}`"
    yield _text(docstring)
    hints = _hints(kind)
    listed = [
        (f"`{name}` (`{hints[name]}`)" if name in hints else f"`{name}`", text)
        for name, text in entries(sections(docstring).get("Attributes", "")).items()
    ]
    for name, member in _members(kind).items():
        if isinstance(member, property):
            hint = inspect.signature(member.fget).return_annotation  # type: ignore[arg-type]
            listed.append((f"`{name}` (`{hint}`)", _text(member.__doc__ or "")))
    if listed:
        yield _list(listed)
    if kind is runtime.GenerationResult:
        yield from _method(kind, "to_dict")


def _class(kind: type[Any]) -> Iterator[str]:
    """Describe a class by its fields, properties, arguments and methods."""
    docstring = inspect.getdoc(kind) or ""
    yield from _record(kind)
    if "Args" in sections(docstring):
        yield _signature(kind.__name__, kind)
        yield from _lists(docstring)
    for name, member in _members(kind).items():
        if name not in INTERNAL and (isinstance(member, classmethod) or inspect.isfunction(member)):
            yield from _method(kind, name)


def _method(kind: type[Any], name: str) -> Iterator[str]:
    method = getattr(kind, name)
    yield f"### `{kind.__name__}.{name}`"
    if len(inspect.signature(method).parameters) > 1 or inspect.ismethod(method):
        yield _signature(name, method)
    yield _text(method.__doc__ or "")
    yield from _lists(method.__doc__ or "")


def _lists(docstring: str) -> Iterator[str]:
    """List the arguments and errors of a docstring."""
    for title in ("Args", "Raises"):
        verb = "Raises " if title == "Raises" else ""
        listed = [
            (f"{verb}`{name}`", text)
            for name, text in entries(sections(docstring).get(title, "")).items()
            if name not in OPTIONS
        ]
        if listed:
            yield _list(listed)


def _list(listed: Sequence[tuple[str, str]]) -> str:
    """Return a list of names and their texts."""
    return "\n".join(_wrapped(f"- {name}: {text}", "  ") for name, text in listed)


def _signature(name: str, function: Any) -> str:
    """Return a block of code with the parameters of a function and their defaults."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]
    call = _wrapped(f"{name}{inspect.Signature(parameters)}", "    ")
    return f"```\n{call}\n```"


def _members(kind: type[Any]) -> dict[str, Any]:
    """Return the public members of a class and of its bases in runtime."""
    return {
        name: member
        for base in kind.__mro__[::-1]
        if base.__module__.startswith("runtime.")
        for name, member in vars(base).items()
        if not name.startswith("_")
    }


def _hints(kind: type[Any]) -> dict[str, str]:
    """Return the types of a class's fields as they are written in its source."""
    return {
        name: getattr(hint, "__forward_arg__", hint)  # type: ignore[misc]
        for name, hint in inspect.get_annotations(kind).items()
    }


def _errors() -> Iterator[str]:
    """Describe the errors by a list."""
    yield "## Errors"
    yield _text(errors.__doc__ or "")
    classes = [
        one
        for one in vars(errors).values()
        if inspect.isclass(one) and issubclass(one, errors.FreeExportError)
    ]
    yield _list(
        [
            (f"`{one.__name__}` (`{one.__base__.__name__}`)", _text(one.__doc__ or ""))  # type: ignore[union-attr]
            for one in classes
        ]
    )
