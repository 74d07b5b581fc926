"""Build chat prompts from HumanEval (https://github.com/openai/human-eval, MIT).

    python -m tools.data.human_eval HumanEval.jsonl.gz prompts.jsonl

Each prompt asks to complete a function, as chat models are asked. SOURCE is the file of the
repository, which the Python package human-eval also has.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import click

from freeexport.checkpoints.examples import DataError
from freeexport.system.output import write_whole
from tools.data.splits import run_tool

REQUEST = "Complete this Python function:\n\n```python\n{prompt}\n```"


def prompts_of(source: Path) -> list[dict[str, object]]:
    """Return a line with `input` and `id` for each problem.

    Raises:
        DataError: If the file is not HumanEval.
    """
    try:
        text = gzip.decompress(source.read_bytes()).decode("utf-8")
        problems = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not problems:
            raise ValueError("no problems")
        return [
            {
                "input": [
                    {
                        "role": "user",
                        "content": REQUEST.format(prompt=problem["prompt"].strip()),
                    }
                ],
                "id": problem["task_id"],
            }
            for problem in problems
        ]
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{source} is not HumanEval.jsonl.gz ({error}); get it from the package human-eval"
        ) from None


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(source: Path, out: Path) -> None:
    lines = prompts_of(source)
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    click.echo(f"{out}: {len(lines)} prompts")


if __name__ == "__main__":
    run_tool(main)
