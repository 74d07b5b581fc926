"""`freeexport evaluate judge` against a local endpoint that fails, limits rates and answers nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from freeexport.cli import main
from freeexport.measure import judge as judging
from freeexport.measure.judge import JUDGEMENTS, Endpoint, JudgeError, JudgeOptions, parsed, questions_of
from freeexport.measure.settings import OUTPUTS, RUN, Record
from runtime.bundle.bundle import sha256_of

Answer = Callable[[int, str], tuple[int, str, dict[str, str]]]
LINES, SETTING = 4, "free 0.5"
PAUSE = judging._pause


class Server:
    """Answers in place of the network: `answer(number of the request, prompt)` gives status, text and headers."""

    url = "http://judge/v1"

    def __init__(self) -> None:
        self.answer: Answer = honest
        self.prompts: list[str] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()

    def post(self, client: httpx.Client, url: str, json: dict[str, Any]) -> httpx.Response:
        assert url == f"{self.url}/chat/completions"
        prompt = json["messages"][0]["content"]
        with self._lock:
            self.prompts.append(prompt)
            self.keys.append(client.headers.get("Authorization"))
            number = len(self.prompts)
        status, text, headers = self.answer(number, prompt)
        return httpx.Response(status, json={"choices": [{"message": {"content": text}}]}, headers=headers)


def honest(number: int, prompt: str) -> tuple[int, str, dict[str, str]]:
    """Good outputs are better than bad ones, wherever they stand."""
    if "Response A" not in prompt:
        return 200, json.dumps({"score": 2 if "bad" in prompt else 5}), {}
    first = prompt.partition("Response A:")[2].partition("Response B:")[0]
    return 200, json.dumps({"winner": "B" if "bad" in first else "A"}), {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(httpx.Client, "post", lambda client, url, json: made.post(client, url, json))
    monkeypatch.setattr(judging, "_pause", lambda attempt, wished: 0.0)
    return made


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An evaluation of four lines; the third and fourth are worse in mode free, the second one is the same."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": f"task {n}", "target": "t"}) + "\n" for n in range(1, LINES + 1)))
    out = tmp_path / "out"
    out.mkdir()
    (out / RUN).write_text(json.dumps({"data": sha256_of(data), "bundles": {"one": []}}))
    (out / "evaluation.json").write_text(json.dumps({"data": str(data)}))
    texts = {1: "good too", 2: "good", 3: "bad", 4: "bad"}
    records = [Record("one", "full", line, 0, 1.0, 1.0, 3, 0.0, text="good") for line in texts]
    records += [Record("one", SETTING, line, 0, 1.0, 1.0, 3, 0.0, text=text) for line, text in texts.items()]
    (out / OUTPUTS).write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return out


@pytest.fixture
def run(server: Server, output: Path) -> Callable[..., Result]:
    def call(*arguments: str) -> Result:
        given = ("--endpoint", server.url, "--judge-model", "m", "--setting", SETTING, "--json", *arguments)
        return CliRunner().invoke(main, ["evaluate", "judge", str(output), *given], env={"OPENAI_API_KEY": "secret"})

    return call


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_grades_and_pairs_are_those_of_the_judge_in_either_order(run: Callable[..., Result], server: Server) -> None:
    server.answer = lambda number, prompt: (
        honest(number, prompt) if "bad" in prompt or "Response A" not in prompt else (200, '{"winner": "tie"}', {})
    )
    result = found(run())
    assert result["lines"] == LINES
    likert, pairs = result["likert"], result["pairwise"]
    assert (likert["full"]["value"], likert["other"]["value"]) == (5, 3.5)
    assert likert["difference"]["low"] <= -1.5 <= likert["difference"]["high"] <= 0
    assert (pairs["other_wins"], pairs["ties"], pairs["full_wins"], pairs["same_text"]) == (0, 2, 2, 1)
    assert pairs["preference"]["value"] == 0.25
    assert pairs["first_position"] == 0.5  # each order once
    assert likert["agreement"] == pairs["agreement"] == 1
    assert set(server.keys) == {"Bearer secret"}


def test_a_judge_that_prefers_the_first_is_seen_and_gives_ties(run: Callable[..., Result], server: Server) -> None:
    server.answer = lambda number, prompt: (200, '{"winner": "A"}', {})
    pairs = found(run("--kind", "pairwise"))["pairwise"]
    assert (pairs["ties"], pairs["agreement"], pairs["first_position"]) == (LINES, 0, 1)


def test_a_run_goes_on_and_nothing_is_judged_twice(run: Callable[..., Result], server: Server, output: Path) -> None:
    server.answer = lambda number, prompt: honest(number, prompt) if number <= 5 else (401, "no", {})
    failed = run("--parallel", "1")
    assert failed.exit_code == 1
    assert "refused with status 401" in failed.stderr
    assert "secret" not in failed.output
    assert (output / JUDGEMENTS).read_text().count("\n") == 5
    with (output / JUDGEMENTS).open("a") as file:
        file.write('{"kind": "lik')
    server.answer = honest
    first = found(run())
    asked = len(server.prompts)
    assert found(run()) == first
    assert len(server.prompts) == asked
    again = (2 * 4 - 1) * 2 + 3 * 2  # likert without the same text, pairs that differ, each twice
    assert asked == again + 1  # and the one that was refused


def test_failures_and_limits_are_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_pause", PAUSE)
    answers: dict[int, tuple[int, str, dict[str, str]]] = {1: (500, "", {}), 2: (429, "", {"Retry-After": "7"})}
    server.answer = lambda number, prompt: answers.get(number, (200, "fine", {}))
    slept: list[float] = []
    monkeypatch.setattr(judging.time, "sleep", slept.append)
    assert Endpoint(server.url, "m", None).ask("x") == "fine"
    assert 0.5 <= slept[0] <= 1
    assert slept[1:] == [7]
    assert server.keys == [None] * 3


def test_an_endpoint_that_never_answers_is_given_up(server: Server) -> None:
    def late(number: int, prompt: str) -> tuple[int, str, dict[str, str]]:
        raise httpx.ReadTimeout("timed out")

    server.answer = late
    with pytest.raises(JudgeError, match="did not answer in 6 attempts \\(ReadTimeout: timed out\\)"):
        Endpoint(server.url, "m", None).ask("x")


def test_nonsense_is_asked_again_and_then_counts_as_no_verdict(run: Callable[..., Result], server: Server) -> None:
    server.answer = lambda number, prompt: (200, "I like turtles 4 or 5", {})
    result = found(run("--kind", "likert", "--repeats", "1"))
    assert result["likert"]["without_verdict"] == 7
    assert result["likert"]["difference"] is None
    assert len(server.prompts) == 3 * 7


def test_a_line_with_one_grade_is_not_compared(run: Callable[..., Result], server: Server) -> None:
    server.answer = lambda number, prompt: (200, "?", {}) if "good too" in prompt else honest(number, prompt)
    likert = found(run("--kind", "likert"))["likert"]
    assert (likert["full"]["value"], likert["other"]["value"], likert["difference"]["value"]) == (5, 3, -2)
    assert likert["without_verdict"] == 2


@pytest.mark.parametrize(
    ("kind", "answer", "swapped", "verdict"),
    [
        ("likert", '{"score": 4}', False, 4),
        ("likert", " 3 ", False, 3),
        ("likert", '{"score": 7}', False, None),
        ("likert", '{"score": 3.5}', False, None),
        ("likert", '{"score": 1} or {"score": 2}', False, None),
        ("pairwise", '{"winner": "A"}', False, "full"),
        ("pairwise", '{"winner": "A"}', True, "other"),
        ("pairwise", '{"winner": "b"}', True, "full"),
        ("pairwise", "Tie.", True, "tie"),
        ("pairwise", "A or B", False, None),
    ],
)
def test_a_verdict_is_read_or_there_is_none(kind: Any, answer: str, swapped: bool, verdict: Any) -> None:
    assert parsed(kind, answer, swapped) == verdict


def test_orders_are_random_over_lines_and_change_with_each_repeat(output: Path) -> None:
    options = JudgeOptions(output, "one", SETTING, "m", kinds=("pairwise",))
    orders = [question.swapped for question, _ in questions_of(options)]
    assert all(first != second for first, second in zip(orders[::2], orders[1::2], strict=True))
    assert len(set(orders[::2])) == 2


def test_what_is_not_there_is_named(run: Callable[..., Result], server: Server, output: Path, tmp_path: Path) -> None:
    assert (
        "has no outputs of one: free 0.9 beside those of full; it has one: free 0.5; one: full"
        in run("--setting", "free 0.9").stderr
    )
    assert "has no outputs of two: free 0.5" in run("--setting", f"two: {SETTING}").stderr
    (tmp_path / "data.jsonl").write_text('{"input": "other", "target": "t"}\n')
    assert "data.jsonl is not what" in run().stderr
    wrong = CliRunner().invoke(main, ["evaluate", "judge", str(output), "--endpoint", "host", "--judge-model", "m",
                                      "--setting", SETTING])  # fmt: skip
    assert "--endpoint 'host' is no address" in wrong.stderr
    assert not server.prompts
