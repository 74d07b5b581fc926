"""Debian's package index, fetched by apt into a directory of one's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.data.splits import DataError

_SYSTEM_PARTS = Path("/etc/apt/apt.conf.d")
_HELPER = "/usr/lib/apt/apt-helper"


def private_configuration(directory: Path, languages: Iterable[str], system_parts: Path = _SYSTEM_PARTS) -> Path:
    """Write a configuration that is the machine's, except for its languages and where its lists lie; returns its file.

    Images of Debian often set the languages to none in a part of their own: parts that name them are left out.
    """
    parts = directory / "parts"
    lists, archives = directory / "lists" / "partial", directory / "archives" / "partial"
    for path in (parts, lists, archives):
        path.mkdir(parents=True)
    for part in sorted(system_parts.iterdir()) if system_parts.is_dir() else ():
        if part.is_file() and not re.search(r"Acquire::Languages", part.read_text(errors="replace"), re.IGNORECASE):
            shutil.copy(part, parts)
    quoted = " ".join(f'"{language}";' for language in languages)
    (parts / "zz-languages").write_text(f"Acquire::Languages {{{quoted}}};\n")
    settings = {"Etc::parts": parts, "State::lists": lists.parent, "Cache::archives": archives.parent}
    lines = [f'Dir::{name} "{path}/";' for name, path in settings.items()]
    # Without root apt has no other user to drop to, and none is needed to write here.
    lines += [f'Dir::Cache::{name} "";' for name in ("pkgcache", "srcpkgcache")] + ['APT::Sandbox::User "";']
    path = directory / "apt.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def fetch_index(target: Path, languages: Sequence[str]) -> None:
    """Make the directory `target` with the texts `Packages` and `Translation-LANGUAGE` of this machine's sources.

    It appears complete or not at all. Raises DataError when apt is missing or fails, or a language has no file.
    """
    target = target.absolute()  # apt reads a relative directory as one below its own
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as name:
        work = Path(name)
        work.chmod(0o755)
        configuration = private_configuration(work / "apt", languages)
        # By default apt calls an update that left files out a success.
        _apt(configuration, "apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
        out = work / "index"
        out.mkdir()
        for kind in ("Packages", *(f"Translation-{language}" for language in languages)):
            found = sorted(path for path in (work / "apt" / "lists").iterdir() if _is_kind(path.name, kind))
            if not found:
                raise DataError(f"the sources of apt have no {kind}; check that they name a Debian mirror")
            with (out / kind).open("wb") as file:
                for path in found:
                    file.write(_apt(configuration, _HELPER, "cat-file", str(path)) + b"\n")
        out.rename(target)


def _is_kind(file: str, kind: str) -> bool:
    return re.search(rf"_(i18n_)?{re.escape(kind)}(\.\w+)?$", file) is not None


def _apt(configuration: Path, *command: str) -> bytes:
    environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
    return _command(list(command), configuration.parent, environment)


def _command(command: list[str], directory: Path, environment: dict[str, str]) -> bytes:
    try:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, check=True)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not on this machine; run on Debian") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise DataError(f"{Path(command[0]).name} failed ({lines[-1]}); try: apt-get update") from None
    return done.stdout
