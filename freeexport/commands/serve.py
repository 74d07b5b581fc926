"""`freeexport serve`: bundles behind OpenAI's interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import DEVICE, THREADS, SectionedCommand, section
from runtime.options import Mode, SessionOptions

KEY = "FREEEXPORT_API_KEY"
# Chats send all earlier turns again. For SmolLM2-135M 5,500 tokens; its four slots take 380 MB.
PREFIX_CACHE_MB = 256
# Options of a session; the others are the server's.
SESSION = ("threads", "slots", "queue", "capacity", "device", "threshold", "prefix_cache_mb")


@click.command(cls=SectionedCommand)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@section("What is served")
@click.option("--name", "names", multiple=True, help="Name of a model, in the order of BUNDLES. May be repeated.  "
              "[default: the directory's]")  # fmt: skip
@click.option("--mode", type=click.Choice(get_args(Mode)),
              help="Mode of requests that name none.  [default: free where a threshold is given or calibrated, else "
              "lossless]")  # fmt: skip
@click.option(
    "--threshold",
    type=float,
    help="A token exits above this confidence, 0 to 1.  [default: the bundle's]",
)
@section("Clients")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 is a free one.")
@click.option(
    "--origin",
    "origins",
    multiple=True,
    help="Origin of pages that may ask, * is any. May be repeated.",
)
@click.option("--deadline", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="End a request that takes longer.")  # fmt: skip
@click.option("--max-body", type=click.IntRange(1), metavar="BYTES",
              help="Refuse larger requests.  [default: 4 MiB, with a sound 64 MiB]")  # fmt: skip
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log, too.")
@section("Machine")
@click.option("--slots", type=int, default=4, help="Requests of a bundle that are decoded at once.")
@click.option("--queue", type=int, default=256, help="Requests that may wait; more get 429.")
@click.option("--threads", type=int, help=THREADS)
@click.option("--capacity", type=int, help="Positions of the KV cache.  [default: the bundle's]")
@click.option("--prefix-cache-mb", type=int, metavar="MB",
              help="Keep keys and values of what was read, for requests that begin alike; 0 is off.  "
              f"[default: {PREFIX_CACHE_MB} on a CPU]")  # fmt: skip
@click.option("--device", default="cpu", help=DEVICE)
@click.option("--shutdown-timeout", type=click.FloatRange(0), default=30.0, metavar="SECONDS",
              help="After SIGTERM running requests have so long to end.")  # fmt: skip
def command(bundles: tuple[Path, ...], host: str, port: int, **options: Any) -> None:
    """Serve BUNDLES to clients of OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/models.

    Requests of one bundle share engine calls. A line of JSON for each goes to standard output. SIGTERM ends the server
    after the running requests. Prometheus reads /metrics. Where the variable FREEEXPORT_API_KEY is set, clients must
    send its value as their API key. `freeexport demo` makes a bundle to try, .demo/g2p.

    \b
    Example:
      freeexport serve bundle --port 8000
      curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "g2p: hello world"}'
    """
    from freeexport.serving.server import run
    from freeexport.serving.service import ServerOptions

    session = {name: options.pop(name) for name in SESSION}
    if session["prefix_cache_mb"] is None:
        session["prefix_cache_mb"] = PREFIX_CACHE_MB if session["device"] == "cpu" else 0
    key = os.environ.get(KEY) or None
    run(
        ServerOptions(bundles, session=SessionOptions(**session), api_key=key, **options),
        host,
        port,
    )
