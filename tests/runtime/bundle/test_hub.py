"""Bundles from the Hugging Face hub, against a stand-in of its HTTP interface."""

from __future__ import annotations

import builtins
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from hub_stand_in import TOKEN, HubStandIn, hub_stand_in

from runtime import Bundle, BundleError, HubError, OptionError, Session
from runtime.bundle.hub import HubName, bundle_name, find_bundle
from runtime.bundle.manifest import MANIFEST

NAME = "ada/tiny-llama"
FOLDER = "models--ada--tiny-llama"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path, bundle: Bundles) -> Iterator[HubStandIn]:
    """A hub with one bundle, for a client without a token."""
    with hub_stand_in(monkeypatch, cache, token=None) as server:
        server.add(NAME, bundle(BY_NAME["llama-tied"]))
        yield server


def refusal(name: str = NAME, **options: Any) -> str:
    with pytest.raises(HubError) as refused:
        find_bundle(name, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def downloads(hub: HubStandIn) -> list[str]:
    """Names of the files whose bodies were sent."""
    return [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_session_from_a_hub_name_matches_the_local_bundle(hub: HubStandIn, bundle: Bundles, cache: Path) -> None:
    local = bundle(BY_NAME["llama-tied"])
    hub.repositories[NAME].commit("main", {"other.bin": b"x" * 2000})
    with Session(local, threads=1) as session, Session.from_pretrained(NAME, threads=1, verify="full") as loaded:
        assert loaded.bundle.path.parents[1] == cache / FOLDER
        assert (loaded.bundle.path / MANIFEST).is_symlink()
        expected = session.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids
        assert loaded.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids == expected
        assert bundle_name(loaded.bundle.path) == "tiny-llama"
    # Only what the manifest lists is downloaded, and nothing again.
    assert sorted(downloads(hub)) == sorted([MANIFEST, *loaded.manifest.files])
    hub.requests.clear()
    with Session.from_pretrained(NAME, threads=1):
        assert downloads(hub) == []
    with Session.from_pretrained(local, threads=1) as session:
        assert session.bundle.path == local


def test_revision_can_be_a_branch_or_a_commit(hub: HubStandIn, bundle: Bundles) -> None:
    repository = hub.repositories[NAME]
    first = repository.branches["main"]
    hub.add(NAME, bundle(BY_NAME["llama-tied"], 2), branch="two")
    for name, revision, layer in (
        (NAME, None, 1),
        (NAME, "two", 2),
        (f"{NAME}@two", None, 2),
        (f"{NAME}@{first}", None, 1),
    ):
        assert Bundle.open(find_bundle(name, revision=revision)).manifest.exit_layer == layer
    assert refusal(revision="three") == f"{NAME} has no revision three; give a branch, a tag or a commit"
    for name, why in ((f"{NAME}@two", "names one already"), ("no/such/path", "is a path")):
        with pytest.raises(OptionError, match=f"revision is 'two', but {name} {why}; leave it out"):
            find_bundle(name, revision="two")


def test_a_private_repository_needs_a_token(hub: HubStandIn) -> None:
    hub.repositories[NAME].private = True
    line = f"the hub has no {NAME} that this token can read (status 401), and there is no such path; check the name, "
    assert refusal() == f"{line}or log in: hf auth login"
    assert refusal(token="hf_wrong") == f"{line}or log in: hf auth login"
    assert Bundle.open(find_bundle(NAME, token=TOKEN)).manifest.exit_layer == 1
    assert "(status 404)" in refusal("ada/other", token=TOKEN)


def test_repository_without_a_bundle_is_refused(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub.add("ada/checkpoint", tmp_path)
    found = refusal("ada/checkpoint")
    assert found == f"ada/checkpoint is not a bundle: it has no {MANIFEST}; convert the checkpoint to one"
    (tmp_path / MANIFEST).write_text('{"files": {"../outside": {}}}')
    hub.add("ada/checkpoint", tmp_path)
    with pytest.raises(BundleError, match=f"^ada/checkpoint: {MANIFEST}"):
        find_bundle("ada/checkpoint")


def test_offline_mode_uses_only_the_cache(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    path = find_bundle(NAME)
    empty = tmp_path / "empty"
    hub.requests.clear()
    assert find_bundle(NAME, local_files_only=True) == path
    off = f"{NAME} is not in the cache, and offline mode is on (HF_HUB_OFFLINE, or local_files_only); turn it off"
    assert refusal(local_files_only=True, cache_dir=empty) == off
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find_bundle(NAME) == path
        assert refusal(cache_dir=empty) == off
    assert hub.requests == []
    (path / "deep.onnx").unlink()
    assert refusal(local_files_only=True) == off


def test_network_failure_falls_back_to_the_cache_without_retries(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    path = find_bundle(NAME)
    # Nobody listens there.
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    assert find_bundle(NAME) == path
    found = refusal(cache_dir=tmp_path / "empty")
    assert re.fullmatch(
        rf"{NAME} is not in the cache, and the hub cannot be reached \(.+\); check the network, and try again", found
    )
    assert capfd.readouterr().err == ""


def test_interrupted_connection_is_resumed(hub: HubStandIn, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # more than one in a tiny file
    hub.cut = 2
    path = find_bundle(NAME)
    assert Bundle.open(path, "full").sha256 == Bundle.open(bundle(BY_NAME["llama-tied"])).sha256
    assert [given for _, _, given in hub.requests if given is not None]
    assert hub.cut == 0


def test_an_interrupted_download_continues_with_the_missing_files(
    hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    find_bundle(NAME)
    complete = sorted(path.name for path in (cache / FOLDER / "blobs").iterdir())
    shutil.rmtree(cache)
    hub.requests.clear()
    handler: Any = hub.RequestHandlerClass
    served = handler._send

    def cut(self: Any, status: int, content: bytes, headers: Any = None, body: bool = True) -> None:
        if self.path.endswith("/weights.data") and self.command == "GET":
            self.close_connection = True  # sends nothing at all
            return
        served(self, status, content, headers, body)

    with monkeypatch.context() as patch:
        patch.setattr(handler, "_send", cut)
        found = refusal()
    assert re.fullmatch(rf"{NAME}: weights.data cannot be downloaded: .+; try again", found)
    blobs = sorted(path.name for path in (cache / FOLDER / "blobs").iterdir())
    assert blobs
    assert set(blobs) < set(complete)  # nothing half-written
    before = downloads(hub)
    hub.requests.clear()
    path = find_bundle(NAME)
    assert set(downloads(hub)).isdisjoint(set(before) - {"weights.data"})
    assert Bundle.open(path, "full")


def test_altered_file_is_refused_and_deleted(hub: HubStandIn, cache: Path) -> None:
    hub.altered = "weights.data"
    for _ in range(2):
        assert refusal() == (
            f"weights.data of {NAME} differs from its manifest (size or sha256), and was deleted from the cache; "
            "try again, or ask its owner to push the bundle again"
        )
        assert not list(cache.glob("*/snapshots/*/weights.data"))
    hub.altered = ""
    assert Bundle.open(find_bundle(NAME), "full")


def test_full_disk_gives_a_one_line_error_and_no_partial_file(
    hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    class Full:
        """A file that has room for nothing."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    def full(self: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        file = opened(self, mode, *given, **options)
        return Full(file) if "incomplete" in self.name and "r" not in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        found = refusal()
    assert found == f"{NAME}: {MANIFEST} cannot be downloaded: the disk is full; free some space and try again"
    assert [path for path in cache.rglob("*incomplete*") if path.stat().st_size] == []
    assert Bundle.open(find_bundle(NAME), "full")


def test_cache_links_outside_the_cache_are_refused(
    hub: HubStandIn, cache: Path, tmp_path: Path, bundle: Bundles
) -> None:
    path = find_bundle(NAME)
    blob = (path / "weights.data").resolve()
    # As huggingface_hub shares files between repositories.
    shared = cache / "blobs" / "ab" / "cdef"
    shared.parent.mkdir(parents=True)
    shutil.move(blob, shared)
    blob.symlink_to(Path("../../blobs/ab/cdef"))
    with Session(path, threads=1, verify="full") as session:
        assert session.generate(list(PROMPTS[0]), max_new_tokens=4).token_ids
    for place in (tmp_path / "outside", cache / "models--eve--other" / "blobs" / "x", cache / FOLDER / "blobs-of-eve"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle(BY_NAME["llama-tied"]) / "weights.data", place)
        (path / "weights.data").unlink()
        (path / "weights.data").symlink_to(place)
        with pytest.raises(BundleError) as refused:
            Bundle.open(path)
        assert str(refused.value) == (
            f"weights.data is a symbolic link to {place}, which is outside of the cache of {FOLDER}; delete "
            f"{cache / FOLDER} and download the bundle again"
        )


def test_local_bundles_load_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, bundle: Bundles) -> None:
    imported = builtins.__import__

    def without(name: str, *given: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refusal() == f"{NAME} on the hub needs the package huggingface_hub; run: pip install 'freeexport[hub]'"
    assert find_bundle(bundle(BY_NAME["llama-tied"]))


def test_hub_names_are_recognized() -> None:
    assert HubName.parse("ada/tiny-llama.v2") == HubName("ada/tiny-llama.v2", None)
    assert HubName.parse("ada/tiny@refs/pr/1") == HubName("ada/tiny", "refs/pr/1")
    assert HubName.parse(f"ada/tiny@{'a' * 255}") is not None
    for text in ("tiny", "a/b/c", "./tiny", "../tiny", "/tiny", "ada/", "ada/..", "ada/t y", "ada/tiny@", "a/b@-x"):
        assert HubName.parse(text) is None, text


def test_overlong_name_is_refused_in_one_line() -> None:
    for length in (256, 5000):
        shown = "'" + "a" * 76 + "..."
        assert refusal(f"{NAME}@{'a' * length}") == (
            f"{NAME}: the revision {shown} has {length} characters, more than 255; give a branch, a tag or a commit"
        )
    for path in ("a" * 5000, "a/b/" + "c" * 300):
        with pytest.raises(BundleError, match=r"^no bundle at [^\n]*$"):
            Session.from_pretrained(path)


def test_environment_sets_the_endpoint_and_offline_mode(hub: HubStandIn, cache: Path) -> None:
    code = f"from runtime.bundle.hub import find_bundle; print(find_bundle({NAME!r}))"
    variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parents[1] == cache / FOLDER
