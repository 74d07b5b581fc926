"""Verification of a bundle: run the checks, write the report, and do both in a child process after a conversion."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.system.child import ChildError, run_child
from freeexport.system.output import write_whole
from freeexport.system.progress import Advance, progress
from freeexport.verification.checks import Check, failure_of
from freeexport.verification.engines import (
    FULL,
    Arithmetic,
    Batch,
    EnginePair,
    Extent,
    Rows,
    encode,
    rows_of,
    sample_batch,
    sample_ids,
    self_checks,
)
from graphs.families import describe
from graphs.rewrites.widen import fp32_copy
from runtime import Session
from runtime.bundle.bundle import VERIFICATION, Bundle
from runtime.bundle.manifest import MANIFEST, ConfidenceMeasure, FloatType, Manifest, Precision
from runtime.errors import FreeExportError
from runtime.machine.machine import available_memory, usable_cores

# Bytes for a token of the vocabulary: 4 texts of 48 tokens, their logits in ten ways.
LOGITS = 4 * 48 * 10 * 4
# Shares of the time that the parts take, as measured in full on SmolLM2-135M in 8 bits, where nothing else ran.
LOAD, AGAINST, ITSELF, GREEDY, EXIT = 30, 8, 8, 46, 8


class VerificationError(FreeExportError):
    """A bundle does not compute what its checkpoint computes."""


def verify(
    bundle: Bundle,
    model: str | None,
    data: Path | None = None,
    extent: Extent = FULL,
    threads: int | None = None,
) -> dict[str, Any]:
    """Check the engines, against the checkpoint `model` if given. The report; its `passed` tells.

    `data` is text (JSON lines) to measure the quality on; None for a few sample texts.
    """
    total = LOAD + AGAINST + ITSELF + GREEDY + EXIT if model else ITSELF
    with _runnable(bundle) as copy, progress("verifying", total) as advance:
        return _Verification(copy, bundle.manifest.float_type, extent, threads, advance).report(model, data)


def _runnable(bundle: Bundle) -> AbstractContextManager[Bundle]:
    """ONNX Runtime's CPU provider has no bf16: there it is fp32, every operator's result rounded."""
    return fp32_copy(bundle, rounds=True) if bundle.manifest.float_type == "bf16" else nullcontext(bundle)


class _Verification:
    """The checks of one bundle, `float_type` as it was written for."""

    def __init__(
        self, bundle: Bundle, float_type: FloatType, extent: Extent, threads: int | None, advance: Advance
    ) -> None:
        self.bundle, self.manifest, self.float_type = bundle, bundle.manifest, float_type
        self.extent, self.threads, self.advance = extent, threads or usable_cores(), advance
        self.torch_threads = threads  # None is torch's own choice, which OMP_NUM_THREADS sets
        self.left_out: list[str] = []
        self.began = time.monotonic()

    def report(self, model: str | None, data: Path | None) -> dict[str, Any]:
        checkpoint = None if model is None else _checkpoint_of(self.bundle, model)
        reference = None if checkpoint is None else self._reference(checkpoint)
        self.began = time.monotonic()
        batch = sample_batch(self.bundle, self.extent.tokens)
        cross, encoded = encode(self.bundle, batch, self.threads)
        pair = EnginePair(self.bundle, len(batch.tokens), self.threads, cross)
        shallow = pair.shallow(batch.tokens, batch.lengths)
        deep = pair.deep(shallow["hidden"], batch.lengths)
        index = rows_of(batch.lengths, batch.width)
        whole = Rows.of_call(index, index, shallow, deep["logits"])
        checks, quality = list[Check](), None
        if checkpoint is not None:
            sure = shallow["confidence"][index, None]
            found, quality = self._against(checkpoint, reference, batch, whole, sure, encoded, data)
            checks += found
        if self._in_time("stepping and sync passes"):
            checks += self_checks(pair, batch, whole, shallow["hidden"], self._arithmetic, self.extent)
        self.advance(ITSELF)
        report: dict[str, Any] = {
            "against": None if checkpoint is None else checkpoint.name,
            "source_sha256": self.manifest.source_sha256,
            "emulated": self.float_type if self.float_type != self.manifest.float_type else None,
            "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        }
        passed = all(check.passed for check in checks)
        if reference is not None and quality is not None:
            report |= self._decoded(reference, checks) | {"quality": quality}
            passed = passed and report["greedy"]["passed"] and quality["passed"]
        report["left_out"] = self.left_out
        return {"passed": passed, **report, **({} if passed else {"remedy": remedy(self.manifest)})}

    @property
    def _arithmetic(self) -> Arithmetic:
        # For a GPU weights are quantized, and activations are not.
        rounds = self.manifest.quantization is not None and self.manifest.target == "cpu"
        return "8 bits" if rounds else self.float_type

    @property
    def _seconds_left(self) -> float:
        return self.began + self.extent.seconds - time.monotonic()

    def _in_time(self, what: str) -> bool:
        if self._seconds_left > 0:
            return True
        self.left_out.append(what)
        return False

    def _reference(self, checkpoint: Checkpoint) -> Any:
        import torch

        from freeexport.checkpoints.transformers_model import reference_model

        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        model = reference_model(checkpoint)
        self.advance(LOAD)
        return model

    def _against(
        self,
        checkpoint: Checkpoint,
        model: Any,
        batch: Batch,
        whole: Rows,
        confidence: np.ndarray,
        encoded: np.ndarray | None,
        data: Path | None,
    ) -> tuple[list[Check], dict[str, Any]]:
        """Engines, and transformers in the bundle's precision, against transformers in float64; and the quality."""
        # torch takes a second to import, and a bundle is checked without it too.
        from freeexport.verification.reference import (
            Float64,
            Predictions,
            States,
            in_precision_of,
            predictions_on,
            quality_of,
            state_checks,
            valid_rows,
        )

        manifest, exit_head = self.manifest, _exit_head(checkpoint, model, self.manifest.confidence)
        with Float64():
            truth = States.of(model, manifest.exit_layer, batch, exit_head)
        with in_precision_of(manifest, model):
            theirs = States.of(model, manifest.exit_layer, batch, exit_head)
        prompts = None if encoded is None else valid_rows(encoded, batch.prompt_lengths)
        ours = States(whole.deep, whole.shallow, whole.hidden, prompts, confidence)
        checks = list(state_checks(ours, truth, theirs, manifest.precision))
        followed = np.isin(whole.index, rows_of(np.maximum(batch.lengths - 1, 0), batch.width))
        targets = batch.following(whole.index[followed])
        sample = Predictions(ours.deep[followed], truth.deep[followed], theirs.deep[followed], targets)
        on = [sample] if data is None else predictions_on(self.bundle, model, data, self.threads)
        quality = quality_of(on, manifest.precision)
        self.advance(AGAINST)
        return checks, {**asdict(quality), "perplexity_ratio": quality.perplexity_ratio, "passed": quality.passed}

    def _decoded(self, model: Any, checks: list[Check]) -> dict[str, Any]:
        """Greedy token ids against transformers', and how often the shallow prediction is the deep one along the full
        model's own output."""
        from freeexport.measure.traces import Traces, trace_of
        from freeexport.verification.reference import compare

        limit = min(FULL.tokens, self.manifest.encoder_capacity or max(1, self.manifest.capacity // 2))
        prompts = [ids[:limit] for ids in sample_ids(self.bundle)][: self.extent.prompts]
        tie, count = _tie(self.manifest.precision, checks), self.extent.new_tokens
        greedy, traces = list[dict[str, Any]](), list[Traces]()
        with Session(self.bundle.path, slots=1, threads=self.threads) as session:
            for comparison in compare(session, model, prompts, count, lambda: self._seconds_left):
                greedy.append({**asdict(comparison), "passed": comparison.passed(tie)})
                self.advance(GREEDY / len(prompts))
                if len(greedy) < len(prompts) and not self._in_time(f"{len(prompts) - len(greedy)} prompts"):
                    break
            for line, ids in enumerate(prompts[: len(greedy)], start=1):
                traces.append(trace_of(session, line, np.array(ids, np.int64), count))
                self.advance(EXIT / len(prompts))
        joined = Traces.joined(traces)
        agreement = joined.share(joined.agrees)
        return {
            "greedy": {
                "tokens": count,
                "tie": tie,
                "passed": all(prompt["passed"] for prompt in greedy),
                "prompts": greedy,
            },
            "exit": {"agreement": None if agreement is None else asdict(agreement)},
        }


def remedy(manifest: Manifest) -> str:
    """Advice on a bundle that does not pass."""
    ways = []
    if manifest.precision != "fp32":
        ways.append("a higher --precision")
    elif manifest.dialect == "ort":
        ways.append("--dialect standard")
    return f"convert with {' or '.join([*ways, '--verify none'])}"


def failure(report: dict[str, Any]) -> str:
    """Describe the fault in a line that names the tensor, the figure, its limit and what to do."""
    found = _found(report)
    return f"{found}; {report['remedy']}" if "remedy" in report else found


def _found(report: dict[str, Any]) -> str:
    for check in report["checks"]:
        if not check["passed"]:
            return failure_of(check)
    for prompt in report["greedy"]["prompts"]:
        if not prompt["passed"]:
            position = prompt["first_difference"]
            return f"greedy decoding: token ids of prompt {prompt['prompt']} differ from position {position}"
    quality = report["quality"]
    return (
        f"predictions diverge by {quality['divergence']:.3g} nats from the checkpoint's, "
        f"the tolerance is {quality['tolerance']:g}"
    )


def write_report(bundle: Bundle, report: dict[str, Any]) -> None:
    """Into verification.json of the bundle, and into its manifest whether it is verified."""
    # NaN is no JSON: a check that gave it is recorded with null, and as failed.
    finite = json.loads(json.dumps(report), parse_constant=lambda name: None)
    write_whole(bundle.path / VERIFICATION, json.dumps(finite, indent=2, allow_nan=False) + "\n")
    if bundle.manifest.verified != report["passed"]:
        marked = replace(bundle.manifest, verified=report["passed"])
        write_whole(bundle.path / MANIFEST, marked.to_json())


def verify_in_child(
    directory: Path, model: str, checkpoint: Checkpoint, manifest: Manifest, extent: str, threads: int | None
) -> bool:
    """Verify a new bundle in a process of its own, so that its memory goes back to the system.

    False, with a warning, where it does not fit in memory. Raises VerificationError where the engines are wrong.
    """
    need = _memory_needed(checkpoint, manifest)
    available = available_memory()
    click.echo(f"verifying against {checkpoint.name}: needs about {need / 1e9:.1f} GB of memory", err=True)
    if available is not None and need > available:
        click.echo(f"warning: only {available / 1e9:.1f} GB is available, so the bundle is not verified", err=True)
        return False
    try:
        how = [*(["--quick"] if extent == "quick" else []), *(["--threads", str(threads)] if threads else [])]
        run_child("freeexport", "verify", str(directory), "--against", model, "--json", *how)
    except ChildError as error:
        raise VerificationError(str(error)) from None
    return True


def _memory_needed(checkpoint: Checkpoint, manifest: Manifest) -> int:
    parameters = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    # The reference in fp32, with its largest weight in float64, the engines with their packed copies twice over, logits
    # of the text that was run in several ways, and room for libraries and activations.
    reference = 4 * parameters + 8 * max(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    engines = 4 * manifest.weight_bytes + 4 * manifest.kv_bytes_per_sequence
    return reference + engines + LOGITS * manifest.vocab_size + 10**9


def _checkpoint_of(bundle: Bundle, model: str) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    if checkpoint.sha256 != bundle.manifest.source_sha256:
        raise VerificationError(
            f"{checkpoint.name} is not the checkpoint that this bundle was made from ({bundle.manifest.source}); "
            "give that one, or convert this one"
        )
    return checkpoint


def _exit_head(checkpoint: Checkpoint, model: Any, measure: ConfidenceMeasure) -> Any:
    """The reference of an exit that has parameters of its own; None where it reads through the model's head."""
    if checkpoint.exit is None or not checkpoint.exit.has_parameters:
        return None
    import torch

    from freeexport.training.exit_modules import known_tokens, own_exit
    from freeexport.training.shallow_deep import exits_of, shared_head

    description = describe(checkpoint.config, checkpoint)
    own, known = own_exit(checkpoint, description), known_tokens(checkpoint, description)
    head = shared_head(model, description).eval()

    @torch.no_grad()
    def read(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = head.normed(states) if own is None else own.norm(own(states))
        logits = head.read(normed)
        if known is None:
            return logits, None
        # Through the model's own linear layer, which is made as coarse as the bundle's.
        tokens = known.vocabulary
        classes = torch.cat([logits[..., tokens], known.other(normed * head.scale)], dim=-1)
        _, confidence = exits_of(classes.flatten(0, 1), tokens, measure)
        unknown = torch.full_like(logits, torch.finfo(torch.float32).min)
        return unknown.index_copy(-1, tokens, logits[..., tokens]), confidence.reshape(*states.shape[:2], 1)

    return read


def _tie(precision: Precision, checks: list[Check]) -> float | None:
    """Logits closer than this may change places: twice what they were just measured to be off by. In fp32 transformers,
    which `generate` runs in, is off too. Quantized weights are another model: how often it says the same is reported,
    and its quality is judged by its predictions."""
    from freeexport.verification.reference import TIE

    logits = [c for c in checks if c.tensor == "deep logits" and c.measure == "largest"]
    if precision == "fp16":
        return 2 * max(c.error * c.scale for c in logits)
    if precision == "fp32":
        return max(TIE, 2 * max((c.error + (c.reference or 0)) * c.scale for c in logits))
    return None
