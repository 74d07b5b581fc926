"""Outputs judged by a chat model: of the full model and of another setting, by grades from 1 to 5 and by pairs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from freeexport.checkpoints.examples import read_examples
from freeexport.evaluation.judging.endpoint import Endpoint
from freeexport.evaluation.records import OUTPUTS, RUN, read_records
from freeexport.system.jsonl import Request, whole_lines
from freeexport.system.progress import progress
from runtime.bundle.bundle import sha256_of
from runtime.errors import OptionError
from runtime.json_file import read_object

Kind = Literal["likert", "pairwise"]
KINDS: tuple[Kind, ...] = get_args(Kind)
JUDGEMENTS = "judgements.jsonl"
# How often a model is asked for one verdict before its answer counts as none.
TRIES = 3

_LIKERT = """Rate a response to a task, from 1 (useless) to 5 (as good as can be). Judge only whether it is correct, \
complete and well written. Reply with JSON alone: {{"score": NUMBER}}

Task:
{input}
{reference}
Response:
{first}
"""
_PAIRWISE = """Which of two responses to a task is better? Judge only whether they are correct, complete and well \
written; their order means nothing. Reply with JSON alone: {{"winner": "A"}}, {{"winner": "B"}} or {{"winner": "tie"}}

Task:
{input}
{reference}
Response A:
{first}

Response B:
{second}
"""


@dataclass(frozen=True)
class JudgeOptions:
    """`output`: of an evaluation. `bundle` and `setting`: what is compared with the full model of that bundle.
    `repeats`: how often each verdict is asked for; pairs change their order from one to the next. `samples`: the first
    lines of the outputs."""

    output: Path
    bundle: str
    setting: str
    endpoint: str
    model: str
    kinds: tuple[Kind, ...] = KINDS
    data: Path | None = None
    samples: int = 100
    repeats: int = 2
    parallel: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "repeats", "parallel"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose 1 or more")


@dataclass(frozen=True)
class Judgement:
    """`of`: "full" or the setting's name for likert, "pair" for pairwise. `verdict`: a grade; or "full", "other" or
    "tie"; None where the model gave none. `swapped`: the other setting's response stood first. `prompt`: a hash of all
    that was judged. `asked` is False where both texts were the same and nothing had to be asked."""

    kind: Kind
    line: int
    repeat: int
    of: str
    verdict: int | str | None
    prompt: str
    model: str
    swapped: bool = False
    asked: bool = True


@dataclass(frozen=True)
class Item:
    """What is to be judged once."""

    kind: Kind
    line: int
    repeat: int
    of: str
    text: str
    swapped: bool
    same: bool
    model: str

    @property
    def prompt(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.line, self.repeat, self.of, self.prompt, self.model


def items_of(options: JudgeOptions) -> list[Item]:
    """In the order of the data. Raises OptionError where the outputs do not have what is asked for."""
    outputs = {
        (one.bundle, one.setting, one.line): one.text for one in read_records(options.output / OUTPUTS) if not one.round
    }
    requests = _requests(options)
    lines = [line for bundle, setting, line in outputs if (bundle, setting) == (options.bundle, options.setting)]
    both = [line for line in sorted(lines) if (options.bundle, "full", line) in outputs and line in requests]
    if not both:
        known = sorted({f"{bundle}: {setting}" for bundle, setting, _ in outputs})
        raise OptionError(
            f"{options.output} has no outputs of {options.bundle}: {options.setting} beside those of full; it has "
            f"{'; '.join(known) or 'none'}"
        )
    items: list[Item] = []
    for line in both[: options.samples]:
        texts = outputs[options.bundle, "full", line], outputs[options.bundle, options.setting, line]
        for kind in options.kinds:
            for repeat in range(options.repeats):
                items.extend(_items(kind, requests[line], texts, repeat, options))
    return items


def only_bundle(output: Path) -> str:
    """The bundle of an evaluation. Raises OptionError where there are several."""
    names = list(read_object(output / RUN, "name the --output of an evaluation").get("bundles", {}))
    if len(names) != 1:
        raise OptionError(f"{output} has outputs of {', '.join(names) or 'no bundle'}; choose one with --bundle-name")
    return str(names[0])


def _requests(options: JudgeOptions) -> dict[int, Request]:
    run = read_object(options.output / RUN, "name the --output of an evaluation")
    data = options.data
    if data is None:
        data = Path(read_object(options.output / "evaluation.json", "name the data with --data")["data"])
    if sha256_of(data) != run.get("data"):
        raise OptionError(f"{data} is not what {options.output} was made of; name the data with --data")
    return {request.line_number: request for request in read_examples(data)}


def _items(kind: Kind, request: Request, texts: tuple[str, str], repeat: int, options: JudgeOptions) -> Iterator[Item]:
    asked = request.input if isinstance(request.input, str) else json.dumps(request.input, ensure_ascii=False)
    known = {"input": asked, "reference": f"\nReference:\n{request.target}\n" if request.target else ""}
    line, same = request.line_number, texts[0].strip() == texts[1].strip()
    if kind == "likert":
        for of, text in zip(("full", options.setting), texts, strict=True):
            if of == "full" or not same:
                filled = _LIKERT.format(first=text, **known)
                yield Item(kind, line, repeat, of, filled, False, False, options.model)
        return
    first = random.Random(f"{options.seed} {line}").random() < 0.5
    swapped = first if repeat % 2 == 0 else not first
    one, other = reversed(texts) if swapped else texts
    yield Item(
        kind, line, repeat, "pair", _PAIRWISE.format(first=one, second=other, **known), swapped, same, options.model
    )


def judge(options: JudgeOptions, endpoint: Endpoint) -> list[Judgement]:
    """What JUDGEMENTS has already, and what is asked for now, each added as soon as it is known. Raises JudgeError,
    OptionError."""
    items = items_of(options)
    path = options.output / JUDGEMENTS
    known = {_key(one): one for one in _read(path)}
    left = [item for item in items if item.key not in known]
    lock, refused = threading.Lock(), threading.Event()
    with path.open("a", encoding="utf-8") as file, progress("judging", len(items), len(items) - len(left)) as advance:

        def work(item: Item) -> None:
            if refused.is_set():
                return
            try:
                made = _judged(item, endpoint)
            except BaseException:
                refused.set()
                raise
            with lock:
                file.write(json.dumps(asdict(made)) + "\n")
                file.flush()
                known[_key(made)] = made
                advance()

        with ThreadPoolExecutor(options.parallel) as pool:
            try:
                for done in [pool.submit(work, item) for item in left]:
                    done.result()
            finally:
                refused.set()
    return [known[item.key] for item in items]


def _judged(item: Item, endpoint: Endpoint) -> Judgement:
    made = (item.kind, item.line, item.repeat, item.of)
    if item.same:
        return Judgement(*made, "tie", item.prompt, item.model, item.swapped, asked=False)
    verdict: int | str | None = None
    for _ in range(TRIES):
        verdict = parsed(item.kind, endpoint.ask(item.text), item.swapped)
        if verdict is not None:
            break
    return Judgement(*made, verdict, item.prompt, item.model, item.swapped)


def parsed(kind: Kind, answer: str, swapped: bool) -> int | str | None:
    """The verdict of an answer, which may stand in other text; None where there is none, or more than one."""
    if kind == "likert":
        grades = set(re.findall(r'"score"\s*:\s*"?([1-5])"?\s*[,}]', answer)) or set(
            re.findall(r"^\s*([1-5])\s*$", answer)
        )
        return int(grades.pop()) if len(grades) == 1 else None
    found = re.findall(r'"winner"\s*:\s*"(A|B|tie)"', answer, re.IGNORECASE) or re.findall(
        r"^\s*(A|B|tie)\s*\.?\s*$", answer, re.IGNORECASE
    )
    winners = {one.lower() for one in found}
    if len(winners) != 1:
        return None
    winner = winners.pop()
    if winner == "tie":
        return "tie"
    return "other" if (winner == "a") == swapped else "full"


def _key(one: Judgement) -> tuple[Any, ...]:
    return one.kind, one.line, one.repeat, one.of, one.prompt, one.model


def _read(path: Path) -> Iterator[Judgement]:
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            yield Judgement(**json.loads(line))
        except (ValueError, TypeError):
            raise OptionError(f"{path} line {number} is no judgement; remove the line") from None
