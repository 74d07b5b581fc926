"""Outputs judged by a chat model behind an OpenAI-compatible endpoint: of the full model and of another setting, by
grades from 1 to 5 and by pairs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.measure.quality import CONFIDENCE, RESAMPLES, SEED
from freeexport.measure.records import OUTPUTS, RUN, read_records
from freeexport.system.jsonl import Request, whole_lines
from freeexport.system.page import pairs
from freeexport.system.progress import progress
from runtime.bundle.bundle import sha256_of
from runtime.errors import FreeExportError, OptionError
from runtime.json_file import read_object

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["likert", "pairwise"]
KINDS: tuple[Kind, ...] = get_args(Kind)
JUDGEMENTS = "judgements.jsonl"
# How often a model is asked for one verdict before its answer counts as none.
TRIES = 3
# Seconds: of one answer, and the longest pause between two attempts.
TIMEOUT, LONGEST_PAUSE = 120.0, 60.0
ATTEMPTS = 6
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)

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


class JudgeError(FreeExportError):
    """The endpoint does not answer."""


class Endpoint:
    """A chat model at `url`, without /chat/completions. Answers are greedy. Threads may share it; to be closed."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise OptionError(f"--endpoint {url!r} is no address; give one such as https://host/v1")
        self._url, self._model, self._sleep = url.rstrip("/") + "/chat/completions", model, sleep
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(timeout=timeout, headers=headers)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, prompt: str) -> str:
        """Get the answer's text. Waits and asks again where the endpoint fails, limits rates or takes too long; raises
        JudgeError where that does not help, and at once where it refuses."""
        import httpx

        messages = [{"role": "user", "content": prompt}]
        request = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": 256}
        reason, wished = "", ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(_pause(attempt, wished))
            try:
                answer = self._client.post(self._url, json=request)
            except httpx.HTTPError as error:
                reason, wished = f"{type(error).__name__}: {error}", ""
                continue
            if answer.status_code in _TRANSIENT:
                reason, wished = f"status {answer.status_code}", answer.headers.get("retry-after", "")
                continue
            if answer.status_code != 200:
                text = " ".join(answer.text.split())[:120]
                raise JudgeError(
                    f"{self._url} refused with status {answer.status_code} ({text}); check --endpoint, --judge-model "
                    "and the key"
                )
            try:
                found: Any = answer.json()["choices"][0]["message"]["content"]
            except (ValueError, KeyError, IndexError, TypeError):
                found = None
            if isinstance(found, str):
                return found
            reason, wished = "an answer that is no chat completion", ""
        raise JudgeError(
            f"{self._url} did not answer in {ATTEMPTS} attempts ({reason}); run the same command later: nothing is "
            "judged twice"
        )


def _pause(attempt: int, wished: str) -> float:
    """Retry-After, else exponential backoff with jitter."""
    try:
        seconds = float(wished)
    except ValueError:
        seconds = 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
    return min(LONGEST_PAUSE, max(0.0, seconds))


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
    """One question to the judge."""

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
    """List the questions in the order of the data. Raises OptionError where outputs are missing."""
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
    """Collect what JUDGEMENTS has already and what is asked now, each written as soon as it is known. Raises
    JudgeError, OptionError."""
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
    """Read the verdict of an answer, which may stand in other text; None where there is none, or more than one."""
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


def summary(judgements: Sequence[Judgement], options: JudgeOptions) -> dict[str, Any]:
    """Compute for each kind means over lines with 95 % intervals of a bootstrap, and how far repeats agree."""
    made: dict[str, Any] = {"lines": len({one.line for one in judgements}), "repeats": options.repeats}
    for kind in options.kinds:
        mine = [one for one in judgements if one.kind == kind]
        valid = [one for one in mine if one.verdict is not None]
        found = _likert(valid, options.setting) if kind == "likert" else _pairwise(valid)
        made[kind] = {**found, "agreement": _agreement(valid), "without_verdict": len(mine) - len(valid)}
    return made


def _likert(valid: Sequence[Judgement], setting: str) -> dict[str, Any]:
    grades: dict[str, dict[int, list[float]]] = {"full": defaultdict(list), setting: defaultdict(list)}
    for one in valid:
        grades[one.of][one.line].append(float(one.verdict or 0))
    other = {line: grades[setting].get(line, full) for line, full in grades["full"].items()}
    lines = [line for line in other if other[line]]
    ours, full = (np.array([np.mean(each[line]) for line in lines]) for each in (other, grades["full"]))
    return {"full": _mean(full), "other": _mean(ours), "difference": _mean(ours - full)}


def _pairwise(valid: Sequence[Judgement]) -> dict[str, Any]:
    """A line's preference is the mean over its repeats: 1 for the other setting, 0 for full, a half for a tie."""
    worth = {"other": 1.0, "tie": 0.5, "full": 0.0}
    lines: Mapping[int, list[float]] = defaultdict(list)
    for one in valid:
        lines[one.line].append(worth[str(one.verdict)])
    values = np.array([np.mean(each) for each in lines.values()])
    asked = [one for one in valid if one.asked and one.verdict != "tie"]
    first = [(one.verdict == "other") == one.swapped for one in asked]
    return {
        "other_wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "full_wins": int((values < 0.5).sum()),
        "same_text": len({one.line for one in valid if not one.asked}),
        "preference": _mean(values),
        "first_position": float(np.mean(first)) if first else None,
    }


def _mean(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def _agreement(valid: Sequence[Judgement]) -> float | None:
    """The share of pairs of repeats with the same verdict, of what was asked; None without repeats."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for one in valid:
        if one.asked:
            groups[one.line, one.of].append(one.verdict)
    pairs = [a == b for each in groups.values() for place, a in enumerate(each) for b in each[place + 1 :]]
    return float(np.mean(pairs)) if pairs else None


def summary_tables(found: Mapping[str, Any], options: JudgeOptions) -> list[Table]:
    """Show a summary on a terminal."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['value']:.3f} (95 %: {value['low']:.3f} to {value['high']:.3f})"
        return "unknown" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    about = (
        f"{options.setting} beside full, {found['lines']} lines, {found['repeats']} verdict(s) each, {options.model}"
    )
    return [
        pairs(f"{kind}: {about}", [(name.replace("_", " "), shown(value)) for name, value in found[kind].items()])
        for kind in options.kinds
    ]
