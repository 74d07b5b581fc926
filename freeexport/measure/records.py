"""The outputs of an evaluation, a line of JSON each: a run that was interrupted goes on after them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from freeexport.system.jsonl import whole_lines
from freeexport.system.output import write_whole
from runtime.errors import FreeExportError, OptionError

RUN, OUTPUTS = "run.json", "outputs.jsonl"


class Key(NamedTuple):
    """A record by the names of its bundle and setting, the line of the data, and the round."""

    bundle: str
    setting: str
    line: int
    round: int


@dataclass(frozen=True)
class Record:
    """One line decoded. `seconds` from the prompt to the last token, `first_seconds` to the first token, and
    `decode_seconds` after it; `layers` of all tokens that could exit, where they are not those of one exit; `threshold`
    that an adaptive session had, and what it had learned then; `joules` where they are known; `busy`: cores that other
    processes used. Text and tokens are those of round 0."""

    bundle: str
    setting: str
    line: int
    round: int
    seconds: float
    decode_seconds: float
    tokens: int
    busy: float
    joules: float | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    exited: tuple[bool, ...] = ()
    finish_reason: str = ""
    threshold: float | None = None
    layers: int | None = None
    adaptive_state: Mapping[str, Any] | None = None
    first_seconds: float = 0.0

    @property
    def key(self) -> Key:
        return Key(self.bundle, self.setting, self.line, self.round)


class Records:
    """The records in the directory `output`, whose file RUN describes the run: it must equal `run`. Raises OptionError
    where it does not, or where something else stands there; `overwrite` begins anew."""

    def __init__(self, output: Path, run: Mapping[str, Any], overwrite: bool = False) -> None:
        self._path = output / OUTPUTS
        check_output(output, run, overwrite)
        output.mkdir(parents=True, exist_ok=True)
        if overwrite or not (output / RUN).exists():
            self._path.unlink(missing_ok=True)
            write_whole(output / RUN, json.dumps(run, indent=2, sort_keys=True) + "\n")
        self._found = {record.key: record for record in read_records(self._path)}
        self._file = FileIO(self._path, "ab")

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, keys: Iterable[Key]) -> bool:
        return all(key in self._found for key in keys)

    def add(self, records: Sequence[Record]) -> None:
        """Append whole lines, or none of them where the disk is full."""
        text = "".join(json.dumps(_filled(record), ensure_ascii=False) + "\n" for record in records)
        end = self._file.seek(0, 2)
        try:
            content = text.encode("utf-8", "backslashreplace")
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self._file.truncate(end)
            raise FreeExportError(
                f"{self._path} cannot be written ({error.strerror}); make room, and run the same command again"
            ) from None
        self._found.update({record.key: record for record in records})

    def last_state(self, bundle: str, setting: str) -> Mapping[str, Any] | None:
        """Find what an adaptive session had learned when its last record was written."""
        states = [one.adaptive_state for one in self._found.values() if (one.bundle, one.setting) == (bundle, setting)]
        return states[-1] if states else None

    def by_setting(self) -> dict[tuple[str, str], dict[int, list[Record]]]:
        """Group records by bundle and setting, then line, the rounds in order."""
        found: dict[tuple[str, str], dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in sorted(self._found.values(), key=lambda one: (one.line, one.round)):
            found[record.bundle, record.setting][record.line].append(record)
        return found


def check_output(output: Path, run: Mapping[str, Any], overwrite: bool = False) -> None:
    """Raise OptionError where `Records` would, before long work."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / RUN).is_file():
        raise OptionError(f"{output} exists and is not what evaluate writes (no {RUN}); choose another --output")
    if overwrite:
        return
    try:
        before = json.loads((output / RUN).read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    before = before if isinstance(before, dict) else {}
    names = sorted(name for name in {*before, *run} if before.get(name) != json.loads(json.dumps(run.get(name))))
    if names:
        raise OptionError(
            f"{output} holds another run, with other {', '.join(names)}; name another --output, or replace it with "
            "--overwrite"
        )


def _filled(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value not in (None, "", ())}


def read_records(path: Path) -> Iterator[Record]:
    """Read records; a partial last line, of a run that was killed, is cut off."""
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            found = json.loads(line)
            for name in ("token_ids", "exited"):
                found[name] = tuple(found.get(name, ()))
            yield Record(**found)
        except (ValueError, TypeError, AttributeError):
            raise OptionError(
                f"{path} line {number} is not what evaluate writes; remove it, or use --overwrite"
            ) from None
