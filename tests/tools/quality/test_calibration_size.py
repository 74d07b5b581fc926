from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import CASES
from click.testing import CliRunner
from conftest import Bundles

from freeexport.traces.trace import Trace, Traces
from tools.quality import calibration_size
from tools.quality.calibration_size import Subset, rows, subsets

CASE = next(case for case in CASES if case.name == "t5-relu-tied")


def lines(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"input": f"line {n} of {n * n}"}) + "\n" for n in range(count)))
    return path


def test_thresholds_of_parts_are_judged_on_other_texts(bundle: Bundles, tmp_path: Path) -> None:
    data, test = lines(tmp_path / "calibration.jsonl", 30), lines(tmp_path / "test.jsonl", 5)
    save, picture = tmp_path / "sizes.json", tmp_path / "sizes.png"
    sizes: list[Any] = ["--samples", 30, "--test-samples", 4, "--repeats", 2, "--target", 0.3, "--max-new-tokens", 16]
    files = ["--traces", tmp_path, "--save", save, "--plot", picture]
    given = [str(part) for part in (bundle(CASE, 2), data, test, *sizes, *files)]
    done = CliRunner().invoke(calibration_size.command, given)
    assert done.exit_code == 0, done.output
    found = json.loads(save.read_text())
    assert [one["sequences"] for one in found] == [1, 1, 1, 1, 3, 3, 9, 9, 30]
    assert found[0]["threshold"] is None  # one sequence has too few tokens
    whole = found[-1]
    assert 0 < whole["threshold"] <= 1
    assert 0 <= whole["exit_rate"] <= 1
    assert "2 of 2" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_subsets_are_drawn_without_replacement_and_the_same_each_time() -> None:
    none = np.zeros(0, np.float32)
    traces = Traces.of([Trace(line, none, none.astype(np.bool_), none, none.astype(np.int32)) for line in range(100)])
    found = subsets(traces, 3)
    assert [len(one.sequences) for _, one in found] == [1, 1, 1, 3, 3, 3, 10, 10, 10, 30, 30, 30, 100]
    for (_, one), (_, other) in zip(found, subsets(traces, 3), strict=True):
        lines = [sequence.line for sequence in one.sequences]
        assert len(set(lines)) == len(lines)
        assert lines == [sequence.line for sequence in other.sequences]


def test_a_row_says_what_is_usual_and_what_was_worst() -> None:
    found = [Subset(share, 10, 50) for share in calibration_size.SHARES]
    found += [Subset(0.01, 10, 60, threshold, 0.5, 0.9, quality) for threshold, quality in ((0.5, 0.99), (0.7, 0.9))]
    first, *others = rows(found)
    assert first[3] == "0.600 (0.500 to 0.700)"
    assert first[-3:] == ("94.50%", "90.00%", "1 of 3")
    assert all(row[3:] == ("", "", "", "", "", "1 of 1") for row in others)
