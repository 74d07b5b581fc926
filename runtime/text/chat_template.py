"""Renders chat templates as transformers does, in Jinja's sandbox with limits.

A template is part of the bundle and trusted like its weights. The sandbox denies access to files
and modules. Limits on iterations and output end accidental endless loops. Neither limits the memory
that a malicious template uses.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import BundleError, PromptError, one_line

FILE = "chat_template.jinja"
# Maximum number of characters of a template. The longest published ones have about 30,000.
MAX_SOURCE = 128 * 1024
# Maximum number of loop iterations and calls. Published templates need a few per message.
MAX_TURNS = 200_000
# Maximum number of characters in the output: MAX_OUTPUT, plus MAX_GROWTH per character of the
# messages.
MAX_OUTPUT = 1 << 20
MAX_GROWTH = 8
# Name of the variable that counts iterations, and of the filter. No template can spell it.
_TURNS = "\0turns"


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template exceeds the limit of iterations or of output."""


class ChatTemplate:
    """A compiled template. Thread-safe.

    Raises:
        BundleError: If it is not a valid template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise BundleError(
                f"{FILE} has {len(source)} characters, at most {MAX_SOURCE} are read; shorten it"
            )
        try:
            self._template = _Environment().from_string(source)
        except Exception as error:
            # Includes templates that Python cannot compile: nested too deeply, or with a huge
            # number.
            line = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise BundleError(
                f"{FILE}{line} is not a valid template ({one_line(error)}); convert the "
                "checkpoint again"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation.

        Args:
            messages: The messages.
            special_tokens: Special tokens by name.
            tools: Functions that the model may call.

        Raises:
            PromptError: If the template rejects the messages, fails, or exceeds a limit.
        """
        variables = {
            "messages": [dict(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": True,
            **special_tokens,
            _TURNS: [0],
        }
        given = sum(
            len(value)
            for message in messages
            for value in message.values()
            if isinstance(value, str)
        )
        room = MAX_OUTPUT + MAX_GROWTH * given
        text = list[str]()
        try:
            for piece in self._template.generate(variables):
                text.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateLimitError(
                        f"writes more than {MAX_OUTPUT + MAX_GROWTH * given} characters"
                    )
            return "".join(text)
        except TemplateLimitError as error:
            problem = one_line(error)
            remedy = "shorten the messages, or pass the prompt as token ids"
        except jinja2.TemplateError as error:
            problem = f"refuses the messages ({one_line(error)})"
            remedy = "change them"
        except Exception as error:
            # Anything that expressions of the template raise on unexpected messages.
            problem = f"fails on the messages ({type(error).__name__}: {one_line(error)})"
            remedy = "change them"
        raise PromptError(f"the chat template {problem}; {remedy}")


def _count(context: Context) -> None:
    """Count an iteration or a call."""
    context[_TURNS][0] += 1
    if context[_TURNS][0] > MAX_TURNS:
        raise TemplateLimitError(f"takes more than {MAX_TURNS} turns of loops")


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Iterator[Any]:
    """Count the iterations over `items`."""
    for item in items:
        _count(context)
        yield item


class _Generation(Extension):
    """`{% generation %}` marks answers for training. Its body is rendered like any other text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Sandbox that counts loop iterations and calls of macros, callers and recursive loops."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters |= {"tojson": _to_json, _TURNS: _counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        for loop in list(parsed.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _TURNS, [], [], None, None, lineno=loop.lineno)
        return parsed.set_environment(self)  # type: ignore[return-value]

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _count(context)
        return super().call(context, function, *args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which is not what models were trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
