"""JSON read into dataclasses, every value checked against its annotation."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import BundleError, FreeExportError


@dataclass(frozen=True)
class Reader:
    """`remedy` ends each message: what to do about a file that does not fit. `finite`: refuse NaN and infinity.
    `most`: entries of an array or an object, None for any number. `skips`: pass over fields that are not known."""

    remedy: str
    finite: bool = False
    most: int | None = None
    skips: bool = False

    def read(self, annotation: Any, value: Any, where: str) -> Any:
        """`value` (parsed JSON) as the annotated type; BundleError names the place where it does not fit."""
        if self.most is not None and isinstance(value, (list, dict)) and len(value) > self.most:
            raise BundleError(f"{where} has {len(value)} entries, at most {self.most} are read; {self.remedy}")
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self._dataclass(annotation, value, where)
        if origin is tuple and isinstance(value, list):
            return tuple(self.read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if origin is dict and isinstance(value, dict):
            keys = [self._number(key, where) for key in value] if arguments[0] is int else list(value)
            items = (self.read(arguments[1], item, f"{where}.{key}") for key, item in value.items())
            return dict(zip(keys, items, strict=True))
        if origin is Literal and value in arguments:
            return value
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.read(arguments[0], value, where)
        if annotation is float and type(value) in (int, float):
            return self._float(value, where)
        if annotation in (int, str, bool) and type(value) is annotation:
            return value
        choices = "one of " + ", ".join(map(repr, arguments)) if origin is Literal else None
        wanted = choices or getattr(annotation, "__name__", origin)
        raise BundleError(f"{where} is {str(value)[:80]!r}, expected {wanted}; {self.remedy}")

    def _number(self, key: str, where: str) -> int:
        """A key: JSON has no numbers there."""
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise BundleError(f"{where} has the key {key[:80]!r}, expected a number; {self.remedy}")
        return int(key)

    def _float(self, number: float, where: str) -> float:
        try:
            value = float(number)
        except OverflowError:
            raise BundleError(f"{where} is larger than any float; {self.remedy}") from None
        if self.finite and not math.isfinite(value):
            raise BundleError(f"{where} is {value!r}, expected a finite number; {self.remedy}")
        return value

    def _dataclass(self, annotation: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise BundleError(f"{where} is not an object; {self.remedy}")
        hints = typing.get_type_hints(annotation)
        fields = {item.name: item for item in dataclasses.fields(annotation)}
        required = {
            name for name, item in fields.items() if item.default is item.default_factory is dataclasses.MISSING
        }
        unknown = value.keys() - fields.keys()
        for problem, names in (("lacks", required - value.keys()), ("has unknown fields", unknown)):
            if names and not (names is unknown and self.skips):
                raise BundleError(f"{where} {problem} {_listed(names)}; {self.remedy}")
        read = {
            name: self.read(hints[name], item, f"{where}: {name}") for name, item in value.items() if name in fields
        }
        try:
            return annotation(**read)
        except FreeExportError as error:
            raise BundleError(f"{where}: {error}; {self.remedy}") from None


def is_newer(content: dict[str, Any], where: str, version: tuple[int, int]) -> bool:
    """Whether parsed JSON is of a newer minor version than `version` (major, minor), which may have fields that are
    unknown here; its version then becomes this one. What is no version is left, to be refused. Raises BundleError for a
    newer major version.
    """
    major, minor = content.get("schema_version"), content.get("schema_minor", 0)
    if type(major) is not int or type(minor) is not int or minor < 0:
        return False
    if major > version[0]:
        raise BundleError(
            f"{where} has schema version {major}, this freeexport reads up to {version[0]}; upgrade freeexport"
        )
    content["schema_minor"] = version[1]
    return minor > version[1]


def _listed(names: set[str]) -> str:
    """Names from a file, in one short line."""
    text = ", ".join(sorted(names)[:20])
    return text[:200] if text.isprintable() else repr(text)[:200]
