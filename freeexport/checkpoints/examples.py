"""Lines of data as token ids: how a checkpoint's text becomes ids, splits, and what is too long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError
from freeexport.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from freeexport.system.jsonl import BrokenLine, Request, read_requests
from graphs.description import Description
from runtime.errors import FreeExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS_WANTED = "give every line an input and a target"
_CHUNK = 4096  # texts a call of the tokenizer
_HASH_RANGE = 1 << 32


class DataError(FreeExportError):
    """Data is missing, empty or broken, or has nothing that a model could be trained on."""


@dataclass(frozen=True)
class Example:
    """Token ids, int32: `prompt` [n] as the model gets it, `target` [m] with its end-of-sequence id."""

    prompt: np.ndarray
    target: np.ndarray
    line: int


@dataclass(frozen=True)
class TextFormat:
    """The way from text to token ids. `limit` is the most tokens of a sequence that the model is trained on.

    Encoder-decoder models have the limit for prompt and target each, decoder-only ones for both together. `truncate`:
    prompts give way, at the end for an encoder, else at the beginning, where the target is farthest away. `begin`:
    tokens that every target begins with.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: int
    limit: int
    seq2seq: bool
    truncate: bool = False
    begin: tuple[int, ...] = ()

    def fits(self, example: Example) -> bool:
        prompt, target = len(example.prompt), len(example.target)
        return max(prompt, target) <= self.limit if self.seq2seq else prompt + target <= self.limit

    def cut(self, example: Example) -> Example:
        """With as much of the prompt as fits, and the special token at its other end; unchanged where only a shorter
        target would do."""
        room = self.limit if self.seq2seq else self.limit - len(example.target)
        prompt = example.prompt
        outer = prompt[-1:] if self.seq2seq else prompt[:1]
        outer = outer if outer[0] in self.tokenizer.all_special_ids else outer[:0]
        inner = room - len(outer)
        if len(prompt) <= room or inner < 1:
            return example
        parts = (prompt[:inner], outer) if self.seq2seq else (outer, prompt[-inner:])
        return replace(example, prompt=np.concatenate(parts))


def text_format(checkpoint: Checkpoint, description: Description, limit: int) -> TextFormat:
    """Sequences of at most `limit` ids, or the model's own limit. Raises CheckpointError without a tokenizer or an end
    of sequence, and for a model of speech."""
    if description.spectrogram is not None:
        raise CheckpointError(
            f"{checkpoint.name} reads speech, and examples of speech are not supported in training and measurements "
            "yet; convert it without"
        )
    if not has_tokenizer(checkpoint):
        raise CheckpointError(f"{checkpoint.name} has no tokenizer, which text needs; add its tokenizer files")
    tokenizer = load_tokenizer(checkpoint)
    ends = end_ids(checkpoint)
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if not ends:
        raise CheckpointError(f"{checkpoint.name} names no eos_token_id; add it to its generation_config.json")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    limit = min(limit, description.decoder.max_positions or limit)
    seq2seq, first = description.encoder is not None, forced(checkpoint.generation_config, "forced_bos_token_id")
    return TextFormat(tokenizer, int(end), limit, seq2seq, begin=(first,) if seq2seq and first is not None else ())


def forced(generation: Mapping[str, Any], name: str) -> int | None:
    """A token id of the generation settings; of a list the first."""
    given = generation.get(name)
    return (int(given[0]) if given else None) if isinstance(given, list) else given


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end a sequence, as the checkpoint's generation_config.json or config.json names them."""
    ends = checkpoint.generation_config.get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [] if ends is None else [int(ends)]


def known_ends(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    """Return those of `end_ids` that the vocabulary has."""
    return tuple(token for token in end_ids(checkpoint) if 0 <= token < vocab_size)


def read_examples(path: Path, limit: int | None = None, need_target: str = "") -> list[Request]:
    """The first `limit` lines of a JSONL file, or all. `need_target`: the remedy for a line without a target; "" where
    none is needed. Raises DataError for a broken line, with its number, and for an empty file."""
    requests = []
    for line in islice(read_requests(path), limit):
        if isinstance(line, BrokenLine):
            raise DataError(f"{path}, line {line.line_number}: {line.reason}; repair or remove the line")
        if need_target and line.target is None:
            raise DataError(f"{path}, line {line.line_number}: 'target' is missing; {need_target}")
        requests.append(line)
    if not requests:
        fields = "'input' and 'target'" if need_target else "'input'"
        raise DataError(f"{path} has no examples; give one JSON object with {fields} a line")
    return requests


def split(requests: Sequence[Request], share: float, path: Path) -> tuple[list[Request], list[Request]]:
    """(training, validation) by a hash of the input: about `share` of the inputs are validation, in every run and
    whatever else the file holds. Raises DataError where one of the two would be empty."""
    ranked = []
    for request in requests:
        text = json.dumps(request.input, sort_keys=True)
        ranked.append((int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"), request))
    lowest = min(rank for rank, _ in ranked)
    # A small file may have no hash below the share; then its lowest one stands for it.
    border = max(share * _HASH_RANGE, lowest + 1)
    training = [request for rank, request in ranked if rank >= border]
    if not training:
        raise DataError(f"{path} has one distinct input, and validation takes it; give more, or a --validation file")
    return training, [request for rank, request in ranked if rank < border]


def encode(requests: Sequence[Request], form: TextFormat, path: Path) -> tuple[list[Example], str | None]:
    """Examples in the order of the file, without those that do not fit, also when cut where `form` says so; and a line
    about those that were cut or left out. Raises DataError where none fits."""
    prompts, targets = prompt_ids(requests, form, path), list[list[int]]()
    for start in range(0, len(requests), _CHUNK):
        texts = [str(request.target) for request in requests[start : start + _CHUNK]]
        targets += _ids(form.tokenizer, texts, special=False, target=form.seq2seq)
    examples = [
        Example(prompt, np.array([*form.begin, *target, form.eos], np.int32), request.line_number)
        for request, prompt, target in zip(requests, prompts, targets, strict=True)
    ]
    return fitted(examples, form, path)


def prompt_ids(requests: Sequence[Request], form: TextFormat, path: Path) -> list[np.ndarray]:
    """The ids of the inputs, int32 [n] each. Raises DataError for an input without tokens."""
    prompts = list[list[int]]()
    for start in range(0, len(requests), _CHUNK):
        prompts += _prompts([request.input for request in requests[start : start + _CHUNK]], form.tokenizer)
    for request, prompt in zip(requests, prompts, strict=True):
        if not prompt:
            raise DataError(f"{path}, line {request.line_number}: 'input' has no tokens; give it some text")
    return [np.array(prompt, np.int32) for prompt in prompts]


def fitted(examples: list[Example], form: TextFormat, path: Path) -> tuple[list[Example], str | None]:
    """The examples that fit, cut where `form` says so; and a line about the others. DataError where none fits."""
    total, long = len(examples), sum(not form.fits(example) for example in examples)
    if not long:
        return examples, None
    if form.truncate:
        examples = [form.cut(example) for example in examples]
    left_out = [example for example in examples if not form.fits(example)]
    if len(left_out) == total:
        raise DataError(f"{path}: none of the {total} examples fits {form.limit} tokens; raise --max-tokens")
    notes = []
    if cut := long - len(left_out):
        notes.append(f"{cut} of {total} inputs are cut, so that examples have {form.limit} tokens")
    if left_out:
        notes.append(
            f"{len(left_out)} of {total} examples are longer than {form.limit} tokens and are left out (the first on "
            f"line {left_out[0].line}); raise --max-tokens if the model can take them"
        )
    return [example for example in examples if form.fits(example)], f"{path}: {'; '.join(notes)}"


def _prompts(inputs: Sequence[str | list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if all(isinstance(text, str) for text in inputs):
        return _ids(tokenizer, inputs, special=True)
    found = []
    for text in inputs:
        if not isinstance(text, str) and not tokenizer.chat_template:
            raise DataError("an input is a list of messages, but the tokenizer has no chat template; give text")
        if isinstance(text, str):
            found += _ids(tokenizer, [text], special=True)
        else:  # the template writes the special tokens itself
            written = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
            found += _ids(tokenizer, [str(written)], special=False)
    return found


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Any], special: bool, target: bool = False
) -> list[list[int]]:
    # Marian has another SentencePiece model for targets.
    given = {"text_target" if target else "text": list(texts)}
    # `verbose` warns of texts longer than the tokenizer's own limit, which is not ours.
    encoded = tokenizer(**given, add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
