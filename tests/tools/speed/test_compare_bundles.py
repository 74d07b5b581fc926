from __future__ import annotations

import pytest
from checkpoints import CASES
from conftest import Bundles

from tools.speed.compare_bundles import SETTINGS, compare

CASE = next(case for case in CASES if case.name == "t5-relu-tied")


def test_every_bundle_and_setting_has_a_line(bundle: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    paths = (bundle(CASE, 1), bundle(CASE, 2))
    compare(paths, threads=1, tokens=3, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SETTINGS) * len(paths)
    assert all("1.00x" in line for line in lines[::2])
