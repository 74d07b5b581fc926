"""Examples from lines of data: token ids, recordings of speech, splits, and length limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError
from freeexport.checkpoints.special_tokens import end_ids, forced, speech_of
from freeexport.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from freeexport.system.jsonl import BrokenLine, InputLine, read_requests
from graphs.description import Description
from runtime.bundle.json_file import UnreadableError, read_bytes
from runtime.bundle.manifest import Speech
from runtime.errors import FreeExportError, PromptError, shown
from runtime.speech.audio import LARGEST_WAV, RATE, log_mel, read_audio, window
from runtime.speech.windows import FRAMES_A_POSITION, SECONDS_A_TIMESTAMP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS_WANTED = "give every line an input, or audio, and a target"
_CHUNK = 4096  # texts per call of the tokenizer
MOST_UNWRITABLE = 0.5  # share of the targets. With more, no training gives correct outputs.
_SHOWN = 40  # characters of an example in a message
_HASH_RANGE = 1 << 32


class DataError(FreeExportError):
    """Data is missing, empty or broken, or contains nothing to train on."""


@dataclass(frozen=True)
class Recording:
    """A WAV file of one window of sound, read again at every use.

    Attributes:
        path: Path of the file.
        digest: Hash of the file's content.
        language: Code of the spoken language.
        bins: Number of bins of the spectrogram.
        rows: Number of positions that the encoder produces.
    """

    path: Path
    digest: str
    language: str
    bins: int
    rows: int

    def __len__(self) -> int:
        """Return the number of positions of the encoder, including silence."""
        return self.rows

    def features(self) -> np.ndarray:
        """Return the spectrogram, float32 [bins, 2 rows]."""
        mels = log_mel(read_audio(self.path), self.bins)
        whole: np.ndarray = window(mels, 0, FRAMES_A_POSITION * self.rows)[0]
        return whole


@dataclass(frozen=True)
class Example:
    """A prompt and its target.

    Attributes:
        prompt: Token ids int32 [n] as the model reads them, or a Recording.
        target: Token ids int32 [m], including the end of sequence.
        line: Line number in the file.
        given: Number of tokens at the start of the target that are not predicted.
    """

    prompt: Any
    target: np.ndarray
    line: int
    given: int = 0


@dataclass(frozen=True)
class TextFormat:
    """Conversion of text to token ids, and the length limit of training sequences.

    Attributes:
        tokenizer: The tokenizer.
        eos: Token that ends a target.
        limit: Maximum number of tokens. Applies to prompt and target separately for encoder-decoder
            models, and to their sum for decoder-only models.
        seq2seq: The model is an encoder-decoder.
        truncate: Cut long prompts, at the end for an encoder. For a decoder at the beginning, which
            is farthest from the target.
        begin: Tokens that every target begins with.
        speech: Tokens of a speech model, or None for a model of text.
        bins: Speech: number of bins of the spectrogram.
        rows: Speech: number of positions of the encoder.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: int
    limit: int
    seq2seq: bool
    truncate: bool = False
    begin: tuple[int, ...] = ()
    speech: Speech | None = None
    bins: int = 0
    rows: int = 0

    def fits(self, example: Example) -> bool:
        prompt = 0 if self.speech else len(example.prompt)
        target = len(example.target)
        return max(prompt, target) <= self.limit if self.seq2seq else prompt + target <= self.limit

    def cut(self, example: Example) -> Example:
        """Cut the prompt to fit, but keep a special token at the end that is cut.

        Returns the example unchanged if only a shorter target would fit.
        """
        room = self.limit if self.seq2seq else self.limit - len(example.target)
        prompt = example.prompt
        assert isinstance(prompt, np.ndarray)
        outer = prompt[-1:] if self.seq2seq else prompt[:1]
        outer = outer if outer[0] in self.tokenizer.all_special_ids else outer[:0]
        inner = room - len(outer)
        if len(prompt) <= room or inner < 1:
            return example
        parts = (prompt[:inner], outer) if self.seq2seq else (outer, prompt[-inner:])
        return replace(example, prompt=np.concatenate(parts))


def text_format(checkpoint: Checkpoint, description: Description, limit: int) -> TextFormat:
    """Return the format of sequences of at most `limit` tokens, or the model's own limit if lower.

    Raises:
        CheckpointError: If the checkpoint has no tokenizer or defines no end of sequence.
    """
    sound = description.spectrogram
    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer, which text needs; add its tokenizer files"
        )
    tokenizer = load_tokenizer(checkpoint)
    ends = end_ids(checkpoint)
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if not ends:
        raise CheckpointError(
            f"{checkpoint.name} names no eos_token_id; add it to its generation_config.json"
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    limit = min(limit, description.decoder.max_positions or limit)
    seq2seq = description.encoder is not None
    first = forced(checkpoint.generation_config, "forced_bos_token_id")
    form = TextFormat(
        tokenizer, int(end), limit, seq2seq, begin=(first,) if seq2seq and first is not None else ()
    )
    if sound is None:
        return form
    return replace(
        form, speech=speech_of(checkpoint, description), bins=sound.bins, rows=sound.positions.count
    )


def read_examples(path: Path, limit: int | None = None, need_target: str = "") -> list[InputLine]:
    """Read the first `limit` lines of a JSONL file. Default: all lines.

    Args:
        path: Path of the file.
        limit: Maximum number of lines.
        need_target: Advice for a line without a target. Default: targets are optional.

    Raises:
        DataError: If a line is broken, or the file is empty.
    """
    requests = []
    for line in islice(read_requests(path), limit):
        if isinstance(line, BrokenLine):
            raise DataError(
                f"{path}, line {line.line_number}: {line.reason}; repair or remove the line"
            )
        if need_target and line.target is None:
            raise DataError(f"{path}, line {line.line_number}: 'target' is missing; {need_target}")
        requests.append(line)
    if not requests:
        fields = "'input' and 'target'" if need_target else "'input'"
        raise DataError(f"{path} has no examples; give one JSON object with {fields} a line")
    return requests


def split(
    requests: Sequence[InputLine], share: float, path: Path
) -> tuple[list[InputLine], list[InputLine]]:
    """Split requests into training and validation by a hash of the input.

    About `share` of the inputs are used for validation. An input is always on the same side,
    whatever else the file contains.

    Raises:
        DataError: If there would be no training examples.
    """
    ranked = []
    for request in requests:
        text = (
            str(request.input)
            if isinstance(request.input, Path)
            else json.dumps(request.input, sort_keys=True)
        )
        ranked.append(
            (int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"), request)
        )
    lowest = min(rank for rank, _ in ranked)
    # In a small file no hash may be below the share. The lowest one is then used for validation.
    border = max(share * _HASH_RANGE, lowest + 1)
    training = [request for rank, request in ranked if rank >= border]
    if not training:
        raise DataError(
            f"{path} has one distinct input, and validation takes it; give more, or a "
            "--validation file"
        )
    return training, [request for rank, request in ranked if rank < border]


def encode(
    requests: Sequence[InputLine], form: TextFormat, path: Path
) -> tuple[list[Example], str | None]:
    """Return the examples that fit, in order, and a message about those cut or left out, or None.

    Raises:
        DataError: If none fits.
    """
    prompts = prompts_of(requests, form, path)
    targets = list[list[int]]()
    for start in range(0, len(requests), _CHUNK):
        texts = [str(request.target) for request in requests[start : start + _CHUNK]]
        if form.speech is not None:  # transcripts begin with a space
            texts = [f" {text.strip()}" for text in texts]
        targets += _ids(form.tokenizer, texts, special=False, target=form.seq2seq)
    examples = [
        example_of(prompt, [*form.begin, *target, form.eos], form, request)
        for request, prompt, target in zip(requests, prompts, targets, strict=True)
    ]
    return fitted(examples, form, path)


def unwritable(requests: Sequence[InputLine], form: TextFormat, path: Path) -> str | None:
    """Find targets that the tokenizer cannot reproduce, ignoring spaces.

    No output can equal such a target. An example is JSON in the vocabulary of T5, which has no
    braces. Returns a message with their number and an example, or None.

    Raises:
        DataError: If they are more than MOST_UNWRITABLE of the targets.
    """
    count = 0
    example = ""
    for start in range(0, len(requests), _CHUNK):
        part = requests[start : start + _CHUNK]
        texts = [" ".join(str(request.target).split()) for request in part]
        ids = _ids(form.tokenizer, texts, special=False, target=form.seq2seq)
        given = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        written = [" ".join(text.split()) for text in form.tokenizer.batch_decode(ids, **given)]
        for request, text, found in zip(part, texts, written, strict=True):
            if text != found:
                count += 1
                example = example or _difference(request, text, found)
    if not count:
        return None
    line = f"{path}: the tokenizer cannot write {count} of {len(requests)} targets ({example})"
    remedy = (
        "no output can equal them; write these targets with other characters, or add tokens to "
        "the model"
    )
    if count > MOST_UNWRITABLE * len(requests):
        raise DataError(f"{line}: {remedy}")
    return f"{line}; {remedy}"


def _difference(request: InputLine, text: str, found: str) -> str:
    """Show the first difference between a text and the same text after tokenization."""
    same = (a == b for a, b in zip(text, found, strict=False))
    place = next(
        (place for place, equal in enumerate(same) if not equal), min(len(text), len(found))
    )
    start = max(0, place - _SHOWN // 2)
    parts = (f"{one[start : start + _SHOWN]!r}" for one in (text, found))
    return f"line {request.line_number}: {' becomes '.join(parts)}"


def example_of(
    prompt: np.ndarray | Recording,
    target: Sequence[int] | np.ndarray,
    form: TextFormat,
    request: InputLine,
) -> Example:
    """Build an example.

    For speech, the target begins with the tokens that the decoder reads first.
    """
    given: list[int] = []
    if isinstance(prompt, Recording) and form.speech is not None:
        given = form.speech.prefix(prompt.language)
    return Example(prompt, np.array([*given, *target], np.int32), request.line_number, len(given))


def prompts_of(
    requests: Sequence[InputLine], form: TextFormat, path: Path
) -> Sequence[np.ndarray | Recording]:
    """Return the recordings, or the ids of each input, int32 [n].

    Each recording is read once, as a check.

    Raises:
        DataError: If a line cannot be used, with its number and the reason.
    """
    if form.speech is not None:
        return [recording_of(request, form.speech, form.rows, path) for request in requests]
    prompts = list[list[int]]()
    texts = list[str | list[dict[str, str]]]()
    for request in requests:
        try:
            texts.append(request.text)
        except PromptError as error:
            raise DataError(f"{path}, line {request.line_number}: {error}") from error
    for start in range(0, len(texts), _CHUNK):
        prompts += _prompts(texts[start : start + _CHUNK], form.tokenizer)
    for request, prompt in zip(requests, prompts, strict=True):
        if not prompt:
            raise DataError(
                f"{path}, line {request.line_number}: 'input' has no tokens; give it some text"
            )
    return [np.array(prompt, np.int32) for prompt in prompts]


def recording_of(request: InputLine, speech: Speech, rows: int, path: Path) -> Recording:
    """Return the WAV file of a line, for an encoder with `rows` positions.

    Raises:
        DataError: If the file cannot be used.
    """
    where = f"{path}, line {request.line_number}"
    language = request.language or "en"
    if not isinstance(request.input, Path):
        raise DataError(
            f"{where}: it has 'input', and the model reads speech; give 'audio', the path of a "
            "WAV file"
        )
    if language not in (speech.languages or ("en",)):
        known = ", ".join(list(speech.languages)[:8]) or "en alone"
        raise DataError(f"{where}: 'language' is {shown(language)}; the model knows {known}")
    try:
        content = read_bytes(request.input, LARGEST_WAV)
        seconds = len(read_audio(content, str(request.input))) / RATE
    except UnreadableError as error:
        raise DataError(
            f"{where}: {request.input} cannot be read ({error}); name a WAV file"
        ) from None
    except PromptError as error:
        raise DataError(f"{where}: {error}") from None
    if seconds > (longest := rows * SECONDS_A_TIMESTAMP):
        raise DataError(
            f"{where}: {request.input} has {seconds:.1f} s, and the model reads windows of "
            f"{longest:g} s; cut it"
        )
    digest = hashlib.sha256(content).hexdigest()[:32]
    return Recording(request.input, digest, language=language, bins=speech.bins, rows=rows)


def fitted(
    examples: list[Example], form: TextFormat, path: Path
) -> tuple[list[Example], str | None]:
    """Return the examples that fit, cut if the format truncates, and a message about the others.

    Raises:
        DataError: If none fits.
    """
    total = len(examples)
    long = sum(not form.fits(example) for example in examples)
    if not long:
        return examples, None
    if form.truncate:
        examples = [form.cut(example) for example in examples]
    left_out = [example for example in examples if not form.fits(example)]
    if len(left_out) == total:
        raise DataError(
            f"{path}: none of the {total} examples fits {form.limit} tokens; raise --max-tokens"
        )
    notes = []
    if cut := long - len(left_out):
        notes.append(f"{cut} of {total} inputs are cut, so that examples have {form.limit} tokens")
    if left_out:
        notes.append(
            f"{len(left_out)} of {total} examples are longer than {form.limit} tokens and are "
            f"left out (the first on line {left_out[0].line}); raise --max-tokens if the model "
            "can take them"
        )
    return [example for example in examples if form.fits(example)], f"{path}: {'; '.join(notes)}"


def _prompts(
    inputs: Sequence[str | list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    if all(isinstance(text, str) for text in inputs):
        return _ids(tokenizer, inputs, special=True)
    found = []
    for text in inputs:
        if not isinstance(text, str) and not tokenizer.chat_template:
            raise DataError(
                "an input is a list of messages, but the tokenizer has no chat template; give text"
            )
        if isinstance(text, str):
            found += _ids(tokenizer, [text], special=True)
        else:  # the template adds the special tokens
            written = tokenizer.apply_chat_template(
                text, tokenize=False, add_generation_prompt=True
            )
            found += _ids(tokenizer, [str(written)], special=False)
    return found


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Any], special: bool, target: bool = False
) -> list[list[int]]:
    # Marian has a separate SentencePiece model for targets.
    given = {"text_target" if target else "text": list(texts)}
    # `verbose` would warn of texts longer than the tokenizer's own limit, which does not apply
    # here.
    encoded = tokenizer(
        **given, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
