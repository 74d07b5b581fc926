"""Generate a model's own greedy outputs as training targets (`--self-distill`).

Outputs are kept in a directory and never generated twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example, Recording, TextFormat, example_of, prompts_of
from freeexport.system.jsonl import InputLine, append_lines, input_field, whole_lines
from freeexport.system.output import OutputError
from freeexport.system.progress import progress
from runtime.bundle.json_file import read_object

# Args: checkpoint, prompts, maximum number of new tokens, directory for temporary files. Yields the
# index and the output of each prompt, in order of completion.
Generate = Callable[[Checkpoint, Sequence[Any], int, Path], Iterator[tuple[int, np.ndarray]]]
OUTPUTS = "outputs.jsonl"
ABOUT = "outputs.json"


def own_examples(
    sets: Sequence[tuple[Path, Sequence[InputLine]]],
    checkpoint: Checkpoint,
    form: TextFormat,
    new_tokens: int,
    directory: Path,
    generate: Generate,
) -> list[list[Example]]:
    """Pair prompts with the model's own outputs as targets.

    A target ends as the model ended it, or after `new_tokens`. Inputs that leave no space for a
    target get only the end of sequence. Training drops them.

    Outputs missing from `directory` are generated and appended to it. Lines of OUTPUTS have
    `input`, or `audio` and the `digest` of its content, and `target` (the text) and `target_ids`.
    ABOUT records the model and the limit.

    Raises:
        OutputError: If the directory holds anything but outputs of this model with this limit.
    """
    _open(directory, checkpoint, new_tokens)
    outputs: dict[str, list[int]] = {}
    for line in whole_lines(directory / OUTPUTS):
        record = json.loads(line)
        outputs[record.get("digest") or _key(record["input"])] = record["target_ids"]
    prompts = [prompts_of(requests, form, path) for path, requests in sets]
    keys = [
        [
            one.digest if isinstance(one, Recording) else _key(request.input)
            for request, one in zip(*pair, strict=True)
        ]
        for pair in zip((requests for _, requests in sets), prompts, strict=True)
    ]
    missing: dict[str, tuple[InputLine, np.ndarray | Recording]] = {}
    for (_, requests), found, named in zip(sets, prompts, keys, strict=True):
        for request, prompt, key in zip(requests, found, named, strict=True):
            fits = form.speech is not None or len(prompt) + (not form.seq2seq) <= form.limit
            if key not in outputs and fits:
                missing[key] = request, prompt
    if missing:
        wanted = list(missing.values())
        names = list(missing)
        with progress(
            "the model's own outputs", len(outputs) + len(wanted), len(outputs)
        ) as advance:
            for index, ids in generate(
                checkpoint, [prompt for _, prompt in wanted], new_tokens, directory
            ):
                text = str(form.tokenizer.decode(ids, skip_special_tokens=True))
                request, prompt = wanted[index]
                digest = {"digest": prompt.digest} if isinstance(prompt, Recording) else {}
                record = {
                    **input_field(request),
                    **digest,
                    "target": text,
                    "target_ids": ids.tolist(),
                }
                append_lines(directory / OUTPUTS, [record])
                outputs[names[index]] = ids.tolist()
                advance()
    return [
        [
            example_of(prompt, outputs.get(key, [form.eos]), form, request)
            for request, prompt, key in zip(requests, found, named, strict=True)
        ]
        for (_, requests), found, named in zip(sets, prompts, keys, strict=True)
    ]


def _open(directory: Path, checkpoint: Checkpoint, new_tokens: int) -> None:
    """Create the directory, or check that its outputs are from this model, with any exit."""
    sha256 = checkpoint.sha256
    exit_file = checkpoint.exit
    if exit_file is not None and exit_file.has_parameters:
        sha256 = exit_file.base_sha256
    about = {"model": checkpoint.name, "sha256": sha256, "new_tokens": new_tokens}
    path = directory / ABOUT
    remedy = "name another directory for --self-distill"
    if path.is_file():
        found = read_object(path, remedy, OutputError)
        for name in ("sha256", "new_tokens"):
            if found.get(name) != about[name]:
                raise OutputError(
                    f"{directory} has outputs with {name} {str(found.get(name))[:12]}, not "
                    f"{str(about[name])[:12]}; {remedy}"
                )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists and holds no outputs of a model; {remedy}")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _key(text: object) -> str:
    return json.dumps(text, sort_keys=True)
