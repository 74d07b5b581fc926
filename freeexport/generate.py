"""`freeexport generate`: text from a bundle, for one prompt or a file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.jsonl import BrokenLine, Request, ResultWriter, read_requests
from freeexport.progress import progress
from runtime import FreeExportError, GenerationResult, PromptError, Session
from runtime.options import Mode

# A prompt's results, best first.
Ask = Callable[[Any], list[GenerationResult]]


def _biases(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[tuple[int, ...], float]:
    biases: dict[tuple[int, ...], float] = {}
    for text in given:
        try:
            sequence, bias = text.split("=")
            biases[tuple(int(token) for token in sequence.split(","))] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not like 42=-5 or 7,42=2.5", context, parameter) from None
    return biases


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--input", "source", type=click.Path(path_type=Path), help="JSON lines with an `input` each.")
@click.option("--output", "target", type=click.Path(path_type=Path), help="Where the results go, a line each.")
@click.option("--resume", is_flag=True, help="Go on with the lines that OUTPUT does not have yet.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message for the bundle's chat template.")
@click.option("--mode", type=click.Choice(get_args(Mode)), default="free", show_default=True)
@click.option("--threshold", type=float, help="Exit above this confidence.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--rollback-threshold", type=float, help="Nats above which mode rollback takes a token back.")
@click.option("--max-pending", type=int, help="Most rows of a sync pass.  [default: the bundle's]")
@click.option("--stop", multiple=True, help="End before this string; may be given several times.")
@click.option("--min-new-tokens", type=int, default=0, help="No end of sequence before as many tokens.")
@click.option("--do-sample", is_flag=True, default=None, help="Draw tokens, as generation_config.json recommends.")
@click.option("--temperature", type=float, help="Draw tokens; 0 is greedy.")
@click.option("--top-k", type=int, help="Draw from so many best; 0 is all.  [default: 50]")
@click.option("--top-p", type=float, help="Draw from the fewest best that have this probability together.")
@click.option("--min-p", type=float, help="Draw from what has this share of the best one's probability.")
@click.option("--repetition-penalty", type=float, help="Above 1, tokens that stand already become less likely.")
@click.option("--sequence-bias", multiple=True, metavar="ID[,ID...]=NATS", callback=_biases, help="Favour a token.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@click.option("--num-beams", type=int, default=1, help="Beam search: encoder-decoders in mode full.")
@click.option("--length-penalty", type=float, default=1.0, help="Above 0, beams may be longer.")
@click.option("--early-stopping", is_flag=True, help="End the search once as many beams are finished.")
@click.option("--num-return-sequences", type=click.IntRange(1), default=1, help="So many samples or beams, best first.")
@click.option("--output-logprobs", is_flag=True, help="Also the log-probability of each token, in JSON.")
@click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]")
@click.option("--capacity", type=int, help="Positions of the KV cache.  [default: the bundle's]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a line of JSON.")
def command(
    bundle: Path,
    prompt: str | None,
    source: Path | None,
    target: Path | None,
    resume: bool,
    overwrite: bool,
    chat: bool,
    threads: int | None,
    capacity: int | None,
    num_return_sequences: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate with BUNDLE: for PROMPT (or standard input), or for each line of --input.

    \b
    Example:
      freeexport generate bundle "The capital of France is" --max-new-tokens 32
      freeexport generate bundle "Once upon a time" --mode lossless --temperature 0.8 --seed 1
      freeexport generate bundle --input prompts.jsonl --output results.jsonl
    """
    if source is not None and (prompt is not None or target is None):
        raise click.UsageError("--input goes with --output and without PROMPT")
    if source is None and (target is not None or resume or overwrite):
        raise click.UsageError("--output, --resume and --overwrite go with --input")
    if source is not None and target is not None and target.exists() and target.samefile(source):
        raise click.UsageError("--output is the same file as --input")
    with _session(bundle, threads, capacity) as session:
        ask = partial(_ask, session, num_return_sequences, options)
        if source is not None and target is not None:
            _generate_file(ask, source, target, resume, overwrite, chat)
            return
        text = sys.stdin.read() if prompt is None else prompt
        if num_return_sequences > 1:
            _print_all(ask(_prompt(text, chat)), as_json)
        else:
            _generate_one(session, text, chat, as_json, options)


def _ask(session: Session, count: int, options: dict[str, Any], prompt: Any) -> list[GenerationResult]:
    if count == 1:
        return [session.generate(prompt, **options)]
    return session.generate_best(prompt, count, **options)


def _print_all(results: list[GenerationResult], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_fields(*results), ensure_ascii=False))
        return
    for result in results:
        logprob = sum(result.logprobs or ()) / len(result.token_ids)
        click.echo(f"[{logprob:.2f} nats a token] {result.text}")


@contextmanager
def _session(bundle: Path, threads: int | None, capacity: int | None) -> Iterator[Session]:
    with Session(bundle, threads=threads, capacity=capacity, slots=1) as session:
        manifest = session.manifest
        if sys.stderr.isatty():
            rows = session.capacity + manifest.max_pending
            click.echo(f"KV cache: {manifest.kv_bytes_per_token * rows / 1e6:.1f} MB", err=True)
        yield session


def _generate_one(session: Session, text: str, chat: bool, as_json: bool, options: dict[str, Any]) -> None:
    with session.stream(_prompt(text, chat), **options) as stream:
        for token in stream:
            if not as_json:
                click.echo(token.text, nl=False)
                sys.stdout.flush()
    if as_json:
        click.echo(json.dumps(_fields(stream.result), ensure_ascii=False))
        return
    click.echo()
    stats = stream.result.stats
    click.echo(
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, {stats.exit_rate:.0%} exited, "
        f"{f'{stats.rejected} drafts rejected, ' if stats.rejected else ''}"
        f"{stats.sync_passes} deep passes, finished by {stream.result.finish_reason}",
        err=True,
    )


def _generate_file(ask: Ask, source: Path, target: Path, resume: bool, overwrite: bool, chat: bool) -> None:
    """Every line that can be answered is; broken ones are reported, and make the exit code 1."""
    requests = list(read_requests(source))
    with (
        ResultWriter(target, resume=resume, overwrite=overwrite) as writer,
        progress("generating", len(requests)) as advance,
    ):
        for request in requests:
            if not writer.skip(request):
                _answer(ask, request, writer, chat)
            advance()
        failures = writer.failures
    if failures:
        raise FreeExportError(f"{failures} of {len(requests)} lines of {source} failed; {target} says why")


def _answer(ask: Ask, request: Request | BrokenLine, writer: ResultWriter, chat: bool) -> None:
    try:
        if isinstance(request, BrokenLine):
            raise PromptError(request.reason)
        writer.write(request, **_fields(*ask(_prompt(request.input, chat))))
    except PromptError as error:
        click.echo(f"line {request.line_number}: {error}", err=True)
        writer.write_error(request, str(error))


def _prompt(text: Any, chat: bool) -> Any:
    return [{"role": "user", "content": text}] if chat and isinstance(text, str) else text


def _fields(result: GenerationResult, *others: GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "exited": list(result.exited),
        "finish_reason": result.finish_reason,
        **({} if result.logprobs is None else {"logprobs": list(result.logprobs)}),
        **({"others": [other.text for other in others]} if others else {}),
    }
