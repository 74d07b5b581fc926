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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.measure.quality import RESAMPLES, percentiles
from freeexport.measure.settings import OUTPUTS, RUN, read_records
from freeexport.metrics import draws
from freeexport.system.jsonl import append_lines, whole_lines
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
# A line's preference for the other setting, by the verdict on a pair.
_WORTH = {"other": 1.0, "tie": 0.5, "full": 0.0}

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
    """A chat model at `url`, without /chat/completions. Answers are greedy. Threads may share it."""

    def __init__(self, url: str, model: str, key: str | None) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise OptionError(f"--endpoint {url!r} is no address; give one such as https://host/v1")
        self._url, self._model = url.rstrip("/") + "/chat/completions", model
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(timeout=TIMEOUT, headers=headers)

    def ask(self, prompt: str) -> str:
        """Get the answer's text. Waits and asks again where the endpoint fails, limits rates or takes too long; raises
        JudgeError where that does not help, and at once where it refuses."""
        import httpx

        messages = [{"role": "user", "content": prompt}]
        request = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": 256}
        reason = wished = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(_pause(attempt, wished))
            wished = ""
            try:
                answer = self._client.post(self._url, json=request)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                with suppress(ValueError, KeyError, IndexError, TypeError):
                    if isinstance(found := answer.json()["choices"][0]["message"]["content"], str):
                        return found
                reason = "an answer that is no chat completion"
            elif answer.status_code in _TRANSIENT:
                reason, wished = f"status {answer.status_code}", answer.headers.get("retry-after", "")
            else:
                text = " ".join(answer.text.split())[:120]
                raise JudgeError(
                    f"{self._url} refused with status {answer.status_code} ({text}); check --endpoint, --judge-model "
                    "and the key"
                )
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
    model: str
    kinds: tuple[Kind, ...] = KINDS
    data: Path | None = None
    samples: int = 100
    repeats: int = 2
    parallel: int = 4


@dataclass(frozen=True)
class Judgement:
    """`of`: "full" or the setting's name for likert, "pair" for pairwise. `verdict`: a grade; or "full", "other" or
    "tie"; None where the model gave none. `swapped`: the other setting's response stood first. `prompt`: a hash of all
    that is judged. `asked` is False where both texts are the same and nothing has to be asked."""

    kind: Kind
    line: int
    repeat: int
    of: str
    verdict: int | str | None
    prompt: str
    model: str
    swapped: bool = False
    asked: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.line, self.repeat, self.of, self.prompt, self.model


def questions_of(options: JudgeOptions) -> list[tuple[Judgement, str]]:
    """List the questions in the order of the data, each as a judgement whose verdict is open, and the text to judge.
    Raises OptionError where outputs are missing."""
    records = list(read_records(options.output / OUTPUTS))
    outputs = {(one.bundle, one.setting, one.line): one.text for one in records if not one.round}
    run, data = read_object(options.output / RUN, "name the --output of an evaluation"), options.data
    if data is None:
        data = Path(read_object(options.output / "evaluation.json", "name the data with --data")["data"])
    if sha256_of(data) != run.get("data"):
        raise OptionError(f"{data} is not what {options.output} was made of; name the data with --data")
    bundle, setting = options.bundle, options.setting
    both = [
        (request, outputs[bundle, "full", request.line_number], outputs[bundle, setting, request.line_number])
        for request in read_examples(data)
        if {(bundle, "full", request.line_number), (bundle, setting, request.line_number)} <= outputs.keys()
    ]
    if not both:
        names = sorted({f"{bundle}: {setting}" for bundle, setting, _ in outputs})
        raise OptionError(
            f"{options.output} has no outputs of {bundle}: {setting} beside those of full; it has "
            f"{'; '.join(names) or 'none'}"
        )
    found: list[tuple[Judgement, str]] = []
    for request, full, other in both[: options.samples]:
        asked = request.input if isinstance(request.input, str) else json.dumps(request.input, ensure_ascii=False)
        known = {"input": asked, "reference": f"\nReference:\n{request.target}\n" if request.target else ""}
        same, swaps = full.strip() == other.strip(), random.Random(f"0 {request.line_number}").random() < 0.5
        for kind, repeat in product(options.kinds, range(options.repeats)):
            if kind == "likert":
                texts = {"full": full} if same else {"full": full, setting: other}
                questions = [(of, _LIKERT.format(first=text, **known), False, True) for of, text in texts.items()]
            else:
                swapped = swaps if repeat % 2 == 0 else not swaps
                first, second = (other, full) if swapped else (full, other)
                questions = [("pair", _PAIRWISE.format(first=first, second=second, **known), swapped, not same)]
            for of, text, *rest in questions:
                prompt = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                found.append(
                    (Judgement(kind, request.line_number, repeat, of, None, prompt, options.model, *rest), text)
                )
    return found


def only_bundle(output: Path) -> str:
    """The bundle of an evaluation. Raises OptionError where there are several."""
    names = list(read_object(output / RUN, "name the --output of an evaluation").get("bundles", {}))
    if len(names) != 1:
        raise OptionError(f"{output} has outputs of {', '.join(names) or 'no bundle'}; name one as 'BUNDLE: SETTING'")
    return str(names[0])


def judge(options: JudgeOptions, endpoint: Endpoint) -> list[Judgement]:
    """Collect what JUDGEMENTS has already and what is asked now, each written as soon as it is known. Raises
    JudgeError, OptionError."""
    questions, path = questions_of(options), options.output / JUDGEMENTS
    known = {one.key: one for one in _read(path)}
    left = [(question, text) for question, text in questions if question.key not in known]
    lock, refused = threading.Lock(), threading.Event()
    with progress("judging", len(questions), len(questions) - len(left)) as advance:

        def work(question: Judgement, text: str) -> None:
            if refused.is_set():
                return
            try:
                verdict: int | str | None = None if question.asked else "tie"
                for _ in range(TRIES if question.asked else 0):
                    verdict = parsed(question.kind, endpoint.ask(text), question.swapped)
                    if verdict is not None:
                        break
                made = replace(question, verdict=verdict)
                with lock:
                    append_lines(path, [asdict(made)])
                    known[made.key] = made
                    advance()
            except BaseException:
                refused.set()
                raise

        with ThreadPoolExecutor(options.parallel) as pool:
            try:
                for done in [pool.submit(work, *one) for one in left]:
                    done.result()
            finally:
                refused.set()
    return [known[question.key] for question, _ in questions]


def parsed(kind: Kind, answer: str, swapped: bool) -> int | str | None:
    """Read the verdict of an answer, which may stand in other text; None where there is none, or more than one."""
    patterns = {
        "likert": (r'"score"\s*:\s*"?([1-5])"?\s*[,}]', r"^\s*([1-5])\s*$"),
        "pairwise": (r'"winner"\s*:\s*"(A|B|tie)"', r"^\s*(A|B|tie)\s*\.?\s*$"),
    }
    whole, alone = (re.findall(pattern, answer, re.IGNORECASE) for pattern in patterns[kind])
    found = {one.lower() for one in whole or alone}
    if len(found) != 1:
        return None
    (verdict,) = found
    if kind == "likert":
        return int(verdict)
    return verdict if verdict == "tie" else "other" if (verdict == "a") == swapped else "full"


def _read(path: Path) -> Iterator[Judgement]:
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            yield Judgement(**json.loads(line))
        except (ValueError, TypeError):
            raise OptionError(f"{path} line {number} is no judgement; remove the line") from None


def summary(judgements: Sequence[Judgement], options: JudgeOptions) -> dict[str, Any]:
    """Compute for each kind means over lines with 95 % intervals of a bootstrap, and how far repeats agree: the share
    of pairs of repeats with the same verdict, of what was asked; None without repeats."""
    made: dict[str, Any] = {"lines": len({one.line for one in judgements}), "repeats": options.repeats}
    for kind in options.kinds:
        mine = [one for one in judgements if one.kind == kind]
        valid = [one for one in mine if one.verdict is not None]
        groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
        for one in valid:
            if one.asked:
                groups[one.line, one.of].append(one.verdict)
        same = [a == b for each in groups.values() for a, b in combinations(each, 2)]
        found = _likert(mine, options.setting) if kind == "likert" else _pairwise(valid)
        agreement = float(np.mean(same)) if same else None
        made[kind] = {**found, "agreement": agreement, "without_verdict": len(mine) - len(valid)}
    return made


def _likert(judgements: Sequence[Judgement], setting: str) -> dict[str, Any]:
    """Grades of the lines of which both outputs have one."""
    grades: dict[str, dict[int, list[float]]] = {"full": defaultdict(list), setting: defaultdict(list)}
    for one in judgements:
        if one.verdict is not None:
            grades[one.of][one.line].append(float(one.verdict))
    # Of the same text nothing but the full model's grade was asked for.
    asked = {one.line for one in judgements if one.of == setting}
    other = {line: grades[setting if line in asked else "full"].get(line, []) for line in grades["full"]}
    both = [line for line, found in other.items() if found]
    ours, full = (np.array([np.mean(each[line]) for line in both]) for each in (other, grades["full"]))
    return {"full": _mean(full), "other": _mean(ours), "difference": _mean(ours - full)}


def _pairwise(valid: Sequence[Judgement]) -> dict[str, Any]:
    """Preferences for the other setting, by the mean over a line's repeats."""
    lines: dict[int, list[float]] = defaultdict(list)
    for one in valid:
        lines[one.line].append(_WORTH[str(one.verdict)])
    values = np.array([np.mean(each) for each in lines.values()])
    first = [(one.verdict == "other") == one.swapped for one in valid if one.asked and one.verdict != "tie"]
    return {
        "other_wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "full_wins": int((values < 0.5).sum()),
        "same_text": len({one.line for one in valid if not one.asked}),
        "preference": _mean(values),
        "first_position": float(np.mean(first)) if first else None,
    }


def _mean(values: np.ndarray) -> dict[str, float | None] | None:
    if not len(values):
        return None
    low, high = percentiles(draws(len(values), RESAMPLES) @ values / len(values))
    return {"value": float(values.mean()), "low": low, "high": high}


def summary_tables(found: Mapping[str, Any], options: JudgeOptions) -> list[Table]:
    """Show a summary on a terminal."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['value']:.3f} (95 %: {value['low']:.3f} to {value['high']:.3f})"
        return "unknown" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    settings = f"{options.setting} beside full, {found['lines']} lines"
    about = f"{settings}, {found['repeats']} verdict(s) each, {options.model}"
    return [
        pairs(f"{kind}: {about}", [(name.replace("_", " "), shown(value)) for name, value in found[kind].items()])
        for kind in options.kinds
    ]
