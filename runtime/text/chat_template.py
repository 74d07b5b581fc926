"""A chat template as transformers renders it, in Jinja's sandbox, with bounds on its loops and its output.

A template is part of the bundle, which is trusted as its weights are: the sandbox keeps it from files and modules, the
bounds end loops that were written by mistake. Neither bounds the memory that a malicious template takes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from runtime.errors import BundleError, PromptError

FILE = "chat_template.jinja"
# Bytes; the longest published templates have about 30,000.
MOST_SOURCE = 128 * 1024
# Turns of loops and calls of macros; published templates take up to a few for each message.
MOST_TURNS = 200_000
# Characters of the output, and as many for each of the messages'.
MOST_OUTPUT, MOST_GROWTH = 1 << 20, 8


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template loops or writes more than it may."""


class ChatTemplate:
    """A compiled template. Safe to use from many threads. Raises BundleError where it is not valid."""

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise BundleError(f"{FILE} has {len(source)} characters, at most {MOST_SOURCE} are read; shorten it")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise _invalid(f" line {error.lineno}", error) from None
        except Exception as error:  # what Python cannot compile: nested too deep, a number of too many digits
            raise _invalid("", error) from None

    def render(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
        """The text of a conversation. Raises PromptError where the template refuses it, fails, or does not end."""
        variables = {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **special_tokens,
            _TURNS: _Turns(),
        }
        try:
            return _joined(self._template.generate(variables), MOST_OUTPUT + MOST_GROWTH * _length(messages))
        except TemplateLimitError as error:
            raise PromptError(
                f"the chat template {_one_line(error)}; shorten the messages, or pass the prompt as token ids"
            ) from None
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses the messages ({_one_line(error)}); change them") from None
        except Exception as error:  # whatever the template's own expressions raise on messages it does not expect
            raise PromptError(
                f"the chat template fails on the messages ({type(error).__name__}: {_one_line(error)}); change them"
            ) from None


# The variable that counts turns and the filter that does so: no template can spell it.
_TURNS = "\0turns"


class _Turns:
    left = MOST_TURNS

    def take(self) -> bool:
        self.left -= 1
        if self.left < 0:
            raise TemplateLimitError(f"takes more than {MOST_TURNS} turns of loops")
        return True


class _Counting(NodeTransformer):
    """Makes each turn of a loop and each call of a macro count."""

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_turn(node), node.test, lineno=node.lineno)
        return self._counted(node)

    def visit_Macro(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._counted(node)

    visit_CallBlock = visit_Macro

    def _counted(self, node: Any) -> Any:
        node.body.insert(0, nodes.ExprStmt(_turn(node), lineno=node.lineno))
        return node


def _turn(node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(nodes.Const(True), _TURNS, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return parsed.set_environment(self)  # type: ignore[return-value]


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; here its body is simply part of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {"tojson": _to_json, _TURNS: _take}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@jinja2.pass_context
def _take(context: Context, value: bool) -> bool:
    taken: bool = context[_TURNS].take()
    return taken


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _joined(pieces: Iterable[str], most: int) -> str:
    kept, length = list[str](), 0
    for piece in pieces:
        length += len(piece)
        if length > most:
            raise TemplateLimitError(f"writes more than {most} characters")
        kept.append(piece)
    return "".join(kept)


def _length(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(value) for message in messages for value in message.values() if isinstance(value, str))


def _invalid(where: str, error: Exception) -> BundleError:
    return BundleError(f"{FILE}{where} is not a valid template ({_one_line(error)}); convert the checkpoint again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
