"""`--self-distill`: a model's own greedy outputs as targets, kept in a directory so that none is generated twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example, TextFormat, prompt_ids
from freeexport.system.jsonl import Request, append_lines, whole_lines
from freeexport.system.output import OutputError
from freeexport.system.progress import progress
from runtime.json_file import read_object

# (checkpoint, prompts, most new tokens, directory for its own files) -> index and output of each prompt, as they come.
Generate = Callable[[Checkpoint, Sequence[np.ndarray], int, Path], Iterator[tuple[int, np.ndarray]]]
OUTPUTS, ABOUT = "outputs.jsonl", "outputs.json"


def own_examples(
    sets: Sequence[tuple[Path, Sequence[Request]]],
    checkpoint: Checkpoint,
    form: TextFormat,
    new_tokens: int,
    directory: Path,
    generate: Generate,
) -> list[list[Example]]:
    """The prompts of each set of lines with the model's output as target, which ends as the model ended it, or after
    `new_tokens`. An input that leaves no room for one has none, and is too long for training.

    Outputs that are not in `directory` are generated and added: OUTPUTS has lines with `input`, `target` (the text) and
    `target_ids`; ABOUT names the model and the limit. Raises OutputError where the directory holds outputs of another
    model or limit, or something else.
    """
    _open(directory, checkpoint, new_tokens)
    outputs: dict[str, list[int]] = {}
    for line in whole_lines(directory / OUTPUTS):
        record = json.loads(line)
        outputs[_key(record["input"])] = record["target_ids"]
    prompts = [prompt_ids(requests, form, path) for path, requests in sets]
    missing: dict[str, tuple[Request, np.ndarray]] = {}
    for (_, requests), found in zip(sets, prompts, strict=True):
        for request, prompt in zip(requests, found, strict=True):
            if _key(request.input) not in outputs and len(prompt) + (not form.seq2seq) <= form.limit:
                missing[_key(request.input)] = request, prompt
    if missing:
        wanted = list(missing.values())
        with progress("the model's own outputs", len(outputs) + len(wanted), len(outputs)) as advance:
            for index, ids in generate(checkpoint, [prompt for _, prompt in wanted], new_tokens, directory):
                text = str(form.tokenizer.decode(ids, skip_special_tokens=True))
                asked = wanted[index][0].input
                append_lines(directory / OUTPUTS, [{"input": asked, "target": text, "target_ids": ids.tolist()}])
                outputs[_key(asked)] = ids.tolist()
                advance()
    return [
        [
            Example(prompt, np.array(outputs.get(_key(request.input), [form.eos]), np.int32), request.line_number)
            for request, prompt in zip(requests, found, strict=True)
        ]
        for (_, requests), found in zip(sets, prompts, strict=True)
    ]


def _open(directory: Path, checkpoint: Checkpoint, new_tokens: int) -> None:
    """Make the directory, or check that its outputs are the model's."""
    about = {"model": checkpoint.name, "sha256": checkpoint.sha256, "new_tokens": new_tokens}
    path = directory / ABOUT
    remedy = "name another directory for --self-distill"
    if path.is_file():
        found = read_object(path, remedy, OutputError)
        for name in ("sha256", "new_tokens"):
            if found.get(name) != about[name]:
                raise OutputError(
                    f"{directory} has outputs with {name} {str(found.get(name))[:12]}, not {str(about[name])[:12]}; "
                    f"{remedy}"
                )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists and holds no outputs of a model; {remedy}")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _key(text: str | list[dict[str, str]]) -> str:
    return json.dumps(text, sort_keys=True)
