"""`freeexport serve`: serve bundles with OpenAI's API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import DEVICE, THREADS, SectionedCommand, option_of, section
from runtime.bundle.hub import find_bundle
from runtime.options.generation_options import Mode
from runtime.options.session_options import SessionOptions

KEY = "FREEEXPORT_API_KEY"
# Chats resend all earlier turns. Holds 5,500 tokens of SmolLM2-135M, whose four slots take 380 MB.
PREFIX_CACHE_MB = 256
# Options of the session. All others are options of the server.
SESSION = (
    *("threads", "slots", "queue", "capacity", "device", "threshold"),
    *("prefix_cache_mb", "draft_memory_mb", "draft_corpus"),
)


option = option_of(SessionOptions)


@click.command(cls=SectionedCommand)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@section("Models")
@click.option(
    "--name",
    "names",
    multiple=True,
    help=(
        "Name of a served model, in the order of BUNDLES. May be repeated.  [default: the "
        "directory's]"
    ),
)
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help=(
        "Default decoding mode of requests.  [default: free if a threshold is given or calibrated, "
        "else lossless]"
    ),
)
@click.option(
    "--threshold",
    type=float,
    help="Confidence above which a token exits, from 0 to 1.  [default: the bundle's]",
)
@section("Clients")
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on. 0.0.0.0 listens on every address."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    help="Port to listen on. 0 selects a free port.",
)
@click.option(
    "--origin", "origins", multiple=True, help="Allowed CORS origin. * allows any. May be repeated."
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Time limit of a request, in seconds.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    metavar="BYTES",
    help="Maximum size of a request body, in bytes.  [default: 4 MiB, or 64 MiB with audio]",
)
@click.option("--log-prompts", is_flag=True, help="Include prompts in the log.")
@click.option("--no-page", is_flag=True, help="Do not serve the chat page at /.")
@section("Machine")
@option("slots", "Maximum number of requests per bundle that are decoded concurrently.")
@option("queue", "Maximum number of waiting requests. Further requests get status 429.")
@option("threads", THREADS)
@option("capacity", "Number of positions in the KV cache.  [default: the bundle's]")
@option(
    "prefix_cache_mb",
    "Memory limit for the prefix cache, in MB. Reuses keys and values of prompts with "
    f"a common prefix. 0 disables it.  [default: {PREFIX_CACHE_MB} on a CPU]",
    default=None,
    metavar="MB",
)
@option(
    "draft_memory_mb",
    "Memory limit for the outputs of earlier requests from which lossless drafts, in MB. 0 "
    "disables them.",
    metavar="MB",
)
@option(
    "draft_corpus",
    "Texts that outputs may resemble, to draft from: a text file or JSON lines.",
    metavar="FILE",
)
@option("device", DEVICE)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=30.0,
    metavar="SECONDS",
    help="Grace period for running requests after SIGTERM.",
)
def command(bundles: tuple[Path, ...], host: str, port: int, no_page: bool, **options: Any) -> None:
    """Serve BUNDLES with OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    A page to chat with the models is at /. Concurrent requests to a bundle share engine calls.
    Each request is logged as a line of JSON on standard output. After SIGTERM the server
    finishes the running requests and exits. Prometheus metrics are at /metrics. If the
    environment variable FREEEXPORT_API_KEY is set, clients must send its value as their API
    key. `freeexport demo` makes a bundle to try, .demo/g2p.

    \b
    Example:
      freeexport serve bundle --port 8000
      curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "g2p: hello world"}'
    """
    from freeexport.serving.server import run_server
    from freeexport.serving.service import ServerOptions

    session = {name: options.pop(name) for name in SESSION}
    if session["prefix_cache_mb"] is None:
        session["prefix_cache_mb"] = PREFIX_CACHE_MB if session["device"] == "cpu" else 0
    key = os.environ.get(KEY) or None
    run_server(
        ServerOptions(
            tuple(map(find_bundle, bundles)),
            session=SessionOptions(**session),
            api_key=key,
            page=not no_page,
            **options,
        ),
        host,
        port,
    )
