"""The estimate of how much text a constraint may force at once."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.grammar_size import Size, grammar_size, regex_size, schema_size


@pytest.mark.parametrize(
    ("regex", "least", "most"),
    [
        ("(((a{50}){50}){50}){50}", 50**4, 50**4),
        ("^a{1000000000}$", 10**9 + 2, 10**9 + 2),
        ("a" * 200_000, 200_000, 200_000),
        ("[ab]a{1000}|b", 1, 1001),
        ("((a{1,100}){1,100}){1,100}", 1, 1),
        ("a{0,1000000}b{3,}", 3, 4),
        ("(abc)?d", 1, 4),
        ("(a{1000}?){1000}", 10**6, 10**6),
        (r"[]a\]]{5}[^]x]{7}[[:alpha:]&&[^x]]{3}", 15, 15),
        (r"\p{L}{10}\x{41}\{{2}\u0041", 14, 14),
        ("(?P<name>ab)+?(?i:cd)(?s)", 4, 4),
        ("a{" + "9" * 5000 + "}", 1 << 60, 1 << 60),
        ("((", 0, 0),
        ("a)b{5}", 6, 6),
    ],
)
def test_regex_size_bounds_the_length_of_matches(regex: str, least: int, most: int) -> None:
    assert regex_size(regex) == Size(least, most)


def test_comments_of_a_verbose_regex_do_not_hide_its_size() -> None:
    assert regex_size("(?x)a # (\n{100000}").most > 100_000


Language = tuple[str, frozenset[str]]  # a regular expression and all of its texts


def repeated(given: tuple[Language, tuple[int, int]]) -> Language:
    (regex, texts), (low, high) = given
    times = (product(texts, repeat=count) for count in range(low, high + 1))
    return f"(?:{regex}){{{low},{high}}}", frozenset("".join(parts) for each in times for parts in each)


def joined(parts: list[Language]) -> Language:
    texts = product(*(texts for _, texts in parts))
    return "".join(f"(?:{regex})" for regex, _ in parts), frozenset(map("".join, texts))


def either(parts: list[Language]) -> Language:
    return "|".join(f"(?:{regex})" for regex, _ in parts), frozenset().union(*(texts for _, texts in parts))


LEAVES = {"a": "a", "ab": "ab", "[ab]": "a b", "b?": "b ", "a{2}b": "aab", "a{1,2}?": "a aa", "(a|bb)": "a bb"}
LANGUAGES: st.SearchStrategy[Language] = st.recursive(
    st.sampled_from([(regex, frozenset(texts.split(" "))) for regex, texts in LEAVES.items()]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 2), (3, 3)])).map(repeated),
        st.lists(inner, min_size=1, max_size=2).map(joined),
        st.lists(inner, min_size=2, max_size=2).map(either),
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(LANGUAGES.filter(lambda language: len(language[1]) <= 300))
def test_forced_text_is_no_longer_than_the_estimate(language: Language) -> None:
    regex, texts = language
    size = regex_size(regex)
    assert size.least == min(map(len, texts))
    for beginning in {text[:end] for text in texts for end in range(len(text) + 1)}:
        rests = [text.removeprefix(beginning) for text in texts if text.startswith(beginning)]
        first, last = min(rests), max(rests)
        alike = next(
            (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
        )
        assert alike <= size.most


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        ({"const": "x" * 198_000}, 198_000),
        ({"type": "string", "pattern": "(((a{50}){50}){50}){50}"}, 50**4),
        ({"type": "string", "minLength": 10**8, "pattern": "a*"}, 10**8),
        ({"type": "array", "items": {"const": "x" * 100}, "minItems": 1000}, 100_000),
        ({"type": "array", "prefixItems": [{"const": "x" * 100}] * 200}, 20_000),
        ({"properties": {key: {"const": "x" * 4000} for key in "abcde"}, "required": list("abcde")}, 20_000),
        ({"allOf": [{"pattern": "(a{997})+"}, {"pattern": "(a{991})+"}]}, 997 * 991),
        ({"$ref": "#/$defs/a/anyOf/1", "$defs": {"a": {"anyOf": [{}, {"minLength": 10**6}]}}}, 10**6),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name", "minLength": 10**6}}}, 10**6),
        ({"additionalProperties": {"const": "x" * 100}, "minProperties": 1000}, 100_000),
    ],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_schema_size_counts_forced_characters(schema: dict[str, Any], most: int) -> None:
    assert schema_size(schema).most >= most


def test_ordinary_schema_is_small() -> None:
    many = {f"key_{n}": {"type": "string", "maxLength": 10**9, "description": "x" * 200} for n in range(500)}
    listed = {"type": "array", "items": {"enum": [f"value {n}" for n in range(9000)]}, "maxItems": 10**6}
    node = {"type": "object", "properties": {"name": {"type": "string"}, "left": {"$ref": "#/$defs/node"}}}
    schema = {"type": "object", "properties": {**many, "listed": listed, "node": {"$ref": "#/$defs/node"}},
              "required": list(many), "$defs": {"node": node}}  # fmt: skip
    assert schema_size(schema).most < 10_000


@pytest.mark.parametrize(
    ("grammar", "most"),
    [
        ('start: a{1000}\na: b{1000}\nb: "x"{1000}', 10**9),
        ('start: A\nA: B{1000} "y"\nB: C~1000..2000\nC: "x"', 10**6),
        ("start: A\nA: /(a{97})+/ & /(a{101})+/ & /(a{103})+/", 97 * 101 * 103),
        ("start: A\nA: /a*/ & ~/a{0,1000000}/", 10**6),
        ('start: "y" %json {"const": "' + "x" * 20_000 + '"} "z"', 20_000),
        ('start: "' + "x" * 20_000 + '"', 20_000),
        ('start: word[suffix=/b{99999}/]\nword: "a" # "', 99_999),
        ("start: # ( comment\n  | /a{99999}/", 99_999),
        ("start: /[/]a{99999}/", 99_999),
        ('start: aB{1000}\na: "x"\nB: "y"{1000}', 10**6),  # a rule and a terminal
    ],
)
def test_grammar_size_counts_forced_characters(grammar: str, most: int) -> None:
    assert grammar_size(grammar).most >= most


def test_ordinary_grammar_is_small() -> None:
    levels = [f'e{n}: e{n + 1} (("op{n}" | "o{n}") e{n + 1})*' for n in range(60)]
    ended = 'start: ANSWER | head "x"\nhead[lazy]: ANSWER "<tool_call>"\nANSWER: /(?s:.*)/ & ~/(?s:.*)<call>(?s:.*)/'
    for grammar in ("\n".join(["start: e0", *levels, 'e60: "(" e0 ")" | /[a-z]{1,8}/']), ended):
        assert grammar_size(grammar).most < 200
