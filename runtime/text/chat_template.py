"""A chat template as transformers renders it, in a sandbox that counts what it spends."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from runtime.errors import BundleError, PromptError
from runtime.text.template_limits import Budget, TemplateLimitError

FILE = "chat_template.jinja"
# Bytes; the longest published templates have about 30,000.
MOST_SOURCE = 128 * 1024

# Made for web pages; slow beyond their length, and not for prompts.
_NO_FILTERS = ("pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr")

_budget: ContextVar[Budget] = ContextVar("budget")


class ChatTemplate:
    """A compiled template. Safe to use from many threads. Raises BundleError where it is not valid."""

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise BundleError(f"{FILE} has {len(source)} characters, at most {MOST_SOURCE} are read; shorten it")
        token = _budget.set(Budget())
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise _invalid(f" line {error.lineno}", error) from None
        except Exception as error:  # what Python cannot compile: nested too deep, a number of too many digits
            raise _invalid("", error) from None
        finally:
            _budget.reset(token)

    def render(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
        """The text of a conversation. Raises PromptError where the template refuses it, fails, or spends too much."""
        token = None
        try:
            token = _budget.set(Budget(messages))
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **special_tokens,
            )
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
        finally:
            if token is not None:
                _budget.reset(token)


class _Environment(ImmutableSandboxedEnvironment):
    """Counts what templates do: each iteration and call, and the size of each value that they make."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return parsed.set_environment(self)  # type: ignore[return-value]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(5)
        receiver = getattr(__obj, "__self__", None)
        if isinstance(receiver, (str, bytes, int, float)):
            args = tuple(map(_settled, args))
            budget.before(getattr(__obj, "__name__", ""), receiver, args, kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget.get().binary(operator, left, right)
        return _budget.get().made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None

        def formatted(*args: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                (mapping,), given = args, ()
            else:
                mapping, given = named, args
            _budget.get().before("vformat", value.__self__, given, mapping)
            return _Formatter(self).vformat(value.__self__, given, mapping)

        return formatted

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        return _budget.get().joined(pieces)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5}", format_spec):
            raise TemplateLimitError(f"formats a field as {format_spec[:40]!r}")
        _budget.get().spend(10)
        return _budget.get().made(super().format_field(value, format_spec))


# Names that no template can spell in a filter expression.
_STEP, _SIZED, _MEASURED, _TOUCHED, _CONCAT = ("\0step", "\0sized", "\0measured", "\0touched", "\0concat")


class _Counting(NodeTransformer):
    """Puts into a template's syntax tree what the environment has no hook for."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        step = _step(node)
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        step = _step(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_CallBlock = visit_Block = visit_Macro

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_SIZED, node) if getattr(node, "ctx", "load") == "load" else node

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(_MEASURED, node.expr)
        for operand in node.ops:
            operand.expr = _filtered(_MEASURED, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(_TOUCHED, node.node)
        return node


def _step(node: nodes.Node) -> nodes.Expr:
    """What a turn through the body of `node` costs: as many steps as it has nodes."""
    return _filtered(_STEP, nodes.Const(sum(1 for _ in node.find_all(nodes.Node)), lineno=node.lineno), constant=True)


def _filtered(name: str, node: nodes.Expr, constant: bool = False) -> nodes.Expr:
    if isinstance(node, nodes.Const) and not constant:
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _count(steps: Any) -> bool:
    _budget.get().spend(steps if isinstance(steps, int) and steps > 0 else 1)
    return True


def _measured(value: Any) -> Any:
    _budget.get().measure(value)
    return value


def _touched(value: Any) -> Any:
    _budget.get().touch(value)
    return value


def _concat(values: Iterable[Any]) -> str:
    budget = _budget.get()
    return budget.joined(str(_measured(value)) for value in values)


def _settled(value: Any) -> Any:
    """An iterator as a list: what it gives is counted."""
    return list(_budget.get().counted(value)) if isinstance(value, Iterator) else value


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that looks first at what it is given, and then at what it made."""
    context = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # Jinja's marks on functions go along
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        args = (*args[:context], *map(_settled, args[context:]))
        if len(args) > context:
            budget.before(name, args[context], args[context + 1 :], kwargs)
        return budget.made(function(*args, **kwargs))

    return call


def _tested(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            _measured(value)
        return function(*args, **kwargs)

    return call


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; here its body is simply part of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_measured,
        optimized=False,
    )
    filters = {**environment.filters, "tojson": _to_json}
    environment.filters = {
        name: _limited(name, function) for name, function in filters.items() if name not in _NO_FILTERS
    }
    environment.filters |= {_STEP: _count, _SIZED: _sized, _MEASURED: _measured}
    environment.filters |= {_TOUCHED: _touched, _CONCAT: _concat}
    tests: Mapping[str, Any] = environment.tests
    environment.tests = {name: _tested(function) for name, function in tests.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _sized(value: Any) -> Any:
    return _budget.get().made(value)


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


def _invalid(where: str, error: Exception) -> BundleError:
    return BundleError(f"{FILE}{where} is not a valid template ({_one_line(error)}); convert the checkpoint again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
