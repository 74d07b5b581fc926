"""Verify a bundle and write a report, if requested in a child process."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.ready_made import open_source
from freeexport.system.child import ChildError, run_child
from freeexport.system.output import write_whole
from freeexport.system.progress import progress
from freeexport.verification.batches import (
    FULL,
    QUICK,
    Batch,
    Extent,
    sample_batch,
    sample_ids,
    sample_sounds,
    valid_indices,
)
from freeexport.verification.checks import Check, sentence_of
from freeexport.verification.engines import EnginePair, encode_prompts
from freeexport.verification.exit_agreement import exit_head
from freeexport.verification.row_parity import Rows, self_checks
from freeexport.verification.ties import BATCHES, compare_up_to_ties
from graphs.widen import fp32_copy
from runtime import Session
from runtime.bundle.bundle import VERIFICATION, Bundle
from runtime.bundle.manifest import MANIFEST, Manifest, Precision
from runtime.engines.kernels import reading_prompt
from runtime.errors import FreeExportError
from runtime.machine.machine import available_memory, usable_cores
from runtime.speech.windows import SpeechPrompt

# Bytes per token of a text and token of the vocabulary: 4 texts, with logits computed in ten ways.
LOGITS = 4 * 10 * 4


class VerificationError(FreeExportError):
    """Raised if a bundle does not compute what its checkpoint computes."""


def verify(
    bundle: Bundle,
    model: str | None,
    data: Path | None = None,
    extent: Extent = FULL,
    device: str = "cpu",
    exit_file: str | None = None,
) -> dict[str, Any]:
    """Check a bundle's engines, and return the report.

    Its entry `passed` is True if all checks passed.

    Args:
        model: Checkpoint to compare with. None: compare the engines only with themselves.
        data: JSONL file of text for measuring quality. None: a few sample texts.
        device: Device that decodes tokens. On a GPU, the tokens of several settings are also
            compared up to ties. Tensors are compared on the CPU.
        exit_file: Name or file of the ready-made exit that the bundle was converted with. Default:
            the one that the manifest names.
    """
    float_type = bundle.manifest.float_type
    # ONNX Runtime's CPU provider does not support bf16. An fp32 copy rounds every operator's
    # result.
    runnable = fp32_copy(bundle, rounds=True) if float_type == "bf16" else nullcontext(bundle)
    with runnable as copy, progress("verifying"):
        report = _Verification(copy, bundle, extent, device).report(model, data, exit_file)
        if device != "cpu":
            report["device"] = decoded_on(bundle, device, extent)
            report["passed"] = report["passed"] and report["device"]["passed"]
        return report


def decoded_on(bundle: Bundle, device: str, extent: Extent = FULL) -> dict[str, Any]:
    """Compare tokens decoded on a device in several settings, up to ties. Returns JSON values."""
    prompts = sample_ids(bundle)[: extent.prompts]
    longest = bundle.manifest.encoder_capacity or max(1, bundle.manifest.capacity // 2)
    with Session(bundle.path, slots=max(BATCHES), device=device, prefix_cache_mb=0) as session:
        report = compare_up_to_ties(session, [ids[:longest] for ids in prompts], extent.new_tokens)
    return {"device": device, **report.to_json()}


class _Verification:
    """Checks of one bundle."""

    def __init__(self, bundle: Bundle, written: Bundle, extent: Extent, device: str) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.float_type = written.manifest.float_type
        self.extent = extent
        self.device = device
        self.decodes = (bundle if device == "cpu" else written).path
        self.threads = usable_cores()
        self.left_out: list[str] = []
        self.began = time.monotonic()

    def report(self, model: str | None, data: Path | None, exit_file: str | None) -> dict[str, Any]:
        manifest = self.manifest
        checkpoint = None
        reference: Any = None
        if model is not None:
            checkpoint = open_source(model, manifest, exit_file)
            if checkpoint.sha256 != manifest.source_sha256:
                raise VerificationError(
                    f"{checkpoint.name} is not the checkpoint that this bundle was made from "
                    f"({manifest.source}); give that one, or convert this one"
                )
            # torch takes a second to import. Checks without a checkpoint do not need it.
            from freeexport.checkpoints.transformers_model import reference_model

            reference = reference_model(checkpoint, capacity=self.manifest.capacity)
        self.began = time.monotonic()
        batch = sample_batch(self.bundle, self.extent.tokens)
        cross, encoded = encode_prompts(self.bundle, batch, self.threads)
        pair = EnginePair(self.bundle, len(batch.tokens), self.threads, cross)
        index = valid_indices(batch.lengths, batch.width)
        # All rows at once are a decoder-only model's prompt, which may have kernels of its own.
        # Their results are compared with the checkpoint. If the kernels for steps give other
        # results, these are compared with the checkpoint too, and with steps and sync passes.
        readings = list[tuple[Rows, np.ndarray]]()
        for reads in (False,) if manifest.encoder_decoder else (True, False):
            pair.trim(0)
            with reading_prompt(reads):
                shallow, deep = pair.both(batch.tokens, batch.lengths)
            rows = Rows.of_call(index, index, shallow, deep["logits"])
            if not readings or not np.array_equal(readings[0][0].deep, rows.deep):
                readings.append((rows, shallow["confidence"][index, None]))
        checks = list[Check]()
        more = dict[str, Any]()
        if checkpoint is not None:
            checks, quality = self._against(
                checkpoint, reference, batch, readings=readings, encoded=encoded, data=data
            )
        if self._in_time("stepping and sync passes"):
            # For a GPU, weights are quantized but activations are not.
            rounds = manifest.quantization is not None and manifest.target == "cpu"
            arithmetic = "8 bits" if rounds else self.float_type
            checks += self_checks(
                pair,
                batch,
                readings[-1][0],
                hidden=shallow["hidden"],
                arithmetic=arithmetic,
                extent=self.extent,
            )
        passed = all(check.passed for check in checks)
        way = "a higher --precision or " if manifest.precision != "fp32" else ""
        way = way or ("--dialect standard or " if manifest.dialect == "ort" else "")
        if checkpoint is not None:
            more = self._decoded(reference, checks) | {"quality": quality}
            passed = passed and more["greedy"]["passed"] and quality["passed"]
        return {
            "passed": passed,
            "against": None if checkpoint is None else checkpoint.name,
            "source_sha256": manifest.source_sha256,
            "emulated": self.float_type if self.float_type != manifest.float_type else None,
            "checks": [{**asdict(check), "passed": check.passed} for check in checks],
            **more,
            "left_out": self.left_out,
            **({} if passed else {"remedy": f"convert with {way}--verify none"}),
        }

    def _seconds_left(self) -> float:
        return self.began + self.extent.seconds - time.monotonic()

    def _in_time(self, what: str) -> bool:
        if self._seconds_left() > 0:
            return True
        self.left_out.append(what)
        return False

    def _against(
        self,
        checkpoint: Checkpoint,
        model: Any,
        batch: Batch,
        readings: Sequence[tuple[Rows, np.ndarray]],
        encoded: np.ndarray | None,
        data: Path | None,
    ) -> tuple[list[Check], dict[str, Any]]:
        """Compare with transformers in float64.

        All `readings` of the sample are compared, each with its confidence. Transformers in the
        bundle's precision sets the tolerances.

        Returns:
            The checks, and the quality of the first reading or on `data`.
        """
        from freeexport.verification import arithmetic, divergence, reference

        manifest = self.manifest
        head = exit_head(checkpoint, model, manifest.confidence)
        with arithmetic.Float64():
            truth = reference.States.of(model, manifest.exit_layer, batch, head)
        with arithmetic.in_precision_of(manifest, model):
            theirs = reference.States.of(model, manifest.exit_layer, batch, head)
        prompts = None if encoded is None else reference.valid_rows(encoded, batch.prompt_lengths)
        read = [
            reference.States(one.deep, one.shallow, one.hidden, encoded=prompts, confidence=sure)
            for one, sure in readings
        ]
        checks = [
            check
            for one in read
            for check in reference.state_checks(one, truth, theirs, manifest.precision)
        ]
        ours = read[0]
        whole = readings[0][0]
        followed = np.isin(
            whole.index, valid_indices(np.maximum(batch.lengths - 1, 0), batch.width)
        )
        bundle, exact, coarse = (states.deep[followed] for states in (ours, truth, theirs))
        sample = divergence.Predictions(
            bundle, exact, coarse, batch.following(whole.index[followed])
        )
        on = [sample] if data is None else divergence.predictions_on(self.bundle, model, data)
        quality = divergence.quality_of(on, manifest.precision)
        return checks, {
            **asdict(quality),
            "perplexity_ratio": quality.perplexity_ratio,
            "passed": quality.passed,
        }

    def _decoded(self, model: Any, checks: list[Check]) -> dict[str, Any]:
        """Compare greedy token ids with those of transformers.

        Also measure how often shallow and deep predictions agree on the full model's own output.
        """
        from freeexport.calibrate.traces import Traces, trace_of
        from freeexport.verification.greedy import compare_greedy

        limit = min(
            FULL.tokens, self.manifest.encoder_capacity or max(1, self.manifest.capacity // 2)
        )
        prompts: list[Any] = [ids[:limit] for ids in sample_ids(self.bundle)][: self.extent.prompts]
        if self.manifest.speech is not None:
            prompts = [
                SpeechPrompt.plain(self.manifest, one) for one in sample_sounds(self.manifest)
            ]
        tie = _tie(self.manifest.precision, checks)
        count = self.extent.new_tokens
        greedy = list[dict[str, Any]]()
        traces = list[Traces]()
        with Session(
            self.decodes, slots=1, threads=self.threads, device=self.device, prefix_cache_mb=0
        ) as session:
            for comparison in compare_greedy(
                session, model, prompts, new_tokens=count, seconds=self._seconds_left
            ):
                greedy.append({**asdict(comparison), "passed": comparison.passed(tie)})
                if len(greedy) < len(prompts) and not self._in_time(
                    f"{len(prompts) - len(greedy)} prompts"
                ):
                    break
            for line, prompt in enumerate(prompts[: len(greedy)], start=1):
                ids = prompt if isinstance(prompt, SpeechPrompt) else np.array(prompt, np.int64)
                traces.append(trace_of(session, line, ids, count))
        joined = Traces.joined(traces)
        agreement = joined.share(joined.agrees)
        passed = all(prompt["passed"] for prompt in greedy)
        return {
            "greedy": {"tokens": count, "tie": tie, "passed": passed, "prompts": greedy},
            "exit": {"agreement": None if agreement is None else asdict(agreement)},
        }


def failure(report: dict[str, Any]) -> str:
    """Describe the first failure in a line: tensor, error, limit and remedy."""
    remedy = f"; {report['remedy']}" if "remedy" in report else ""
    for check in report["checks"]:
        if not check["passed"]:
            return sentence_of(check) + remedy
    for prompt in report.get("greedy", {"prompts": ()})["prompts"]:
        if not prompt["passed"]:
            place = f"prompt {prompt['prompt']} differ from position {prompt['first_difference']}"
            return f"greedy decoding: token ids of {place}{remedy}"
    if not report.get("device", {"passed": True})["passed"]:
        return f"device {report['device']['device']}: {report['device']['line']}"
    divergence = report["quality"]["divergence"]
    tolerance = report["quality"]["tolerance"]
    return (
        f"predictions diverge by {divergence:.3g} nats from the checkpoint's, the tolerance is "
        f"{tolerance:g}{remedy}"
    )


def write_report(bundle: Bundle, report: dict[str, Any]) -> None:
    """Write the bundle's verification.json, and update `verified` in its manifest."""
    # JSON has no NaN. Checks with NaN are recorded as null and failed.
    finite = json.loads(json.dumps(report), parse_constant=lambda name: None)
    write_whole(bundle.path / VERIFICATION, json.dumps(finite, indent=2, allow_nan=False) + "\n")
    if bundle.manifest.verified != report["passed"]:
        marked = replace(bundle.manifest, verified=report["passed"])
        write_whole(bundle.path / MANIFEST, marked.to_json())


def verify_in_child(
    directory: Path,
    model: str,
    checkpoint: Checkpoint,
    manifest: Manifest,
    extent: str,
    exit_file: str | None = None,
) -> bool:
    """Verify a new bundle in a child process, so that its memory is returned to the system.

    `exit_file` is the name or the file of its ready-made exit, if any.

    Returns False, with a warning, if there is not enough memory.
    """
    sizes = [math.prod(checkpoint.shape(name)) for name in checkpoint.names()]
    # Memory for the reference in fp32 with its largest weight in float64, the engines and their
    # packed copies twice, logits of the text in several ways, and libraries and activations.
    engines = 4 * manifest.weight_bytes + 4 * manifest.kv_bytes_per_sequence
    logits = LOGITS * (QUICK if extent == "quick" else FULL).tokens * manifest.vocab_size
    need = 4 * sum(sizes) + 8 * max(sizes) + engines + logits + 10**9
    available = available_memory()
    click.echo(
        f"verifying against the checkpoint: needs about {need / 1e9:.1f} GB of memory", err=True
    )
    if need > available:
        click.echo(
            f"warning: only {available / 1e9:.1f} GB is available, so the bundle is not verified",
            err=True,
        )
        return False
    arguments = ["verify", str(directory), "--against", model, "--json"]
    arguments += ["--quick"] if extent == "quick" else []
    arguments += [] if exit_file is None else ["--exit", exit_file]
    try:
        run_child("freeexport", *arguments)
    except ChildError as error:
        raise VerificationError(str(error)) from None
    return True


def _tie(precision: Precision, checks: list[Check]) -> float | None:
    """Return the distance below which the two best logits may swap.

    It is twice the measured error. In fp32 it includes the error of transformers, which runs
    `generate` in fp32. None for quantized weights: such a bundle is a different model, so equal
    tokens are reported but not required, and quality is that of the predictions.
    """
    from freeexport.verification.greedy import TIE

    logits = [c for c in checks if c.tensor == "deep logits" and c.measure == "largest"]
    if precision == "fp16":
        return 2 * max(c.error * c.scale for c in logits)
    if precision == "fp32":
        return max(TIE, 2 * max((c.error + (c.reference or 0)) * c.scale for c in logits))
    return None
