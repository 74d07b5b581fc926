from __future__ import annotations

import errno
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import Result
from command_line import invoke

from freeexport import cli, commands
from freeexport.cli import error_message
from freeexport.system.extras import PURPOSES, extras, missing_of

ROOT = Path(__file__).parents[2]

Run = Callable[..., Result]


@pytest.fixture
def run_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Install a verb `probe` with the given body and run it."""

    def run(body: str, *arguments: str, header: str = "") -> Result:
        lines = [header, "import click", "@click.command()", "def command():", f"    {body}"]
        (tmp_path / "probe.py").write_text("\n".join(lines))
        importlib.invalidate_caches()
        monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
        monkeypatch.setitem(cli.GROUPS, "Probes", {"probe": "A verb for tests."})
        monkeypatch.delitem(sys.modules, "freeexport.commands.probe", raising=False)
        return invoke(*arguments, "probe")

    return run


def error_line(result: Result, exit_code: int = 1) -> str:
    """The one line on stderr, checked to be one, with the exit code."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_help_is_fast_and_imports_no_heavy_package() -> None:
    code = (
        "import sys; from freeexport.cli import main; main(['--help'], standalone_mode=False);"
        "print(*{'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'rich'} & set(sys.modules),"
        "file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = run_python(code)
        after = os.times()
        # Of the processor: what else runs here must not count.
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "doctor" in done.stdout
    assert done.stderr.strip() == ""
    assert min(seconds) < 1  # 0.4 on an idle Xeon, 0.65 beside other tests; torch takes 2


def test_version_is_that_of_the_distribution() -> None:
    result = invoke("--version")
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert result.stdout == f"freeexport {declared[1]}\n"


def test_extras_are_those_declared_by_the_distribution() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras().keys() == PURPOSES.keys() == declared.keys() - {"dev"}
    assert extras()["convert"][:2] == ("torch", "transformers")
    assert {"rapidfuzz", "sacrebleu", "matplotlib"} <= set(extras()["evaluate"])  # [metrics] within it
    assert {"torch", "peft"} <= set(extras()["train"])


def test_one_onnxruntime_wheel_is_enough_and_other_missing_packages_are_reported() -> None:
    assert missing_of("cpu", {"onnxruntime": "1"}.get) == missing_of("cpu", {"onnxruntime-gpu": "1"}.get) == ()
    assert missing_of("gpu", {"onnxruntime": "1"}.get) == ()  # another wheel would overwrite this one
    assert missing_of("gpu", {"onnxruntime-gpu": "1"}.get) == ("cuda-python",)
    assert missing_of("gpu", {"onnxruntime-gpu": "1", "cuda-python": "12"}.get) == ()
    assert missing_of("gpu", {}.get) == ("onnxruntime-gpu", "cuda-python")


def test_every_listed_verb_has_a_command_with_help_and_an_example() -> None:
    context = click.Context(cli.main)
    for verb in cli.main.list_commands(context):
        result = invoke(verb, "--help")
        assert result.exit_code == 0, verb
        assert "Example" in result.output, verb


def test_command_runs_and_keeps_its_exit_code(run_verb: Run) -> None:
    for body, found in (
        ("click.echo('ran')", (0, "ran\n", "")),
        ("raise click.exceptions.Exit(7)", (7, "", "")),
        ("raise BrokenPipeError(32, 'Broken pipe')", (1, "", "")),  # quiet
    ):
        result = run_verb(body)
        assert (result.exit_code, result.stdout, result.stderr) == found


BUNDLE_ERROR = "from runtime.errors import BundleError; raise BundleError('deep.onnx is altered;\\n convert')"


@pytest.mark.parametrize(
    ("body", "exit_code", "line"),
    [
        (BUNDLE_ERROR, 1, "error: deep.onnx is altered; convert"),
        ("raise KeyboardInterrupt()", 130, "error: interrupted"),
        ("raise click.Abort()", 130, "error: interrupted"),
        ("open('no/such/file')", 1, "error: no/such/file: No such file or directory"),
        (
            "raise MemoryError('cannot allocate 9 GB')",
            1,
            "error: out of memory (cannot allocate 9 GB); free some memory, or lower --capacity, and run again",
        ),
        pytest.param(
            "open('/dev/full', 'w', buffering=1).write('x\\n')",
            1,
            "error: disk full while writing the output; free some space and run again",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full"),
        ),
    ],
)
def test_error_is_one_line(body: str, exit_code: int, line: str, run_verb: Run) -> None:
    assert error_line(run_verb(body), exit_code) == line


INTERRUPTED_IN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import freeexport.__main__ as entry

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = ["freeexport", "doctor"]
entry.main()
"""


@pytest.mark.parametrize("module", ["freeexport.cli", "numpy", "freeexport.commands.doctor"])
def test_ctrl_c_while_packages_are_imported_exits_with_130(module: str) -> None:
    done = run_python(INTERRUPTED_IN.replace("MODULE", module))
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    "changed",
    [
        "cli.Verbs.get_command = lambda *_: click.command()(interrupt)",
        "click.Group.parse_args = lambda *_: interrupt()",
        "cli.Verbs.get_command = lambda *_: click.command()(swallow)",
    ],
    ids=["in the verb", "while options are parsed", "where native code makes it its own error"],
)
def test_ctrl_c_in_a_real_process_exits_with_130(changed: str) -> None:
    code = (
        # A background job of a shell is born without.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from freeexport import cli; import click\n"
        "interrupt = lambda: signal.raise_signal(signal.SIGINT)\n"
        "def swallow():\n"
        "    try: interrupt()\n"
        "    except KeyboardInterrupt: pass\n"
        "    raise ValueError('could not determine the shape')\n"
        f"{changed}\ncli.main(['doctor'])"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_ignored(closed: str, tmp_path: Path) -> None:
    """Text that a library prints to a closed stream must not go to the file that is opened next."""
    (tmp_path / "shape.py").write_text(
        "import os, freeexport.__main__ as entry, freeexport.cli as cli, click\n"
        "def body():\n"
        f"    with open({str(tmp_path / 'out')!r}, 'w') as file:\n"
        "        click.echo('to stdout'); click.echo('to stderr', err=True)\n"
        "        os.write(1, b'native'); os.write(2, b'native'); os.read(0, 1)\n"
        "        file.write('result')\n"
        "cli.Verbs.get_command = lambda *_: click.command()(body)\n"
        "import sys; sys.argv = ['freeexport', 'doctor']; entry.main()\n"
    )
    command = ["sh", "-c", f"{sys.executable} {tmp_path / 'shape.py'} {closed}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, input="", env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "result"
    assert done.stdout == ("" if " >&-" in f" {closed}" else "to stdout\nnative")
    assert done.stderr == ("" if "2>&-" in closed else "to stderr\nnative")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/deep.data"),
            "disk full while writing out/deep.data; free some space and run again",
        ),
        (OSError("gpt9 is not a model\nidentifier"), "gpt9 is not a model identifier"),
        (OSError(), "OSError"),
        (
            ModuleNotFoundError("no", name="graphs.nowhere"),
            "ModuleNotFoundError: no; this is a bug; get the traceback with ",
        ),
        (ValueError("odd"), "ValueError: odd; this is a bug; get the traceback with freeexport --debug ..."),
    ],
)
def test_library_error_keeps_its_text_and_a_bug_is_called_one(error: Exception, text: str) -> None:
    assert cli.error_message(error).startswith(text)


@pytest.mark.parametrize(
    ("verb", "module", "line"),
    [
        ("convert", "torch.nn", "torch is not installed; run: pip install 'freeexport[convert]'"),
        ("train", "torch", "torch is not installed; run: pip install 'freeexport[train]'"),
        ("evaluate", "rapidfuzz", "rapidfuzz is not installed; run: pip install 'freeexport[evaluate]'"),
        ("evaluate", "matplotlib", "matplotlib is not installed; run: pip install 'freeexport[evaluate]'"),
        ("generate", "onnxruntime", "onnxruntime is not installed; run: pip install 'freeexport[cpu]'"),
        (None, "google.protobuf", "protobuf is not installed; run: pip install 'freeexport[convert]'"),
        (None, "tokenizers", "tokenizers is not installed; run: pip install freeexport"),
    ],
)
def test_missing_package_names_the_extra_of_the_command(
    verb: str | None, module: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.system.extras.missing_of", lambda extra: ())
    assert cli.error_message(ModuleNotFoundError(f"No module named {module}", name=module), verb) == line


@pytest.mark.parametrize(("verb", "near"), [("convrt", "; did you mean 'convert'?"), ("zzz", "")])
def test_unknown_command_suggests_the_nearest(verb: str, near: str) -> None:
    result = invoke(verb)
    assert result.exit_code == 2
    assert result.stderr.endswith(f"Error: No such command '{verb}'{near}\n")


def test_unknown_option_suggests_the_nearest() -> None:
    result = invoke("convert", "--exit-layr", "3")
    assert result.exit_code == 2
    assert "--exit-layer" in result.stderr


def test_debug_shows_the_traceback_and_the_error_line(run_verb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_verb("raise MemoryError()", "--debug")
    monkeypatch.setenv("FREEEXPORT_DEBUG", "1")
    assert "Traceback" in run_verb("raise MemoryError()").stderr
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: out of memory;")


def test_usage_error_exits_with_2(run_verb: Run) -> None:
    result = run_verb("raise click.UsageError('--exit-layer needs a number')")
    assert result.exit_code == 2
    assert "--exit-layer needs a number" in result.stderr


def test_write_error_of_a_library_is_reported_as_a_system_error() -> None:
    import torch
    from safetensors import SafetensorError

    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.save(torch.zeros(100_000), "/dev/full")
    with pytest.raises(OSError, match="written") as short, open("/dev/full", "wb", buffering=0) as full:
        np.zeros(100_000).tofile(full)
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, said in (
        (caught.value, "free some space"),
        (short.value, "disk full while writing the output"),
        (rust, "disk full while writing the output; free some space and run again"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "disk full while writing a/b"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b is on a read-only file system; write else"),
        (Exception("Read-only file system (os error 30)"), "the output is on a read-only file system"),
    ):
        line = error_message(error)
        assert said in line
        assert "this is a bug" not in line
    closing = RuntimeError("the file could not be closed")
    closing.__context__ = OSError(errno.ENOSPC, "No space left on device", "x")
    assert error_message(closing).startswith("disk full while writing x")
    assert "this is a bug" in error_message(KeyError("a"))
