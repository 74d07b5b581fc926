"""Reads JSON into dataclasses and checks every value against its annotation."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from runtime.bundle.json_file import UnreadableError, parse_json
from runtime.errors import BundleError, FreeExportError

# Most entries of an array or object.
MAX_ENTRIES = 10_000


class Range(NamedTuple):
    """Range of numbers for a field, both ends included: `Annotated[int, Range(1, 10)]`."""

    minimum: float
    maximum: float


@dataclass(frozen=True)
class Reader:
    """Converts parsed JSON to annotated types.

    Args:
        remedy: What to do about an invalid file. Ends every error message.
        skips: Ignore unknown fields.
    """

    remedy: str
    skips: bool = False

    def read(self, annotation: Any, value: Any, where: str) -> Any:
        """Return `value` as the annotated type.

        Raises:
            BundleError: Names the place that does not match.
        """
        if isinstance(value, (list, dict)) and len(value) > MAX_ENTRIES:
            raise BundleError(
                f"{where} has {len(value)} entries, at most {MAX_ENTRIES} are read; {self.remedy}"
            )
        origin = typing.get_origin(annotation)
        arguments = typing.get_args(annotation)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self._dataclass(annotation, value, where)
        if origin is tuple and isinstance(value, list):
            return tuple(
                self.read(arguments[0], item, f"{where}[{index}]")
                for index, item in enumerate(value)
            )
        if origin is dict and isinstance(value, dict):
            shown = {key: key[:80] if key.isprintable() else repr(key)[:80] for key in value}
            items = {
                key: self.read(arguments[1], item, f"{where}.{shown[key]}")
                for key, item in value.items()
            }
            if arguments[0] is not int:
                return items
            for key in value:
                if not (key.isascii() and key.isdecimal() and len(key) < 10):
                    raise BundleError(
                        f"{where} has the key {key[:80]!r}, expected a number; {self.remedy}"
                    )
            return {int(key): item for key, item in items.items()}
        if origin is Literal and value in arguments:
            return value
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.read(arguments[0], value, where)
        if origin is Annotated:
            number = self.read(arguments[0], value, where)
            minimum, maximum = arguments[1]
            if not minimum <= number <= maximum:
                raise BundleError(f"{where} = {repr(number)[:80]} is out of range; {self.remedy}")
            return number
        if annotation is float and type(value) in (int, float):
            number = float(value) if abs(value) <= sys.float_info.max else math.nan
            if not math.isfinite(number):
                raise BundleError(
                    f"{where} is {str(value)[:80]}, expected a finite number; {self.remedy}"
                )
            return number
        if annotation in (int, str, bool) and type(value) is annotation:
            return value
        choices = "one of " + ", ".join(map(repr, arguments)) if origin is Literal else None
        wanted = choices or getattr(annotation, "__name__", origin)
        raise BundleError(f"{where} is {str(value)[:80]!r}, expected {wanted}; {self.remedy}")

    def _dataclass(self, annotation: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise BundleError(f"{where} is not an object; {self.remedy}")
        hints = typing.get_type_hints(annotation, include_extras=True)
        fields = {item.name: item for item in dataclasses.fields(annotation)}
        required = {
            name
            for name, item in fields.items()
            if item.default is item.default_factory is dataclasses.MISSING
        }
        unknown = set() if self.skips else value.keys() - fields.keys()
        for problem, names in (("lacks", required - value.keys()), ("has unknown fields", unknown)):
            if names:
                listed = ", ".join(sorted(names)[:20])
                shown = listed[:200] if listed.isprintable() else repr(listed)[:200]
                raise BundleError(f"{where} {problem} {shown}; {self.remedy}")
        read = {
            name: self.read(hints[name], item, f"{where}: {name}")
            for name, item in value.items()
            if name in fields
        }
        try:
            return annotation(**read)
        except FreeExportError as error:
            raise BundleError(f"{where}: {error}; {self.remedy}") from None


def parse_object(text: str, where: str, remedy: str) -> dict[str, Any]:
    """Parse a JSON object. NaN and infinity are left for `Reader` to report.

    Raises:
        BundleError: If the text is not a JSON object.
    """
    try:
        value = parse_json(text, nan=True)
    except UnreadableError as reason:
        raise BundleError(f"{where} cannot be read ({reason}); {remedy}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds {type(value).__name__}, not an object; {remedy}")
    return value


def is_newer(content: dict[str, Any], where: str, version: tuple[int, int]) -> bool:
    """Return True if JSON has a newer minor version than `version` (major, minor).

    It may then have unknown fields. Its minor version is set to `version`'s. An invalid version is
    left unchanged, to be rejected later.

    Raises:
        BundleError: If its major version is newer.
    """
    major = content.get("schema_version")
    minor = content.get("schema_minor", 0)
    if type(major) is not int or type(minor) is not int or minor < 0:
        return False
    if major > version[0]:
        raise BundleError(
            f"{where} has schema version {major}, this freeexport reads up to {version[0]}; "
            "upgrade freeexport"
        )
    content["schema_minor"] = version[1]
    return minor > version[1]
