"""Files on the Hugging Face hub: names, downloads into its cache, and errors on one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runtime.bundle.bundle import sha256_of, snapshot_repository
from runtime.bundle.json_file import read_text
from runtime.bundle.manifest import LARGEST_MANIFEST, MANIFEST, Manifest
from runtime.errors import FreeExportError, HubError, OptionError, one_line, shown

INSTALL = "pip install 'freeexport[hub]'"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w][\w./-]*))?", re.ASCII)
LONGEST_REVISION = 255  # characters


class HubName(NamedTuple):
    """A repository of the hub.

    Attributes:
        repository: Its name, "owner/name".
        revision: Branch, tag or commit. None: the default branch.
    """

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Parse "owner/name" or "owner/name@revision". None for any other text.

        Raises:
            HubError: If the revision is too long.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        if len(match[2] or "") > LONGEST_REVISION:
            raise HubError(
                f"{match[1]}: the revision {shown(match[2])} has {len(match[2])} characters, more "
                f"than {LONGEST_REVISION}; give a branch, a tag or a commit"
            )
        return cls(match[1], match[2])


def import_hub(name: HubName) -> Any:
    """Import and return huggingface_hub.

    Args:
        name: What it is needed for.

    Raises:
        HubError: If it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(
            f"{name.repository} on the hub needs the package huggingface_hub; run: {INSTALL}"
        ) from None
    return huggingface_hub


def bundle_name(bundle: Path) -> str:
    """Return the name of a bundle: of its directory, or of its repository in the hub's cache."""
    path = bundle.resolve()
    repository = snapshot_repository(path)
    return path.name if repository is None else repository.name.rpartition("--")[2]


def find_bundle(
    bundle: Path | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: Path | str | None = None,
) -> Path:
    """Return the directory of a bundle, which is downloaded if it is on the hub.

    Only the files that its manifest lists are downloaded, into the hub's cache. Their sizes and
    hashes are checked once, and an altered file is deleted again. Files in the cache are reused, so
    an interrupted download continues with the files that are missing.

    Args:
        bundle: A directory, or "owner/name" or "owner/name@revision" on the hub. An existing path
            is preferred. Other paths are returned unchanged.
        revision: Branch, tag or commit. Default: the default branch.
        token: Access token, or False to send none. Default: the one of `hf auth login`.
        local_files_only: Only search the cache.
        cache_dir: The cache. Default: that of huggingface_hub, see HF_HOME.

    Raises:
        HubError: If a file cannot be downloaded, or is altered.
        BundleError: If the manifest is not valid.
        OptionError: If `revision` is given for a local path, or twice.
    """
    named = None if os.path.lexists(bundle) else HubName.parse(str(bundle))
    known = None if named is None else named.revision
    if revision is not None and (named is None or known is not None):
        where = "names one already" if known is not None else "is a path"
        raise OptionError(f"revision is {shown(revision)}, but {bundle} {where}; leave it out")
    if named is None:
        return Path(bundle)
    fetch = partial(hub_file, token=token, local_files_only=local_files_only, cache_dir=cache_dir)
    listing = fetch(HubName(named.repository, revision or known), MANIFEST)
    # The folder of a snapshot has the name of its commit.
    snapshot = listing.parent
    commit = HubName(named.repository, snapshot.name)
    manifest = Manifest.from_json(
        read_text(listing, LARGEST_MANIFEST), f"{named.repository}: {MANIFEST}"
    )
    for name, file in manifest.files.items():
        if (snapshot / name).exists():
            continue
        path = fetch(commit, name)
        if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            if path.is_symlink():  # to the blob
                (path.parent / os.readlink(path)).unlink(missing_ok=True)
            path.unlink()
            raise HubError(
                f"{name} of {named.repository} differs from its manifest (size or sha256), and was "
                "deleted from the cache; try again, or ask its owner to push the bundle again"
            )
    return snapshot


def hub_file(
    named: HubName,
    file: str,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: Path | str | None = None,
) -> Path:
    """Return the path of a file in the hub's cache, into which it is downloaded if missing.

    Raises:
        HubError: If it cannot be downloaded.
    """
    hub = import_hub(named)
    name, revision = named
    with hub_errors(named, f"{file} cannot be downloaded"):
        if not local_files_only and not isinstance(
            hub.try_to_load_from_cache(name, file, cache_dir, revision), str
        ):
            _check_reachable(hub, named, file, token)
        return Path(
            hub.hf_hub_download(
                name,
                file,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                library_name="freeexport",
            )
        )


def _check_reachable(hub: Any, named: HubName, file: str, token: str | bool | None) -> None:
    """Ask the hub once about a file. A download would ask six times, with a warning each time.

    Raises:
        HubError: If there is no answer. Answers with an error are left to the download.
    """
    from huggingface_hub import errors

    name, revision = named
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file, revision=revision), token=token)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
        pass
    except Exception as error:  # of the HTTP library, which depends on the version
        raise HubError(f"{name} is not in the cache, and {_unreachable(error)}") from None


@contextmanager
def hub_errors(named: HubName, failed: str) -> Iterator[None]:
    """Context manager: turns the errors of huggingface_hub into HubError.

    Args:
        named: The repository.
        failed: What failed, for errors without a known cause.
    """
    from huggingface_hub import errors

    name, revision = named
    try:
        yield
        return
    except FreeExportError:
        raise
    except errors.GatedRepoError:
        why = f"{name} is gated; accept its terms on the hub, and log in: hf auth login"
    except errors.RepositoryNotFoundError as error:
        why = (
            f"the hub has no {name} that this token can read (status "
            f"{error.response.status_code}), and there is no such path; check the name, or log in: "
            "hf auth login"
        )
    except errors.RevisionNotFoundError:
        why = f"{name} has no revision {revision}; give a branch, a tag or a commit"
    except errors.LocalEntryNotFoundError as error:
        why = f"{name} is not in the cache, and {_unreachable(error.__cause__)}"
    except errors.EntryNotFoundError as error:
        why = f"{name}: {failed}: {one_line(error)}"
        if MANIFEST in failed:
            why = f"{name} is not a bundle: it has no {MANIFEST}; convert the checkpoint to one"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "log in: hf auth login" if status in (401, 403) else "try again later"
        why = f"{name}: {failed}: the hub answers with status {status}; {remedy}"
    except errors.OfflineModeIsEnabled as error:
        why = f"{name}: {failed}: {_unreachable(error)}"
    except Exception as error:  # also of the HTTP library, which depends on the version
        why = f"{name}: {failed}: {one_line(error)}; try again"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"{name}: {failed}: the disk is full; free some space and try again"
    raise HubError(why) from None


def _unreachable(cause: BaseException | None) -> str:
    """Explain why the hub was not asked, or did not answer."""
    from huggingface_hub import errors

    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE, or local_files_only); turn it off"
    return f"the hub cannot be reached ({one_line(cause)}); check the network, and try again"
