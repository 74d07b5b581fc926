"""A bundle compared with itself: what is compared, what a difference looks like, and options that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner
from exit_layer_case import EXIT_CASES

from freeexport.cli import main
from freeexport.verification import equality
from freeexport.verification.equality import Answer, Row, all_settings, check_equality, prompt_ids
from runtime.bundle.bundle import Bundle
from runtime.decoding import decoder
from runtime.engines.kernels import supported
from runtime.errors import OptionError
from runtime.requests.session_state import SessionState

LLAMA, EXIT_LAYERS, T5 = "llama-tied", "llama-tied-exit-layers", "t5-wide-heads"  # heads that our attention takes
CASES = {**BY_NAME, **{case.name: case for case in EXIT_CASES}}


def ran(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


@pytest.mark.parametrize(
    ("name", "instructions", "options"),
    [
        (EXIT_LAYERS, "", {}),
        (LLAMA, "scalar-bf16", {}),
        (T5, "", {}),
        (EXIT_LAYERS, "", {"kv_cache": "int8", "activations": "int16"}),
        (EXIT_LAYERS, "", {"precision": "fp32"}),
        (LLAMA, "scalar-bf16", {"precision": "fp16"}),
    ],
)
def test_all_settings_of_a_bundle_with_our_kernels_are_equal(
    name: str,
    instructions: str,
    options: dict[str, str],
    bundle: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", instructions)
    path = bundle(CASES[name], capacity=256, **{"precision": "int8", **options})
    prompts: list[object] = []
    if instructions:  # which are slow: the built-in prompts have twice as many tokens
        prompts = ["--data", tmp_path / "prompts.jsonl"]
        lines = (json.dumps({"input": f"request {number} of twelve"}) for number in range(12))
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = ran(path, "--equal", 170, "--json", *prompts)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["complete"], report["equal"], report["compared"]) == (True, True, 170)
    assert [row["setting"] for row in report["settings"]] == [setting.name for setting in all_settings()]
    assert {row["tokens"] for row in report["settings"]} <= {170 // len(report["settings"]) + extra for extra in (0, 1)}
    warm = {row["setting"]: row["cached_tokens"] for row in report["settings"]}
    assert all((tokens > 0) == ("warm" in setting) for setting, tokens in warm.items())
    assert report["bundle"]["sha256"] == Bundle.open(path).sha256
    assert decoder.PREFILL_ROWS == 512


def test_difference_is_counted_shown_and_exits_with_1(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated tokens that are stored where a prompt has other bits, as before."""
    path = bundle(BY_NAME[LLAMA], precision="int8", capacity=256)
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "scalar-bf16")
    begin = SessionState.__post_init__

    def always(model: SessionState) -> None:
        begin(model)
        model.generated_limit = model.manifest.capacity

    monkeypatch.setattr(SessionState, "__post_init__", always)
    used = [setting for setting in all_settings() if setting.name in ("full, 2 threads", "full, warm cache")]
    monkeypatch.setattr(equality, "all_settings", lambda: used)
    done = ran(path, "--equal", 2 * 9 * 20, "--json")
    assert done.exit_code == 1
    assert "error: answers differ, the first of full, warm cache: request 1, token 0: a log-probability" in done.output
    rows = json.loads(done.stdout)["settings"]
    assert all(("warm" in row["setting"]) or not row["differing_tokens"] for row in rows)
    assert any(row["differing_logprobs"] for row in rows)


def test_tokens_and_log_probabilities_are_counted_separately() -> None:
    row = Row("full", "avx2")
    reference = Answer((1, 2, 3, 4), (-0.5, -0.25, -1.0, -2.0))
    row.compare(0, reference, (1, 2, 3, 4), reference.logprobs)
    assert (row.equal, row.tokens, row.first_difference) == (True, 4, None)
    row.compare(7, reference, (1, 2, 9), (-0.5, -0.125, -1.0))
    assert (row.tokens, row.differing_tokens, row.differing_logprobs) == (7, 1, 1)
    assert row.first_difference == "request 7, token 1: a log-probability of -0.125 instead of -0.25"
    alone = Row("full, ids alone", "avx2")
    alone.compare(0, reference, (1, 3), None)
    assert (alone.differing_tokens, alone.differing_logprobs, alone.equal) == (1, None, False)


def test_instruction_sets_run_in_separate_processes_and_equal_prefills_are_compared(bundle: Bundles) -> None:
    path = bundle(BY_NAME[LLAMA], precision="int8", capacity=256)
    names = [name for name in ("scalar", "avx2", "neon", "scalar-bf16") if supported(name)]
    done = ran(path, "--equal", 110, "--instructions", ",".join([*names, "scalar"]), "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["settings"]
    assert list(dict.fromkeys(row["instructions"] for row in rows)) == names
    beside = [row for row in rows if row["setting"] == "full, beside scalar"]
    assert [row["instructions"] for row in beside] == names[1:-1]  # the last reads prompts with other bits
    assert all(row["tokens"] and row["differing_logprobs"] == 0 for row in beside)
    assert sum(row["tokens"] for row in rows if row not in beside) == 110


def test_difference_between_instruction_sets_is_detected() -> None:
    first, second = (Answer((1, 2), (-1.0, last)) for last in (-2.0, -3.0))
    row = equality.between([first, first], [first, second], "avx2", "avx512")
    assert (row.setting, row.instructions, row.tokens, row.differing_logprobs) == ("full, beside avx2", "avx512", 4, 1)


def test_interrupt_shows_the_finished_comparisons(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(BY_NAME[LLAMA], precision="int8", capacity=256)
    assert "68 tokens compared: all equal" in ran(path, "--equal", 68).output
    decoded, count = equality._decoded, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(equality, "_decoded", interrupted)
    done = ran(path, "--equal", 68)
    assert done.exit_code == 130
    assert "not complete: " in done.output
    assert "all equal" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--equal", "0"], "0 is not in the range x>=1"),
        (["--equal", "5"], "--equal 5 is less than a token for each of"),
        (
            ["--equal", "9", "--against", "x"],
            "--equal compares the bundle with itself; omit --against and --quick",
        ),
        (["--instructions", "scalar"], "--instructions requires --equal N"),
        (["--equal", "99", "--instructions", "mmx"], "mmx is not supported by this processor"),
        (["--equal", "99999999999"], "give --data with more or shorter prompts"),
    ],
)
def test_invalid_options_are_refused_before_decoding(
    arguments: list[str], message: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equality, "Session", None)
    done = ran(bundle(BY_NAME[LLAMA], precision="int8", capacity=256), *arguments)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())


def test_prompts_are_read_from_a_file_and_a_malformed_line_is_named(bundle: Bundles, tmp_path: Path) -> None:
    opened, file = Bundle.open(bundle(BY_NAME[LLAMA], precision="int8", capacity=256)), tmp_path / "prompts.jsonl"
    file.write_text('{"input": "one"}\n{"input": "two words"}\n')
    prompts = prompt_ids(opened, file)
    assert len(prompts) == 2
    *_, outcome = check_equality(opened, 68, prompts)
    assert (outcome.complete, outcome.equal, outcome.compared) == (True, True, 68)
    file.write_text('{"input": "one"}\n{"inptu": 3}\n')
    with pytest.raises(OptionError, match=r"prompts\.jsonl, line 2: "):
        prompt_ids(opened, file)
