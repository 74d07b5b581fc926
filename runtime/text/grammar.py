"""Constrained output: the tokens that a schema, regular expression, grammar or choice allows next.

Uses the package llguidance (the extra `grammar`). A forced token is one for which the grammar
allows only one text, such as the keys and quotes of an object, or the rest of a choice. It needs no
prediction. Forced text is tokenized as the tokenizer does.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from runtime.errors import OptionError, one_line
from runtime.text.grammar_size import Size, grammar_size, regex_size, resolve_reference, schema_size
from runtime.text.tokenizer import Tokenizer

# Logit of a token outside a head's vocabulary. Its probability is 0.
UNKNOWN = np.finfo(np.float32).min
NEVER = np.float32(-np.inf)  # score of a token that cannot be chosen
INSTALL = "pip install 'freeexport[grammar]'"
# Maximum number of compiled grammars in the cache.
MAX_KEPT = 64
# JSON is on one line, as written by Python's json.dumps: a single form forces more tokens.
# "x-guidance" in a schema overrides this.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Maximum number of symbols of a grammar, and of states of its lexer (1 to 2 kB each). They limit
# its time and memory.
MAX_SYMBOLS = 50_000
MAX_STATES = 50_000
# Maximum number of characters that may be forced at once, and of tokens at the start. Finding them
# holds the GIL for about 2 us per character.
MAX_LETTERS = 16_384
MAX_FORCED = 10_000
# Maximum number of parts of a schema that are visited to find out if it requires itself.
MAX_LOOKS = 10_000
INFINITE = "no finite output satisfies it: it requires itself"


class Constraint(Protocol):
    """The tokens that may follow an `output`, int64 [n]: a Grammar, or the rules of speech.

    Attributes:
        seconds: Time spent on it.
        by_scores: The most likely token may not be chosen, even if it is allowed.
    """

    seconds: float
    by_scores: bool

    def forced(self, output: np.ndarray) -> int | None:
        """Return the only token that may follow, None if there is a choice."""
        ...

    def allows(self, output: np.ndarray, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` may follow, one after the other."""
        ...

    def mask(self, scores: np.ndarray, output: np.ndarray) -> np.ndarray:
        """Return scores, float32 [V], with -inf for tokens that must not follow."""
        ...


class Grammars:
    """Compiles constraints for a model. Thread-safe.

    Args:
        tokenizer: The tokenizer, if any.
        vocab_size: Size of the vocabulary.
        ends: Tokens that end an output.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = list(ends)
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._tokens: Any = None

    def open(self, kind: str, text: str, max_tokens: int) -> Grammar:
        """Return a grammar in its initial state.

        Args:
            kind: "json_schema", "regex", "grammar", or "choice" with a JSON list.
            text: The constraint.
            max_tokens: Maximum number of tokens of the output.

        Raises:
            OptionError: If it cannot be compiled or allows no output.
        """
        key = kind, text
        matcher = self._kept.get(key)
        if matcher is None:
            with self._compiling:  # compiled grammars remain available
                matcher = self._kept.get(key) or self._compile(kind, text)
        with self._lock:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return Grammar(
                kind,
                matcher.deep_copy(),
                self._ends,
                vocab_size=self._vocab_size,
                max_tokens=max_tokens,
            )

    def _compile(self, kind: str, text: str) -> Any:
        try:
            import llguidance
        except ImportError:
            raise OptionError(f"{kind} needs the package llguidance; run {INSTALL}") from None
        if self._tokenizer is None or not self._ends:
            missing = "tokenizer" if self._tokenizer is None else "end-of-sequence token"
            raise OptionError(f"{kind} is given, but the session has no {missing}; leave it out")
        limits = llguidance.LLParserLimits(
            max_grammar_size=MAX_SYMBOLS, max_lexer_states=MAX_STATES, verbose_errors=False
        )
        try:
            if self._tokens is None:
                self._tokens = _tokens(llguidance, self._tokenizer, self._vocab_size, self._ends)
            grammars = [{**_described(llguidance, kind, text), "name": "text"}]
            if not self._tokenizer.keeps_leading_space:
                grammars.insert(0, {"lark_grammar": 'start: " "? @text'})
            matcher = llguidance.LLMatcher(
                self._tokens, json.dumps({"grammars": grammars}), log_level=0, limits=limits
            )
            forced = 0 if matcher.is_error() else len(matcher.compute_ff_tokens())
            problem = matcher.get_error()
            if not problem and forced > MAX_FORCED:
                problem = (
                    f"it begins with {forced} tokens without a choice, at most {MAX_FORCED} may be"
                )
        except (KeyboardInterrupt, SystemExit, OptionError):
            raise
        except BaseException as error:
            # Anything that the library raises for a text it cannot parse, including panics.
            problem = one_line(error)
        if problem:
            raise OptionError(f"{kind} cannot be used: {' '.join(problem.split())[:300]}")
        return matcher


class Grammar:
    """The grammar of one request.

    An `output`, int64 [n], contains the generated tokens so far, including drafts. Returning to an
    earlier output is cheap. One state is kept per token of the last output. Its forced tokens are
    those found after the last choice, so they depend on the output only.

    Attributes:
        seconds: Time spent on it.
    """

    by_scores = False

    def __init__(
        self, name: str, matcher: Any, ends: Sequence[int], vocab_size: int, max_tokens: int
    ) -> None:
        self.seconds = 0.0
        self._name = name
        self._matcher = matcher
        self._end = ends[0]
        self._ends = frozenset(ends)
        self._read = np.zeros(max_tokens, np.int64)
        self._length = 0
        self._vocab_size = vocab_size
        self._forced = [self._run()]

    def forced(self, output: np.ndarray) -> int | None:
        """Return the only token that may follow, None if there is a choice."""
        began = perf_counter()
        try:
            run = self._forced[-1] if self._follow(output) else ()
        finally:
            self.seconds += perf_counter() - began
        return run[0] if run else None

    def allows(self, output: np.ndarray, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` may follow, one after the other. None may follow the end."""
        began = perf_counter()
        count = 0
        try:
            if self._follow(output):
                for token in tokens:
                    if token in self._ends:
                        run = self._forced[-1]
                        count += token == run[0] if run else bool(self._matcher.is_accepting())
                        break
                    if not self._take(token):
                        break
                    count += 1
        finally:
            self.seconds += perf_counter() - began
        return count

    def mask(self, scores: np.ndarray, output: np.ndarray) -> np.ndarray:
        """Return scores, float32 [V], with -inf for tokens that must not follow.

        Raises:
            OptionError: If no token may follow.
        """
        began = perf_counter()
        try:
            if not self._follow(output):  # a beam that is no longer valid
                return scores
            run = self._forced[-1]
            if run:
                allowed = np.arange(len(scores)) == run[0]
            else:
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                allowed = np.unpackbits(bits, count=len(scores), bitorder="little").view(bool)
            self._check()
            masked: np.ndarray = np.where(allowed, scores, NEVER)
            if masked.max() <= UNKNOWN / 2:
                if not allowed.any():
                    raise OptionError(
                        f"{self._name}: no token of this model's vocabulary can follow; change it"
                    )
                # An exit vocabulary may contain none of the allowed tokens. Then all are equal.
                masked = np.where(allowed, np.float32(0), NEVER)
            return masked
        finally:
            self.seconds += perf_counter() - began

    def _follow(self, output: np.ndarray) -> bool:
        """Move to the state after `output`. Returns False if the grammar does not allow it."""
        shared = min(self._length, len(output))
        differ = np.flatnonzero(self._read[:shared] != output[:shared])
        same = int(differ[0]) if len(differ) else shared
        if same < self._length:
            self._matcher.rollback(self._length - same)
            self._length = same
            del self._forced[same + 1 :]
        return all(self._take(token) for token in output[same:].tolist())

    def _take(self, token: int) -> bool:
        """Advance by a token if it is allowed, and return True if it is.

        An end has no state of its own.
        """
        run = self._forced[-1]
        if (
            token in self._ends
            or (run and token != run[0])
            or not self._matcher.try_consume_tokens([token])
        ):
            self._check()
            return False
        self._read[self._length] = token
        self._length += 1
        self._forced.append(run[1:] or self._run())
        return True

    def _run(self) -> tuple[int, ...]:
        """Return the tokens that are forced in the current state, which follows a choice."""
        if self._matcher.is_stopped():
            self._check()
            return (self._end,)
        run = tuple(self._matcher.compute_ff_tokens())
        # A tokenizer may have tokens that the model does not have.
        return run if max(run, default=0) < self._vocab_size else ()

    def _check(self) -> None:
        """Check for errors of the matcher.

        Raises:
            OptionError: If it exceeded its limits.
        """
        if self._matcher.is_error():
            problem = " ".join(self._matcher.get_error().split())[:200]
            raise OptionError(f"{self._name} is too complex ({problem}); simplify it")


def _tokens(llguidance: Any, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Any:
    """Create the llguidance tokenizer, which takes a second.

    Raises:
        OptionError: If the decoder has no text for each token.
    """
    size = max(vocab_size, tokenizer.vocab_size)
    if "ByteLevel" in tokenizer.decoder_kinds or "ByteFallback" in tokenizer.decoder_kinds:
        return llguidance.LLTokenizer(tokenizer.source, size, list(ends))
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Spelled(tokenizer, size, ends)), size, list(ends)
    )


class _Spelled:
    """A tokenizer for llguidance's TokenizerWrapper, with the text of each token as bytes.

    The texts are those within a text, not at its start.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        if tokenizer.anchor is None:
            raise OptionError(
                "the bundle's tokenizer has no text for each token, so its output cannot be "
                "constrained"
            )
        anchor, length = tokenizer.anchor
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [
            b""
            if index in tokenizer.special_ids
            else tokenizer.decode([anchor, index])[length:].encode()
            for index in range(size)
        ]
        self._tokenizer = tokenizer
        self._ids = {text: index for index, text in reversed(list(enumerate(self.tokens))) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return token ids that spell exactly `text`, as far as the vocabulary allows.

        If the tokenizer would add a leading space, the longest matching tokens are used.
        """
        spelled = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(spelled.decode(), special=False)
        if b"".join(self.tokens[index] for index in ids) == spelled:
            return ids
        ids = []
        while spelled:
            sizes = range(min(len(spelled), self._longest), 0, -1)
            size = next((size for size in sizes if spelled[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[spelled[:size]])
            spelled = spelled[size:]
        return ids


def written_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose JSON has the form JSON_FORM.

    Objects that list properties have no others, unless the schema allows them. Other servers read
    schemas in this way, too. It forces more tokens and leaves the model less to invent. Does not
    apply if schemas of objects are merged.
    """
    given = schema.get("x-guidance")
    form = {"x-guidance": JSON_FORM | (given if isinstance(given, dict) else {})}
    return (schema if _merges(schema) else _closed(schema)) | form


def is_finite(root: dict[str, Any]) -> bool:
    """Return True if a finite value can satisfy a schema.

    Considers references and required parts only.
    """
    left = MAX_LOOKS
    known = set[str]()

    def finite(schema: Any, within: frozenset[str]) -> bool:
        nonlocal left
        left -= 1
        if left < 0 or not isinstance(schema, dict):
            return schema is not False
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in known:
            if reference in within or not finite(
                resolve_reference(root, reference), within | {reference}
            ):
                return False
            known.add(reference)
        needed = list[Any]()
        properties = schema.get("properties")
        if (
            schema.get("type") == "object"
            and isinstance(properties, dict)
            and isinstance(schema.get("required"), list)
        ):
            needed += [properties.get(name) for name in schema["required"] if isinstance(name, str)]
        if schema.get("type") == "array" and schema.get("minItems"):
            needed.append(schema.get("items"))
        choices = [
            parts for name in ("anyOf", "oneOf") if isinstance(parts := schema.get(name), list)
        ]
        needed += parts if isinstance(parts := schema.get("allOf"), list) else []
        return all(finite(part, within) for part in needed) and all(
            any(finite(part, within) for part in parts) for parts in choices
        )

    return finite(root, frozenset({"#"}))


def _merges(schema: Any) -> bool:
    """Return True if the schema of any object is combined from several parts."""
    if isinstance(schema, list):
        return any(map(_merges, schema))
    if not isinstance(schema, dict):
        return False
    parts = schema.get("allOf")
    merges = (isinstance(parts, list) and len(parts) > 1) or (
        "properties" in schema and not schema.keys().isdisjoint({"allOf", "anyOf", "oneOf", "$ref"})
    )
    return merges or any(map(_merges, schema.values()))


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no other properties than those listed."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name, part in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(
            part,
            dict,
            # Named schemas.
        ):
            closed[name] = {key: _closed(each) for key, each in part.items()}
        elif name not in ("enum", "const", "default", "examples"):  # not schemas
            closed[name] = _closed(part)
    listed = isinstance(schema.get("properties"), dict) and schema["properties"]
    if listed and schema.keys().isdisjoint(
        {"additionalProperties", "patternProperties", "unevaluatedProperties"}
    ):
        closed["additionalProperties"] = False
    return closed


def _described(llguidance: Any, kind: str, text: str) -> dict[str, Any]:
    """Return a grammar in llguidance's format.

    Raises:
        ValueError: If it may force too much text. Errors of llguidance's parsers are passed on.
    """
    described: dict[str, Any]
    if kind == "json_schema":
        schema = json.loads(text)
        if not is_finite(schema):
            raise ValueError(INFINITE)
        described = {"json_schema": written_form(schema)}
        size = schema_size(schema)
    elif kind == "choice":
        choices = json.loads(text)
        longest = max(map(len, choices))
        described = {"lark_grammar": "start: " + " | ".join(map(json.dumps, choices))}
        size = Size(longest, longest)
    elif kind == "regex":
        described = json.loads(llguidance.LLMatcher.grammar_from_regex(text))["grammars"][0]
        size = regex_size(text)
    else:
        if re.search(r"^\s*root\s*::=", text, re.MULTILINE):  # GBNF, the format of llama.cpp
            from llguidance.gbnf_to_lark import any_to_lark

            text = any_to_lark(text)
        described = {"lark_grammar": text}
        size = grammar_size(text)
    if size.most > MAX_LETTERS:
        raise ValueError(
            f"it may force {size.most:,} characters at once, more than {MAX_LETTERS:,}; "
            "shorten its strings or reduce its repetitions"
        )
    return described
