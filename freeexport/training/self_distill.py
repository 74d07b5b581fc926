"""`--self-distill`: a model's own greedy outputs as targets, kept in a directory so that none is generated twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example, TextFormat, prompt_ids
from freeexport.system.jsonl import Request, append_lines, whole_lines
from freeexport.system.output import OutputError
from freeexport.system.progress import progress

# (checkpoint, prompts, most new tokens, directory for its own files) -> index and output of each prompt, as they come.
Generate = Callable[[Checkpoint, Sequence[np.ndarray], int, Path], Iterator[tuple[int, np.ndarray]]]
OUTPUTS, ABOUT = "outputs.jsonl", "outputs.json"
DEFAULT_NEW_TOKENS = 256
_AT_ONCE = 16  # outputs that are written together


class OwnOutputs:
    """Outputs of one model in the directory `path`: OUTPUTS has lines with `input`, `target` (the text of the output)
    and `target_ids`, in the order in which they were generated; ABOUT says by which model, and the limit of tokens.

    Raises OutputError where the directory holds outputs of another model or limit, or something else.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, form: TextFormat, new_tokens: int) -> None:
        self.path, self._checkpoint, self._form, self._new_tokens = path, checkpoint, form, new_tokens
        about = {"model": checkpoint.name, "sha256": checkpoint.sha256, "new_tokens": new_tokens}
        if (path / ABOUT).is_file():
            found = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            if changed := [name for name in ("sha256", "new_tokens") if found.get(name) != about[name]]:
                name = changed[0]
                raise OutputError(
                    f"{path} has outputs with {name} {str(found.get(name))[:12]}, not {str(about[name])[:12]}; "
                    "name another directory for --self-distill"
                )
        elif path.exists() and any(path.iterdir()):
            raise OutputError(f"{path} exists and holds no outputs of a model; name another directory")
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        self._ids: dict[str, list[int]] = {}
        for line in whole_lines(path / OUTPUTS):
            record = json.loads(line)
            self._ids[_key(record["input"])] = record["target_ids"]

    def generate(self, requests: Sequence[Request], data: Path, generate: Generate) -> None:
        """Generate the outputs that are missing, for inputs that leave room for one token."""
        missing = {_key(request.input): request for request in requests if _key(request.input) not in self._ids}
        wanted = list(missing.values())
        prompts = prompt_ids(wanted, self._form, data)
        room = [index for index, prompt in enumerate(prompts) if len(prompt) < self._form.limit]
        if not room:
            return
        pending: list[dict[str, Any]] = []
        done = len(requests) - len(wanted)
        chosen = [prompts[index] for index in room]
        try:
            with progress(f"own outputs for {data.name}", len(requests), done) as advance:
                for index, ids in generate(self._checkpoint, chosen, self._new_tokens, self.path):
                    request = wanted[room[index]]
                    self._ids[_key(request.input)] = ids.tolist()
                    text = self._form.tokenizer.decode(ids, skip_special_tokens=True)
                    pending.append({"input": request.input, "target": text, "target_ids": ids.tolist()})
                    if len(pending) >= _AT_ONCE:
                        append_lines(self.path / OUTPUTS, pending)
                        pending.clear()
                    advance()
        finally:
            append_lines(self.path / OUTPUTS, pending)

    def examples(self, requests: Sequence[Request], data: Path) -> list[Example]:
        """The prompts with their outputs, which end as the model ended them or at the limit of tokens."""
        prompts = prompt_ids(requests, self._form, data)
        found = []
        for request, prompt in zip(requests, prompts, strict=True):
            ids = self._ids.get(_key(request.input), [])
            found.append(Example(prompt, np.array(ids, np.int32), request.line_number))
        return found


def _key(text: str | list[dict[str, str]]) -> str:
    return json.dumps(text, sort_keys=True)
