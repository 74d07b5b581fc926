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
        ("threshold", 1.5),
        ("threshold", "clever"),
        ("threshold", True),
        ("adaptive_memory", 0),
        ("adaptive_memory", 1e3),
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
        ("rollback_threshold", -1.0),
        ("rollback_threshold", math.nan),
        ("min_new_tokens", -1),
        ("temperature", -0.5),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 2**64),
        ("num_beams", 0),
        ("length_penalty", math.inf),
        ("early_stopping", "always"),
        ("sequence_bias", {3: math.inf}),
        ("sequence_bias", {-1: 2.0}),
        ("sequence_bias", {(): 2.0}),
        ("sequence_bias", {1.5: 2.0}),
        ("sequence_bias", {(1, "2"): 2.0}),
        ("sequence_bias", [3]),
    ],
)
def test_a_generation_option_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        GenerationOptions(do_sample=True if name in ("top_k", "top_p", "min_p") else None, **{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, "do_sample is False and temperature is 0.7"),
        ({"top_p": 0.9}, "top_p is 0.9, but nothing is sampled"),
        ({"top_k": 5, "temperature": 0}, "top_k is 5, but nothing is sampled"),
        ({"min_p": 0.0, "do_sample": False}, "min_p is 0.0, but nothing is sampled"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5, more than max_new_tokens, 4"),
        ({"num_beams": 4}, "num_beams is 4 in mode free: exits do not go with beams; take mode 'full'"),
        ({"num_beams": 2, "mode": "lossless"}, "exits do not go with beams"),
        ({"num_beams": 2, "mode": "full", "temperature": 1.0}, "num_beams is 2 with sampling"),
        ({"num_beams": 2, "mode": "full", "stop": "end"}, "num_beams is 2 with stop strings"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GenerationOptions(**options)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"do_sample": False}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"temperature": 0, "do_sample": False}, False),
        ({"repetition_penalty": 1.2, "seed": 3}, False),
    ],
)
def test_sampling_is_asked_for(options: dict[str, Any], samples: bool) -> None:
    assert GenerationOptions(**options).samples is samples


def test_a_bias_is_for_a_token_or_a_sequence() -> None:
    given = GenerationOptions(sequence_bias={3: 1, np.int64(4): np.float32(2), (5, 6): -1.0}).sequence_bias
    assert given == {(3,): 1, (4,): 2, (5, 6): -1.0}


@pytest.mark.parametrize("given", ["abc", [1], 3])
def test_a_logits_processor_is_callable(given: Any) -> None:
    with pytest.raises(OptionError, match=r"logits_processor is .*give a callable"):
        GenerationOptions(logits_processor=given)


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
