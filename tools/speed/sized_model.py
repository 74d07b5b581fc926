"""A checkpoint of a known model's size with random weights: to measure speed where the model itself is not at hand.

    python -m tools.speed.sized_model t5-base OUT        T5 v1.0: t5-base or t5-large

What it writes means nothing; what it costs is what the real one costs. Run from the root.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

import click

from freeexport.checkpoints.transformers_model import write_random_weights

# d_model, d_ff, layers of encoder and decoder, heads; of the published configurations.
SIZES = {"t5-base": (768, 3072, 12, 12), "t5-large": (1024, 4096, 24, 16)}
TOKENS, ROWS = 32100, 32128


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
def main(size: str, out: Path, seed: int) -> None:
    if out.exists():
        raise click.UsageError(f"{out} exists; choose another path")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory)
        (source / "config.json").write_text(json.dumps(configuration(size)))
        write_tokenizer(source)
        write_random_weights(source, out, seed)
    click.echo(f"{out}: {size}, random weights")


def configuration(size: str) -> dict:
    width, inner, layers, heads = SIZES[size]
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": width,
        "d_ff": inner,
        "d_kv": 64,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "vocab_size": ROWS,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def write_tokenizer(directory: Path) -> None:
    """A vocabulary of T5's size: characters, so that any English text can be read, and made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    made_up = [f"▁piece{number}" for number in range(TOKENS - len(special) - len(letters))]
    pieces = [(piece, -10.0) for piece in special + letters + made_up]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
