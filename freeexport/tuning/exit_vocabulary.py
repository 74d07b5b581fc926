"""How many tokens, and which, the shallow head of a bundle or checkpoint should know."""

from __future__ import annotations

from pathlib import Path

from freeexport.calibration.calibrate import check_enough, collect
from freeexport.calibration.choose import choose
from freeexport.calibration.open_source import cache_path, is_bundle, open_source
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.source import Facts
from freeexport.checkpoints.examples import read_examples
from freeexport.conversion.exit_vocabulary_file import ExitVocabularyFile
from freeexport.traces.trace import Traces
from freeexport.tuning.vocabulary_gains import ExitGains, Gain, exit_gains
from graphs.errors import GraphError
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.errors import OptionError


def gains_of(
    model: str, data: Path, options: CalibrateOptions, output: Path, size: int | None, threshold: float | None,
    threads: int | None, text: Path | None = None,
) -> tuple[Facts, Traces, ExitGains]:  # fmt: skip
    """Collect traces, as calibrate does and keeps them, and see what a head of fewer tokens would lose and win. Tokens
    that do not exit are ranked by the targets of `text`, which is only tokenized, or of the decoded lines.

    Raises OptionError for a bundle that has an exit vocabulary, a size out of range, and a threshold that is unknown;
    what `calibrate_model` raises.
    """
    requests = read_examples(data, options.samples)
    expected = requests if text is None else read_examples(text, need_target="targets say which tokens to expect")
    with open_source(model, options, threads) as source:
        facts = source.facts
        _check_size(size, len(facts.ends), facts.vocab_size)
        if facts.exit_vocabulary is not None:
            raise OptionError(f"{model} has an exit vocabulary already; give a bundle without")
        kept = cache_path(model, None if is_bundle(model) else output)
        traces = collect(source, data, requests, kept, options.max_new_tokens)
        check_enough(traces, options)
        costs = source.costs(requests, traces.mean_length)
        targets = [request.target for request in expected if request.target]
        found = exit_gains(
            traces,
            _threshold(facts, traces, options) if threshold is None else threshold,
            costs,
            facts.max_pending,
            facts.vocab_size,
            facts.ends,
            source.token_ids(targets),
            () if size is None else (size,),
        )
        return facts, traces, found


def _threshold(facts: Facts, traces: Traces, options: CalibrateOptions) -> float:
    """That of a calibrated bundle; else the one that calibrate would choose."""
    known = facts.threshold
    found = choose(traces, options, None).threshold if known >= NEVER_EXIT else known
    if found >= NEVER_EXIT:
        raise OptionError("calibrate would let no token exit, so no vocabulary pays; give a --threshold")
    return found


def _check_size(size: int | None, fewest: int, vocabulary: int) -> None:
    if size is not None and not max(2, fewest) <= size <= vocabulary:
        raise GraphError(
            f"exit vocabulary {size} is out of range; this model has {vocabulary} tokens and {fewest} that end a "
            f"sequence, choose {max(2, fewest)} to {vocabulary}"
        )


def vocabulary_file(facts: Facts, traces: Traces, found: ExitGains, chosen: Gain) -> ExitVocabularyFile:
    """What `freeexport convert --exit-vocab` reads."""
    return ExitVocabularyFile(
        source_sha256=facts.source_sha256,
        vocab_size=facts.vocab_size,
        exit_layer=facts.exit_layer,
        threshold=found.threshold,
        predictions=traces.tokens,
        covered=chosen.covers,
        exits_lost=chosen.lost,
        tokens=tuple(sorted(map(int, found.ranked[: chosen.size]))),
    )
