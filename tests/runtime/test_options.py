from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from runtime.errors import OptionError
from runtime.options import GenerationOptions, SessionOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("threads", -1),
        ("threads", 2.0),
        ("threads", 5000),
        ("slots", 0),
        ("slots", True),
        ("capacity", 0),
        ("capacity", "64"),
        ("verify", "hash"),
        ("verify", None),
        ("device", "tpu"),
    ],
)
def test_a_session_option_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        SessionOptions(**{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_pending", 0),
        ("mode", "fast"),
        ("mode", ["free"]),
        ("threshold", -0.01),
        ("threshold", 1.01),
        ("threshold", math.nan),
        ("threshold", "0.5"),
        ("threshold", 1j),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop", b"ab"),
        ("stop", None),
        ("stop", 5),
    ],
)
def test_a_generation_option_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        GenerationOptions(**{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")
    assert "\n" not in str(refused.value)


def test_the_ends_of_the_ranges_are_options() -> None:
    assert GenerationOptions(threshold=0).threshold == 0
    assert GenerationOptions(threshold=1.0, max_new_tokens=1, max_pending=1).threshold == 1.0
    assert SessionOptions(threads=1, slots=1, capacity=1).capacity == 1


def test_numbers_of_numpy_are_numbers() -> None:
    options = GenerationOptions(threshold=np.float32(0.5), max_new_tokens=np.int64(3))  # type: ignore[arg-type]
    assert (options.threshold, options.max_new_tokens) == (0.5, 3)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert GenerationOptions(stop="end").stop == ("end",)
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")
    assert GenerationOptions().stop == ()
