from __future__ import annotations

from pathlib import Path

from checkpoints import CASES, Bundles
from click.testing import CliRunner

from tools.speed.outside import HERE, main


def test_two_trees_are_compared_row_by_row(bundle: Bundles) -> None:
    path: Path = bundle(CASES[0])
    done = CliRunner().invoke(main, [str(path), "--against", str(HERE), "--rounds", "1", "--tokens", "4"])
    assert done.exit_code == 0, done.output
    head, *rows = done.output.splitlines()
    assert head.split() == ["microseconds", "this", "other", "ratio", "best", "best", "ratio"]
    assert len(rows) == 10
    assert all(float(ratio) > 0 for row in rows for ratio in row.split()[-4:])
