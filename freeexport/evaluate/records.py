"""Records of decoded prompts. An interrupted run continues from those in its directory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from freeexport.costs.bytes import Calls
from freeexport.system.jsonl import append_lines, whole_lines
from freeexport.system.output import write_whole
from freeexport.system.steps import check_run
from runtime.errors import OptionError

RUN = "run.json"
OUTPUTS = "outputs.jsonl"

# Key of a record: bundle, setting, line of the data and round.
Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Record:
    """A decoded prompt, of a setting or of another decoder.

    If outputs are scored, fields in OUTPUT_FIELDS are recorded in round 0 only.

    Attributes:
        bundle: Name of the bundle. "" for other decoders.
        line: Line of the data, from 1.
        round: Round, from 0.
        seconds: Seconds from the prompt to the last token.
        decode_seconds: Seconds after the first token.
        tokens: Number of generated tokens.
        busy: Cores that other processes used.
        exited: One flag per token: did it exit?
        finish_reason: Reason for the end of the output.
        threshold: Threshold of an adaptive session before this request.
        layers: Total layers of all tokens that could exit. Default: computed from `exited`.
        adaptive_state: State of an adaptive session after this request.
        first_seconds: Seconds to the first token.
        calls: Engine calls. None if unknown.
        times: Seconds from the request to each token, if speed alone is measured.
        acceptance: Share of the drafted tokens that were accepted.
        overhead: Seconds outside the engines.
    """

    bundle: str
    setting: str
    line: int
    round: int
    seconds: float
    decode_seconds: float
    tokens: int
    busy: float
    text: str = ""
    token_ids: tuple[int, ...] = ()
    exited: tuple[bool, ...] = ()
    finish_reason: str = ""
    threshold: float | None = None
    layers: int | None = None
    adaptive_state: Mapping[str, Any] | None = None
    first_seconds: float = 0.0
    calls: Calls | None = None
    times: tuple[float, ...] = ()
    acceptance: float = 1.0
    overhead: float = 0.0

    @property
    def key(self) -> Key:
        return self.bundle, self.setting, self.line, self.round


OUTPUT_FIELDS = ("text", "token_ids", "exited", "finish_reason", "calls", "acceptance")
_DEFAULTS = {one.name: one.default for one in fields(Record)}
# Records of a setting: by line, with rounds in order.
Lines = Mapping[int, Sequence[Record]]


def busiest(settings: Iterable[Lines]) -> float:
    """Return the most cores that other processes used."""
    return max(one.busy for lines in settings for turns in lines.values() for one in turns)


class Records:
    """Records in a directory of results. Nothing is written or replaced before the first record.

    Args:
        output: The directory. None keeps records in memory only.
        run: Description of the run. Must equal that of the directory's file RUN.
        overwrite: Replace the records of another run.

    Raises:
        OptionError: If the directory holds another run and `overwrite` is False, or other files.
    """

    def __init__(
        self, output: Path | None, run: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self._output = output
        self._run = run
        self._found: dict[Key, Record] = {}
        self._begins = True
        if output is None:
            return
        remedy = "name another --output, or replace it with --overwrite"
        check_run(output / RUN, run, remedy, overwrite)
        if not overwrite and (output / RUN).exists():
            self._begins = False
            self._found = {record.key: record for record in read_records(output / OUTPUTS)}

    def has(self, keys: Iterable[Key]) -> bool:
        """Return True if all keys have a record."""
        return all(key in self._found for key in keys)

    def add(self, records: Sequence[Record]) -> None:
        """Add records, and append them to the file. The first call creates or replaces it."""
        self._found.update({record.key: record for record in records})
        if self._output is None:
            return
        if self._begins:
            self._output.mkdir(parents=True, exist_ok=True)
            (self._output / OUTPUTS).unlink(missing_ok=True)
            run = json.dumps(self._run, indent=2, sort_keys=True) + "\n"
            write_whole(self._output / RUN, run)
            self._begins = False
        filled = (
            {name: value for name, value in asdict(one).items() if value != _DEFAULTS[name]}
            for one in records
        )
        append_lines(self._output / OUTPUTS, filled)

    def last_state(self, bundle: str, setting: str) -> Mapping[str, Any] | None:
        """Return the state of an adaptive session in its last record. None without one."""
        states = [
            one.adaptive_state
            for one in self._found.values()
            if (one.bundle, one.setting) == (bundle, setting)
        ]
        return states[-1] if states else None

    def by_setting(self) -> dict[tuple[str, str], dict[int, list[Record]]]:
        """Group records by bundle and setting, then by line, with rounds in order."""
        found: dict[tuple[str, str], dict[int, list[Record]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for record in sorted(self._found.values(), key=lambda one: (one.line, one.round)):
            found[record.bundle, record.setting][record.line].append(record)
        return found


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file. A partial last line, of a killed run, is cut off."""
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            found = json.loads(line)
            for name in ("token_ids", "exited", "times"):
                found[name] = tuple(found.get(name, ()))
            if found.get("calls") is not None:
                found["calls"] = Calls.read(found["calls"])
            yield Record(**found)
        except (ValueError, TypeError, AttributeError, KeyError):
            raise OptionError(
                f"{path} line {number} is not what evaluate writes; remove it, or use --overwrite"
            ) from None
