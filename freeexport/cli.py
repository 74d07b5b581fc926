"""The `freeexport` command: imports the verbs on demand, and turns errors into text.

A verb is a line in GROUPS and a module `freeexport/commands/<verb>.py` with a click command named
`command`.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from freeexport import INTERRUPTED, __version__
from freeexport.system.child import tell_parent
from freeexport.system.extras import how_to_install
from freeexport.system.output import writing_error
from runtime.errors import FreeExportError, first_line, shown

# In the order of use, grouped as in the help.
GROUPS: dict[str, dict[str, str]] = {
    "Conversion": {
        "fit": "Plan, train, convert and evaluate in one command.",
        "train": "Fine-tune a checkpoint for early exit.",
        "convert": "Convert a checkpoint to a bundle of ONNX engines.",
        "exits": "List ready-made exits.",
        "verify": "Compare a bundle with its checkpoint, or with itself.",
        "calibrate": "Calibrate the exit threshold.",
    },
    "Inference": {
        "generate": "Generate text with a bundle.",
        "serve": "Serve bundles over an OpenAI-compatible API.",
        "inspect": "Show the contents of a bundle.",
    },
    "Evaluation": {
        "evaluate": "Compare methods by speed and quality.",
    },
    "Getting started": {
        "demo": "Convert a small model, generate, and compare speeds.",
        "doctor": "Diagnose this installation and machine.",
    },
}

# Verbs of earlier versions, and what replaces them.
REMOVED = {"push": "upload a bundle or an exit with hf upload (docs/hub.md)"}

_TORCH_ARCHIVE = re.compile(r"inline_container\.cc(?!.*Reader)", re.DOTALL)


_VERB = f"{__name__}.verb"


class Verbs(click.Group):
    """A group that imports a command only to run it, so `--help` is fast and needs no extra."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for group in GROUPS.values() for verb in group]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        ctx.meta[_VERB] = cmd_name  # click knows it only after the import
        command: click.Command = importlib.import_module(f"freeexport.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if args[0] in REMOVED:
                ctx.fail(f"{args[0]} was removed; {REMOVED[args[0]]}")
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {shown(args[0])}{hint}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(verbs.items()))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt as error:  # click would print "Aborted!" and exit with 1
            click.echo(f"error: {error_message(error)}", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None

    def invoke(self, ctx: click.Context) -> Any:
        with _interrupts() as interrupted:
            try:
                return super().invoke(ctx)
            except (click.UsageError, click.exceptions.Exit, BrokenPipeError):
                raise  # click sets the exit code: 2, the command's, or a silent 1
            except (Exception, KeyboardInterrupt) as error:
                if ctx.params["debug"]:
                    traceback.print_exc()
                if interrupted and not isinstance(error, FreeExportError):
                    error = KeyboardInterrupt()
                reason = error_message(error, ctx.meta.get(_VERB))
                if not tell_parent(reason):
                    click.echo(f"error: {reason}", err=True)
                ctx.exit(INTERRUPTED if isinstance(error, (KeyboardInterrupt, click.Abort)) else 1)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the interrupts received while the block runs.

    Native code turns some of them into other errors, for instance torch when it reads the shape of
    an object.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if (
        before is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield received
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def error_message(error: BaseException, verb: str | None = None) -> str:
    """Describe an error of `verb` and its remedy on one line, without the leading `error:`."""
    return " ".join(line.strip() for line in _explain(error, verb).splitlines() if line.strip())


def _explain(error: BaseException, verb: str | None) -> str:
    if isinstance(error, FreeExportError):
        return str(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}; free some memory, or lower --capacity, and run again"
    error = writing_error(error) or error
    if isinstance(error, OSError):
        where = error.filename or "the output"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full while writing {where}; free some space and run again"
        if error.errno == errno.EFBIG:
            advice = "raise the limit, or write elsewhere"
            return f"{where}: file size limit of ulimit -f or the file system exceeded; {advice}"
        if error.errno == errno.EROFS:
            return f"{where} is on a read-only file system; write elsewhere"
        named = f"{error.filename}: " if error.strerror and error.filename is not None else ""
        return named + (error.strerror or str(error) or type(error).__name__)
    if _TORCH_ARCHIVE.search(str(error)):  # torch does not name the cause
        return (
            f"a file could not be written ({first_line(error)}); free some space, or write "
            "elsewhere, and run again"
        )
    ours = ("freeexport", "graphs", "runtime")
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and error.name.partition(".")[0] not in ours
    ):
        return how_to_install(error.name, verb)
    return (
        f"{type(error).__name__}: {error}; this is a bug; "
        "get the traceback with freeexport --debug ..."
    )


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(cls=Verbs, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="freeexport", message="%(prog)s %(version)s")
@click.option(
    "--debug", is_flag=True, envvar="FREEEXPORT_DEBUG", help="Show the traceback of an error."
)
def main(debug: bool) -> None:
    """Early-exit decoding (FREE) as ONNX engines.

    \b
    Example:
      freeexport convert path/to/checkpoint bundle
      freeexport generate bundle "Once upon a time"
    """
    if not sys.stderr.isatty():
        # transformers' GGUF reader always draws its bar. Child processes inherit this setting.
        os.environ.setdefault("TQDM_DISABLE", "1")
