"""Lines of data as examples: text that becomes ids, recordings of speech, splits, and what is too long."""

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
from graphs.errors import GraphError
from runtime.audio import LARGEST_WAV, RATE, log_mel, read_audio, window
from runtime.bundle.manifest import Speech
from runtime.errors import FreeExportError, PromptError
from runtime.json_file import UnreadableError, read_bytes
from runtime.speech import FRAMES_A_POSITION, SECONDS_A_TIMESTAMP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS_WANTED = "give every line an input, or audio, and a target"
_CHUNK = 4096  # texts a call of the tokenizer
MOST_UNWRITABLE = 0.5  # of the targets: with more, outputs are wrong whatever is trained
_SHOWN = 40  # characters of an example
_HASH_RANGE = 1 << 32


class DataError(FreeExportError):
    """Data is missing, empty or broken, or has nothing that a model could be trained on."""


@dataclass(frozen=True)
class Recording:
    """A WAV file that is read anew where it is needed: a window of sound, of which the encoder makes `rows` positions
    from `bins` bins. `digest` is of the file's content, `language` the code of what is spoken."""

    path: Path
    digest: str
    language: str
    bins: int
    rows: int

    def __len__(self) -> int:
        """Positions of the encoder, which reads silence, too."""
        return self.rows

    def features(self) -> np.ndarray:
        """The spectrogram, float32 [bins, 2 rows]."""
        mels = log_mel(read_audio(self.path), self.bins)
        whole: np.ndarray = window(mels, 0, FRAMES_A_POSITION * self.rows)[0]
        return whole


@dataclass(frozen=True)
class Example:
    """`prompt`: token ids int32 [n] as the model gets them, or a Recording; `target`: ids int32 [m] with that of the
    end of a sequence, of which the first `given` are not predicted."""

    prompt: Any
    target: np.ndarray
    line: int
    given: int = 0


@dataclass(frozen=True)
class TextFormat:
    """The way from text to token ids. `limit` is the most tokens of a sequence that the model is trained on.

    Encoder-decoder models have the limit for prompt and target each, decoder-only ones for both together. `truncate`:
    prompts give way, at the end for an encoder, else at the beginning, where the target is farthest away. `begin`:
    tokens that every target begins with. `speech` where inputs are recordings of `bins` bins and `rows` positions.
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
        prompt, target = 0 if self.speech else len(example.prompt), len(example.target)
        return max(prompt, target) <= self.limit if self.seq2seq else prompt + target <= self.limit

    def cut(self, example: Example) -> Example:
        """With as much of the prompt as fits, and the special token at its other end; unchanged where only a shorter
        target would do."""
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


def speech_of(checkpoint: Checkpoint, description: Description) -> Speech | None:
    """The tokens of speech, as generation_config.json names them; None for a model of text. Raises GraphError."""
    sound, config = description.spectrogram, checkpoint.generation_config
    if sound is None:
        return None
    timestamps = config.get("no_timestamps_token_id")
    if not isinstance(timestamps, int):
        raise GraphError(
            f"{checkpoint.name} names no no_timestamps_token_id; add the generation_config.json of the Whisper model "
            "that it was made from"
        )
    languages = {
        code.strip("<|>"): token for code, token in (config.get("lang_to_id") or {}).items()
    }
    ends = known_ends(checkpoint, description.vocab_size)
    return Speech(
        bins=sound.bins,
        no_timestamps=timestamps,
        previous=int(config.get("prev_sot_token_id") or timestamps - 2),
        no_speech=timestamps - 1,
        languages=languages,
        tasks=dict(config.get("task_to_id") or {}) if languages else {},
        suppressed=tuple(
            token for token in config.get("suppress_tokens") or () if token not in ends
        ),
        begin_suppressed=tuple(config.get("begin_suppress_tokens") or ()),
        latest_first=int(config.get("max_initial_timestamp_index") or 50),
    )


def text_format(checkpoint: Checkpoint, description: Description, limit: int) -> TextFormat:
    """Sequences of at most `limit` ids, or the model's own limit. Raises CheckpointError without a tokenizer or an end
    of sequence."""
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
    seq2seq, first = (
        description.encoder is not None,
        forced(checkpoint.generation_config, "forced_bos_token_id"),
    )
    form = TextFormat(
        tokenizer, int(end), limit, seq2seq, begin=(first,) if seq2seq and first is not None else ()
    )
    if sound is None:
        return form
    return replace(
        form, speech=speech_of(checkpoint, description), bins=sound.bins, rows=sound.positions.count
    )


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
    requests: Sequence[Request], share: float, path: Path
) -> tuple[list[Request], list[Request]]:
    """(training, validation) by a hash of the input: about `share` of the inputs are validation, in every run and
    whatever else the file holds. Raises DataError where one of the two would be empty."""
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
    # A small file may have no hash below the share; then its lowest one stands for it.
    border = max(share * _HASH_RANGE, lowest + 1)
    training = [request for rank, request in ranked if rank >= border]
    if not training:
        raise DataError(
            f"{path} has one distinct input, and validation takes it; give more, or a --validation file"
        )
    return training, [request for rank, request in ranked if rank < border]


def encode(
    requests: Sequence[Request], form: TextFormat, path: Path
) -> tuple[list[Example], str | None]:
    """Examples in the order of the file, without those that do not fit, also when cut where `form` says so; and a line
    about those that were cut or left out. Raises DataError where none fits."""
    prompts, targets = prompts_of(requests, form, path), list[list[int]]()
    for start in range(0, len(requests), _CHUNK):
        texts = [str(request.target) for request in requests[start : start + _CHUNK]]
        if form.speech is not None:  # which begins a transcript with a space
            texts = [f" {text.strip()}" for text in texts]
        targets += _ids(form.tokenizer, texts, special=False, target=form.seq2seq)
    examples = [
        example_of(prompt, [*form.begin, *target, form.eos], form, request)
        for request, prompt, target in zip(requests, prompts, targets, strict=True)
    ]
    return fitted(examples, form, path)


def unwritable(requests: Sequence[Request], form: TextFormat, path: Path) -> str | None:
    """Compare each target with what the tokenizer makes of its tokens, spaces aside: no output can equal one that
    differs, such as JSON in the vocabulary of T5, which has no braces. Return a line with the count and an example,
    None where there are none. Raises DataError where more than MOST_UNWRITABLE of the targets differ."""
    count, example = 0, ""
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
    remedy = "no output can equal them; write these targets with other characters, or add tokens to the model"
    if count > MOST_UNWRITABLE * len(requests):
        raise DataError(f"{line}: {remedy}")
    return f"{line}; {remedy}"


def _difference(request: Request, text: str, found: str) -> str:
    """Show where a text that was written and read differs first."""
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
    request: Request,
) -> Example:
    """An example, of speech with the tokens that the decoder reads before what it writes."""
    given: list[int] = []
    if isinstance(prompt, Recording) and form.speech is not None:
        given = form.speech.prefix(prompt.language)
    return Example(prompt, np.array([*given, *target], np.int32), request.line_number, len(given))


def prompts_of(
    requests: Sequence[Request], form: TextFormat, path: Path
) -> Sequence[np.ndarray | Recording]:
    """The recordings, each of which was read once, or the ids of the inputs, int32 [n] each. Raises DataError for one
    that cannot be used: the line, and why."""
    if form.speech is not None:
        return [recording_of(request, form.speech, form.rows, path) for request in requests]
    prompts, texts = list[list[int]](), list[str | list[dict[str, str]]]()
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


def recording_of(request: Request, speech: Speech, rows: int, path: Path) -> Recording:
    """The WAV file of a line, for an encoder of so many positions. Raises DataError for one that cannot be used."""
    where, language = f"{path}, line {request.line_number}", request.language or "en"
    if not isinstance(request.input, Path):
        raise DataError(
            f"{where}: it has 'input', and the model reads speech; give 'audio', the path of a WAV file"
        )
    if language not in (speech.languages or ("en",)):
        known = ", ".join(list(speech.languages)[:8]) or "en alone"
        raise DataError(f"{where}: 'language' is {language!r}; the model knows {known}")
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
            f"{where}: {request.input} has {seconds:.1f} s, and the model reads windows of {longest:g} s; cut it"
        )
    digest = hashlib.sha256(content).hexdigest()[:32]
    return Recording(request.input, digest, language, speech.bins, rows)


def fitted(
    examples: list[Example], form: TextFormat, path: Path
) -> tuple[list[Example], str | None]:
    """The examples that fit, cut where `form` says so; and a line about the others. DataError where none fits."""
    total, long = len(examples), sum(not form.fits(example) for example in examples)
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
            f"{len(left_out)} of {total} examples are longer than {form.limit} tokens and are left out (the first on "
            f"line {left_out[0].line}); raise --max-tokens if the model can take them"
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
        else:  # the template writes the special tokens itself
            written = tokenizer.apply_chat_template(
                text, tokenize=False, add_generation_prompt=True
            )
            found += _ids(tokenizer, [str(written)], special=False)
    return found


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Any], special: bool, target: bool = False
) -> list[list[int]]:
    # Marian has another SentencePiece model for targets.
    given = {"text_target" if target else "text": list(texts)}
    # `verbose` warns of texts longer than the tokenizer's own limit, which is not ours.
    encoded = tokenizer(
        **given, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
