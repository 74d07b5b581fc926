"""The options of `freeexport generate` reach the session, and what it returns reaches the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles, Case
from click.testing import Result
from command_line import error, invoke, succeed
from fake_device import Machine

from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import MANIFEST

CASE = BY_NAME["llama-tied"]
Run = Callable[..., Result]


@pytest.fixture
def generate(bundle: Bundles) -> Run:
    path = str(bundle(CASE, 2))
    return lambda *arguments: invoke("generate", path, *arguments, "--threads", "1")


@pytest.fixture
def session(bundle: Bundles) -> Any:
    with Session(bundle(CASE, 2), threads=1, slots=1) as opened:
        yield opened


def test_every_option_of_sampling_and_modes_reaches_the_session(generate: Run, session: Session) -> None:
    others = {
        "rollback_threshold": 3.0,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 5,
        "min_new_tokens": 3,
        "top_logprobs": 2,
    }
    result = generate(
        *("Hi there", "--json", "--mode", "rollback", "--threshold", "0.2", "--temperature", "0.9"),
        *(word for name, value in others.items() for word in ("-o", f"{name}={value}")),
        *("--option", 'sequence_bias={"42": -1.5, "7,42": 2}', "--max-new-tokens", "9"),
    )
    assert result.exit_code == 0, result.output
    ours = json.loads(result.stdout)
    options: dict[str, Any] = {**others, "sequence_bias": {42: -1.5, (7, 42): 2.0}, "output_logprobs": True}
    expected = session.generate(
        "Hi there", mode="rollback", threshold=0.2, temperature=0.9, max_new_tokens=9, **options
    )
    assert ours["token_ids"] == list(expected.token_ids)
    assert ours["exited"] == list(expected.exited)
    assert ours["logprobs"] == pytest.approx(expected.logprobs)
    assert ours["top_logprobs"] == [[list(pair) for pair in best] for best in expected.top_logprobs or ()]


def test_draft_options_reach_the_session(generate: Run, session: Session, tmp_path: Path) -> None:
    full = session.generate("Hi there", mode="lossless", max_new_tokens=60, drafts="none")
    draft = tmp_path / "draft.txt"
    draft.write_text(full.text, encoding="utf-8")
    arguments = ("Hi there", "--mode", "lossless", "--max-new-tokens", "60")
    for more in (("-o", "drafts=exit"), ("-o", "drafts=none"), ("--predicted-output", str(draft))):
        ours = json.loads(generate(*arguments, *more, "--json").stdout)
        assert ours["token_ids"] == list(full.token_ids)
        assert more[0] == "--predicted-output" or "lookup" not in ours.get("drafts", {})
    for more, message in (
        (("--predicted-output", str(tmp_path / "none.txt")), "none.txt cannot be read (No such file or directory)"),
        (("--predicted-output", str(tmp_path)), "cannot be read (it is a directory"),
        (("--mode", "full", "-o", "drafts=lookup"), "drafts is 'lookup' in mode full, which drafts nothing"),
        (("--predicted-output", str(draft), "-o", "drafts=none"), "but drafts is 'none'"),
    ):
        assert message in error(generate(*arguments, *more))


def test_constraint_options_reach_the_session(generate: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert generate("Hi", "--json-schema", str(schema)).stdout.strip() in ('"yes"', '"no"')
    assert generate("Hi", "-o", 'choice=["up", "down"]').stdout.strip() in ("up", "down")
    for more, message in (
        (("--json-schema", str(tmp_path)), "cannot be read (it is a directory"),
        (("--json-schema", str(schema), "-o", "regex=a"), "json_schema and regex are both given"),
        (("-o", "regex=("), "regex cannot be used"),
    ):
        assert message in error(generate("Hi", *more))


@pytest.fixture
def silent(generate: Run, session: Session) -> Callable[..., Result]:
    """Answers that end at once: the first token is biased to be the end of sequence."""
    end = session.manifest.eos_token_ids[0]
    return lambda *arguments: generate(*arguments, "-o", f'sequence_bias={{"{end}": 1000}}', "--max-new-tokens", "3")


def test_empty_answer_to_a_raw_prompt_suggests_the_chat_template_once(
    generate: Run, silent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = silent("Hi", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == ""
    assert result.stderr == "hint: the output is empty and this bundle has a chat template; try --chat\n"
    assert "--chat" not in silent("Hi", "--chat").stderr
    (tmp_path / "in.jsonl").write_text('{"input": "Hi"}\n' * 3)
    result = silent("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("--chat") == 1
    assert "--chat" not in generate("Hi", "--max-new-tokens", "3").stderr
    monkeypatch.setattr("runtime.text.tokenizer.CHAT_TEMPLATE", "no such file")
    assert "--chat" not in silent("Hi").stderr


def test_more_tokens_than_the_remaining_context_are_refused(generate: Run, session: Session, tmp_path: Path) -> None:
    read = len(session.encode("Hi there"))
    room = session.capacity - read + 1
    line = error(generate("Hi there", "--max-new-tokens", str(room + 1)))
    assert f"--max-new-tokens is {room + 1}, but {room} fit after the {read} tokens of the prompt" in line
    assert generate("Hi there", "--max-new-tokens", str(room), "-o", "ignore_eos=true").exit_code == 0
    assert generate("Hi there", "-o", "ignore_eos=true").exit_code == 0  # without a number it is what fits
    (tmp_path / "in.jsonl").write_text('{"input": "Hi there"}\n')
    result = generate("--input", str(tmp_path / "in.jsonl"), "--max-new-tokens", str(room + 1))
    assert "fit after" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "rollback"), "rollback_threshold is None"),
        (("-o", "top_p=0.5"), "nothing is sampled"),
        (("-o", "top_kk=3"), "unknown option top_kk; known are "),
        (("-o", "draft_source=x"), "draft_source is 'x'; give a callable"),
        *(
            (("-o", f"sequence_bias={given}"), "give {token: bias} or {(token, token): bias}")
            for given in ("42", '{"a": 3}', '{"42": "much"}', '{"1,": 2}', "[1]")
        ),
        (("-o", "num_return_sequences=2"), "num_return_sequences is 2"),
        (("-o", "min_new_tokens=x"), "min_new_tokens is 'x'"),
        (("-o", "num_beams=2", "--mode", "full"), "beam search is for encoder-decoders"),
    ],
)
def test_mismatched_options_give_a_one_line_error(arguments: tuple[str, ...], message: str, generate: Run) -> None:
    result = generate("Hi", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Hi", "-o", "top_k"), "'top_k' is not NAME=VALUE"),
        (("Hi", "--batch-size", "2"), "require --input"),
        (("Hi", "--input", "in"), "--input and PROMPT are mutually exclusive; use one"),
        (("--input", "in", "--resume", "--overwrite"), "are mutually exclusive"),
        (("--input", "in", "--predicted-output", "draft"), "--predicted-output requires PROMPT"),
        (("--input", "in", "--output", "out", "--batch-size", "0"), "0 is not in the range"),
    ],
)
def test_contradictory_options_are_usage_errors(arguments: tuple[str, ...], message: str, generate: Run) -> None:
    result = generate(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def on_a_gpu(path: Path, *arguments: str) -> Result:
    return invoke("generate", path, "Hi there", "--max-new-tokens", "8", *arguments)


def test_device_option_reaches_the_session(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(CASE, target="cuda", precision="fp32")
    expected = json.loads(on_a_gpu(path, "--json").stdout)
    machine = Machine(monkeypatch)
    result = on_a_gpu(path, "--json", "--device", "cuda:0")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == expected["token_ids"]
    assert machine.onnxruntime.runs > 0
    assert machine.cuda.allocated == 0


@pytest.mark.parametrize(
    ("machine", "target", "device", "message"),
    [
        ({"driver": 0}, "cuda", "cuda:0", "no NVIDIA driver is loaded"),
        ({}, "cpu", "cuda:0", "convert again with --target cuda"),
        ({}, "cuda", "gpu", "device is 'gpu'; choose 'cpu', or 'cuda:0'"),
    ],
)
def test_unavailable_device_is_a_one_line_error(
    machine: Any, target: str, device: str, message: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(CASE, target=target, precision="fp32")
    Machine(monkeypatch, **machine)
    result = on_a_gpu(path, "--device", device)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in error(result)


def test_untrusted_bundle_reads_and_prints_token_ids(generate: Run, session: Session, tmp_path: Path) -> None:
    ids = list(session.generate([1, 5, 7], max_new_tokens=5).token_ids)
    bare = ("--no-trust-templates", "--max-new-tokens", "5")
    assert generate("1, 5 7", *bare).stdout.split() == list(map(str, ids))
    found = json.loads(generate("1,5,7", "--json", *bare).stdout)
    assert (found["text"], found["token_ids"], found["finish_reason"]) == ("", ids, "length")
    line = error(generate("Hello", *bare))
    assert "does not load the bundle's tokenizer (trust_templates=False), so it takes no text" in line
    assert generate("1", "--chat", *bare).exit_code == 2
    (tmp_path / "in.jsonl").write_text('{"input": "1,5,7"}\n{"input": "Hello"}\n')
    result = generate("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *bare)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0]["token_ids"] == ids
    assert "takes no text" in lines[1]["error"]


def test_first_line_names_the_mode(generate: Run) -> None:
    drafting = "mode lossless: the tokens of mode full, with drafts from"
    for more, expected in (
        ((), f"{drafting} the text\n"),
        (("--mode", "lossless"), f"{drafting} the text and the exit\n"),
        (("-o", "drafts=lookup"), f"{drafting} the text\n"),
        (("-o", "drafts=none"), "mode full: no token exits\n"),
        (
            ("--threshold", "0.5"),
            "mode free, threshold 0.5: speedup unknown, with verified drafts from the text and the exit\n",
        ),
        (("--threshold", "0.5", "-o", "drafts=exit"), "mode free, threshold 0.5: speedup unknown\n"),
        (("--mode", "free"), f"{drafting} the text\n"),
        (("--mode", "shallow"), "mode shallow: every token exits\n"),
    ):
        result = generate("Hi", "--max-new-tokens", "3", *more)
        assert result.stderr.startswith(expected), (more, result.stderr)
    assert generate("Hi", "--max-new-tokens", "3", "--json").stderr == ""


def test_calibrated_lossless_bundle_is_described_as_drafting(copied: Bundles) -> None:
    path = copied(CASE, 2)
    manifest = Bundle.open(path).manifest
    (path / MANIFEST).write_text(replace(manifest, threshold=0.135).to_json())
    run = partial(invoke, "generate", path, "Hi", "--max-new-tokens", "3", "--threads", "1")
    assert run().stderr.startswith("mode free, threshold 0.135: ")
    assert run("--mode", "lossless", "-o", "drafts=exit").stderr.startswith(
        "mode lossless: the tokens of mode full, with drafts from the exit"
    )


def test_convert_inspect_and_generate_describe_draft_sources_alike(
    checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    phrases = tmp_path / "phrases.jsonl"
    phrases.write_text('{"input": "x", "target": "one two three four"}\n' * 20)
    made = succeed("convert", checkpoint(CASE), out, "--verify", "none", "--exit-layer", "2", "--phrases", phrases)
    (line,) = (line for line in made.stdout.splitlines() if line.startswith("default: "))
    expected = line.removeprefix("default: ")
    assert expected == "mode lossless: the tokens of mode full, with drafts from the text and the phrases"
    assert succeed("inspect", out).stdout.startswith(expected)
    assert succeed("generate", out, "Hi", "--max-new-tokens", "3").stderr.startswith(expected)
