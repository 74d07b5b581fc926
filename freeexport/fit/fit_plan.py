"""Plan a run of `freeexport fit`: what to train and convert, expected speed and time.

Speeds come from a byte model: decoding is limited by reading weights, so a token costs the bytes
that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil

from freeexport.calibrate.sources import reference_of
from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.examples import Example, encode, text_format, unwritable
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.ready_made import fitting_exits
from freeexport.conversion.convert_options import ConvertOptions, engine_options
from freeexport.costs.bytes import step_bytes
from freeexport.costs.measured import bandwidth_of
from freeexport.costs.verdict import PAYS
from freeexport.evaluate.settings import EvaluateOptions
from freeexport.fit.exit_choice import PlannedExit, best_exit
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.splits import TRAIN
from freeexport.fit.training_speed import training_speed
from freeexport.system.jsonl import InputLine
from freeexport.system.load import other_load
from freeexport.system.machine import multiplies_bfloat16
from freeexport.system.progress import duration
from freeexport.task_metrics import MetricError, metric_of
from graphs.description import Description
from graphs.families import describe
from runtime.bundle.manifest import ExitInput, Precision
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores
from runtime.requests.load_engines import check_device

# Cost of a prompt's token relative to a decoded one, since many tokens share a read of the weights.
# A position of a speech encoder costs less if the decoder has more weights than the encoder (1/20
# for Whisper base in int8).
PROMPT = 1 / 8
# Share of the memory bandwidth that decoding reaches.
REACHED = 0.7
SAMPLE = 5000  # number of lines whose tokens are counted
# Bits per weight in the layers, including scales. The head has 8.
LAYER_BITS: dict[Precision, float] = {"int8": 8.0, "int4": 4.5, "fp16": 16.0}
LONGEST = 0.99  # share of targets that fit the output limit

# Minimum and maximum lines of the splits. The maximum is where more lines bring no benefit.
TEST = (100, 400)
CALIBRATION = (60, 300)
MAX_VALIDATION = 100
MIN_TRAIN = 100
# Cost of a line relative to one decoding by the full model: calibration by quality, calibration by
# agreement, and evaluation of both bundles and of the original model alone.
BY_QUALITY = 8.0
BY_AGREEMENT = 2.0
COMPARED = 6.5
ALONE = 2.0
WITH_EXIT = 2.5  # extra cost if the original model has an exit, evaluated in all modes
SHARES = {"calibrate": 0.12, "evaluate": 0.2}  # maximum shares of the budget
# Share of the training time for training all weights. The rest trains the exit alone, which takes
# longer if it is trained in no other step.
TOGETHER: dict[ExitInput, float] = {"state": 0.85, "feature": 0.6, "fused": 0.6}
# A conversion takes CONVERTING seconds, plus one per CONVERTED weights. Training needs ACTIVATIONS
# bytes in addition to its weights, and LOGITS bytes per batch token and vocabulary token.
CONVERTING = 45
CONVERTED = 1.5e6
ACTIVATIONS = 2 << 30
LOGITS = 32
FEW_STEPS = 100  # fewer steps barely train an exit
BATCH_TOKENS = 2048  # default batch size
MIN_BATCH = 256  # minimum batch tokens, for small budgets
RECORDINGS = 6  # recordings per batch
# Speed measurement without data: prompts, tokens of each, maximum rounds, and approximate seconds.
SPEED_PROMPTS = 4
SPEED_TOKENS = 64
MAX_ROUNDS = 5
SPEED_SECONDS = 60
TOKENS_OF_A_ROUND = 2 * SPEED_PROMPTS * SPEED_TOKENS  # in both modes
# Names of the bundles of the original and of the trained model.
GIVEN = "given"
TRAINED = "trained"


@dataclass(frozen=True)
class Texts:
    """Mean lengths of the data.

    Attributes:
        prompt: Tokens of an input, or encoder positions if `speech`.
        target: Tokens of a target.
        max_output: Maximum tokens of an output.
        share: Cost of an input token relative to a decoded one.
        speech: The inputs are recordings.
    """

    prompt: float
    target: float
    max_output: int
    share: float
    speech: bool = False

    @property
    def read(self) -> float:
        """Return the cost of reading an input, in decoded tokens."""
        return self.share * self.prompt

    def request(self, speed: float) -> float:
        """Return the speedup of a request if a token is `speed` times as fast."""
        return (self.read + self.target) / (self.read + self.target / speed)


@dataclass(frozen=True)
class Training:
    """Planned training.

    Attributes:
        step: Seconds per step of `batch_tokens`.
        tokens_per_second: Measured training speed.
        frozen_lines: Number of lines that train the exit alone.
        batch_tokens: Padded tokens per batch.
    """

    step: float
    tokens_per_second: float
    learning_rate: float
    bf16: bool
    frozen_lines: int
    batch_tokens: int


@dataclass(frozen=True)
class Plan:
    """A plan for a run.

    Attributes:
        rate: Expected tokens per second of the full model in this precision.
        busy: Cores used by other processes.
        seconds: Duration of each step, by name.
        why: Why nothing is trained.
        texts: Lengths of the data.
        lines: Number of lines of each split.
        exit: The exit to train. None: nothing is trained.
        trainings: Names of its trainings: "joint" of all weights, "exit" of the exit alone.
        training: Their options. None: nothing is trained.
        has_exit: The checkpoint has a trained exit.
        ready_made: Names of ready-made exits that fit the weights.
        drafting: The ready-made exit that drafts if nothing is trained.
        missing: Why the budget is too small.
        unwritable: Note about targets that the tokenizer cannot write.
    """

    name: str
    layers: int
    precision: Precision
    rate: float
    busy: float
    seconds: dict[str, float]
    why: str = ""
    texts: Texts | None = None
    lines: dict[str, int] = field(default_factory=dict)
    exit: PlannedExit | None = None
    trainings: tuple[str, ...] = ()
    training: Training | None = None
    has_exit: bool = False
    ready_made: tuple[str, ...] = ()
    drafting: str | None = None
    missing: str = ""
    unwritable: str = ""


def make_plan(options: FitOptions, lines: Sequence[InputLine]) -> Plan:
    """Plan a run over `lines` of data.

    Reads no weights before the timed steps, unless a ready-made exit may fit them. If the budget is
    too small, `missing` of the plan is set.

    Raises:
        CheckpointError: If the checkpoint is damaged or incomplete.
        UnsupportedModelError: If the model is not supported.
        DataError: If the data do not fit the model.
        MetricError: If the metric does not fit the data.
        OptionError: If nothing can be planned.
        EngineError: If ONNX Runtime here has no provider for the device.
        DeviceError: If there is no such device.
        CapacityError: If the device has too little memory for the bundles.
    """
    checkpoint = open_checkpoint(options.model)
    description = describe(checkpoint.config, checkpoint)
    layers = len(description.decoder.layers)
    costs = step_bytes(description, checkpoint)
    if layers < 2:
        raise OptionError(
            f"{checkpoint.name} has one decoder layer, and an exit needs at least two; use convert"
        )
    parameters = _weights(checkpoint)
    if options.target != "cpu":
        _check_for_gpu(options, checkpoint, description, parameters)
    ready_made = fitting_exits(checkpoint)
    with other_load() as load:
        bandwidth = REACHED * bandwidth_of(options.threads or usable_cores())
        # Decoding on a GPU is in fp16, and faster than this rate, which is that of main memory.
        stored = as_stored(checkpoint) if options.target == "cpu" else "fp16"
        plan = Plan(
            name=checkpoint.name,
            layers=layers,
            precision=stored,
            rate=bandwidth / (layers * costs.layer * LAYER_BITS[stored] / 8 + costs.head),
            busy=0.0,
            seconds={"convert": CONVERTING + parameters / CONVERTED},
            has_exit=checkpoint.exit is not None and checkpoint.exit.trained,
            ready_made=tuple(packed.name for packed in ready_made),
        )
        if options.data is None:
            drafting = next(
                (packed.name for packed in ready_made if not packed.adapter_config), None
            )
            tokens = speed_options(options, plan).rounds * TOKENS_OF_A_ROUND
            plan = replace(
                plan,
                why="there are no data to train an exit on",
                drafting=drafting,
                seconds=plan.seconds | {"speed": tokens / plan.rate},
            )
        else:
            _check_metric(options.metric, lines)
            every = max(1, len(lines) // SAMPLE)
            form = text_format(checkpoint, description, 2048)
            examples = encode(lines[::every], form, options.data)[0]
            texts = _texts(examples)
            if form.speech is not None:
                decoder = layers * costs.layer + costs.head
                texts = replace(
                    texts,
                    max_output=min(texts.max_output, form.limit),
                    share=PROMPT * _weights(checkpoint, "encoder.layers.") / decoder,
                    speech=True,
                )
            plan = replace(
                plan,
                texts=texts,
                exit=best_exit(checkpoint, description, examples),
                unwritable=unwritable(lines[::every], form, options.data) or "",
            )
            in_8_bits = bandwidth / (layers * costs.layer + costs.head)
            plan = _with_training(options, plan, in_8_bits, parameters, description.vocab_size)
            plan = _with_times(options, plan, parameters, len(lines))
    return replace(plan, busy=load.cores)


def speed_options(options: FitOptions, plan: Plan) -> EvaluateOptions:
    """Return the options for measuring the speed of a bundle that was made without data."""
    rounds = int(SPEED_SECONDS * plan.rate / TOKENS_OF_A_ROUND)
    return EvaluateOptions(
        bundles=((options.out, ("full", "lossless")),),
        thresholds=(),
        samples=SPEED_PROMPTS,
        rounds=max(1, min(MAX_ROUNDS, rounds)),
        max_new_tokens=SPEED_TOKENS,
        threads=options.threads,
        device=options.device,
    )


def min_lines() -> int:
    """Return the minimum number of lines for a run."""
    return TEST[0] + CALIBRATION[0] + MAX_VALIDATION // 2 + MIN_TRAIN


def _check_for_gpu(
    options: FitOptions, checkpoint: Checkpoint, description: Description, parameters: int
) -> None:
    """Check that the device is there, has room for the bundles, and can run the model.

    The original and the trained model are evaluated side by side.
    """
    device = Device.parse(options.device)
    if description.spectrogram is not None:
        raise OptionError(f"--device {device}: speech is supported only on the CPU; leave it out")
    bundles = 1 if options.data is None else 2
    size = bundles * 2 * parameters
    check_device(device, size, f"{size / 1e6:.1f} MB of weights in fp16 ({bundles} bundles)")
    layers = len(description.decoder.layers)
    layer = checkpoint.exit_layer(layers, None if checkpoint.exit else 1)
    engine_options(checkpoint.described(), ConvertOptions(target=options.target), layer)


def _check_metric(name: str, lines: Sequence[InputLine]) -> None:
    metric = metric_of(name)
    references = [reference_of(line) for line in lines[:SAMPLE]]
    known = [one for one in references if one is not None]
    scored = metric.of(metric.table([one.texts[0] for one in known], known))
    if not scored:
        raise MetricError(
            f"metric {name} gives the targets themselves 0: it does not fit these data; choose "
            "another"
        )


def _weights(checkpoint: Checkpoint, part: str = "") -> int:
    """Return the number of weights in tensors with `part` in their name."""
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names() if part in name)


def _texts(examples: Sequence[Example]) -> Texts:
    prompts, targets = (
        np.array([len(getattr(one, name)) for one in examples]) for name in ("prompt", "target")
    )
    longest = float(np.quantile(targets, LONGEST))
    return Texts(
        prompt=float(prompts.mean()),
        target=float(targets.mean()),
        max_output=max(16, math.ceil(1.1 * longest)),
        share=PROMPT,
    )


def as_stored(checkpoint: Checkpoint) -> Precision:
    """Return the precision for a model that is not trained.

    4 bits if most of its file consists of 4-bit blocks that can be kept, else 8 bits.
    """
    file = checkpoint.files[0]
    if checkpoint.merged is None and isinstance(file, GGUFFile):
        blocks = sum(
            tensor.nbytes for tensor in file.header.tensors.values() if tensor.kind in (2, 3)
        )  # Q4_0, Q4_1
        if 2 * blocks > file.nbytes:
            return "int4"
    return "int8"


def _with_training(
    options: FitOptions, plan: Plan, rate: float, parameters: int, vocabulary: int
) -> Plan:
    """Decide what to train. Remove the exit if training cannot pay.

    Args:
        rate: Tokens per second of the full model in 8 bits, the precision of a trained model.
    """
    found = plan.exit
    assert found is not None
    assert plan.texts is not None
    # Memory for weights, gradients and both moments of every parameter, and for a batch's
    # activations, mainly logits.
    needed = 16 * parameters + ACTIVATIONS + LOGITS * BATCH_TOKENS * vocabulary
    trainings = found.trainings
    if needed > psutil.virtual_memory().available:
        trainings = tuple(name for name in trainings if name == "exit")
    usual = plan.texts.request(found.speeds["usual"])
    if usual < PAYS:
        why = f"an exit would usually give {usual:.2f}x a request here: training cannot pay"
        return replace(plan, exit=None, why=why)
    if not trainings:
        why = f"training {plan.name} takes more memory than there is"
        return replace(plan, exit=None, why=why)
    if options.target == "cpu":
        plan = replace(plan, precision="int8", rate=rate)
    return replace(plan, trainings=trainings)


def _with_times(options: FitOptions, plan: Plan, parameters: int, lines: int) -> Plan:
    """Divide the lines and the budget among the steps."""
    texts = plan.texts
    assert texts is not None
    trains = plan.exit is not None
    request = (texts.read + texts.target) / plan.rate  # seconds, by the full model
    by_rule = request * (BY_AGREEMENT if options.quality is None else BY_QUALITY)
    compared = request * ((COMPARED if trains else ALONE) + WITH_EXIT * plan.has_exit)

    def count(bounds: tuple[int, int], step: str, each: float) -> int:
        """Return the lines that fit the step's share of the budget.

        Above the minimum, at most a quarter of all lines.
        """
        fitting = min(bounds[1], SHARES[step] * options.budget / each, lines / 4)
        return int(max(bounds[0], fitting))

    convert = plan.seconds["convert"]
    sizes = {"test": count(TEST, "evaluate", compared)}
    seconds = {GIVEN: convert, "evaluate": sizes["test"] * compared}
    calibrations = trains + plan.has_exit  # an existing exit is calibrated too
    if calibrations:
        sizes["calibration"] = count(CALIBRATION, "calibrate", by_rule * calibrations)
    if plan.has_exit:
        seconds["calibrate given"] = sizes["calibration"] * by_rule
    if not trains:
        return replace(plan, lines=sizes, seconds=seconds)
    sizes["validation"] = min(MAX_VALIDATION, lines // 10)
    sizes[TRAIN] = lines - sum(sizes.values())
    seconds |= {TRAINED: convert, "calibrate": sizes["calibration"] * by_rule}
    plan = replace(plan, lines=sizes, seconds=seconds)
    return _with_training_time(options, plan, parameters, texts.prompt + texts.target)


def _with_training_time(
    options: FitOptions, plan: Plan, parameters: int, line_tokens: float
) -> Plan:
    """Give the trainings the rest of the budget, and measure how fast they are."""
    found = plan.exit
    texts = plan.texts
    assert found is not None
    assert texts is not None
    assert options.data is not None
    left = options.budget - sum(plan.seconds.values())
    shares = {plan.trainings[0]: 1.0}
    if len(plan.trainings) > 1:
        shares = {"joint": TOGETHER[found.input], "exit": 1 - TOGETHER[found.input]}
    batch = BATCH_TOKENS
    min_batch = max(MIN_BATCH, math.ceil(line_tokens))
    if texts.speech:
        min_batch = math.ceil(texts.prompt + texts.max_output)
        batch = RECORDINGS * min_batch
    settings: dict[str, Any] = {
        "bf16": multiplies_bfloat16(),
        "learning_rate": 3e-4 if parameters < 3e8 else 1e-4,
    }
    while True:
        speed = training_speed(
            options.model,
            options.data,
            line_tokens,
            batch,
            **found.training(plan.trainings[0]),
            **settings,
            threads=options.threads,
        )
        needed = FEW_STEPS * speed["step"] / shares[plan.trainings[0]]
        if not 0 < left < needed or batch <= min_batch:
            break
        # At most half, and the largest power of two whose steps should fit.
        wanted = max(1.0, batch * left / needed)
        batch = max(min_batch, min(batch // 2, 1 << int(math.log2(wanted))))
    missing = ""
    if left < needed:
        minutes = math.ceil((options.budget - left + needed) / 60)
        missing = (
            f"--budget {duration(options.budget)} leaves {duration(max(0.0, left))} for training, "
            f"and {FEW_STEPS} steps of {batch} tokens take {duration(needed)}; give --budget "
            f"{minutes}min or more, or leave --data out"
        )
        left = needed
    seconds = plan.seconds | {name: share * left for name, share in shares.items()}
    # The frozen model reads its lines once, three times as fast as it trains, in a quarter of the
    # time.
    frozen = 0.75 * seconds.get("exit", 0.0) * speed["tokens_per_second"] / line_tokens
    training = Training(
        **settings,
        step=speed["step"],
        tokens_per_second=speed["tokens_per_second"],
        frozen_lines=max(MIN_TRAIN, int(frozen)),
        batch_tokens=batch,
    )
    return replace(plan, seconds=seconds, training=training, missing=missing)
