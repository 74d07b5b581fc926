"""The models that decoders are compared with, and their bundles."""

from __future__ import annotations

import json
import string
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freeexport.checkpoints.checkpoint import open_checkpoint, smollm2
from freeexport.checkpoints.transformers_model import write_random_weights
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from tools.results.measure import run_command

SMOLLM2 = "smollm2"
# Positions of bundles, where the model has so many.
POSITIONS = 8192
COMMON = {
    "scale_embedding": True,
    "max_position_embeddings": 1024,
    "forced_eos_token_id": None,
    "bos_token_id": 0,
}


def _sides(**values: int) -> dict[str, int]:
    return {f"{side}_{name}": values[name] for side in ("encoder", "decoder") for name in values}


# Of the sizes of the published opus-mt-en-de and nllb-200-distilled-600M.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "marian": {
        **COMMON,
        **_sides(layers=6, attention_heads=8, ffn_dim=2048),
        "model_type": "marian",
        "d_model": 512,
        "vocab_size": 58101,
        "activation_function": "swish",
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "decoder_start_token_id": 58100,
    },
    "m2m_100": {
        **COMMON,
        **_sides(layers=12, attention_heads=16, ffn_dim=4096),
        "model_type": "m2m_100",
        "d_model": 1024,
        "vocab_size": 256206,
        "activation_function": "relu",
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
}
# First and last tokens of the vocabulary.
SPECIAL = {
    "marian": (["</s>", "<unk>"], ["<pad>"]),
    "m2m_100": (["<s>", "<pad>", "</s>", "<unk>"], []),
}
MODELS = (SMOLLM2, *CONFIGURATIONS)


def models_of(given: tuple[str, ...]) -> dict[str, str]:
    """Parse NAME=CHECKPOINT arguments.

    Raises:
        OptionError: If a name is unknown, or the checkpoint is of the other kind.
        CheckpointError: If a checkpoint cannot be opened.
    """
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in MODELS or not path:
            raise OptionError(
                f"--model {text} is not NAME=CHECKPOINT; names are {', '.join(MODELS)}"
            )
        encoder_decoder = bool(open_checkpoint(path).config.get("is_encoder_decoder"))
        if encoder_decoder == (name == SMOLLM2):
            kind = "an encoder-decoder" if encoder_decoder else "a decoder-only model"
            raise OptionError(f"--model {text}: {path} is {kind}, unlike {name}")
        found[name] = path
    return found


def checkpoint_of(name: str, given: Mapping[str, str], output: Path) -> str:
    """Return the checkpoint of a model: `given`, or SmolLM2's, or one with random weights.

    Random weights are written below `output`. They cost as much as the published ones.
    """
    if name in given:
        return given[name]
    if name == SMOLLM2:
        return str(smollm2())
    out = output / "models" / name
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory)
            (source / "config.json").write_text(json.dumps(CONFIGURATIONS[name]))
            write_tokenizer(source, CONFIGURATIONS[name]["vocab_size"], SPECIAL[name])
            out.parent.mkdir(parents=True, exist_ok=True)
            write_random_weights(source, out, 0)
    return str(out)


def bundle_of(name: str, checkpoint: str, precision: str, output: Path) -> Bundle:
    """Return the bundle of a checkpoint below `output`. Converts a missing one.

    `precision` may have further options of `convert`, as in "int4 --head int4".
    """
    out = output / "bundles" / "-".join([name, precision.replace(" --", "-").replace(" ", "-")])
    if not out.is_dir():
        positions = open_checkpoint(checkpoint).config.get("max_position_embeddings", POSITIONS)
        command = [sys.executable, "-m", "freeexport", "convert", checkpoint, str(out)]
        command += ["--precision", *precision.split(), "--verify", "none"]
        run_command(*command, "--capacity", str(min(positions, POSITIONS)))
    return Bundle.open(out)


def write_tokenizer(directory: Path, count: int, special: tuple[list[str], list[str]]) -> None:
    """Write a tokenizer with a vocabulary of a given size.

    It has the characters of English texts and made-up words.

    Args:
        directory: Directory of the tokenizer.
        count: Size of the vocabulary.
        special: First and last tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    first, last = special
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    made_up = [f"▁piece{number}" for number in range(count - len(first + letters + last))]
    pieces = first + letters + made_up + last
    tokenizer = Tokenizer(
        models.Unigram([(piece, -10.0) for piece in pieces], unk_id=pieces.index("<unk>"))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(first + last)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", pieces.index("</s>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": first[0], "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
