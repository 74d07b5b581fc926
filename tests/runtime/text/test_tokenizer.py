from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from runtime.errors import BundleError, PromptError
from runtime.text.tokenizer import Tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "hello", "world", "user", ":"]
CHAT = [{"role": "user", "content": "hello"}]


def word_level() -> tokenizers.Tokenizer:
    vocab = {word: index for index, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.add_tokens([AddedToken("<tool>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def bundle(
    directory: Path,
    backend: tokenizers.Tokenizer | None = None,
    template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    (backend or word_level()).save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def loaded(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def test_bundle_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x")
    assert Tokenizer.load(tmp_path) is None


def test_text_gets_special_tokens_and_rendered_chat_does_not(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer = loaded(bundle(tmp_path, template=template, config={"bos_token": "<s>", "eos_token": "</s>"}))
    assert tokenizer.encode("hello world") == [1, 4, 5]
    assert tokenizer.encode("hello", special=False) == [4]
    assert tokenizer.encode_chat(CHAT) == [1, 6, 7, 4, 2]


def test_decoding_skips_special_tokens_and_unknown_ids(tmp_path: Path) -> None:
    tokenizer = loaded(bundle(tmp_path))
    assert tokenizer.decode([1, 4, 8, 99, 3, 5, 2]) == "hello <tool> world"
    assert tokenizer.special_ids == {1, 2, 3}
    assert tokenizer.vocab_size == 9
    assert (tokenizer.token(4), tokenizer.token(99)) == ("hello", None)


def test_truncation_and_padding_of_the_file_are_disabled(tmp_path: Path) -> None:
    backend = word_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_id=3, pad_token="<pad>")
    assert loaded(bundle(tmp_path, backend)).encode("hello world hello") == [1, 4, 5, 4]


def test_broken_file_is_a_bundle_error(tmp_path: Path) -> None:
    for content in (b"", b"{}", b"[]", b'{"version": "1.0", "model"', b"\xff\xfe", b'{"model": 3}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read .*convert the checkpoint again"):
            Tokenizer.load(tmp_path)
    for text in ("{", "[]", "3"):
        (bundle(tmp_path) / "tokenizer_config.json").write_text(text)
        with pytest.raises(BundleError, match=r"tokenizer_config\.json (cannot be read|holds).* convert the"):
            Tokenizer.load(tmp_path)


def test_special_tokens_are_strings_or_objects_with_content(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None, "other": "x"}
    assert loaded(bundle(tmp_path, config=config)).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(PromptError, match="no chat template; pass the prompt as text or token ids"):
        Tokenizer(word_level()).encode_chat(CHAT)


def test_untokenizable_text_is_a_prompt_error() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"hello": 0}, unk_token="<unk>"))
    with pytest.raises(PromptError, match="cannot encode the text"):
        Tokenizer(backend).encode("world")


def test_loading_does_not_import_jinja2_or_torch() -> None:
    modules = "runtime.text.tokenizer, runtime.text.prompt, runtime.text.detokenizer"
    code = f"import sys, {modules}; print({{'jinja2', 'torch', 'transformers'}} & {{*sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def bpe(**parts: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<unk>": 2}, [], unk_token="<unk>"))
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


TWICE = processors.TemplateProcessing(single="$A $A $A", special_tokens=[])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"normalizer": normalizers.Sequence([normalizers.Replace("a", "a" * 100)] * 8)},
            "its normalizers can make a text 10{16} times as long",
        ),
        (
            {"normalizer": normalizers.Sequence([normalizers.Replace(Regex(""), "aa")] * 8)},
            "its normalizers can make a text 6561 times",
        ),
        ({"normalizer": normalizers.Sequence([normalizers.NFC()] * 99)}, "it has 99 normalizers, at most 64 are run"),
        ({"decoder": decoders.Sequence([decoders.Replace("a", "a" * 100)] * 8)}, "its decoders can make a text"),
        ({"post_processor": processors.Sequence([TWICE, TWICE])}, "its post-processor repeats a text 9 times"),
    ],
)
def test_tokenizer_that_multiplies_a_text_is_refused(tmp_path: Path, parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=rf"tokenizer\.json cannot be read \(({reason})"):
        Tokenizer.load(bundle(tmp_path, bpe(**parts)))


def test_tokenizer_with_common_replacements_is_accepted(tmp_path: Path) -> None:
    steps = [normalizers.Replace("``", '"'), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(" ", "▁")]
    steps += [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Lowercase()]
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert loaded(bundle(tmp_path, bpe(normalizer=normalizers.Sequence(steps), decoder=decoder))).encode("A") == [2, 0]


# A regular expression that gives up after many retries: the library's Rust code panics.
CATASTROPHE, HOPELESS = tokenizers.Regex("(a+)+$"), "a" * 40 + "!"


def test_panic_of_the_library_is_converted_into_our_error() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, HOPELESS: 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(CATASTROPHE, "isolated")
    backend.decoder = decoders.Replace(CATASTROPHE, "b")
    tokenizer = Tokenizer(backend)
    with pytest.raises(PromptError, match=r"cannot encode the text .*retry-limit"):
        tokenizer.encode(HOPELESS)
    with pytest.raises(PromptError, match=r"cannot decode the 1 tokens .*retry-limit"):
        tokenizer.decode([2])
    assert (tokenizer.encode("hello"), tokenizer.decode([1])) == ([1], "hello")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_in_the_library_is_not_converted(interruption: type[BaseException]) -> None:
    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            raise interruption

    tokenizer = Tokenizer(word_level())
    tokenizer._backend = Interrupted()  # type: ignore[assignment]
    for ask in (lambda: tokenizer.encode("hello"), lambda: tokenizer.decode([4])):
        with pytest.raises(interruption):
            ask()
