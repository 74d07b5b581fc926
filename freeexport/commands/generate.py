"""`freeexport generate`: generate text with a bundle, for one prompt or a file of prompts."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import DEVICE, THREADS, SectionedCommand, section
from freeexport.system.answers import answer_file, fields_of
from freeexport.system.jsonl import STANDARD
from runtime import FreeExportError, GenerationResult, OptionError, Session
from runtime.bundle.json_file import UnreadableError, read_text
from runtime.errors import PromptError, PromptLengthError, shown
from runtime.options.generation_options import Mode

# Lines of a file that are decoded concurrently. Each uses a slot of the KV cache.
BATCH = 4


def _others(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, Any]:
    """Parse NAME=VALUE as options of a request. The session checks them.

    A value is parsed as JSON if possible.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{shown(text)} is not NAME=VALUE", context, parameter)
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    with suppress(AttributeError, KeyError, ValueError):  # JSON keys cannot be sequences
        biases = options["sequence_bias"].items()
        options["sequence_bias"] = {tuple(map(int, ids.split(","))): bias for ids, bias in biases}
    return options


@click.command(cls=SectionedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@section("Input and output")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, allow_dash=True),
    help="JSONL file with an 'input' or 'audio' on each line. - is standard input.",
)
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path, allow_dash=True),
    help=(
        "File to write the results to, one line for each line of input.  [default: -, standard "
        "output]"
    ),
)
@click.option(
    "--audio",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=(
        "Audio file to transcribe, for a bundle that reads speech (-o language=de, task=translate, "
        "timestamps=true)."
    ),
)
@click.option(
    "--chat",
    is_flag=True,
    help="Apply the bundle's chat template, with the prompt as a user's message.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@section("Decoding")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help=(
        "Decoding mode. free: exits are final. rollback: the deep decoder rejects exits that it "
        "finds unlikely. lossless: exits are drafts, and the tokens are those of full. full: no "
        "token exits. shallow: every token exits.  [default: the bundle's]"
    ),
)
@click.option(
    "--threshold",
    type=float,
    help="Confidence above which a token exits, from 0 to 1.  [default: the bundle's]",
)
@click.option(
    "--max-new-tokens",
    type=int,
    help=(
        "Maximum number of tokens to generate, including the end of sequence.  [default: 256, or "
        "what fits]"
    ),
)
@click.option(
    "--stop",
    multiple=True,
    help="String that stops the generation, not included in the output. May be repeated.",
)
@click.option("--temperature", type=float, help="Sampling temperature. 0 is greedy decoding.")
@section("Files", rare=True)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted run with the lines that OUTPUT does not contain yet.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1, 4096),
    help=f"Number of lines of the input file to decode concurrently.  [default: {BATCH}]",
)
@click.option(
    "--no-trust-templates",
    is_flag=True,
    help="Do not load the tokenizer and chat template. PROMPT must be token ids, such as 1,22,333.",
)
@section("Decoding options", rare=True)
@click.option(
    "--predicted-output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text file that the output is expected to resemble. Used as drafts in mode lossless.",
)
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=(
        "Constrain the output to JSON of the schema in FILE (-o regex=, grammar= and choice= are "
        "similar)."
    ),
)
@click.option(
    "-o",
    "--option",
    "others",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_others,
    help=(
        "Any other option of a request (docs/options.md), such as seed=1, "
        "top_p=0.9, num_beams=4, num_return_sequences=4, drafts=exit, "
        'deadline=60, top_logprobs=3 for JSON, or sequence_bias={"42": -5, "7,42": 2.5}. '
        "May be repeated."
    ),
)
@section("Machine", rare=True)
@click.option("--device", default="cpu", help=DEVICE)
@click.option("--threads", type=int, help=THREADS)
def command(
    bundle: Path,
    prompt: str | None,
    source: Path | None,
    target: Path | None,
    resume: bool,
    overwrite: bool,
    batch: int | None,
    audio: Path | None,
    chat: bool,
    device: str,
    threads: int | None,
    no_trust_templates: bool,
    predicted_output: Path | None,
    json_schema: Path | None,
    others: dict[str, Any],
    as_json: bool,
    **given: Any,
) -> None:
    """Generate with BUNDLE, for PROMPT or for each line of --input.

    If PROMPT is missing or -, it is read from standard input.

    \b
    Example:
      freeexport generate bundle "The capital of France is" --max-new-tokens 32
      freeexport generate bundle "Once upon a time" --temperature 0.8 -o top_k=40 -o seed=1
      freeexport generate bundle "Correct the spelling: ..." --mode lossless --predicted-output draft.txt
      freeexport generate bundle "Ada, born in 1815: " --json-schema person.json
      freeexport generate bundle --input prompts.jsonl --output results.jsonl --batch-size 8 -o deadline=60
      freeexport generate whisper-bundle --audio talk.wav -o timestamps=true
      freeexport generate cuda-bundle "Once upon a time" --device cuda:0
    """  # noqa: E501
    for wrong, message in (
        (source and prompt is not None, "--input and PROMPT are mutually exclusive; use one"),
        (
            not source and (target or resume or overwrite or batch),
            "--output, --resume, --overwrite and --batch-size require --input",
        ),
        (resume and overwrite, "--resume and --overwrite are mutually exclusive; use one"),
        (
            source and target and target.is_file() and target.samefile(source),
            "--output is the same file as --input; choose another",
        ),
        (
            chat and no_trust_templates,
            "--chat requires the bundle's chat template; omit --no-trust-templates",
        ),
        (
            audio and (source or prompt or chat or predicted_output or json_schema),
            "--audio cannot be combined with PROMPT, --input, --chat, --predicted-output "
            "or --json-schema",
        ),
        (source and predicted_output, "--predicted-output requires PROMPT; omit --input"),
    ):
        if wrong:
            raise click.UsageError(message)
    options = {name: value for name, value in {**given, **others}.items() if value is not None}
    for name, file in {"predicted_output": predicted_output, "json_schema": json_schema}.items():
        if file is not None:
            try:
                options[name] = read_text(file)
            except UnreadableError as error:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(
                    f"{option} {file} cannot be read ({error}); give a text file in UTF-8"
                ) from None
    sequences = options.pop("num_return_sequences", 1)
    if options.get("top_logprobs"):
        options["output_logprobs"] = True
    slots = 1 if source is None else batch or BATCH
    trust = not no_trust_templates
    with Session.from_pretrained(
        bundle, device=device, threads=threads, slots=slots, trust_templates=trust
    ) as session:
        if sys.stderr.isatty():
            rows = session.capacity + session.manifest.max_pending
            click.echo(
                f"KV cache: {slots * session.manifest.kv_bytes_per_token * rows / 1e6:.1f} MB",
                err=True,
            )
        speech = session.manifest.speech is not None
        if (audio is not None) != speech and not (speech and source):
            wanted = (
                "text, not speech; leave out --audio"
                if audio
                else "speech; give --audio FILE, a WAV file"
            )
            raise OptionError(f"{bundle} reads {wanted}")
        if audio is not None:
            _transcribe(session, audio, options, as_json)
            return

        def prompt_of(text: Any) -> Any:
            if isinstance(text, Path) != speech:
                raise PromptError(
                    f"the bundle reads {'speech; give `audio`' if speech else 'text; give `input`'}"
                )
            if speech:
                return text
            if no_trust_templates:
                text = _ids(text)
            elif chat and isinstance(text, str):
                text = [{"role": "user", "content": text}]
            _check_room(session, text, options.get("max_new_tokens"))
            return text

        def ask(text: Any, cancel: threading.Event | None = None) -> list[GenerationResult]:
            prompt = prompt_of(text)
            if sequences == 1:
                results = [session.generate(prompt, cancel=cancel, **options)]
            else:
                results = session.generate_best(prompt, sequences, cancel=cancel, **options)
            hint(prompt, results)
            return results

        hint = _chat_hint(session)
        if source is not None:
            click.echo(session.describe_mode(**options), err=True)
            answer_file(
                ask,
                source,
                target or Path(STANDARD),
                batch=slots,
                resume=resume,
                overwrite=overwrite,
            )
            return
        text = sys.stdin.read() if prompt in (None, STANDARD) else prompt
        if sequences == 1 and not as_json:
            prompt = prompt_of(text)
            hint(prompt, [_stream(session, prompt, options)])
            return
        results = ask(text)
        if not results:
            raise FreeExportError(
                "deadline exceeded before the first result; raise it with -o deadline=SECONDS"
            )
        if as_json:
            click.echo(json.dumps(fields_of(*results), ensure_ascii=False))
            return
        for result in results:
            logprob = sum(result.logprobs or ()) / len(result.token_ids)
            click.echo(f"[{logprob:.2f} nats per token] {result.text or result.token_ids}")


def _transcribe(session: Session, audio: Path, options: dict[str, Any], as_json: bool) -> None:
    """Print the transcript of a file, one line per segment or word if they have times."""
    result = session.generate(str(audio), **options)
    if as_json:
        segments = (
            None if result.segments is None else [asdict(segment) for segment in result.segments]
        )
        fields = {**fields_of(result), "language": result.language, "segments": segments}
        click.echo(json.dumps(fields, ensure_ascii=False))
        return
    if result.segments is None:
        click.echo(result.text)
    for segment in result.segments or ():
        for each in (segment,) if segment.words is None else segment.words:
            click.echo(f"[{each.start:8.2f} - {each.end:8.2f}] {each.text.strip()}")
    stats = result.stats
    click.echo(
        f"{result.language}, {stats.tokens} tokens in {stats.seconds:.1f} s, of which the encoder "
        f"took {stats.encode_seconds:.1f} s; {stats.exit_rate:.0%} exited, finished by "
        f"{result.finish_reason}",
        err=True,
    )


def _ids(text: Any) -> Any:
    """Parse token ids such as 1,22,333. The session refuses any other text with the reason."""
    words = text.replace(",", " ").split() if isinstance(text, str) else []
    listed = words and all(word.isdecimal() and len(word) < 20 for word in words)
    return list(map(int, words)) if listed else text


def _check_room(session: Session, prompt: Any, wanted: int | None) -> None:
    """Check that `wanted` tokens fit into the context."""
    if wanted is None:
        return
    read = 1 if session.manifest.encoder_decoder else len(session.encode(prompt))
    room = session.capacity - read + 1  # the last token is not read again
    if wanted > room:
        before = (
            "" if session.manifest.encoder_decoder else f" after the {read} tokens of the prompt"
        )
        raise PromptLengthError(
            f"--max-new-tokens is {wanted}, but {room} fit{before} in the {session.capacity} "
            "positions of the context; lower it, or convert with a larger --capacity"
        )


def _chat_hint(session: Session) -> Callable[[Any, list[GenerationResult]], None]:
    """Return a function that suggests --chat on stderr, once.

    It does so after an empty answer, if the bundle has a chat template that the prompt did not use.
    """
    wanted = session.tokenizer is not None and session.tokenizer.chat_template is not None

    def hint(prompt: Any, results: list[GenerationResult]) -> None:
        nonlocal wanted
        empty = any(result.finish_reason == "eos" and not result.text.strip() for result in results)
        if wanted and empty and isinstance(prompt, str):
            wanted = False
            click.echo(
                "hint: the output is empty and this bundle has a chat template; try --chat",
                err=True,
            )

    return hint


def _stream(session: Session, prompt: Any, options: dict[str, Any]) -> GenerationResult:
    """Print tokens as they are generated, then a line of statistics on stderr."""
    with session.stream(prompt, **options) as stream:
        click.echo(session.describe_mode(**options), err=True)
        for token in stream:
            click.echo(token.text if session.tokenizer else f"{token.id} ", nl=False)
            sys.stdout.flush()
    click.echo()
    stats = stream.result.stats
    figures = [
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, {stats.exit_rate:.0%} "
        "exited",
        *([f"{stats.forced_tokens} forced by the grammar"] if stats.forced_tokens else []),
        *([f"{stats.rejected} drafts rejected"] if stats.rejected else []),
        *(
            f"{counts.accepted} of {counts.proposed} {source} drafts accepted "
            f"({counts.mean_accepted:.1f} at a time)"
            for source, counts in stats.drafts.items()
            if source != "exit"
        ),
        f"{stats.sync_passes} deep passes, finished by {stream.result.finish_reason}",
    ]
    click.echo(", ".join(figures), err=True)
    return stream.result
