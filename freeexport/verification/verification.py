"""Verification of a bundle: run the checks, write the report, and do both in a child process after a conversion."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.system.child import ChildError, run_child
from freeexport.system.output_file import write_whole
from freeexport.system.progress import Advance, progress
from freeexport.verification.checks import Check, failure_of
from graphs.families import describe
from graphs.rewrites.fp32_copy import fp32_copy
from runtime import Session
from runtime.bundle.bundle import VERIFICATION, Bundle
from runtime.bundle.manifest import MANIFEST, Manifest, Precision
from runtime.bundle.precision import FloatType
from runtime.errors import FreeExportError
from runtime.machine.machine import available_memory

# Bytes for a token of the vocabulary: 4 texts of 48 tokens, their logits in ten ways.
LOGITS = 4 * 48 * 10 * 4


class VerificationError(FreeExportError):
    """A bundle does not compute what its checkpoint computes."""


def verify(bundle: Bundle, model: str | None, data: Path | None = None) -> dict[str, Any]:
    """Check the engines, against the checkpoint `model` if given. The report; its `passed` tells.

    `data` is text (JSON lines) to measure the quality on; None for a few sample texts.
    """
    with _runnable(bundle) as copy, progress("verifying", 5) as advance:
        return _verify(copy, bundle.manifest.float_type, model, data, advance)


def _runnable(bundle: Bundle) -> AbstractContextManager[Bundle]:
    """ONNX Runtime's CPU provider has no bf16: there it is fp32, every operator's result rounded."""
    return fp32_copy(bundle, rounds=True) if bundle.manifest.float_type == "bf16" else nullcontext(bundle)


def _verify(
    bundle: Bundle, float_type: FloatType, model: str | None, data: Path | None, advance: Advance
) -> dict[str, Any]:
    from freeexport.verification.parity import engine_checks, sample_batch

    checkpoint = None if model is None else _checkpoint_of(bundle, model)
    reference = None if checkpoint is None else _reference(checkpoint)
    exit_head = None if checkpoint is None else _exit_head(checkpoint, reference)
    advance()
    checks = list(engine_checks(bundle, reference, sample_batch(bundle), exit_head, float_type))
    report: dict[str, Any] = {
        "against": None if checkpoint is None else checkpoint.name,
        "source_sha256": bundle.manifest.source_sha256,
        "emulated": float_type if float_type != bundle.manifest.float_type else None,
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
    }
    passed = all(check.passed for check in checks)
    advance()
    if reference is not None:
        with Session(bundle.path, slots=1) as session:
            report["greedy"] = _greedy(session, reference, checks)
            advance()
            report["exit"] = _exit(session)
            advance()
        report["quality"] = _quality(bundle, reference, data)
        passed = passed and report["greedy"]["passed"] and report["quality"]["passed"]
    return {"passed": passed, **report, **({} if passed else {"remedy": remedy(bundle.manifest)})}


def remedy(manifest: Manifest) -> str:
    """What to do about a bundle that does not pass."""
    ways = []
    if manifest.precision != "fp32":
        ways.append("a higher --precision")
    elif manifest.dialect == "ort":
        ways.append("--dialect standard")
    return f"convert with {' or '.join([*ways, '--no-verify'])}"


def failure(report: dict[str, Any]) -> str:
    """What is wrong, in a line that names the tensor, the figure, its limit and what to do."""
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


def verify_in_child(directory: Path, model: str, checkpoint: Checkpoint, manifest: Manifest) -> bool:
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
        run_child("freeexport", "verify", str(directory), "--against", model, "--json")
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


def _reference(checkpoint: Checkpoint) -> Any:
    from freeexport.checkpoints.transformers_model import reference_model

    return reference_model(checkpoint)


def _exit_head(checkpoint: Checkpoint, model: Any) -> Any:
    """The reference of an exit that has parameters of its own; None where it reads through the model's head."""
    if checkpoint.exit is None or not checkpoint.exit.has_parameters:
        return None
    import torch

    from freeexport.measure.layers import own_head
    from freeexport.training.exit_layers.module import own_exit
    from freeexport.training.shallow_deep import shared_head

    description = describe(checkpoint.config, checkpoint)
    own = own_exit(checkpoint, description)
    if own is not None:
        head = shared_head(model, description)
        return torch.no_grad()(lambda states: head.read(own.norm(own(states))))
    return torch.no_grad()(own_head(checkpoint, description, shared_head(model, description)))


def _quality(bundle: Bundle, model: Any, data: Path | None) -> dict[str, Any]:
    from freeexport.verification.quality import measure_quality

    quality = measure_quality(bundle, model, data)
    return {**asdict(quality), "perplexity_ratio": quality.perplexity_ratio, "passed": quality.passed}


def _exit(session: Session) -> dict[str, Any]:
    """How often the shallow prediction is the deep one, along the full model's own output."""
    from freeexport.measure.traces import Traces, trace_of
    from freeexport.verification.greedy_parity import NEW_TOKENS

    prompts = [np.array(ids, np.int64) for ids in _prompts(session.bundle)]
    traces = Traces.joined(trace_of(session, line, ids, NEW_TOKENS) for line, ids in enumerate(prompts, start=1))
    agreement = traces.share(traces.agrees)
    return {"agreement": None if agreement is None else asdict(agreement)}


def _prompts(bundle: Bundle) -> list[list[int]]:
    from freeexport.verification.parity import MAX_TEXT, sample_ids

    limit = bundle.manifest.encoder_capacity or max(1, bundle.manifest.capacity // 2)
    return [ids[: min(MAX_TEXT, limit)] for ids in sample_ids(bundle)]


def _greedy(session: Session, model: Any, checks: list[Check]) -> dict[str, Any]:
    from freeexport.verification.greedy_parity import NEW_TOKENS, compare

    comparisons = compare(session, model, _prompts(session.bundle))
    tie = _tie(session.manifest.precision, checks)
    return {
        "tokens": NEW_TOKENS,
        "tie": tie,
        "passed": all(c.passed(tie) for c in comparisons),
        "prompts": [{**asdict(c), "passed": c.passed(tie)} for c in comparisons],
    }


def _tie(precision: Precision, checks: list[Check]) -> float | None:
    """Logits closer than this may change places: twice what they were just measured to be off by. In fp32 transformers,
    which `generate` runs in, is off too. Quantized weights are another model: how often it says the same is reported,
    and its quality is judged by its predictions."""
    from freeexport.verification.greedy_parity import TIE

    logits = [c for c in checks if c.tensor == "deep logits" and c.measure == "largest"]
    if precision == "fp16":
        return 2 * max(c.error * c.scale for c in logits)
    if precision == "fp32":
        return max(TIE, 2 * max((c.error + (c.reference or 0)) * c.scale for c in logits))
    return None
