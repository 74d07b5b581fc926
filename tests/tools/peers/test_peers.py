"""Other decoders beside ours: who runs, who cannot, and what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_peer
import pytest
from checkpoints import BY_NAME, Case
from tokenizers import Tokenizer

from runtime.errors import FreeExportError, OptionError
from tools.peers import models
from tools.peers import server as peer_server
from tools.peers.catalog import PEERS, chosen, peer_model
from tools.peers.fidelity import agreement, differences, equality, fidelity
from tools.peers.measure import MEMORY, Cell, Contender, Decoders, ask, opening
from tools.peers.models import bundle_of, models_of
from tools.peers.worker import PeerError, Worker

LLAMA = BY_NAME["llama-tied"]
T5 = BY_NAME["t5-gated-tied"]
ROOT = Path(__file__).parents[3]
PROGRAM = "import sys, runpy; sys.path[:0] = sys.argv[1:3]; runpy.run_path(sys.argv[3], run_name='__main__')"
COMMAND = [sys.executable, "-c", PROGRAM, str(ROOT), str(ROOT / "tests"), fake_peer.__file__]
TEXT = Cell(0, 3)


def contender(name: str, bundle: Any = None) -> Contender:
    return Contender(name, "fp32", COMMAND, "", {}, bundle)


def test_every_decoder_answers_every_round_and_a_failure_stops_no_other() -> None:
    missing = replace(contender("missing"), command=["/nowhere/python"])
    with Decoders([missing, contender("good"), contender("other")], 1) as running:
        blocks = TEXT.blocks([[[5]], [[6]]], 2, 100, None)
        assert blocks == [[[[5]]], [[[5]], [[6]]], [[[5]], [[6]]]]
        good, other = running.rows(TEXT, blocks, settle=0)
        assert good["versions"] == {"fake": "1.0"}
        assert good["flags"] == "threads=1"
        assert good["request"]["ratio_low"] == good["request"]["ratio_high"] == 1
        assert other["request"]["ratio"] > 0
        assert 0.001 < good["token"]["seconds"] < good["request"]["seconds"] < 1
    assert list(running.failed) == ["missing"]
    assert "cannot be started" in running.failed["missing"]


def test_crashed_decoder_has_no_row() -> None:
    with Decoders([contender("good")], 1) as running:
        assert running.rows(TEXT, [[[[1]]], [[[fake_peer.DIES]]]], settle=0) == []
        assert "ended with code 3" in running.failed["good"]


def test_batch_rows_are_answered_together() -> None:
    cell = Cell(4, 2, rows=3)
    blocks = cell.blocks([], 2, 100, None)
    prompts = [prompt for block in blocks for request in block for prompt in request]
    assert len(prompts) == len({tuple(prompt) for prompt in prompts}) == 9
    with Decoders([contender("good")], 1) as running:
        (row,) = running.rows(cell, blocks, settle=0)
    assert (row["read"], row["rows"]) == (4, 3)


def test_random_encoder_decoder_prompts_end_with_the_end_token() -> None:
    assert all(request[0][-1] == 3 for (request,) in Cell(5, 1).blocks([], 3, 1000, 3))


def test_tokens_are_compared_up_to_the_end_of_the_reference() -> None:
    truth = [[1, 2, 3, 4], [5, 9, 7, 8], [1, 1, 1, 1]]
    found = agreement([[1, 2, 0, 4], [5, 9, 0, 0], [1, 1, 1, 1]], truth, {9})
    assert found["same"] == pytest.approx(9 / 10)
    assert found["next"] == pytest.approx(8 / 9)
    assert found["same_low"] < found["same"] < found["same_high"] == 1


def test_all_decoders_are_compared_with_the_first() -> None:
    missing = replace(contender("missing"), command=["/nowhere/python"])
    rows, failed = fidelity([contender("fp32"), missing, contender("other")], [[1], [2]], 4, ())
    assert [(row["name"], row["same"], row["next"]) for row in rows] == [("fp32", 1, 1), ("other", 1, 1)]
    assert list(failed) == ["missing"]


def test_outputs_changed_by_drafts_are_counted() -> None:
    found = differences([(1, 2, 3), (4, 5, 6), (7, 8, 9)], [(1, 2, 3), (4, 0, 0), (0, 8, 9)])
    assert found == {"outputs": 3, "differing_outputs": 2}
    rows, failed = equality([contender("good")], [[1], [2]], 4, 1)
    assert rows[0]["greedy_again"] == rows[0]["with_drafts"] == {"outputs": 2, "differing_outputs": 0}
    assert not failed


def test_precision_may_add_options_of_convert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[str] = []
    monkeypatch.setattr(models, "open_checkpoint", lambda path: SimpleNamespace(config={}))
    monkeypatch.setattr(models, "run_command", lambda *command: given.extend(command))
    monkeypatch.setattr(models.Bundle, "open", lambda path: path)
    out = bundle_of("smollm2", "model.gguf", "int4 --head int4", tmp_path)
    assert out == tmp_path / "bundles" / "smollm2-int4-head-int4"
    assert given[5:11] == [str(out), "--precision", "int4", "--head", "int4", "--verify"]


def test_opening_time_counts_from_process_start() -> None:
    missing = replace(contender("missing"), command=["/nowhere/python"])
    rows, failed = opening([contender("good"), missing], [7], 1, 1, settle=0)
    assert [row["name"] for row in rows] == ["good"]
    assert rows[0]["first"]["seconds"] > 0.01
    assert rows[0]["peak_bytes"] > rows[0]["own_bytes"] > 1 << 20
    assert list(failed) == ["missing"]


def test_failure_of_freeexport_is_an_error() -> None:
    ours = contender("ours", bundle=object())
    with Decoders([ours], 1) as running, pytest.raises(FreeExportError, match=r"^ours: ValueError: cannot"):
        running.rows(TEXT, [[[[fake_peer.FAILS]]]] * 2, settle=0)


def test_requested_peers_must_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left_out = chosen([])
    assert left_out["genai"] == "not installed"
    assert "hf" not in left_out
    assert chosen(["hf"])["genai"] == "not asked for"
    with pytest.raises(OptionError, match=r"run: python -m tools\.peers install genai$"):
        chosen(["hf", "genai"])
    with pytest.raises(OptionError, match="did you mean genai-int4"):
        chosen(["genai-int"])


def test_models_are_converted_once(
    checkpoint: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tools.peers.catalog.Peer.command", COMMAND)
    source = checkpoint(LLAMA)
    peer = PEERS["genai"]
    converted = peer_model(peer, str(source))
    # The checkpoint is a plain directory: it is not copied.
    assert (converted / "model").read_text() == str(source)
    assert peer_model(peer, str(source)) == converted
    assert peer_model(PEERS["hf"], str(source)) == source
    with pytest.raises(PeerError, match="reads GGUF files"):
        peer_model(PEERS["llama-cpp"], str(source))
    broken = replace(peer, name="broken", options={"unconvertible": True})
    with pytest.raises(PeerError, match="cannot be converted: ValueError: no such layer"):
        peer_model(broken, str(source))


def test_checkpoints_have_the_architecture_they_replace(checkpoint: Callable[[Case], Path]) -> None:
    given = f"marian={checkpoint(T5)}"
    assert models_of((given,)) == {"marian": str(checkpoint(T5))}
    for text, said in (
        (f"smollm2={checkpoint(T5)}", "is an encoder-decoder, unlike smollm2"),
        (f"marian={checkpoint(LLAMA)}", "is a decoder-only model, unlike marian"),
        ("other=x", "is not NAME=CHECKPOINT; names are smollm2, marian, m2m_100"),
    ):
        with pytest.raises(OptionError, match=said):
            models_of((text,))


@pytest.mark.parametrize("size", models.CONFIGURATIONS)
def test_special_tokens_of_a_generated_vocabulary_match_its_configuration(size: str, tmp_path: Path) -> None:
    config = models.CONFIGURATIONS[size]
    models.write_tokenizer(tmp_path, 200, models.SPECIAL[size])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    last = 199 if size == "marian" else config["pad_token_id"]
    assert tokenizer.token_to_id("<pad>") == last
    assert tokenizer.encode("hello").ids[-1] == tokenizer.token_to_id("</s>") == config["eos_token_id"]
    assert tokenizer.get_vocab_size() == 200


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(COMMAND, {})
    made.ask({"op": "load", "model": "", "threads": 1, "cpus": [], "options": {}}, 60)
    yield made
    made.close()


def generate(last: int, tokens: int = 3) -> dict[str, Any]:
    return {"op": "generate", "prompts": [[last]], "tokens": tokens, "beams": 1}


def test_worker_answers_despite_printed_output_and_earlier_failures(worker: Worker) -> None:
    with pytest.raises(PeerError, match=r"^ValueError: cannot read this$"):
        worker.ask(generate(fake_peer.FAILS), 60)
    with pytest.raises(PeerError, match="generated 2 tokens instead of 3"):
        worker.ask(generate(fake_peer.SHORT), 60)
    answer = ask(worker, [[7], [1]], 3)
    assert answer["tokens"] == [[8, 9, 10], [2, 3, 4]]
    assert 0 < answer["first"] < answer["last"] <= answer["seconds"]
    assert answer["peak_bytes"] > answer["own_bytes"] > 1 << 20


@pytest.mark.parametrize(
    ("last", "limit", "said", "then"),
    [
        (fake_peer.DIES, 60, "ended with code 3.*the last words", "ended with code 3"),
        (fake_peer.HANGS, 0.2, "generate took more than 0 s and was stopped", "its process was stopped"),
    ],
)
def test_crashed_or_hanging_worker_is_reported(worker: Worker, last: int, limit: float, said: str, then: str) -> None:
    with pytest.raises(PeerError, match=said):
        worker.ask(generate(last), limit)
    with pytest.raises(PeerError, match=then):
        worker.ask(generate(1), 60)


def test_memory_is_read_after_the_first_and_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, timeout: float) -> None:
            pass

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def post(self, url: str, json: dict[str, Any]) -> Client:
            assert 8 <= len(json["prompt"]) < 64
            return self

        def raise_for_status(self) -> None:
            pass

    asked: list[int] = []

    def memory(process: int) -> dict[str, int]:
        asked.append(process)
        return dict.fromkeys(MEMORY, len(asked))

    @contextmanager
    def served(bundle: Path, threads: int, slots: int) -> Iterator[str]:
        with subprocess.Popen([sys.executable, "-c", "input()", "serve"], stdin=subprocess.PIPE) as process:
            yield f"http://{process.pid}"
            process.communicate(b"\n")

    monkeypatch.setattr(peer_server, "served", served)
    monkeypatch.setattr(peer_server.httpx, "Client", Client)
    monkeypatch.setattr(peer_server, "memory", memory)
    ours = contender("ours", SimpleNamespace(manifest=SimpleNamespace(vocab_size=100), path=Path()))
    missing = replace(contender("missing"), command=["/nowhere/python"])
    rows, failed = peer_server.server([ours, contender("good"), missing], 3, 1)
    assert [row["name"] for row in rows] == ["ours serve", "good"]
    assert (rows[0]["own_bytes"], rows[0]["own_bytes_after"]) == (1, 3)
    assert rows[1]["peak_bytes_after"] >= rows[1]["peak_bytes"] > 1 << 20
    assert list(failed) == ["missing"]
