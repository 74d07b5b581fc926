"""A benchmark, from its options to its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from freeexport.benchmark.contenders import Contender, Loaded, Ours, PeerContender, Run, Transformers, cpus_for
from freeexport.benchmark.options import BenchOptions
from freeexport.benchmark.peers.catalog import find_peer
from freeexport.benchmark.peers.environment import PeerError
from freeexport.benchmark.peers.model import Source
from freeexport.benchmark.report import Report, settings
from freeexport.benchmark.rounds import Measured, measure
from freeexport.benchmark.rows import Answers, Row, rows_of
from freeexport.checkpoints.examples import read_examples
from freeexport.measure.byte_model import bandwidth_of, token_bytes
from freeexport.measure.costs import measured_in_child
from freeexport.measure.forced import THRESHOLD, exit_trace
from freeexport.system.idle import is_idle, require_idle
from freeexport.system.progress import progress
from freeexport.verification.engines import sample_ids
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.errors import OptionError
from runtime.machine.device import Device, check_runnable
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer

# A static exit: it decides nothing, so it has no threshold.
SHALLOW = "shallow"
# transformers in float32 says what the model's tokens are.
_TRUTHS = ("transformers", "hf", "hf-compile")


def benchmark(options: BenchOptions) -> Report:
    """Measure. Raises BusyMachineError where the machine is busy and `force` is not set, and FreeExportError."""
    bundles = [Bundle.open(path) for path in (options.bundle, *options.also)]
    for bundle in bundles:
        check_runnable(bundle.manifest, Device.parse(options.device))
    prompts = bench_prompts(bundles[0], options.data, options.samples)
    source = _source(options, bundles)
    contenders = contenders_of(options, bundles, source)
    idle = require_idle(options.force)
    with progress("memory bandwidth"):
        bandwidth = bandwidth_of(options.count)
    context = round(fmean(map(len, prompts)))
    # What a processor takes predicts nothing of a GPU.
    predicts = bool(options.replay) and options.device == "cpu"
    costs = {b.path: measured_in_child(b.path, options.count, options.tokens, context) for b in bundles if predicts}
    measured = measure(contenders, prompts, options.tokens, options.rounds)
    # Work that began in between spoils the figures as well.
    idle = idle and is_idle()
    answers, truth = reference_answers(contenders, measured, source, prompts, options)
    rows = rows_of(contenders, measured, answers, idle or options.force)
    ours = {contender.name: contender for contender in contenders if isinstance(contender, Ours)}
    opened = {bundle.path: bundle for bundle in bundles}
    for number, row in enumerate(rows):
        if row.name in ours and options.device == "cpu":
            mine = ours[row.name]
            row = _with_roofline(row, mine, opened[mine.bundle], (context, options.tokens / 2), bandwidth)
            rows[number] = _with_prediction(row, mine, costs.get(mine.bundle), measured, ours)
    used = settings(bundles[0], options, len(prompts), idle, truth)
    return Report(used, rows, measured.failed, bandwidth)


def bench_prompts(bundle: Bundle, data: Path | None, limit: int) -> list[list[int]]:
    """The first prompts of a JSONL file, or the built-in sample texts, as token ids."""
    manifest = bundle.manifest
    longest = manifest.encoder_capacity or manifest.capacity // 2
    if data is None:
        return [ids[:longest] for ids in sample_ids(bundle)][:limit]
    tokenizer = Tokenizer.load(bundle.path, bundle.manifest.files)
    examples = read_examples(data, limit)
    return [encode_prompt(one.input, tokenizer, manifest.vocab_size, longest).tolist() for one in examples]


def contenders_of(options: BenchOptions, bundles: Sequence[Bundle], source: Source | None) -> list[Contender]:
    """Others in the order given, then each bundle: mode full, the modes at the thresholds, shallow, the replays."""
    threads, exit_layer = options.count, bundles[0].manifest.exit_layer
    contenders: list[Contender] = []
    for name in options.against:
        peer = find_peer(name)
        if peer is None:
            contenders.append(Transformers(name, threads))
        elif source is None:
            raise OptionError(
                f"--against {name} needs the checkpoint that the bundle came from ({bundles[0].manifest.source}); "
                "give it with --model"
            )
        else:
            contenders.append(PeerContender(peer, source, threads, exit_layer))
    for bundle, label in zip(bundles, _labels(bundles), strict=True):
        contenders += _ours(options, bundle, label)
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise OptionError(f"two rows would be called {max(names, key=names.count)!r}; name each bundle and option once")
    return contenders


def _labels(bundles: Sequence[Bundle]) -> list[str]:
    """What tells bundles apart, as short as possible; nothing where there is one."""
    if len(bundles) == 1:
        return [""]
    kinds: list[list[str]] = [
        [bundle.manifest.precision for bundle in bundles],
        [bundle.path.name for bundle in bundles],
        [str(bundle.path) for bundle in bundles],
    ]
    return next((labels for labels in kinds if len(set(labels)) == len(labels)), kinds[-1])


def _ours(options: BenchOptions, bundle: Bundle, label: str) -> list[Contender]:
    precision, predicted = bundle.manifest.precision, int(not bundle.manifest.encoder_decoder)
    full = Ours(bundle.path, options.count, "full", precision=precision, label=label, device=options.device)
    limit = options.rollback_threshold
    modes = [
        replace(full, mode=mode, threshold=value, rollback_threshold=limit if mode == "rollback" else None)
        for value in options.threshold
        for mode in options.mode
        if mode != SHALLOW
    ]
    if SHALLOW in options.mode:
        modes.append(replace(full, mode=SHALLOW))
    replays = [
        replace(full, mode="free", threshold=THRESHOLD, replay=tuple(exit_trace(what, predicted)), replay_name=what)
        for what in options.replay
    ]
    drafts = [replace(full, mode="lossless", drafts=source) for source in options.drafts]
    replayed = [
        replace(full, mode="lossless", threshold=THRESHOLD, drafts="exit", right=rate) for rate in options.replay_drafts
    ]
    return [full, *modes, *drafts, *replays, *replayed]


def _source(options: BenchOptions, bundles: Sequence[Bundle]) -> Source | None:
    manifest = bundles[0].manifest
    for bundle in bundles[1:]:
        if bundle.manifest.source_sha256 != manifest.source_sha256:
            raise OptionError(f"--also {bundle.path} is of another checkpoint ({bundle.manifest.source})")
    return Source.of(manifest, options.source)


def reference_answers(
    contenders: Sequence[Contender],
    measured: Measured,
    source: Source | None,
    prompts: Sequence[Sequence[int]],
    options: BenchOptions,
) -> tuple[Answers | None, str | None]:
    """What the whole model gives in float32, and by which program: transformers, where it ran or can run here; else a
    float32 bundle in mode full; else nobody."""
    own = [c.name for c in contenders if isinstance(c, Ours) and c.mode == "full" and c.precision == "fp32"]
    ran = [name for name in _TRUTHS if name in measured.rounds]
    if not ran and source is not None:
        try:
            return _ask(source, prompts, options), "transformers"
        except PeerError:
            pass  # without torch, a bundle may still say it
    for name in (*ran, *own):
        return [run.tokens for run in measured.rounds[name][0]], name
    return None, None


def _ask(source: Source, prompts: Sequence[Sequence[int]], options: BenchOptions) -> Answers:
    with progress("reference"):
        loaded = Loaded(Transformers(source.model, options.count), cpus_for(options.count))
        try:
            return [loaded.run(prompt, options.tokens).tokens for prompt in prompts]
        finally:
            loaded.close()


def _with_roofline(row: Row, ours: Ours, bundle: Bundle, context: tuple[float, float], bandwidth: float) -> Row:
    """Only of modes whose deep passes say how often each weight was read."""
    if ours.mode not in ("full", "free"):
        return row
    prompt, written = context
    seq2seq = bundle.manifest.encoder_decoder
    valid, encoded = (written, prompt) if seq2seq else (prompt + written, 0.0)
    read = token_bytes(bundle, valid, encoded, ours.mode == "free", row.passes)
    return replace(row, token_bytes=read, roofline=read * row.decode_per_second / bandwidth)


def _with_prediction(row: Row, ours: Ours, costs: Costs | None, measured: Measured, others: Mapping[str, Ours]) -> Row:
    """How much faster than mode full these exits are by the cost model, from prompt to last token: prompts take
    what they took in mode full."""
    if costs is None or ours.mode != "free":
        return row
    full = next(name for name, other in others.items() if other.bundle == ours.bundle and other.mode == "full")
    prompts, seconds = (
        sum(getattr(run, name) for run in _runs(measured, full)) for name in ("first_seconds", "seconds")
    )
    done = _runs(measured, row.name)
    passes = sum((Counter(run.sync_sizes) for run in done), Counter[int]())
    speedup = costs.speedup_of(passes, sum(run.decided for run in done))
    return replace(row, predicted=seconds / (prompts + (seconds - prompts) / speedup))


def _runs(measured: Measured, name: str) -> list[Run]:
    return [run for turn in measured.rounds[name] for run in turn]
