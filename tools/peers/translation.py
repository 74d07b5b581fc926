"""Compares requests to encoder-decoders with CTranslate2, by lengths and number of beams.

    python -m tools.peers.translation make marian OUT        checkpoint with random weights
    python -m tools.peers.translation time BUNDLE --model CHECKPOINT --beams 1 --beams 4 --save FILE

Each decoder runs in its own process, in turn, with a pause before each request: CTranslate2's
threads spin for 0.2 s after a request and would slow the other decoder down. Ratios are
CTranslate2's seconds divided by ours, for the same prompt and without end of sequence. Run from the
root of the repository on an idle machine.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.transformers_model import write_random_weights
from freeexport.system.environment import about, environment
from freeexport.system.load import load_note, other_load
from freeexport.system.output import write_whole
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores
from tools.peers.catalog import OURS, PEERS, find_source, peer_command, peer_model
from tools.peers.compare import Contender, decode

PAUSE = 0.4  # seconds
# Sizes of the published opus-mt-en-de and nllb-200-distilled-600M.
SIZES: dict[str, dict[str, Any]] = {
    "marian": {
        "d_model": 512,
        "ffn": 2048,
        "layers": 6,
        "heads": 8,
        "vocab_size": 58101,
        "activation": "swish",
    },
    "m2m_100": {
        "d_model": 1024,
        "ffn": 4096,
        "layers": 12,
        "heads": 16,
        "vocab_size": 256206,
        "activation": "relu",
    },
}

# First and last tokens of the vocabulary.
SPECIAL = {
    "marian": (["</s>", "<unk>"], ["<pad>"]),
    "m2m_100": (["<s>", "<pad>", "</s>", "<unk>"], []),
}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
def make(size: str, out: Path, seed: int) -> None:
    """Write a checkpoint with random weights. It costs as much as the real one of this size."""
    if out.exists():
        raise OptionError(f"{out} exists; choose another path")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(configuration(size)))
        write_tokenizer(Path(directory), SIZES[size]["vocab_size"], SPECIAL[size])
        write_random_weights(Path(directory), out, seed)


def configuration(size: str) -> dict[str, Any]:
    of = SIZES[size]
    sides = {
        f"{side}_{name}": of[key]
        for side in ("encoder", "decoder")
        for name, key in (("layers", "layers"), ("attention_heads", "heads"), ("ffn_dim", "ffn"))
    }
    named = {
        "activation_function": of["activation"],
        "vocab_size": of["vocab_size"],
        "d_model": of["d_model"],
    }
    tokens = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    if size == "marian":
        last = of["vocab_size"] - 1
        tokens = {
            "pad_token_id": last,
            "eos_token_id": 0,
            "bos_token_id": 0,
            "decoder_start_token_id": last,
        }
    common = {
        "model_type": size,
        "scale_embedding": True,
        "max_position_embeddings": 1024,
        "forced_eos_token_id": None,
    }
    return {**common, **sides, **named, **tokens}


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


@main.command(context_settings={"show_default": True})
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The checkpoint that the bundle came from.")
@click.option("--beams", type=click.IntRange(1), multiple=True, default=(1, 4))
@click.option(
    "--request",
    "requests",
    multiple=True,
    default=("20x1", "20x64", "128x64", "512x1"),
    help="Tokens read x written.",
)
@click.option("--rounds", type=click.IntRange(1), default=7)
@click.option("--threads", type=click.IntRange(1))
@click.option("--save", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def time(
    path: Path,
    model: str,
    beams: tuple[int, ...],
    requests: tuple[str, ...],
    rounds: int,
    threads: int | None,
    save: Path | None,
) -> None:
    """Time requests to a bundle and to CTranslate2."""
    manifest = Bundle.open(path).manifest
    peer = PEERS["ctranslate2-int8" if manifest.precision == "int8" else "ctranslate2"]
    source = find_source(manifest, model)
    command = peer_command(peer)
    theirs = str(peer_model(peer, source, command))
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with other_load() as load:
        for number in beams:
            given = {**peer.options, "encoder_decoder": True, "beams": number}
            pair = [
                Contender("ours", manifest.precision, OURS, str(path), {"beams": number}),
                Contender(peer.name, peer.precision, command, theirs, given),
            ]
            workers = {}
            try:
                for one in pair:
                    workers[one.name], installed = one.load(threads or usable_cores())
                    versions |= installed
                rows += [row_of(workers, request, number, rounds, manifest) for request in requests]
            finally:
                for worker in workers.values():
                    worker.close()
    facts = {
        **dict(about(environment(), threads or usable_cores())),
        "other load": load_note(load.cores) or "none",
    }
    for name, text in facts.items():
        click.echo(f"{name}: {text}")
    if save is not None:
        found = {
            "model": Path(model).name,
            "precision": manifest.precision,
            "rounds": rounds,
            "facts": facts,
            "versions": versions,
        }
        write_whole(save, json.dumps({**found, "rows": rows}, indent=2) + "\n")


def row_of(
    workers: dict[str, Any], request: str, beams: int, rounds: int, manifest: Manifest
) -> dict[str, Any]:
    """Time a request and return a row: median seconds, their ratio, and rounds with equal tokens.

    Args:
        workers: Processes of ours and of CTranslate2, in this order.
        request: Tokens of prompt and output, such as "20x64".
        beams: Number of beams.
        rounds: Number of rounds.
        manifest: Manifest of the bundle.
    """
    read, written = map(int, request.split("x"))
    source = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    same = 0
    for number in range(rounds + 1):  # the first binds and warms up
        prompt = [
            *source.integers(200, manifest.vocab_size - 200, read - 1).tolist(),
            manifest.eos_token_ids[0],
        ]
        found = {}
        for name in list(workers)[:: 1 if number % 2 else -1]:
            sleep(PAUSE)
            run = decode(workers[name], prompt, written)
            found[name] = run.token_ids
            if number:
                seconds[name].append(run.seconds)
        same += number > 0 and len(set(found.values())) == 1
    ours, theirs = seconds.values()
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    row = {
        "read": read,
        "written": written,
        "beams": beams,
        "seconds": median(ours),
        "ctranslate2": median(theirs),
        "ratio": median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "same": same,
    }
    click.echo(
        f"{request} tokens, beams {beams}: {1e3 * row['seconds']:.1f} ms, "
        f"{written / row['seconds']:.0f} tokens/s, "
        f"CTranslate2 {1e3 * row['ctranslate2']:.1f}; "
        f"{row['ratio']:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"ids equal in {same} of {rounds}"
    )
    return row


if __name__ == "__main__":
    main()
