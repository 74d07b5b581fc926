"""Builds a data set of synthetic speech with texts, for Whisper.

    python -m tools.data.speech data/speech --index data/debian-index --wordnet /usr/share/wordnet

The sentences are from descriptions of Debian packages and from WordNet's examples. espeak-ng and
hibari-tts speak them. Requires Debian's `espeak-ng`, `wordnet-base` for half of the texts, and
PyPI's `hibari-tts` for half of the clips. A family of descriptions (tools/data/debian_index.py) is
in one split. Lines have `audio`, a path relative to the file, `target`, the text, and `length`:
short, medium or long.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import click
import numpy as np

from freeexport.fit.splits import stable_hash
from freeexport.system.output import output_directory
from runtime.speech.audio import RATE, read_audio, resampled
from tools.data.debian_index import PackageDescription, package_families, read_index
from tools.data.debian_index import sources as source_packages
from tools.data.splits import MARKER, DataError, run_tool, shuffled, split_of

LENGTHS = {"short": (3.0, 7.0), "medium": (12.0, 18.0), "long": (23.0, 29.0)}  # seconds
WORDS_A_SECOND = 2.45
COMMON = 40  # fewest occurrences of a common word in all descriptions
VOICES = (
    "en-us",
    "en-us+f3",
    "en-us+m3",
    "en-gb",
    "en-gb+f2",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-us+m7",
)
_SENTENCE = re.compile(r"[A-Z][^.!?]{20,240}?[.!?](?= |$)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][a-z]+)*")
# Words with at most one capital letter. The pronunciation of acronyms and CamelCase names varies.
_PLAIN = re.compile(r"(?:[A-Z]?[a-z]+(?:['-][a-z]+)*[,;:]?|[aAI],?)")


def plain_texts(english: Mapping[str, PackageDescription]) -> dict[str, list[str]]:
    """Return the sentences of common words in each description, by md5."""
    counts = Counter(
        word.lower()
        for text in english.values()
        for word in _WORD.findall(" ".join(text.paragraphs))
    )
    seen = set[str]()
    found = dict[str, list[str]]()
    for md5, text in english.items():
        for paragraph in text.paragraphs:
            for sentence in _SENTENCE.findall(" ".join(paragraph.split())):
                words = sentence[:-1].split()
                plain = all(
                    _PLAIN.fullmatch(word) and counts[word.strip(",;:").lower()] >= COMMON
                    for word in words
                )
                if (
                    len(words) >= 5
                    and plain
                    and not sentence.startswith("This package")
                    and sentence not in seen
                ):
                    seen.add(sentence)
                    found.setdefault(md5, []).append(sentence)
    return found


def example_sentences(wordnet: Path) -> dict[str, list[str]]:
    """Return WordNet's examples with at least five plain words as sentences, by synset."""
    found = dict[str, list[str]]()
    for path in sorted(wordnet.glob("data.*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for text in re.findall(r'"([^"]+)"', line):
                words = text.rstrip(".").split()
                if len(words) >= 5 and all(_PLAIN.fullmatch(word) for word in words):
                    sentence = text[0].upper() + text[1:].rstrip(".") + "."
                    found.setdefault(f"{path.name} {line[:8]}", []).append(sentence)
    if not found:
        raise DataError(
            f"{wordnet} has no data.noun or other file of WordNet; "
            "try: apt-get install wordnet-base"
        )
    return found


def clips(
    texts: Mapping[str, list[str]], family: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield split, length and text of clips, which consist of whole sentences of one split.

    Half of the training clips are long, because the encoder takes equally long for short ones.
    """
    made = Counter[str]()
    waiting = dict[str, list[str]]()
    for key in shuffled(texts, 0, lambda key: key):
        split = split_of(family.get(key, key))
        parts = waiting.setdefault(split, [])
        for sentence in texts[key]:
            order = ("short", "long", "medium", "long") if split == "train" else tuple(LENGTHS)
            name = order[made[split] % len(order)]
            low, high = (WORDS_A_SECOND * seconds for seconds in LENGTHS[name])
            parts.append(sentence)
            size = sum(len(part.split()) for part in parts)
            if low <= size <= high:
                yield split, name, " ".join(parts)
                made[split] += 1
            if size >= low:
                parts.clear()


def espeak(text: str, drawn: int) -> np.ndarray:
    """Speak a text with espeak-ng.

    Returns:
        Samples float32 [n] at 16 kHz.
    """
    voice = VOICES[drawn % len(VOICES)]
    speed = 150 + 10 * (drawn // 64 % 4)
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdin", "--stdout"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise DataError(f"espeak-ng failed ({error}); try: apt-get install espeak-ng") from None
    # The header has the length of a stream, which is unlimited.
    return read_audio(done.stdout)


def hibari() -> Callable[[str, int], np.ndarray]:
    """Return a function like `espeak` that speaks with hibari-tts."""
    try:
        import hibari as package
    except ImportError:
        raise DataError(
            "hibari-tts is not installed; try: pip install hibari-tts, or --voices espeak-ng"
        ) from None
    voice = package.Hibari()
    speeds = (0.9, 1.0, 1.1)
    return lambda text, drawn: resampled(
        np.asarray(voice(text, speed=speeds[drawn % 3], seed=drawn % 2**32), np.float32),
        voice.sample_rate,
    )


def wav(samples: np.ndarray) -> bytes:
    """Encode samples as a WAV file with 16 bits at 16 kHz."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    default="data/debian-index",
    help="Fetched where missing.",
)
@click.option("--wordnet", type=click.Path(path_type=Path), help="WordNet's directory.")
@click.option(
    "--clips",
    "wanted",
    type=int,
    nargs=3,
    default=(1000, 60, 60),
    help="Of train, validation and test.",
)
@click.option("--voices", type=click.Choice(["both", "espeak-ng"]), default="both")
@click.option("--overwrite", is_flag=True)
def main(
    out: Path,
    index: Path,
    wordnet: Path | None,
    wanted: tuple[int, int, int],
    voices: str,
    overwrite: bool,
) -> None:
    """Write clips of speech and their texts to the directory OUT."""
    english, packages = read_index(index)
    family = package_families(english, source_packages(english, packages))
    speakers = {"espeak-ng": espeak, **({"hibari": hibari()} if voices == "both" else {})}
    sizes = dict(zip(("train", "validation", "test"), wanted, strict=True))
    lines: dict[str, list[dict[str, object]]] = {split: [] for split in sizes}
    with output_directory(out, MARKER, overwrite) as directory:
        for split in sizes:
            (directory / split).mkdir()
        sources = [clips(plain_texts(english), family)] + (
            [clips(example_sentences(wordnet), {})] if wordnet else []
        )
        for split, length, text in chain.from_iterable(zip(*sources, strict=False)):
            if all(len(found) == sizes[name] for name, found in lines.items()):
                break
            if split not in sizes or len(lines[split]) == sizes[split]:
                continue
            number = len(lines[split])
            drawn, which = divmod(stable_hash(text), len(speakers))
            speaker = list(speakers)[which]
            samples = speakers[speaker](text, drawn)
            seconds = len(samples) / RATE
            low, high = LENGTHS[length]
            if not low <= seconds <= high:
                continue
            name = f"{split}/{number:04}.wav"
            (directory / name).write_bytes(wav(samples))
            found = {
                "audio": name,
                "target": text,
                "voice": speaker,
                "length": length,
                "seconds": round(seconds, 2),
            }
            lines[split].append(found)
        for split, found_lines in lines.items():
            if not found_lines:
                raise DataError(f"split {split} has no clips; ask for more")
            text = "".join(json.dumps(line) + "\n" for line in found_lines)
            (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
        about = {
            "task": "speech",
            "source": "index of Debian packages",
            "voices": list(speakers),
            "sizes": sizes,
        }
        (directory / MARKER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
