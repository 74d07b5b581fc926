"""Steps of long runs: finished ones are not repeated, and other runs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from freeexport.system.steps import Steps
from runtime.errors import OptionError

RUN = "run.json"


def test_finished_step_is_not_repeated_and_an_unfinished_one_leaves_nothing(tmp_path: Path) -> None:
    done: list[int] = []

    def work(number: int) -> dict[str, int]:
        done.append(number)
        if number < 0:
            raise OptionError("no")
        return {"number": number}

    out = tmp_path / "out"
    steps = Steps(out, RUN, {"seed": (0, 1)})
    assert not out.exists()
    assert steps.run("one", work, 1) == {"number": 1}
    with pytest.raises(OptionError, match="no"):
        steps.run("two", work, -1)
    again = Steps(out, RUN, {"seed": (0, 1)})
    assert (again.run("one", work, 7), again.run("two", work, 2)) == ({"number": 1}, {"number": 2})
    assert done == [1, -1, 2]


def test_resume_with_other_options_or_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    Steps(tmp_path / "out", RUN, {"lines": 3, "seed": 0}).run("one", dict)
    with pytest.raises(OptionError, match="holds another run, with other lines; repeat its options"):
        Steps(tmp_path / "out", RUN, {"lines": 4, "seed": 0})
    with pytest.raises(OptionError, match=f"is no output of this command \\(no {RUN}\\)"):
        Steps(tmp_path, RUN, {})


def test_discarded_step_is_repeated(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "out", RUN, {})
    steps.run("one", lambda: {"number": 1})
    steps.forget("one")
    assert not steps.finished("one")
    assert steps.run("one", lambda: {"number": 2}) == {"number": 2}
    steps.forget("two")
