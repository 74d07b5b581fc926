"""How the options of a request choose among logits."""

from __future__ import annotations

from runtime.errors import OptionError
from runtime.options import GenerationOptions
from runtime.text.sampler import LogitsProcessor, Sampler, Warping


def sampler_of(
    options: GenerationOptions, prompt_length: int, eos: frozenset[int], seed: tuple[int, int]
) -> Sampler | None:
    """None where nothing but arg max is asked for, which the engines do themselves."""
    sampler = Sampler(
        prompt_length,
        eos,
        options.min_new_tokens,
        _given(options.repetition_penalty, 1.0),
        options.sequence_bias,
        processors_of(options),
        _warping(options) if options.samples else None,
        seed,
    )
    plain = not sampler.sequence_bias and not sampler.processors and sampler.repetition_penalty == 1.0
    return None if plain and sampler.warping is None and sampler.min_new_tokens == 0 else sampler


def processors_of(options: GenerationOptions) -> tuple[LogitsProcessor, ...]:
    given = options.logits_processor
    return (given,) if callable(given) else tuple(given)


def check_biases(options: GenerationOptions, vocab_size: int) -> None:
    """Raises OptionError for tokens that the vocabulary does not have."""
    for sequence in options.sequence_bias or ():
        if max(sequence) >= vocab_size:
            raise OptionError(
                f"sequence_bias names token {max(sequence)}; the ids of this bundle are 0 to {vocab_size - 1}"
            )


def _warping(options: GenerationOptions) -> Warping:
    top_k = 50 if options.top_k is None else int(options.top_k)
    return Warping(_given(options.temperature, 1.0), top_k, _given(options.top_p, 1.0), _given(options.min_p, 0.0))


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)
