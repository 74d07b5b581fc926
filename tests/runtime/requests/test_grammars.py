"""Constrained output: every mode obeys the grammar, and lossless gives the tokens of full."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Open
from exit_layer_case import with_feature

from runtime import GenerationResult, OptionError, Session
from runtime.text.grammar import is_finite, written_form

llguidance = pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["package", "program", "library"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 999}, "maxItems": 3},
        "free": {"type": "boolean"},
    },
    "required": ["name", "kind", "sizes", "free"],
    "additionalProperties": False,
}
LARK = 'start: word (", " word)* "."\nword: /[a-c]{2,4}/ | "freedom"'
GBNF = 'root ::= "<" ("yes" | "no" | "never") ">" [0-9]'
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"[a-f]{3,20}-(version|release) [0-9]{2}"},
    "lark": {"grammar": LARK},
    "gbnf": {"grammar": GBNF},
    "choice": {"choice": ["positive", "negative", "neutral", 'said "no"\n']},
}
MODELS = ("llama-tied", "qwen2-tied", "t5-relu-tied")


def holds(constraint: dict[str, Any], text: str) -> bool:
    """Whether a text satisfies a constraint, by other means than the runtime's."""
    if "choice" in constraint:
        return text in constraint["choice"]
    if "json_schema" in constraint:
        value = json.loads(text)
        kinds = {"name": str, "kind": str, "sizes": list, "free": bool}
        return (
            [(key, type(value)) for key, value in value.items()] == list(kinds.items())
            and text == json.dumps(value, ensure_ascii=False)
            and value["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
        )
    patterns = {LARK: r"((?:[a-c]{2,4}|freedom), )*([a-c]{2,4}|freedom)\.", GBNF: r"<(yes|no|never)>[0-9]"}
    return re.fullmatch(constraint.get("regex") or patterns[constraint["grammar"]], text) is not None


@pytest.fixture
def ask(sessions: Callable[[str], Session]) -> Callable[..., list[GenerationResult]]:
    def generate(model: str, **options: Any) -> list[GenerationResult]:
        return sessions(model).generate([list(prompt) for prompt in PROMPTS], **{"max_new_tokens": 80, **options})

    return generate


def tokens(results: list[GenerationResult]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


class Naive:
    """Masks by a matcher that reads the whole output again for every token."""

    def __init__(self, session: Session, kind: str, prompt: int, grammar: str) -> None:
        ends = list(session.manifest.eos_token_ids)
        source = (session.bundle.path / "tokenizer.json").read_text()
        self.tokens = llguidance.LLTokenizer(source, n_vocab=session.manifest.vocab_size, eos_token=ends)
        self.prompt, self.grammar = prompt, grammar

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        matcher = llguidance.LLMatcher(self.tokens, self.grammar)
        output = ids[0, self.prompt :].tolist()
        assert matcher.try_consume_tokens(output) == len(output)
        allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)[: scores.shape[1]]
        return np.where(allowed > 0, scores, -np.inf)


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_complete_outputs_satisfy_the_constraint_at_any_token_limit(
    constraint: dict[str, Any], ask: Callable[..., list[GenerationResult]]
) -> None:
    """Wherever `max_new_tokens` cuts."""
    for limit in (1, 2, 3, 5, 8, 13, 21, 34, 120):
        for result in ask("llama-tied", max_new_tokens=limit, **constraint):
            assert result.complete == (result.finish_reason == "eos")
            assert not result.interrupted
            assert not result.complete or holds(constraint, result.text)
            assert result.complete or len(result.token_ids) == limit


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "top_k": 0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", MODELS)
def test_full_chooses_the_tokens_of_a_mask_computed_from_scratch(
    model: str, sampled: dict[str, Any], sessions: Callable[[str], Session]
) -> None:
    session, kinds = sessions(model), llguidance.LLMatcher
    form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    for given, grammar in (
        (CONSTRAINTS["schema"], kinds.grammar_from_json_schema(SCHEMA, defaults=form)),
        (CONSTRAINTS["regex"], kinds.grammar_from_regex(CONSTRAINTS["regex"]["regex"])),
        (CONSTRAINTS["lark"], kinds.grammar_from_lark(LARK)),
    ):
        for prompt in PROMPTS:
            read = 1 if session.manifest.encoder_decoder else len(prompt)
            options: dict[str, Any] = {"mode": "full", "max_new_tokens": 80, **sampled}
            ours = session.generate(list(prompt), **options, **given)
            naive = session.generate(list(prompt), logits_processor=Naive(session, "", read, grammar), **options)
            assert ours.token_ids == naive.token_ids
            assert (ours.text, ours.finish_reason) == (naive.text, naive.finish_reason)
            assert ours.finish_reason == "length" or holds(given, ours.text)


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("model", MODELS)
def test_lossless_gives_the_tokens_of_full(model: str, name: str, ask: Callable[..., list[GenerationResult]]) -> None:
    given = CONSTRAINTS[name]
    full = ask(model, mode="full", **given)
    assert all(result.finish_reason == "length" or holds(given, result.text) for result in full)
    assert sum(result.stats.forced_tokens for result in full) > 0
    expected = '{"name": "abc", "kind": "library", "sizes": [1, 2], "free": true}'
    for options in (
        {"threshold": 0.0},
        {"threshold": 0.5, "drafts": "exit", "max_pending": 3},
        {"threshold": 0.2, "drafts": "lookup"},
        {"predicted_output": expected},
        {"draft_source": lambda context: (context[-2:] + 1) % 200},
        {"drafts": "none"},
    ):
        assert tokens(ask(model, mode="lossless", **given, **options)) == tokens(full)
    assert tokens(ask(model, mode="free", threshold=1.0, output_confidence=True, **given)) == tokens(full)
    assert tokens(ask(model, mode="full", max_pending=1, **given)) == tokens(full)


def test_feature_reading_exit_obeys_the_grammar(open_session: Open) -> None:
    session = open_session(with_feature("llama-tied", 0), with_feature("llama-tied", 0).exit_layers[0])
    for number, (given, prompt) in enumerate(product(CONSTRAINTS.values(), PROMPTS[:2])):
        options: dict[str, Any] = {"max_pending": (2, 5)[number % 2], "max_new_tokens": 80, **given}
        full = session.generate(list(prompt), mode="full", max_new_tokens=80, **given)
        drafted = session.generate(list(prompt), mode="lossless", threshold=0.1, drafts="exit", **options)
        assert drafted.token_ids == full.token_ids
        exited = session.generate(list(prompt), mode="free", threshold=0.2, **options)
        assert exited.finish_reason == "length" or holds(given, exited.text)


@pytest.mark.parametrize("options", [{"mode": "free", "threshold": 0.3}, {"mode": "shallow"}])
@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("model", MODELS)
def test_exits_obey_the_grammar(
    model: str, name: str, options: dict[str, Any], ask: Callable[..., list[GenerationResult]]
) -> None:
    for result in ask(model, **options, **CONSTRAINTS[name]):
        assert result.finish_reason == "length" or holds(CONSTRAINTS[name], result.text)
        refused = [e for e, c in zip(result.exited, result.confidence, strict=True) if c == 0.0]
        assert options["mode"] == "shallow" or not any(refused)


@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_rollback_obeys_the_grammar(limit: float, ask: Callable[..., list[GenerationResult]]) -> None:
    for given in CONSTRAINTS.values():
        for result in ask("llama-tied", mode="rollback", threshold=0.1, rollback_threshold=limit, **given):
            assert result.finish_reason == "length" or holds(given, result.text)


def test_sampling_logprobs_stop_strings_and_streams_obey_the_grammar(sessions: Callable[[str], Session]) -> None:
    session, given = sessions("llama-tied"), CONSTRAINTS["schema"]
    prompt = list(PROMPTS[0])
    for options in (
        {"temperature": 1.3, "seed": 11},
        {"temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 20},
        {"output_logprobs": True, "top_logprobs": 2},
        {"stop": ['"kind"']},
        {"stop": ["a"], "sequence_bias": {(70,): 3.0}},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 13},
    ):
        full = session.generate(prompt, **{"mode": "full", "max_new_tokens": 80, **given, **options})
        drafted = session.generate(
            prompt, **{"mode": "lossless", "threshold": 0.1, "max_new_tokens": 80, **given, **options}
        )
        assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (
            full.token_ids,
            full.text,
            full.finish_reason,
        )
        if full.logprobs is not None:
            assert drafted.logprobs == pytest.approx(full.logprobs, abs=1e-4)
            assert len(full.logprobs) == len(full.token_ids)
        with session.stream(prompt, **{"mode": "full", "max_new_tokens": 80, **given, **options}) as stream:
            assert "".join(token.text for token in stream) == full.text


def test_concurrent_requests_and_several_continuations_obey_the_grammar(sessions: Callable[[str], Session]) -> None:
    session = sessions("llama-tied")
    asked = [
        {"mode": mode, "threshold": 0.2, **given}
        for given in CONSTRAINTS.values()
        for mode in ("full", "lossless", "free")
    ]

    def generate(options: dict[str, Any]) -> GenerationResult:
        return session.generate(list(PROMPTS[2]), max_new_tokens=60, **options)

    alone = [generate(options).token_ids for options in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert [result.token_ids for result in pool.map(generate, asked)] == alone
    best = session.generate_best(list(PROMPTS[0]), 3, choice=["yes", "no"], temperature=2.0, seed=1)
    assert {result.text for result in best} <= {"yes", "no"}


def test_prepared_grammar_is_compiled_once(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session("llama-tied")
    session.prepare(choice=["a", "b"])
    session.prepare()
    monkeypatch.setattr(session._state._grammars, "_compile", lambda kind, text: pytest.fail("compiled again"))
    assert session.generate(list(PROMPTS[0]), choice=["a", "b"]).text in ("a", "b")
    monkeypatch.undo()
    with pytest.raises(OptionError, match="regex cannot be used"):
        session.prepare(regex="(")


def test_beams_obey_the_grammar(sessions: Callable[[str], Session]) -> None:
    session = sessions("t5-relu-tied")
    best = session.generate_best(list(PROMPTS[0]), 3, choice=["yes", "no", "never"], num_beams=3)
    assert sorted(result.text for result in best) == ["never", "no", "yes"]
    assert session.generate(list(PROMPTS[0]), choice=["yes", "no"], num_beams=4).text in ("yes", "no")


def test_forced_tokens_take_no_engine_call(sessions: Callable[[str], Session]) -> None:
    result = sessions("llama-tied").generate(list(PROMPTS[0]), mode="full", choice=["positive", "negative"])
    # One prediction: what follows its first letter, and the end, are forced.
    assert result.finish_reason == "eos"
    assert (result.stats.tokens, result.stats.forced_tokens, result.stats.sync_passes) == (9, 8, 0)
    assert result.stats.grammar_seconds > 0
    assert sorted(result.sources) == ["deep", *["forced"] * 8]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"json_schema": {"enum": []}}, "json_schema cannot be used: Unsatisfiable schema"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable"),
        ({"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "no finite"),
        (
            {
                "json_schema": {
                    "type": "object",
                    "properties": {"n": {"type": "string"}, "a": {"$ref": "#"}},
                    "required": ["n", "a"],
                }
            },
            "no finite",
        ),
        ({"json_schema": {"$ref": "#"}}, "no finite"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "https://example.com"}}, "json_schema cannot be used"),
        ({"json_schema": '{"type": '}, "no JSON"),
        ({"json_schema": "[]"}, "give a JSON object"),
        ({"json_schema": 3}, "json_schema is 3"),
        ({"json_schema": {"enum": ["x" * 300_000]}}, "at most 262144"),
        ({"json_schema": {"properties": {f"k{n}": {} for n in range(5000)}}}, "an object of 5000 keys"),
        ({"json_schema": {"a": {1}}}, "json_schema"),
        ({"json_schema": {"enum": ["\ud800"]}}, "json_schema"),
        ({"regex": "("}, "regex cannot be used"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 7}, "regex is 7"),
        ({"grammar": "start: foo"}, "grammar cannot be used: .*unknown name"),
        ({"grammar": 'start: start "a"'}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar cannot be used"),
        ({"choice": []}, "choice is"),
        ({"choice": "yes"}, "choice is 'yes'"),
        ({"choice": ["a", ""]}, "choice is"),
        ({"choice": ["x"], "regex": "x"}, "regex and choice are both given"),
        ({"choice": ["x"], "ignore_eos": True}, "ignore_eos is True, but choice"),
        ({"choice": ["x"], "min_new_tokens": 2}, "min_new_tokens is 2, but choice"),
    ],
)
def test_unsupported_constraints_are_refused(
    options: dict[str, Any], said: str, sessions: Callable[[str], Session]
) -> None:
    with pytest.raises(OptionError, match=said):
        sessions("llama-tied").generate(list(PROMPTS[0]), max_new_tokens=20, **options)


@pytest.mark.parametrize(
    "regex", ["((a{1,100}){1,100}){1,100}", "(.*a){20}", "[a-z]{0,1000000}", "(a|aa)+b{1000}c{1000}"]
)
def test_explosive_regex_ends_within_20_seconds(regex: str, sessions: Callable[[str], Session]) -> None:
    result = sessions("llama-tied").generate(list(PROMPTS[0]), max_new_tokens=40, regex=regex)
    assert result.stats.grammar_seconds < 20  # about 0.1 on an idle machine


def test_missing_llguidance_error_names_the_package(
    sessions: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    said = r"regex needs the package llguidance; run pip install 'freeexport\[grammar\]'"
    with pytest.raises(OptionError, match=said):
        sessions("llama-tied").generate(list(PROMPTS[0]), regex="not compiled before")


def test_infinitely_recursive_schemas_are_detected() -> None:
    def node(child: Any, **others: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {"name": {"type": "string"}, "child": child}, **others}

    itself, required = {"$ref": "#/$defs/node"}, {"required": ["name", "child"]}
    for child, finite in (
        (itself, False),
        ({"anyOf": [itself, {"type": "null"}]}, True),
        ({"oneOf": [itself, {"allOf": [itself]}]}, False),
        ({"type": "array", "items": itself}, True),
        ({"type": "array", "items": itself, "minItems": 1}, False),
        ({"type": "string"}, True),
        ({"$ref": "#/$defs/missing"}, True),
    ):
        assert is_finite({**itself, "$defs": {"node": node(child, **required)}}) == finite
        assert is_finite({**itself, "$defs": {"node": node(child)}})
    chain = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(90)}
    assert is_finite({"$ref": "#/$defs/d0", "$defs": chain})


def test_objects_have_only_the_listed_keys() -> None:
    listed = {"type": "object", "properties": {"properties": {"enum": [{"properties": {"a": 1}}]}}}
    open_ = {**listed, "additionalProperties": True}
    for given, closed in (
        (listed, True),
        ({"type": "object"}, False),
        ({"type": "object", "properties": {}}, False),
        (open_, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": listed}}, False),
        ({"allOf": [listed, {"properties": {"b": {}}}]}, False),
        ({**listed, "anyOf": [{"required": ["b"]}]}, False),
    ):
        form = written_form(given)
        assert form.pop("x-guidance")["item_separator"] == ", "
        assert ("additionalProperties" in form) == closed
        assert given is not open_ or form == given
    nested = written_form(
        {"anyOf": [{"type": "array", "items": listed}, {"$ref": "#/$defs/a"}], "$defs": {"a": listed}}
    )
    assert nested["anyOf"][0]["items"]["additionalProperties"] is nested["$defs"]["a"]["additionalProperties"] is False
    assert nested["$defs"]["a"]["properties"] == listed["properties"]
    assert written_form({"x-guidance": {"whitespace_flexible": True}})["x-guidance"]["whitespace_flexible"] is True
