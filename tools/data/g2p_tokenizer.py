"""Writes the tokenizer and configuration of an untrained T5 for grapheme-to-phoneme conversion.

    python -m tools.data.g2p_tokenizer models/g2p-init --d-model 192 --layers 2 --decoder-layers 8

Each letter and each phoneme is a token, and so is the task prefix. Letters are lower case and
phonemes upper case, so one tokenizer reads inputs and targets. Decoding separates phonemes by
spaces. AutoTokenizer of transformers 4.57 and 5 loads the files without a custom class. `freeexport
train --from-config` starts with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import click
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from freeexport.system.output import output_directory
from tools.data.g2p import PREFIX, SEPARATOR
from tools.data.splits import run_tool

PAD = "<pad>"
EOS = "</s>"
UNKNOWN = "<unk>"
PHONEMES = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"),
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
# In the order of their ids.
VOCABULARY = (PAD, EOS, UNKNOWN, PREFIX, " ", "'", *ascii_lowercase, SEPARATOR, *PHONEMES)


def build_tokenizer() -> Tokenizer:
    """Build a tokenizer of letters and phonemes that appends EOS. Other characters are unknown."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, UNKNOWN)]
    )
    # A space between phonemes is a separator. A space between letters is a token.
    separators = pre_tokenizers.Split(Regex(r"(?<=[A-Z012|]) +(?=[A-Z|])"), "removed")
    tokens = pre_tokenizers.Split(Regex(rf"\A{PREFIX}|[A-Z]+[012]?|[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([separators, tokens])
    # Without a decoder, tokens are joined by spaces, as in targets.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])]
    )
    return tokenizer


def write_files(directory: Path, tokenizer: Tokenizer, sizes: dict[str, int]) -> None:
    """Write the tokenizer and the configuration of a T5 with tied embeddings."""
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config: dict[str, Any] = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": tokenizer.get_vocab_size(),
        **sizes,
        "d_kv": sizes["d_model"] // sizes["num_heads"],
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "tie_word_embeddings": True,
        **ends,
    }
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        # Clean-up would move spaces around apostrophes and commas.
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in {
        "config": config,
        "generation_config": ends,
        "tokenizer_config": tokenizer_config,
    }.items():
        (directory / f"{name}.json").write_text(
            json.dumps(value, indent=2) + "\n", encoding="utf-8"
        )


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--d-model", type=click.IntRange(8), default=192)
@click.option("--d-ff", type=click.IntRange(8), default=512)
@click.option("--heads", "num_heads", type=click.IntRange(1), default=4)
@click.option("--layers", "num_layers", type=click.IntRange(1), default=2, help="Of the encoder.")
@click.option("--decoder-layers", "num_decoder_layers", type=click.IntRange(2), default=8)
@click.option("--overwrite", is_flag=True, help="Replace a model at OUT.")
def command(out: Path, overwrite: bool, **sizes: int) -> None:
    """Write the tokenizer and configuration of a grapheme-to-phoneme T5 to the directory OUT."""
    if sizes["d_model"] % sizes["num_heads"]:
        raise click.UsageError(
            f"--d-model {sizes['d_model']} is not a multiple of --heads {sizes['num_heads']}"
        )
    with output_directory(out, "config.json", overwrite) as directory:
        write_files(directory, build_tokenizer(), sizes)


if __name__ == "__main__":
    run_tool(command)
