"""Publishes bundles and exits on the Hugging Face hub, each with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from freeexport import __version__
from freeexport.checkpoints.packed_exit import read_packed
from freeexport.checkpoints.ready_made import HUB_EXIT
from freeexport.system.page import human_bytes
from freeexport.system.sheet import Sheet, markdown
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import MANIFEST
from runtime.errors import OptionError, shown
from runtime.hub import HubName, hub_errors, import_hub
from runtime.json_file import UnreadableError, parse_json, read_text

CARD = "README.md"
# Files in the output of `freeexport evaluate`.
RESULTS = "evaluation.json"
RESULTS_PAGE = "results.md"
RESULTS_FILES = (RESULTS, RESULTS_PAGE)
LARGEST_RESULTS = 16 << 20  # bytes
BUNDLE_CARD = """\
ONNX engines of a language model with an early exit, for freeexport.

{table}

## Use

`pip install 'freeexport[{extra},hub]'`, then

```python
from freeexport import Session

with Session.from_pretrained({arguments}) as session:
    result = session.generate("{prompt}")
    print(result.text)
```
"""
EXIT_CARD = """\
An early exit of a language model, for freeexport.

{table}

## Use

Convert the base model, MODEL, with this exit:

```sh
pip install 'freeexport[cpu,convert,hub]'
freeexport convert MODEL bundle --precision int8 --exit {name}
freeexport generate bundle "Once upon a time"
```
"""


@dataclass(frozen=True)
class PushOptions:
    """Options of `freeexport push`, which freeexport/commands/push.py describes."""

    private: bool = False
    revision: str | None = None
    license: str | None = None
    base_model: str | None = None
    results: Path | None = None


@dataclass(frozen=True)
class Publication:
    """Content of a repository on the hub.

    Attributes:
        files: Files by their names in the repository.
        base: Recorded name of the base model.
        pipeline_tag: Task of the model on the hub.
        body: Text of the model card, below its title.
        licence: Licence, if known.
        sha256: Hash of the manifest of a bundle.
    """

    files: dict[str, Path]
    base: str
    pipeline_tag: str
    body: str
    licence: str | None = None
    sha256: str | None = None


def push(source: Path, target: str, options: PushOptions) -> str:
    """Upload a bundle, or the file of an exit, in one commit. Return the address of the commit.

    Of a bundle, only the files that its manifest lists are uploaded.

    Args:
        source: Directory of the bundle, or the file.
        target: "owner/name" on the hub. The repository is created if there is none.
        options: Options of the push.

    Raises:
        BundleError: If the bundle is not valid.
        CheckpointError: If the exit is not valid.
        OptionError: If an option is not valid.
        HubError: If the hub refuses the upload or cannot be reached.
    """
    named = HubName.parse(target)
    if named is None or named.revision is not None:
        raise OptionError(
            f"{shown(target)} is not a repository of the hub; give owner/name, and a branch with "
            "--revision"
        )
    named = HubName(named.repository, options.revision)
    hub = import_hub(named)
    found = _exit(source, named) if source.is_file() else _bundle(source, named)
    contents = {} if options.results is None else _results(options.results, found.sha256)
    base = options.base_model or (found.base if HubName.parse(found.base) is not None else None)
    licence = options.license or found.licence
    api = hub.HfApi(library_name="freeexport", library_version=__version__)
    with hub_errors(named, "the push failed"):
        api.create_repo(named.repository, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(named.repository, branch=options.revision, exist_ok=True)
        if licence is None and base is not None:
            with suppress(Exception):  # the base is private, or has no card
                licence = api.model_info(base).card_data.license
        facts = hub.ModelCardData(
            base_model=base,
            library_name="freeexport",
            license=None if licence is None else licence.lower(),
            pipeline_tag=found.pipeline_tag,
            tags=["onnx", "early-exit"],
        )
        page = contents.pop(RESULTS_PAGE, None)
        results = "" if page is None else f"\n## Results\n\n{page.strip()}\n"
        title = named.repository.partition("/")[2]
        contents[CARD] = f"---\n{facts.to_yaml()}\n---\n\n# {title}\n\n{found.body}{results}"
        commit = api.create_commit(
            named.repository,
            [
                *(hub.CommitOperationAdd(name, str(path)) for name, path in found.files.items()),
                *(hub.CommitOperationAdd(name, text.encode()) for name, text in contents.items()),
            ],
            commit_message=f"Push {source.resolve().name} with freeexport {__version__}",
            revision=options.revision,
        )
    return str(commit.commit_url)


def _bundle(path: Path, named: HubName) -> Publication:
    """Check a bundle, with the hashes of its files, and describe it."""
    bundle = Bundle.open(path, verify="full")
    manifest = bundle.manifest
    if manifest.speech is not None:
        task, prompt = "automatic-speech-recognition", "talk.wav"
    elif manifest.languages is not None:
        task, prompt = "translation", "Hello."
    else:
        task = "text2text-generation" if manifest.encoder_decoder else "text-generation"
        prompt = "Once upon a time"
    exit = f"after layer {manifest.exit_layer} of {manifest.layers}"
    if manifest.ready_made_exit is not None:
        exit += f", the ready-made exit {manifest.ready_made_exit.name}"
    elif manifest.exit_trained is not None:
        exit += ", trained for it" if manifest.exit_trained else ", not trained for it"
    calibration = bundle.calibration
    threshold = "not calibrated: decoding is lossless by default"
    if calibration is not None:
        threshold = (
            f"threshold {manifest.threshold:.4g}, by the rule {calibration.method}; the exit "
            f"predicts {calibration.agreement:.1%} of the full model's tokens"
        )
    size = human_bytes(sum(file.size for file in manifest.files.values()))
    facts = {
        "base model": manifest.source,
        "family": manifest.family,
        "precision": f"{manifest.precision}, for {manifest.target}",
        "exit": exit,
        "calibration": threshold,
        "verified against the base": "yes" if manifest.verified else "no",
        "size": size,
    }
    where = "" if named.revision is None else f', revision="{named.revision}"'
    body = BUNDLE_CARD.format(
        table=_table(facts),
        extra="cpu" if manifest.target == "cpu" else "gpu",
        arguments=f'"{named.repository}"{where}',
        prompt=prompt,
    )
    return Publication(
        files={name: path / name for name in (MANIFEST, *manifest.files)},
        base=manifest.source,
        pipeline_tag=task,
        body=body,
        sha256=bundle.sha256,
    )


def _exit(path: Path, named: HubName) -> Publication:
    """Check the file of an exit, and describe it."""
    packed = read_packed(path).about
    facts = {
        "base model": packed.model,
        "family": packed.family,
        "exit": f"{packed.name}, after layer {packed.exit.exit_layer}",
        "data": packed.data,
        "recipe": packed.recipe,
        "results": packed.results,
        "licence": packed.licence,
    }
    if packed.agreement is not None:
        facts["agrees with the base on"] = f"{packed.agreement:.1%} of its tokens"
    where = "" if named.revision is None else f"@{named.revision}"
    body = EXIT_CARD.format(table=_table(facts), name=f"{named.repository}{where}")
    return Publication(
        files={HUB_EXIT: path},
        base=packed.model,
        pipeline_tag="text-generation",
        body=body,
        licence=packed.licence,
    )


def _table(facts: Mapping[str, str]) -> str:
    """Return a table of names and values in Markdown."""
    rows = tuple((name, " ".join(text.split())) for name, text in facts.items())
    return markdown(Sheet("", ("", ""), rows))


def _results(directory: Path, sha256: str | None) -> dict[str, str]:
    """Return the page and the JSON of an evaluation, by their names.

    Args:
        directory: Output of `freeexport evaluate`.
        sha256: Hash of the bundle's manifest. None skips the comparison.
    """
    try:
        text = {name: read_text(directory / name, LARGEST_RESULTS) for name in RESULTS_FILES}
        report = parse_json(text[RESULTS], nan=True)
    except UnreadableError as error:
        raise OptionError(
            f"--results {directory}: {RESULTS} or {RESULTS_PAGE} cannot be read ({error}); give "
            "the --output of freeexport evaluate"
        ) from None
    bundles = report.get("bundles") if isinstance(report, dict) else None
    if sha256 is not None and isinstance(bundles, dict):
        found = (each.get("manifest_sha256") for each in bundles.values() if isinstance(each, dict))
        if sha256 not in found:
            raise OptionError(
                f"--results {directory} are about other bundles ({', '.join(bundles)[:100]}); "
                "evaluate this one"
            )
    return text
