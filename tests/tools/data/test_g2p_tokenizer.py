from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.transformers_model import write_random_weights
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer
from tools.data.g2p_tokenizer import PAD, Sizes, build_tokenizer, command, vocabulary, write_files

PHRASE = "HH AH L OW | AY M"
TINY = ["--d-model", "16", "--d-ff", "24", "--heads", "2", "--layers", "1", "--decoder-layers", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("g2p") / "model"
    result = CliRunner().invoke(command, [str(out), *TINY])
    assert result.exit_code == 0, result.output
    return out


def test_an_input_is_the_prefix_and_one_token_a_character() -> None:
    encoding = build_tokenizer().encode("g2p: i'm me")
    assert encoding.tokens == ["g2p: ", "i", "'", "m", " ", "m", "e", "</s>"]
    assert encoding.ids[-1] == 1


def test_a_target_is_one_token_a_phoneme_and_decodes_to_itself() -> None:
    tokenizer = build_tokenizer()
    encoding = tokenizer.encode(PHRASE)
    assert encoding.tokens == [*PHRASE.split(), "</s>"]
    assert tokenizer.decode(encoding.ids) == PHRASE


def test_special_tokens_have_the_ids_of_t5() -> None:
    assert [build_tokenizer().token_to_id(token) for token in (PAD, "</s>", "<unk>")] == [0, 1, 2]
    assert len(vocabulary()) == build_tokenizer().get_vocab_size() == 72


@pytest.mark.parametrize("text", ["g2p: café", "g2p: A1", "g2p: x\n", "g2p: g2p: x"])
def test_other_characters_are_unknown(text: str) -> None:
    assert 2 in build_tokenizer().encode(text).ids


def test_transformers_loads_the_tokenizer_and_a_model_of_the_configuration(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("g2p: i'm")["input_ids"] == build_tokenizer().encode("g2p: i'm").ids
    assert set(tokenizer("g2p: a")) == {"input_ids", "attention_mask"}
    targets = tokenizer(text_target=PHRASE)["input_ids"]
    assert tokenizer.decode(targets, skip_special_tokens=True) == PHRASE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    write_random_weights(model, tmp_path / "begun", 0)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "begun")
    assert loaded.config.num_decoder_layers == 3
    assert loaded.generation_config.decoder_start_token_id == 0


def test_the_runtime_streams_the_text_that_it_decodes(tmp_path: Path) -> None:
    write_files(tmp_path, Sizes())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode(PHRASE)
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces[:3] == ["HH", " AH", " L"]
    assert "".join(pieces) + stream.finish() == PHRASE


def test_a_width_that_heads_do_not_divide_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "x"), "--d-model", "30", "--heads", "4"])
    assert result.exit_code == 2
    assert not (tmp_path / "x").exists()
