"""Models with the interface of transformers' `generate`, for programs that change one line.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from runtime.bundle.json_file import read_object
from runtime.errors import BatchError, OptionError, PromptError, shown
from runtime.options.generation_options import GenerationOptions
from runtime.requests.session_state import GENERATION_CONFIG, LARGEST_CONFIG
from runtime.session import Session

NEW_TOKENS = 20  # transformers' default
_OPTIONS = frozenset(field.name for field in fields(GenerationOptions))
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Arguments of transformers that are accepted with their default only.
_DEFAULTS = {
    "diversity_penalty": 0.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "synced_gpus": False,
}
# Fields of a generation configuration that change nothing here.
_WITHOUT_EFFECT = ("_from_model_config", "bos_token_id", "transformers_version", "use_cache")
# Fields that conversion has applied, and the manifest's names for them.
_APPLIED = {
    "decoder_start_token_id": "decoder_start_token_id",
    "forced_bos_token_id": "forced_first_token_id",
    "forced_eos_token_id": "forced_last_token_id",
}


class _FreeModel:
    """A session with transformers' `generate`.

    Args:
        session: The session, which is closed by `close`.

    Raises:
        OptionError: If the bundle is of the other kind, or reads speech.
    """

    _encoder_decoder: ClassVar[bool]

    def __init__(self, session: Session) -> None:
        manifest = session.manifest
        if manifest.speech is not None:
            raise OptionError("the bundle reads speech; use Session")
        if manifest.encoder_decoder != self._encoder_decoder:
            other = FreeModelForCausalLM if self._encoder_decoder else FreeModelForSeq2SeqLM
            kind = "an encoder-decoder" if manifest.encoder_decoder else "decoder-only"
            raise OptionError(f"the bundle is {kind}; use {other.__name__}")
        self.session = session
        self._config: dict[str, Any] = {}
        if GENERATION_CONFIG in manifest.files:
            path = session.bundle.path / GENERATION_CONFIG
            self._config = read_object(path, "convert the checkpoint again", limit=LARGEST_CONFIG)

    @classmethod
    def from_pretrained(cls, bundle: Path | str, **options: Any) -> Self:
        """Load a bundle from a directory or the hub. Arguments and errors: Session.from_pretrained.

        Raises:
            OptionError: If the bundle is of the other kind, or an option is not known.
        """
        session = Session.from_pretrained(bundle, **options)
        try:
            return cls(session)
        except BaseException:
            session.close()
            raise

    @property
    def device(self) -> str:
        """Device of the input ids: the CPU, for every device of the session."""
        return "cpu"

    def generate(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """Generate token ids as transformers' `generate` does, and return them in the same shape.

        Values not given are those of `generation_config`, then of the bundle's
        generation_config.json, then transformers' defaults: greedy decoding of at most 20 new
        tokens. By default tokens are those of the full model, unless the bundle has a calibrated
        threshold (see `mode`).

        Args:
            inputs: Token ids of the prompts, integers [B, n], as torch tensor, numpy array or
                lists. Prompts of decoder-only models are padded on the left, those of
                encoder-decoders on the right.
            input_ids: Other name of `inputs`.
            attention_mask: 1 for tokens and 0 for padding, [B, n]. Default: 1. For decoder-only
                models 0 for the padding token, unless it is an end-of-sequence token.
            generation_config: A GenerationConfig of transformers, or a dict of its fields.
            streamer: A streamer of transformers, for one prompt.
            **options: Fields of GenerationOptions, which have transformers' names where there is
                such an option, and also max_length, eos_token_id and pad_token_id.

        Returns:
            Token ids, int64 [B, m], padded on the right: a torch tensor if `inputs` is one, else a
            numpy array. Rows of decoder-only models begin with the prompt, those of
            encoder-decoders with the decoder's start token.

        Raises:
            OptionError: If an option is not supported, or not allowed.
            PromptError: If prompts or mask are not valid, or too long.
        """
        if (inputs is None) == (input_ids is None):
            raise PromptError("give the prompts as inputs or as input_ids, [B, n]")
        given = input_ids if inputs is None else inputs
        ids = _whole(given, "inputs")
        values = self._values(generation_config, options)
        manifest = self.session.manifest
        eos = np.atleast_1d(values.pop("eos_token_id", manifest.eos_token_ids)).tolist()
        pad = values.pop("pad_token_id", manifest.pad_token_id)
        if pad is None:
            pad = eos[0] if eos else 0
        if attention_mask is None:  # as transformers, which infers none for encoder-decoders
            attention_mask = (ids != pad) | (pad in eos) | self._encoder_decoder
        prompts = self._prompts(ids, _whole(attention_mask, "attention_mask"))
        begin = ids
        if self._encoder_decoder:
            begin = np.full((len(ids), 1), manifest.decoder_start_token_id, np.int64)
        length = values.pop("max_length", NEW_TOKENS + begin.shape[1])
        if values.setdefault("max_new_tokens", length - begin.shape[1]) < 1:
            raise OptionError(
                f"max_length is {length}, but the rows begin with {begin.shape[1]} tokens; give "
                "max_new_tokens"
            )
        ends = set(eos) - set(manifest.eos_token_ids)
        if ends or set(manifest.eos_token_ids) - set(eos):
            for name, default in (("min_new_tokens", 0), ("num_beams", 1)):
                if values.get(name, default) > default:
                    raise OptionError(f"{name} is for the bundle's own eos_token_id; leave one out")
            ends.update(eos)
            values["ignore_eos"] = True
        if streamer is not None and (len(ids) > 1 or values.get("num_beams", 1) > 1):
            raise OptionError("a streamer is for one prompt and one beam; leave it out")
        chosen = GenerationOptions(**values)

        def as_given(array: np.ndarray) -> Any:
            return given.new_tensor(array.tolist()) if hasattr(given, "new_tensor") else array

        if streamer is not None:
            streamer.put(as_given(begin))
            put = lambda token: streamer.put(as_given(np.array([token])))  # noqa: E731
            rows = self._streamed(prompts, chosen, ends, put)
            streamer.end()
        elif values.get("ignore_eos") and ends:
            rows = self._streamed(prompts, chosen, ends, lambda token: None)
        else:
            try:
                rows = [[*result.token_ids] for result in self.session.generate(prompts, chosen)]
            except BatchError as error:
                raise next(one for one in error.results if isinstance(one, Exception)) from None
        output = np.full((len(rows), max(map(len, rows))), pad, np.int64)
        for row, tokens in zip(output, rows, strict=True):
            row[: len(tokens)] = tokens
        return as_given(np.concatenate([begin, output], axis=1))

    def _streamed(
        self,
        prompts: Sequence[np.ndarray],
        options: GenerationOptions,
        ends: Collection[int],
        put: Callable[[int], None],
    ) -> list[list[int]]:
        """Return the tokens of each prompt up to one of `ends`. Calls `put` with each token."""
        rows: list[list[int]] = []
        slots = self.session.options.slots
        for first in range(0, len(prompts), slots):
            group = prompts[first : first + slots]
            for stream in [self.session.stream(prompt, options) for prompt in group]:
                rows.append([])
                for token in stream:
                    rows[-1].append(token.id)
                    put(token.id)
                    if token.id in ends:
                        break
                stream.close()
        return rows

    def _values(self, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the arguments of a call with the configurations, and check their names."""
        given = {} if config is None else config
        if hasattr(given, "to_diff_dict"):
            given = given.to_diff_dict()
        if not isinstance(given, Mapping):
            raise OptionError(
                f"generation_config is {shown(config)}; give a GenerationConfig or a dict"
            )
        values = {**self._config}
        for layer in (given, options):
            values.update({name: value for name, value in layer.items() if value is not None})
        for name in values.keys() - _OPTIONS - {"max_length", "eos_token_id", "pad_token_id"}:
            value = values.pop(name)
            here = name not in given and name not in options
            if value is None or name in _WITHOUT_EFFECT or (here and name in _APPLIED):
                continue
            if name in _APPLIED and value == getattr(self.session.manifest, _APPLIED[name]):
                continue
            if name not in _DEFAULTS or value != _DEFAULTS[name]:
                where = f" from {GENERATION_CONFIG}" if here else ""
                remedy = f"give {_DEFAULTS[name]}" if name in _DEFAULTS else "leave it out"
                raise OptionError(
                    f"generate does not support {name} = {shown(value)}{where}; {remedy}"
                )
        values = {name: value for name, value in values.items() if value is not None}
        if values.setdefault("do_sample", False):
            return values
        ignored = [name for name in _SAMPLING if options.get(name) is not None]
        if ignored:
            warnings.warn(f"{', '.join(ignored)} have no effect without do_sample", stacklevel=3)
        return {name: value for name, value in values.items() if name not in _SAMPLING}

    def _prompts(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of each row without padding."""
        if mask.shape != ids.shape:
            raise PromptError(
                f"attention_mask is {list(mask.shape)}, but inputs are {list(ids.shape)}; give "
                "both the same shape"
            )
        kept = mask != 0
        side = "right" if self._encoder_decoder else "left"
        ordered = kept if self._encoder_decoder else kept[:, ::-1]
        if (ordered[:, 1:] > ordered[:, :-1]).any():
            raise PromptError(
                f"attention_mask has padding that is not on the {side}; pad on the {side} "
                f"(tokenizer.padding_side = {side!r})"
            )
        return [row[keep] for row, keep in zip(ids, kept, strict=True)]

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class FreeModelForCausalLM(_FreeModel):
    """A decoder-only bundle with transformers' `generate`, for AutoModelForCausalLM."""

    _encoder_decoder = False


class FreeModelForSeq2SeqLM(_FreeModel):
    """An encoder-decoder bundle with transformers' `generate`, for AutoModelForSeq2SeqLM."""

    _encoder_decoder = True


def _whole(given: Any, name: str) -> np.ndarray:
    """Return a tensor, array or lists of integers as int64 [B, n]."""
    try:
        array = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except ValueError:  # rows of several lengths
        array = np.empty(0)
    if array.ndim != 2 or array.dtype.kind not in "iub" or not array.size:
        raise PromptError(f"{name} is {shown(given)}; give integers [B, n], with rows padded")
    return array.astype(np.int64)
