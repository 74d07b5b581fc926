"""Pack the texts of answers, whose phrases `freeexport convert` counts for every model of text.

    python -m tools.data.pack_answers answers.jsonl more.jsonl

Reads what `freeexport generate --output` writes, and replaces the package's answers.jsonl.xz. A
text that occurs twice is kept once. Lines that failed are left out.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import click

from freeexport.conversion.phrases import READY_MADE
from freeexport.system.output import replacing
from tools.data.splits import DataError, json_lines, run_tool


@click.command(help=__doc__)
@click.argument("answers", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(answers: tuple[Path, ...]) -> None:
    texts: dict[str, bool] = {}
    for path in answers:
        for line in json_lines(path):
            if "text" in line:
                texts.setdefault(line["text"], line.get("finish_reason") in ("eos", "stop"))
    if not texts:
        raise DataError("no line has a 'text'; give the output of freeexport generate")
    lines = [
        json.dumps({"target": text, "complete": complete}, ensure_ascii=False) + "\n"
        for text, complete in texts.items()
    ]
    content = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    with replacing(READY_MADE) as partial:
        partial.write_bytes(content)
    click.echo(f"{READY_MADE}: {len(texts):,} answers, {len(content) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_tool(main)
