"""Options shared by verbs: sections of the help, and help texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from freeexport.task_metrics import check_name
from runtime.errors import OptionError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

REST = "Other options"
# Options of earlier versions by verb, and what replaces them.
REMOVED = {
    ("convert", "--data"): "give --quantization-data",
    ("fit", "--paper"): "compare trainings with: python -m tools.paper compare",
    ("train", "--exit-layers"): "give --exit-head-layers",
}
# An option has the same meaning and text in every verb (CONTRIBUTING.md).
SAMPLES = "Use only the first N lines of --data."
MAX_NEW_TOKENS = "Maximum number of tokens to generate per line."
DEVICE = "Device to run on: cpu, or cuda:0 for the first GPU."
THREADS = "Number of CPU threads.  [default: one per physical core]"
CONFIDENCES = (
    "softmax: probability of the best token minus that of the second. max-prob: probability of "
    "the best token. entropy: 1 minus the normalized entropy."
)
METRICS = (
    "exact: the same text. rouge-1, rouge-2, rouge-l, rouge-lsum, bleu, chrf: of texts. wer, "
    "per: the rate of wrong words or phonemes. word-acc: of pronunciations of words. squad-em, "
    "squad-f1: of answers. case-f1, punct-f1: of capitals and punctuation. module:function: a "
    "function of output and reference, from 0 to 1. The suffix -error, as in exact-error, makes "
    "tables show 1 minus the value."
)


def option_of(options: type) -> Callable[..., Callable[[Decorated], Decorated]]:
    """Return a decorator that declares an option for a field of the dataclass `options`."""
    hints = get_type_hints(options)
    defaults = {field.name: field.default for field in fields(options)}

    def option(name: str, help: str, flag: str = "", **changes: Any) -> Any:
        """Declare the option `flag`, by default --NAME, with the type and default of field `name`.

        Fields of type bool become flags, tuples options that may be repeated, and fields without a
        default required options. `changes` are arguments of `click.option` that differ from these.
        """
        hint = hints[name]
        if get_origin(hint) in (Union, UnionType):  # X | None
            hint = get_args(hint)[0]
        settings: dict[str, Any] = {"help": help}
        if get_origin(hint) is tuple:
            hint = get_args(hint)[0]
            settings["multiple"] = True
        if hint is bool:
            settings["is_flag"] = True
        elif get_origin(hint) is Literal:
            settings["type"] = click.Choice(get_args(hint))
        else:
            settings["type"] = click.Path(path_type=Path) if hint is Path else hint
        default = defaults[name]
        if default is MISSING:
            settings["required"] = True
        elif default is not None and default is not False and default != ():
            settings["default"] = default
        flag = flag or f"--{name.replace('_', '-')}"
        return click.option(flag, name, **{**settings, **changes})

    return option


class MetricName(click.ParamType):
    """Name of a metric (freeexport/task_metrics.py). The metric itself is not loaded."""

    name = "metric"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            check_name(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class SectionedCommand(click.Command):
    """A command whose help shows options under the headings of `section`.

    Options are shown in the order of their declaration. Rare sections are shown by --help-all only.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            successor = REMOVED.get((ctx.info_name or "", error.option_name))
            if successor is None:
                raise
            ctx.fail(f"{error.option_name} was removed; {successor}")

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        # click keeps the first help option of a command, even that of a run without the group.
        return ["-h", "--help"]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), HELP_ALL]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        hidden: list[str] = []
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            title = getattr(option, "section", None)
            if record is None:
                continue
            if getattr(option, "rare", False) and HELP_ALL.name not in ctx.meta:
                hidden.append(str(title))
            else:
                (rest if title is None else sections.setdefault(title, [])).append(record)
        for name, records in {**sections, (REST if sections else "Options"): rest}.items():
            with formatter.section(name):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            titles = ", ".join(title[:1].lower() + title[1:] for title in dict.fromkeys(hidden))
            formatter.write_text(f"{len(hidden)} more options with --help-all: {titles}.")


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[parameter.name or ""] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show every option.",
)


def section(title: str, rare: bool = False) -> Callable[[Decorated], Decorated]:
    """Put a heading above the options declared below it, up to the next heading."""

    def mark(function: Decorated) -> Decorated:
        # Decorators run bottom up, so options without a heading are those below this one.
        for parameter in getattr(function, "__click_params__", ()):
            if not hasattr(parameter, "section"):
                parameter.section = title
                parameter.rare = rare
        return function

    return mark
