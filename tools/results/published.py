"""Reads and writes the published results, and the record of every use of test lines.

docs/results/results.jsonl has a line for each published row. docs/results/test_set_uses.jsonl has a
line for each measurement on test lines, and fingerprints of what the package shipped then.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from freeexport.system.output import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "docs/results/results.jsonl"
USES = "docs/results/test_set_uses.jsonl"
# Shipped files that measurements on test lines can have influenced.
SHIPPED = {
    "smollm2-chat": "freeexport/exits/smollm2-chat.safetensors",
    "smollm2-extraction": "freeexport/exits/smollm2-extraction.safetensors",
    "g2p": "freeexport/data/g2p/model.safetensors",
    "phrases": "freeexport/phrases/answers.jsonl.xz",
    "draft rule": "runtime/decoding/acceptance.py",
}
Line = Mapping[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, none if it is missing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write objects as JSONL."""
    write_whole(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def fingerprint(path: str, content: bytes) -> str:
    """Return a hash of what a shipped file contributes to results.

    Of weights these are the tensors without the notes beside them, of Python the constants.
    """
    if path.endswith(".safetensors"):
        content = content[8 + int.from_bytes(content[:8], "little") :]
    elif path.endswith(".py"):
        nodes = [node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.Constant)]
        values = [node.value for node in nodes if isinstance(node.value, int | float)]
        content = repr(sorted(values)).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def shipped(names: Iterable[str]) -> dict[str, str | None]:
    """Return the fingerprints of shipped files by their names in SHIPPED, None if missing."""
    found: dict[str, str | None] = {}
    for name in names:
        path = ROOT / SHIPPED[name]
        found[name] = fingerprint(path.name, path.read_bytes()) if path.is_file() else None
    return found


def changed_since(use: Line) -> list[str]:
    """Name the shipped files on which a use of test lines depends and that have changed since."""
    now = shipped(use["shipped"])
    return [
        name for name, before in use["shipped"].items() if before is None or now[name] != before
    ]


def rows_of(report: Line, facts: Line) -> list[dict[str, Any]]:
    """Return the lines of a report of `evaluate`: `facts`, conditions and figures of every row.

    Speeds are multiples of mode full with the bounds of a 95 % interval. A score is the value, and
    its share of that of mode full with the bounds of a 95 % interval. Hashes are the first 16
    digits of SHA-256.
    """
    machine = report["machine"]
    lines = []
    for row in report["rows"]:
        bundle = report["bundles"][row["bundle"]]
        bundles = {"bundle": row["bundle"]} if len(report["bundles"]) > 1 else {}
        hashes = {"data": report.get("data_sha256"), "bundle": bundle.get("manifest_sha256")}
        lines.append(
            {
                **facts,
                "date": report["made"][:10],
                **bundles,
                "precision": row["precision"],
                "method": row["method"],
                "setting": row["setting"],
                "n": row["lines"],
                "rounds": report["rounds"],
                "threads": report["threads"],
                "processor": machine["processor"],
                "kernels": machine.get("kernels"),
                "sha256": {name: text[:16] for name, text in hashes.items() if text},
                "tokens_per_second": round(row["tokens_per_second"], 1),
                **{f"per_{of}": _interval(row, f"{of}_speed", of) for of in ("token", "request")},
                "byte_model": _rounded(row.get("predicted")),
                "same": _rounded(row["same"]),
                "scores": {
                    name: [_rounded(score["value"]), *_interval(score, "relative")]
                    for name, score in row["scores"].items()
                },
            }
        )
    return lines


def _interval(values: Line, mean: str, of: str = "") -> list[float | None]:
    bounds = [f"{of}_{bound}" if of else bound for bound in ("low", "high")]
    return [_rounded(values.get(name)) for name in (mean, *bounds)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
