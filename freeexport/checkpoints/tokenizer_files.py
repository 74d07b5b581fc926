"""Write a checkpoint's tokenizer and generation settings as the files of a bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.gguf_transformers import quick_reader
from freeexport.checkpoints.weight_files import CheckpointError
from runtime.bundle.manifest import Languages
from runtime.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these files transformers 5 returns an empty tokenizer instead of failing.
_SOURCES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
    ),
    *("vocab.json", "vocab.txt", "source.spm"),
)
# Language tokens: deu_Latn and de_DE, __de__ (M2M100), >>deu<< (Marian). Then the place of the
# target's token.
_LANGUAGE = re.compile(r"([a-z]{2,3}_[A-Z][A-Za-z]{1,3})|__([a-z]{2,3})__|>>([\w-]+)<<")
_TARGETS: dict[str, Literal["first", "start", "prompt"]] = {
    "m2m_100": "first",
    "mbart": "first",
    "marian": "prompt",
}
# Slow tokenizers, and the attribute with their SentencePiece model for prompts.
_PIECES = {"MarianTokenizer": "spm_source", "M2M100Tokenizer": "sp_model"}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYT5_OFFSET = 3


def write_tokenizer(checkpoint: Checkpoint, out_dir: Path) -> list[str]:
    """Write the files that convert between text and token ids, and return their names.

    generation_config.json is always written. If the checkpoint has a tokenizer, so are
    tokenizer.json (with the special tokens of AutoTokenizer, without padding and truncation),
    tokenizer_config.json (the strings of the special tokens, for chat templates), and
    chat_template.jinja if there is a chat template.

    Raises:
        CheckpointError: If the tokenizer cannot be read or has no equivalent in `tokenizers`.
    """
    files = {"generation_config.json": _json(checkpoint.generation_config)}
    if has_tokenizer(checkpoint):
        tokenizer = load_tokenizer(checkpoint)
        try:
            files["tokenizer.json"] = _quick(_fast(tokenizer, checkpoint).to_str(pretty=False))
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise _unreadable(checkpoint, error) from None
        named = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
        special = {name: str(token) for name, token in named.items() if token is not None}
        if gguf := _gguf(checkpoint):  # transformers 4.57 reads a wrong eos token
            special = gguf.special_tokens()
        files["tokenizer_config.json"] = _json(special)
        template = getattr(tokenizer, "chat_template", None)
        if template := template.get("default") if isinstance(template, dict) else template:
            files["chat_template.jinja"] = template
    for name, text in files.items():
        (out_dir / name).write_text(text, encoding="utf-8")
    return list(files)


def languages_of(checkpoint: Checkpoint, directory: Path) -> Languages | None:
    """Return the languages of a translation model, or None if it has no language tokens.

    They are read from the tokens of the tokenizer.json in `directory`.
    """
    file = directory / "tokenizer.json"
    if checkpoint.config.get("model_type") not in _TARGETS or not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))
    found = (
        (_LANGUAGE.fullmatch(token.content), index)
        for index, token in tokenizer.get_added_tokens_decoder().items()
    )
    tokens = {next(filter(None, match.groups())): index for match, index in found if match}
    if not tokens:
        return None
    written = set(tokenizer.encode("a").ids)
    source = next((code for code, index in tokens.items() if index in written), None)
    # mBART with 25 languages has the target's token instead of a start token.
    start = checkpoint.generation_config.get("decoder_start_token_id")
    target = "start" if start in tokens.values() else _TARGETS[checkpoint.config["model_type"]]
    return Languages(dict(sorted(tokens.items())), source, target)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Return True if the checkpoint has a tokenizer. Without one, prompts must be token ids."""
    if gguf := _gguf(checkpoint):
        return gguf.has_tokenizer
    return any((checkpoint.path / name).is_file() for name in _SOURCES)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer with transformers.

    Raises:
        CheckpointError: If it cannot be read.
    """
    from transformers import AutoTokenizer

    source, options = checkpoint.source
    try:
        with quick_reader(options):
            return AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True, **options
            )
    except Exception as error:  # every kind of tokenizer raises its own types
        raise _unreadable(checkpoint, error) from None


def _gguf(checkpoint: Checkpoint) -> GGUFFile | None:
    return next((file for file in checkpoint.files if isinstance(file, GGUFFile)), None)


def _unreadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.name}: its tokenizer cannot be read ({one_line(error)}); repair the "
        "tokenizer files, or remove them to convert without"
    )


def _quick(source: str) -> str:
    """Return a tokenizer.json with merges as strings, "a b", which load faster than pairs.

    Loading 49,000 merges takes 75 instead of 135 ms (tokenizers 0.23). Tokens with spaces require
    pairs.
    """
    content = json.loads(source)
    pairs = content["model"].get("merges")
    if not pairs or any(" " in part for pair in pairs for part in pair):
        return source
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    quick = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return quick if Tokenizer.from_str(quick).to_str() == source else source


def _fast(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> Tokenizer:
    # The checkpoint's own tokenizer.json is not used: transformers changes it on loading (bos and
    # eos of Llama, added tokens), and a file from the hub may enable truncation and padding.
    kind = type(tokenizer).__name__
    if kind == "ByT5Tokenizer":
        return _byt5(tokenizer)
    if kind in _PIECES:
        return _of_pieces(tokenizer, _PIECES[kind])
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{checkpoint.name}: {type(tokenizer).__name__} has no equivalent in the tokenizers "
            "library; add a tokenizer.json to the checkpoint, or remove its tokenizer to convert "
            "without"
        )
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.no_padding()
    fast.no_truncation()
    return fast


def _of_pieces(tokenizer: Any, model: str) -> Tokenizer:
    """Build a tokenizer from SentencePiece pieces with the ids of the checkpoint's `encoder`.

    Pieces missing from the prompt's model, such as those of Marian's targets, are included to
    decode them.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(getattr(tokenizer, model).serialized_model_proto())
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    scores = {piece.piece: piece.score for piece in normal}
    ids: dict[str, int] = tokenizer.encoder
    rare = min(scores.values()) * 100 - 100
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        known = scores.keys() & ids.keys()
        by_score = sorted(known, key=lambda piece: -scores[piece])
        cuts = ((piece[:cut], piece[cut:]) for piece in by_score for cut in range(1, len(piece)))
        merges = [(left, right) for left, right in cuts if left in known and right in known]
        fast = Tokenizer(
            models.BPE(vocab=ids, merges=merges, unk_token=str(tokenizer.unk_token), fuse_unk=True)
        )
    else:
        pieces = {index: piece for piece, index in ids.items()}
        vocabulary = [
            (pieces.get(n, f"<unused{n}>"), scores.get(pieces.get(n, ""), rare))
            for n in range(max(pieces) + 1)
        ]
        fast = Tokenizer(models.Unigram(vocabulary, unk_id=ids[str(tokenizer.unk_token)]))
    steps: list[Any] = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    languages = dict(getattr(tokenizer, "lang_token_to_id", {}))
    languages |= {piece: index for piece, index in ids.items() if _LANGUAGE.fullmatch(piece)}
    named = (getattr(tokenizer, name, None) for name in _SPECIAL)
    special = [str(token) for token in named if token is not None and str(token) in ids]
    fast.add_special_tokens([*special, *sorted(languages, key=lambda token: languages[token])])
    unknown = tokenizer.unk_token_id  # stands for a text between the tokens that are added
    added = tokenizer.build_inputs_with_special_tokens([unknown])
    place = added.index(unknown)
    before = tokenizer.convert_ids_to_tokens(added[:place])
    after = tokenizer.convert_ids_to_tokens(added[place + 1 :])
    fast.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}
        ],
    )
    return fast


def _byt5(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Build a tokenizer of bytes.

    The id of a byte is its value + 3, after pad, eos and unk. Sentinels follow the bytes.
    """
    # A byte-level tokenizer represents a byte by its character, or by one from U+0100 if
    # unprintable.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
    vocabulary = {added[index].content: index for index in range(_BYT5_OFFSET)}
    vocabulary.update({letter: byte + _BYT5_OFFSET for byte, letter in enumerate(letters)})
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=added[2].content))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([added[index] for index in sorted(added)])
    eos = str(tokenizer.eos_token)
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, 1)]
    )
    return fast


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
