"""`freeexport generate`: text from a bundle, for one prompt or a file of them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import DEVICE, SectionedCommand, section
from freeexport.system.answers import answer_file, fields_of
from freeexport.system.jsonl import STANDARD
from runtime import FreeExportError, GenerationOptions, GenerationResult, OptionError, Session, Stats
from runtime.errors import PromptLengthError
from runtime.json_file import UnreadableError, read_text
from runtime.options import Drafts, Mode
from runtime.sequence import MOST_SEQUENCES

# Lines of a file that are decoded at once: each holds a slot of the KV cache.
BATCH = 4
# Options of a request that --option takes: all but those of this command, and Python functions.
OWN = (
    *("mode", "threshold", "drafts", "predicted_output", "max_new_tokens", "stop", "deadline", "temperature", "top_p"),
    *("seed", "num_beams", "top_logprobs", "draft_source", "logits_processor", "cache_salt"),
)
OTHERS = sorted({item.name for item in dataclasses.fields(GenerationOptions)} - set(OWN))


def _others(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as options of a request, the value as JSON where it is any."""
    options: dict[str, Any] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found or name not in OTHERS:
            near = difflib.get_close_matches(name, OTHERS, 1)
            hint = f"did you mean {near[0]}" if near else f"names are {', '.join(OTHERS)}"
            if name in OWN:
                hint = f"give --{name.replace('_', '-')}"
            raise click.BadParameter(f"{text!r} is no NAME=VALUE of a request; {hint}", context, parameter)
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
        if name == "sequence_bias":
            options[name] = _biases(options[name], context, parameter)
    return options


def _biases(given: Any, context: click.Context, parameter: click.Parameter) -> dict[tuple[int, ...], float]:
    try:
        return {tuple(map(int, tokens.split(","))): float(bias) for tokens, bias in given.items()}
    except (AttributeError, TypeError, ValueError):
        example = 'sequence_bias={"42": -5, "7,42": 2.5}'
        raise click.BadParameter(f"sequence_bias is {given!r}, not like {example}", context, parameter) from None


@click.command(cls=SectionedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@section("Prompts and results")
@click.option("--input", "source", type=click.Path(path_type=Path, allow_dash=True),
              help="JSON lines with an `input` each; - is standard input.")  # fmt: skip
@click.option("--output", "target", type=click.Path(path_type=Path, allow_dash=True),
              help="Write the results of --input here, a line each.  [default: -, standard output]")  # fmt: skip
@click.option("--chat", is_flag=True, help="The prompt is a user's message for the bundle's chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a line of JSON.")
@section("Decoding")
@click.option("--mode", type=click.Choice(get_args(Mode)),
              help="free: exits are final. rollback: the deep decoder rejects those it finds unlikely. lossless: "
              "exits are drafts, and the tokens are those of full. full: no exits. shallow: only exits.  "
              "[default: the bundle's]")  # fmt: skip
@click.option("--threshold", type=float, help="A token exits above this confidence, 0 to 1.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int,
              help="Generate at most so many tokens, the end included.  [default: 256, or what fits]")  # fmt: skip
@click.option("--stop", multiple=True, help="End before this string. May be repeated.")
@click.option("--temperature", type=float, help="Sample at this temperature; 0 is greedy.")
@click.option("--seed", type=int, help="The same seed gives the same tokens.")
@section("Files", rare=True)
@click.option("--resume", is_flag=True, help="Continue with the lines that OUTPUT does not have yet.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option("--batch-size", "batch", type=click.IntRange(1, 4096),
              help=f"Lines of --input to decode at once.  [default: {BATCH}]")  # fmt: skip
@click.option("--deadline", type=float, metavar="SECONDS",
              help="End a prompt that takes longer; with --input its line has failed.")  # fmt: skip
@click.option("--no-trust-templates", is_flag=True,
              help="Do not load the tokenizer and chat template: PROMPT is token ids, as in 1,22,333.")  # fmt: skip
@section("Drafts of mode lossless", rare=True)
@click.option("--drafts", type=click.Choice(get_args(Drafts)),
              help="Where they come from. exit: the shallow decoder. lookup: text that is repeated. none: nowhere. "
              "auto: lookup, else exit.  [default: auto]")  # fmt: skip
@click.option("--predicted-output", type=click.Path(path_type=Path), metavar="FILE",
              help="Text that the output is expected to be, but for changes.")  # fmt: skip
@section("Sampling, beams and several results", rare=True)
@click.option("--top-p", type=float, help="Sample from the fewest best tokens with this total probability.")
@click.option("--num-beams", type=int, default=1, help="Beam search: encoder-decoders in mode full.")
@click.option("--num-return-sequences", type=click.IntRange(1, MOST_SEQUENCES), default=1,
              help="Return so many samples or beams, best first.")  # fmt: skip
@click.option("--top-logprobs", type=int, default=0,
              help="In JSON, the log-probability of each token, and of so many of the likeliest, 0 to 20.")  # fmt: skip
@click.option("-o", "--option", "others", multiple=True, metavar="NAME=VALUE", callback=_others,
              help=f"Any other option of a request. May be repeated. Names: {', '.join(OTHERS)}.")  # fmt: skip
@section("Machine", rare=True)
@click.option("--device", default="cpu", help=DEVICE)
@click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]")
@click.option("--capacity", type=int, help="Positions of the KV cache.  [default: the bundle's]")
def command(
    bundle: Path,
    prompt: str | None,
    source: Path | None,
    target: Path | None,
    resume: bool,
    overwrite: bool,
    batch: int | None,
    chat: bool,
    device: str,
    threads: int | None,
    capacity: int | None,
    no_trust_templates: bool,
    num_return_sequences: int,
    predicted_output: Path | None,
    others: dict[str, Any],
    as_json: bool,
    **given: Any,
) -> None:
    """Generate with BUNDLE: for PROMPT (- or none is standard input), or for each line of --input.

    \b
    Example:
      freeexport generate bundle "The capital of France is" --max-new-tokens 32
      freeexport generate bundle "Once upon a time" --temperature 0.8 --seed 1 -o top_k=40
      freeexport generate bundle "Correct the spelling: ..." --mode lossless --predicted-output draft.txt
      freeexport generate bundle --input prompts.jsonl --output results.jsonl --batch-size 8 --deadline 60
      freeexport generate cuda-bundle "Once upon a time" --device cuda:0
    """
    if source is not None and prompt is not None:
        raise click.UsageError("--input goes without PROMPT")
    if source is None and (target is not None or resume or overwrite or batch is not None):
        raise click.UsageError("--output, --resume, --overwrite and --batch-size go with --input")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite contradict each other; choose one")
    if source is not None and target is not None and target.is_file() and target.samefile(source):
        raise click.UsageError("--output is the same file as --input")
    if chat and no_trust_templates:
        raise click.UsageError("--chat needs the bundle's chat template; leave out --no-trust-templates")
    if source is not None and predicted_output is not None:
        raise click.UsageError("--predicted-output is for one PROMPT; leave out --input")
    options = {name: value for name, value in {**given, **others}.items() if value is not None}
    if predicted_output is not None:
        options["predicted_output"] = _text_of(predicted_output)
    if options["top_logprobs"]:
        options["output_logprobs"] = True
    slots = 1 if source is None else batch or BATCH
    trust = not no_trust_templates
    with _session(
        bundle, device=device, threads=threads, capacity=capacity, slots=slots, trust_templates=trust
    ) as session:
        hint = ChatHint(session)

        def prompt_of(text: Any) -> Any:
            prompt = _prompt(text, chat) if trust else _ids(text)
            _check_room(session, prompt, options)
            return prompt

        def ask(text: Any, cancel: threading.Event | None = None) -> list[GenerationResult]:
            prompt = prompt_of(text)
            if num_return_sequences == 1:
                results = [session.generate(prompt, cancel=cancel, **options)]
            else:
                results = session.generate_best(prompt, num_return_sequences, cancel=cancel, **options)
            hint(prompt, results)
            return results

        if source is not None:
            if "mode" not in options and "threshold" not in options:
                click.echo(session.default_mode, err=True)
            answer_file(ask, source, target or Path(STANDARD), batch or BATCH, resume, overwrite)
            return
        text = sys.stdin.read() if prompt in (None, STANDARD) else prompt
        if num_return_sequences > 1:
            _print_all(ask(text), as_json)
        else:
            prompt = prompt_of(text)
            hint(prompt, [_generate_one(session, prompt, as_json, options)])


def _check_room(session: Session, prompt: Any, options: dict[str, Any]) -> None:
    """PromptLengthError where more tokens were asked for than the context has room for."""
    wanted = options.get("max_new_tokens")
    if wanted is None:
        return
    read = 1 if session.manifest.encoder_decoder else len(session.encode(prompt))
    room = session.capacity - read + 1  # the newest token is never read back
    if wanted > room:
        before = "" if session.manifest.encoder_decoder else f" after the {read} tokens of the prompt"
        raise PromptLengthError(
            f"--max-new-tokens is {wanted}, but {room} fit{before} in the {session.capacity} positions of the context; "
            "ask for fewer, or convert with a larger --capacity"
        )


class ChatHint:
    """Says once, on stderr, that a bundle has a chat template, where a prompt without it was answered with nothing."""

    def __init__(self, session: Session) -> None:
        tokenizer = session.tokenizer
        self._wanted = tokenizer is not None and tokenizer.chat_template is not None

    def __call__(self, prompt: Any, results: list[GenerationResult]) -> None:
        empty = any(result.finish_reason == "eos" and not result.text.strip() for result in results)
        if self._wanted and empty and isinstance(prompt, str):
            self._wanted = False
            click.echo("hint: the answer is empty, and this bundle has a chat template; try --chat", err=True)


def _prompt(text: Any, chat: bool) -> Any:
    return [{"role": "user", "content": text}] if chat and isinstance(text, str) else text


def _ids(text: Any) -> Any:
    """Token ids as text names them; what names none stays, and the session says why it is refused."""
    words = text.replace(",", " ").split() if isinstance(text, str) else []
    listed = words and all(word.isdecimal() and len(word) < 20 for word in words)
    return list(map(int, words)) if listed else text


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except UnreadableError as error:
        raise OptionError(f"--predicted-output {path} cannot be read ({error}); give a text file in UTF-8") from None


def _print_all(results: list[GenerationResult], as_json: bool) -> None:
    if not results:
        raise FreeExportError("the deadline passed before the first result; allow more with --deadline")
    if as_json:
        click.echo(json.dumps(fields_of(*results), ensure_ascii=False))
        return
    for result in results:
        logprob = sum(result.logprobs or ()) / len(result.token_ids)
        click.echo(f"[{logprob:.2f} nats a token] {result.text or result.token_ids}")


@contextmanager
def _session(bundle: Path, slots: int, **options: Any) -> Iterator[Session]:
    with Session(bundle, slots=slots, **options) as session:
        manifest = session.manifest
        if sys.stderr.isatty():
            rows = session.capacity + manifest.max_pending
            click.echo(f"KV cache: {slots * manifest.kv_bytes_per_token * rows / 1e6:.1f} MB", err=True)
        yield session


def _generate_one(session: Session, prompt: Any, as_json: bool, options: dict[str, Any]) -> GenerationResult:
    with session.stream(prompt, **options) as stream:
        if not as_json and "mode" not in options and "threshold" not in options:
            click.echo(session.default_mode, err=True)
        for token in stream:
            if not as_json:
                click.echo(token.text if session.tokenizer else f"{token.id} ", nl=False)
                sys.stdout.flush()
    if as_json:
        click.echo(json.dumps(fields_of(stream.result), ensure_ascii=False))
        return stream.result
    click.echo()
    stats = stream.result.stats
    asked = options.get("mode", stats.mode)
    click.echo(
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, {stats.exit_rate:.0%} exited, "
        f"{f'{stats.rejected} drafts rejected, ' if stats.rejected else ''}{_sources(stats)}"
        f"{stats.sync_passes} deep passes, finished by {stream.result.finish_reason}"
        f"{'' if stats.mode in (None, asked) else f'; decoded as {stats.mode}: no token can exit'}",
        err=True,
    )
    return stream.result


def _sources(stats: Stats) -> str:
    """Describe the drafts that no exit made."""
    return "".join(
        f"{counts.accepted} of {counts.proposed} {source} drafts accepted ({counts.mean_accepted:.1f} at a time), "
        for source, counts in stats.drafts.items()
        if source != "exit"
    )
