from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from runtime.errors import OptionError
from runtime.options.generation_options import MODES, GenerationOptions, SpeechOptions, merged
from runtime.options.option_keywords import GenerationKeywords, SessionKeywords
from runtime.options.session_options import SessionOptions


def test_corpus_requires_a_draft_memory() -> None:
    with pytest.raises(OptionError, match=r"draft_corpus is 'x.txt', but draft_memory_mb is 0; leave one of them out"):
        SessionOptions(draft_corpus="x.txt", draft_memory_mb=0)


def test_overlap_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(OptionError, match=r"overlap is True on the CPU, .* slower .*; leave it out"):
        SessionOptions(overlap=True)
    assert SessionOptions(overlap=False).overlap is False
    assert SessionOptions(overlap=True, device="cuda:0").overlap is True


SESSION: dict[str, list[Any]] = {
    "threads": [0, -1, 2.0, 5000],
    "slots": [0, True, None],
    "capacity": [0, "64"],
    "verify": ["hash", None],
    "device": ["tpu", None],
    "threshold": [1.5, "clever", True, math.inf],
    "adaptive_memory": [0, 1e3, None],
    "adaptive_target": [0.0, 1, math.nan, "0.9"],
    "queue": [None, 1.0],
    "overlap": [1, "yes"],
    "cuda_graphs": [None, 1, "no"],
    "prefix_cache_mb": [-1, 1.5, "256", True, 2**70],
    "draft_memory_mb": [-1, 1.5, None, 10**7],
    "draft_corpus": ["", 7, b"a"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in SESSION for value in SESSION[name]])
def test_out_of_range_session_option_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        SessionOptions(**{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")


GENERATION: dict[str, list[Any]] = {
    "max_new_tokens": [-3, 1.5, True, None],
    "max_pending": [0],
    "mode": ["fast", ["free"]],
    "threshold": [-0.01, 1.01, math.nan, "0.5", 1j, math.inf],
    "cache_salt": ["", 7, b"a", ["a"]],
    "stop": ["", [""], itertools.repeat("a"), ["a", ""], [3], b"ab", None, 5, {"a": 1, 2: 3}],
    "rollback_threshold": [-1.0, math.nan, math.inf],
    "min_new_tokens": [-1, None],
    "temperature": [-0.5, math.inf, True, 1e-38, 1e-7, "hot"],
    "top_k": [-1, 2.5],
    "top_p": [0, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1.0, 1e-38, 1e300, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.nan, None],
    "presence_penalty": [-2.1, 2.1, math.inf, "1"],
    "prompt_logprobs": [-1, 21, 0.5],
    "seed": [-1, 2**64],
    "num_beams": [0, None],
    "length_penalty": [math.inf, None, 1e300],
    "early_stopping": ["always", 1],
    "sequence_bias": [{3: math.inf}, {-1: 2.0}, {(): 2.0}, {1.5: 2.0}, {(1, "2"): 2.0}, [3], {3: 1e30}],
    "sync_every": [None],
    "deadline": [0, math.inf, math.nan, 1e300, [1]],
    "do_sample": ["maybe", 1],
    "ignore_eos": ["no", None],
    "output_logprobs": [1],
    "top_logprobs": [-1, 21],
    "logits_processor": ["abc", [1], 3, itertools.repeat("a")],
    "draft_source": [[1], "x"],
    "predicted_output": [3, b"x"],
    "parse_special": [1, "yes"],
    "src_lang": [3],
    "json_schema": [3, [1]],
    "regex": ["", 3],
    "choice": ["abc", [], [""]],
}
SPEECH: dict[str, list[Any]] = {
    "language": ["", 3],
    "task": ["sing", None],
    "timestamps": [None, 1],
    "fallback_temperatures": [None, 0.5, [0.0], ["a"]],
    "compression_ratio_threshold": [-1.0, "a"],
    "logprob_threshold": [0.5, math.nan],
    "no_speech_threshold": [1.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GENERATION for value in GENERATION[name]])
def test_out_of_range_generation_option_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        GenerationOptions(**{"do_sample": True if name in ("top_k", "top_p", "min_p") else None, name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in SPEECH for value in SPEECH[name]])
def test_out_of_range_speech_option_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        SpeechOptions(**{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; choose an integer from 0"),
        ({"max_new_tokens": 2**70}, f"max_new_tokens is {2**70}; choose an integer from 0 to {2**63 - 1}"),
        ({"top_logprobs": 21}, "top_logprobs is 21; choose an integer from 0 to 20"),
        ({"threshold": 2}, "threshold is 2; choose a number from 0 (exit always) to 1 (never)"),
        ({"length_penalty": 99}, "length_penalty is 99; choose a number from -50 to 50"),
        ({"ignore_eos": 1}, "ignore_eos is 1; choose True or False"),
        ({"do_sample": 1}, "do_sample is 1; choose True, False or None"),
        ({"early_stopping": 1}, "early_stopping is 1; choose True, False or 'never'"),
        ({"cache_salt": ""}, "cache_salt is ''; give a text that is not empty"),
        ({"cache_salt": "a" * 257}, "cache_salt has 257 characters; give at most 256"),
    ],
)
def test_error_message_lists_the_allowed_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        GenerationOptions(**options)
    assert str(refused.value) == message


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.fractions()
    | st.decimals()
    | st.sampled_from([10**400, np.zeros(3), np.float32(0.5), np.bool_(True), np.int8(3), len])
    | st.builds(Unprintable)
    | st.builds(pow, st.just(10), st.just(5000))
    | st.sampled_from([*MODES, "never", "adaptive", "sizes", "use", "cpu", "cuda:0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.hypothesis
@pytest.mark.parametrize("options", [GenerationOptions, SessionOptions, SpeechOptions])
def test_arbitrary_values_are_accepted_or_refused(options: Any) -> None:
    names = [field.name for field in dataclasses.fields(options)]

    @given(st.dictionaries(st.sampled_from(names), JUNK, max_size=4))
    @tries(80)
    def check(values: dict[str, Any]) -> None:
        with contextlib.suppress(OptionError):
            assert isinstance(options(**values), options)

    check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, "do_sample is False and temperature is 0.7"),
        ({"top_p": 0.9}, "top_p is 0.9, but nothing is sampled"),
        ({"top_k": 5, "temperature": 0}, "top_k is 5, but nothing is sampled"),
        ({"min_p": 0.0, "do_sample": False}, "min_p is 0.0, but nothing is sampled"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5, more than max_new_tokens, 4"),
        (
            {"num_beams": 4, "mode": "free"},
            "num_beams is 4 in mode free: early exit is not supported with beam search; use mode 'full'",
        ),
        ({"num_beams": 2, "mode": "lossless"}, "early exit is not supported with beam search"),
        ({"num_beams": 2, "mode": "full", "temperature": 1.0}, "num_beams is 2 with sampling"),
        ({"num_beams": 2, "mode": "full", "stop": "end"}, "num_beams is 2 with stop strings"),
        (
            {"mode": "shallow", "drafts": "auto"},
            "drafts is 'auto' in mode shallow, which drafts nothing; use 'lossless' or 'free'",
        ),
        ({"mode": "full", "drafts": "lookup"}, "drafts is 'lookup' in mode full"),
        ({"mode": "rollback", "predicted_output": "x"}, "predicted_output is 'x' in mode rollback"),
        ({"mode": "full", "draft_source": list}, "draft_source is <class 'list'> in mode full"),
        (
            {"mode": "lossless", "drafts": "some"},
            "drafts is 'some'; choose 'auto', 'exit', 'phrases', 'lookup' or 'none'",
        ),
        ({"mode": "lossless", "drafts": 3}, "drafts is 3; choose"),
        ({"mode": "lossless", "draft_source": [1]}, r"draft_source is \[1\]; give a callable"),
        (
            {"mode": "lossless", "drafts": "none", "predicted_output": "x"},
            "predicted_output is 'x', but drafts is 'none'",
        ),
        ({"mode": "lossless", "drafts": "exit", "draft_source": list}, "but drafts is 'exit'"),
        ({"num_beams": 2, "mode": "full", "top_logprobs": 3}, "num_beams is 2 with top_logprobs 3; choose one of them"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
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
def test_sampling_options_turn_sampling_on(options: dict[str, Any], samples: bool) -> None:
    assert GenerationOptions(**options).samples is samples


def test_values_are_accepted_in_their_usual_forms() -> None:
    options = GenerationOptions(
        threshold=np.float32(0.5),  # type: ignore[arg-type]
        max_new_tokens=np.int64(3),  # type: ignore[arg-type]
        stop="end",
        sequence_bias={3: 1, np.int64(4): np.float32(2), (5, 6): -1.0},
    )
    assert (options.threshold, options.max_new_tokens, options.stop) == (0.5, 3, ("end",))
    assert options.sequence_bias == {(3,): 1, (4,): 2, (5, 6): -1.0}


@pytest.mark.parametrize(
    ("options", "keywords"), [(SessionOptions, SessionKeywords), (SpeechOptions, GenerationKeywords)]
)
def test_keywords_are_the_fields_of_the_options_with_their_types(options: type, keywords: type) -> None:
    assert {**get_type_hints(options), **get_type_hints(keywords)} == get_type_hints(keywords)
    assert set(get_type_hints(keywords)) - set(get_type_hints(options)) <= {"cancel"}


def test_keywords_override_an_options_object() -> None:
    given = GenerationOptions(mode="full", max_new_tokens=5, stop=["x"])
    assert merged(GenerationOptions, given, {}) is given
    assert merged(GenerationOptions, given, {"max_new_tokens": 7}) == GenerationOptions(
        mode="full", max_new_tokens=7, stop=["x"]
    )
    assert merged(SessionOptions, None, {"slots": 2}) == SessionOptions(slots=2)


def test_speech_options_require_a_speech_bundle() -> None:
    with pytest.raises(OptionError, match=r"^language is for bundles that read speech, and this one reads text"):
        merged(GenerationOptions, None, {"language": "en"})
    given = GenerationOptions(mode="full", stop=["x"])
    assert merged(SpeechOptions, given, {"language": "en"}) == SpeechOptions(mode="full", stop=["x"], language="en")


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 5}, 8, SessionOptions(), SpeechOptions()])
def test_objects_that_are_not_options_are_refused(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"^options is .*; give a GenerationOptions, or its fields as keywords$"):
        merged(GenerationOptions, wrong, {})


MISTAKES = """
from runtime import GenerationOptions, Session, SessionOptions

def good(session: Session) -> str:
    Session("bundle", SessionOptions(slots=1), threads=2)
    several = session.generate(["a", "b"], GenerationOptions(mode="full"), max_new_tokens=8, stop=["x"])
    return several[0].text + session.generate("a", threshold=0.5).text

async def better(session: Session) -> str:
    return (await session.agenerate("a", max_new_tokens=8)).text

def bad(session: Session) -> None:
    Session("bundle", slot=1)  # 14
    session.generate("a", max_new_tokenz=8)  # 15
    session.stream("a", mode="fre")  # 16
    session.astream("a", max_new_tokens="8")  # 17
    session.generate_best("a", 2, SessionOptions())  # 18
"""


@pytest.mark.slow
def test_type_checker_finds_unknown_options_and_wrong_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    root = Path(__file__).resolve().parents[2]
    file = tmp_path / "application.py"
    file.write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--follow-imports", "silent", str(file)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(root)})
    lines = [int(line.split(":")[1]) for line in ran.stdout.splitlines() if ": error:" in line]
    assert lines == [14, 15, 16, 17, 18], ran.stdout
