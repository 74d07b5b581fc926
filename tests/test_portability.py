"""Packages import without features of Linux or POSIX, and use the substitute of each that has one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

import freeexport.system.file_lock
from runtime.engines import kv_cache
from runtime.machine import machine

ROOT = Path(__file__).resolve().parent.parent
# In a process without what Windows or macOS lack, import each module that loads quickly.
IMPORTS = """
import asyncio, importlib, mmap, os, pkgutil, signal, subprocess, sys, tempfile
import click, jinja2, numpy, onnxruntime, prometheus_client, psutil, rich.console, starlette, tokenizers, uvicorn
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
missing = ["sched_getaffinity", "posix_fadvise", "posix_fallocate", "mkfifo", "fork", "O_NOFOLLOW", "O_NONBLOCK"]
for owner, names in (
    (os, [*missing, "O_CLOEXEC", "getuid", "memfd_create"]),
    (mmap, ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "PROT_READ", "MAP_PRIVATE", "MAP_ANONYMOUS"]),
    (signal, ["SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM"]),
):
    for name in names:
        delattr(owner, name)
sys.modules["msvcrt"] = sys.modules["freeexport.system.file_lock"] = os  # has its own test
os.lock_file = None
import freeexport.cli, runtime
for package in ("runtime", "freeexport.system", "freeexport.serving", "freeexport.costs", "freeexport.commands"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.startswith(("runtime.engines.cuda", "runtime.engines.tensorrt", "runtime.engines.kernels.")):
            importlib.import_module(module.name)
"""


@pytest.mark.timeout(200)
def test_modules_import_without_posix_only_modules() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cores_and_memory_are_read_without_affinity_and_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == psutil.cpu_count(logical=False)
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(machine, "memory_left", lambda: None)
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "memory_left", lambda: 5)
    assert machine.available_memory() == 5


def test_memory_trimming_does_nothing_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(name: str | None) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")  # as Windows does without a name

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", library)
    numbers = ("max_pending", "kv_bytes_per_token", "feature_bytes_per_token", "encoder_capacity")
    kv_cache.check_memory(SimpleNamespace(**dict.fromkeys(numbers, 1)), capacity=1, slots=1)


def test_windows_locks_a_byte_after_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")

    msvcrt = ModuleType("msvcrt")
    msvcrt.__dict__.update(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(sys, "platform", "win32")
    module = importlib.reload(freeexport.system.file_lock)
    try:
        with (tmp_path / "file").open("wb+", buffering=0) as file:
            file.write(b"content")
            module.lock_file(file.fileno())
            with pytest.raises(BlockingIOError):
                module.lock_file(file.fileno())
            assert file.tell() == 7
    finally:
        monkeypatch.undo()
        importlib.reload(freeexport.system.file_lock)
    assert calls == [(1 << 20, 2, 1)] * 2
