"""What was asked: a prompt as tokens, its options, and what follows from them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from time import monotonic
from typing import cast

import numpy as np

from runtime.errors import OptionError, shown
from runtime.options.generation_options import GenerationOptions
from runtime.requests.languages import check_languages
from runtime.requests.session_state import SessionState
from runtime.speech.windows import Sound, SpeechPrompt
from runtime.text.grammar import Constraint
from runtime.text.prompt import Prompt
from runtime.text.sampler import LogitsProcessor, Sampler, Warping

# Maximum number of continuations of one prompt. They are decoded one after the other, in one slot.
MAX_SEQUENCES = 1024


@dataclass(frozen=True, eq=False)
class Request:
    """A request, before it is decoded.

    Attributes:
        ids: Tokens for the encoder or the decoder, int64 [n]. For speech, the decoder reads them
            first.
        options: Options of the request.
        arrival: Time of the call, on the monotonic clock.
        cancel: Event that ends the request after its next token.
        count: Number of continuations.
        grammar: Constraint of the output.
        sound: Window of speech for the encoder.
    """

    ids: np.ndarray
    options: GenerationOptions
    arrival: float
    cancel: threading.Event | None = None
    count: int = 1
    grammar: Constraint | None = None
    sound: Sound | None = None


def request_of(
    state: SessionState,
    prompt: Prompt | SpeechPrompt,
    options: GenerationOptions,
    *,
    cancel: threading.Event | None = None,
    count: int | None = None,
    arrival: float | None = None,
) -> Request:
    """Return the request for a prompt.

    Args:
        state: What the requests of the session share.
        prompt: The prompt.
        options: Options of the request.
        cancel: Event that ends the request after its next token.
        count: Number of continuations, ordered by log-probability. Default: one, without an order.
        arrival: Time of the call, on the monotonic clock. Default: now.

    Raises:
        PromptError: If the prompt is not valid or does not fit.
        OptionError: If the options do not fit the bundle.
        CapacityError: If the caches of beams do not fit into memory.
    """
    if count is not None:
        options = replace(options, output_logprobs=True)
    options = state.resolve(options)
    src_lang = options.src_lang
    tgt_lang = options.tgt_lang
    sound: Sound | None = None
    grammar: Constraint | None
    if isinstance(prompt, SpeechPrompt):
        check_languages(state.manifest, is_text=False, src_lang=src_lang, tgt_lang=tgt_lang)
        ids = np.array(prompt.prefix, np.int64)
        sound = prompt.sound
        grammar = prompt.rules
    else:
        ids = state.encode(
            prompt,
            parse_special=options.parse_special,
            src_lang=src_lang,
            tgt_lang=tgt_lang,
        )
        grammar = state.grammar(options)
    return Request(
        ids,
        options,
        arrival=monotonic() if arrival is None else arrival,
        cancel=cancel,
        count=count or 1,
        grammar=grammar,
        sound=sound,
    )


def check_count(count: int, options: GenerationOptions) -> None:
    """Check that `count` continuations of one prompt are possible.

    Raises:
        OptionError: If they are not.
    """
    if not options.max_new_tokens:
        raise OptionError("max_new_tokens is 0 with num_return_sequences; raise it")
    max_count = MAX_SEQUENCES if options.samples else options.num_beams
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= max_count:
        raise OptionError(
            f"num_return_sequences is {shown(count)}; choose 1 to {MAX_SEQUENCES} with "
            "do_sample=True or a temperature above 0, or up to num_beams"
        )


def sampler_of(
    options: GenerationOptions,
    prompt_length: int,
    eos: frozenset[int],
    seed: tuple[int, int],
    grammar: Constraint | None = None,
) -> Sampler | None:
    """Return the sampler for these options. None for arg max, which the engines compute."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    warping = None
    if options.samples:
        warping = Warping(
            temperature=given(options.temperature, 1.0),
            top_k=int(given(options.top_k, 50)),
            top_p=given(options.top_p, 1.0),
            min_p=given(options.min_p, 0.0),
        )
    penalty = given(options.repetition_penalty, 1.0)
    processors = cast(tuple[LogitsProcessor], options.logits_processor)
    biases = options.sequence_bias
    min_new_tokens = options.min_new_tokens
    frequency = float(options.frequency_penalty)
    presence = float(options.presence_penalty)
    others = warping or biases or processors or min_new_tokens or grammar or frequency or presence
    if not others and penalty == 1.0:
        return None
    return Sampler(
        prompt_length,
        eos=eos,
        min_new_tokens=min_new_tokens,
        repetition_penalty=penalty,
        frequency_penalty=frequency,
        presence_penalty=presence,
        sequence_bias=biases,
        processors=processors,
        warping=warping,
        seed=seed,
        grammar=grammar,
    )
