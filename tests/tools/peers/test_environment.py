from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from runtime.machine.machine import user_cache
from tools.peers.environment import PeerError, environment_key, peer_interpreter


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(directory: Path) -> Path:
    """The smallest package that pip installs."""
    path = directory / "fake_decoder-1.0-py3-none-any.whl"
    info = "fake_decoder-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_decoder.py", "ANSWER = 42\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-decoder\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_keys_differ_by_what_is_built_and_not_by_order() -> None:
    key = environment_key(["a>=1", "b"], {})
    assert key == environment_key(["b", "a>=1"], {})
    assert key != environment_key(["a>=2", "b"], {})
    assert key != environment_key(["a>=1", "b"], {"CMAKE_ARGS": "-DX=1"})


def test_an_environment_is_built_once_and_has_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = [str(wheel(tmp_path))]
    python = peer_interpreter("fake", requirements, {})
    found = subprocess.run([python, "-E", "-c", "import fake_decoder; print(fake_decoder.ANSWER)"], capture_output=True)
    assert found.stdout == b"42\n"
    assert not list(python.parents[2].glob(".*partial*"))
    monkeypatch.setattr(subprocess, "run", None)
    assert peer_interpreter("fake", requirements, {}) == python


def test_a_package_that_cannot_be_installed_leaves_nothing_but_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], stdout: Any, **given: Any) -> None:
        if "install" in command:
            stdout.write("Looking\nERROR: No matching distribution for missing.whl\nnote: that was pip\n")
            stdout.flush()
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PeerError, match=r"cannot be built \(No matching .*missing\.whl\); see .*fake\.log"):
        peer_interpreter("fake", ["missing.whl"], {})
    assert not list(user_cache("peers", "environments").iterdir())
    assert user_cache("peers", "logs", "fake.log").is_file()


def test_an_installation_that_takes_too_long_is_ended() -> None:
    with pytest.raises(PeerError, match="not built within 0 s"):
        peer_interpreter("fake", ["anything"], {}, limit=0.01)
    assert not list(user_cache("peers", "environments").iterdir())


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert user_cache("peers") == cache / "freeexport" / "peers"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == Path.home() / ".cache" / "freeexport"
