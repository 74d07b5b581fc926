"""Served models, their readiness, and one JSON log line per request."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from freeexport.serving.answers import AnswerReader
from freeexport.serving.audio_process import AudioReader
from freeexport.serving.errors import ApiError, draining
from freeexport.serving.grammar_trial import GrammarTrial
from runtime import GenerationResult, OptionError, Session, SessionOptions
from runtime.bundle.hub import bundle_name
from runtime.errors import shown
from runtime.options.generation_options import Mode

State = Literal["loading", "ready", "draining"]


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        bundles: Paths of the bundles to serve.
        names: Model names of the first bundles. Default: the names of their directories.
        session: Options of every session.
        mode: Mode for requests that set none. Default: the session's default.
        deadline: Time limit for a request, in seconds. Default: no limit.
        api_key: Key that requests need. Default: no authentication.
        max_body: Maximum size of a request body in bytes. Default: 4 MiB, or 64 MiB with audio.
        shutdown_timeout: Grace period for running requests at shutdown, in seconds.
        origins: Allowed CORS origins; "*" allows any.
        log_prompts: Log the prompts of requests.
        page: Serve the chat page at `/`.

    Raises:
        OptionError: If no bundle is given, or names or the API key are invalid.
    """

    bundles: Sequence[Path]
    names: Sequence[str] = ()
    session: SessionOptions = field(default_factory=SessionOptions)
    mode: Mode | None = None
    deadline: float | None = None
    api_key: str | None = None
    max_body: int | None = None
    shutdown_timeout: float = 30.0
    origins: Sequence[str] = ()
    log_prompts: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        if not self.bundles:
            raise OptionError(
                "no bundle is given; run freeexport serve BUNDLE "
                "(freeexport demo creates one to try)"
            )
        if len(self.names) > len(self.bundles):
            raise OptionError(
                f"{len(self.names)} names are given for {len(self.bundles)} bundles; "
                "give one for each"
            )
        given = [*self.names, *(bundle_name(path) for path in self.bundles[len(self.names) :])]
        object.__setattr__(self, "names", given)
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise OptionError(f"two bundles are named {twice[0]!r}; give each a different --name")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise OptionError("the API key is empty or not ASCII; set a valid key or unset it")


class RequestLog:
    """Log line of one request. Shutdown waits until `end` is called.

    Attributes:
        line: Fields of the log line.
        results: Results of the choices so far.
    """

    def __init__(self, service: Service, path: str) -> None:
        self.line: dict[str, Any] = {"time": round(time.time(), 3), "path": path}
        self.results: list[GenerationResult] = []
        self._service = service
        self._began = time.monotonic()
        service.running.add(self)
        service.idle.clear()

    def end(self, status: int, error: BaseException | None = None) -> None:
        """Write the line. Status 499 means that the client disconnected."""
        stats = [result.stats for result in self.results]
        if stats:
            candidates = sum(each.candidates for each in stats)
            self.line |= {
                "completion_tokens": sum(each.tokens for each in stats),
                "cached_tokens": sum(each.cached_tokens for each in stats),
                "exit_rate": round(sum(each.exits for each in stats) / max(1, candidates), 4),
                "finish_reasons": [result.finish_reason for result in self.results],
                "queue_seconds": round(max(each.queue_seconds for each in stats), 4),
                "first_token_seconds": round(max(each.first_token_seconds for each in stats), 4),
            }
        self.line |= {"status": status, "seconds": round(time.monotonic() - self._began, 4)}
        if error is not None:
            self.line["error"] = str(error)[:300]
        service = self._service
        service.running.discard(self)
        if not service.running:
            service.idle.set()
        service.responses[self.line["path"], status] += 1
        # ASCII only: U+2028, U+0085 and control characters of a prompt could end the line for some
        # readers, or worse.
        service.log(json.dumps(self.line))


class Service:
    """Sessions of one process, which share its cores. Call `open` once, before the first request.

    Args:
        options: Options of the server.
        log: Writes one log line.
    """

    def __init__(self, options: ServerOptions, log: Callable[[str], None]) -> None:
        self.options = options
        self.log = log
        self.sessions: dict[str, Session] = {}
        self.trials: dict[str, GrammarTrial] = {}
        self.state: State = "loading"
        self.created = int(time.time())
        self.responses: Counter[tuple[str, int]] = Counter()
        self.running: set[RequestLog] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.answers = AnswerReader(self.idle)
        self.audio = AudioReader()
        self._open = ExitStack()

    def open(self) -> None:
        """Load every bundle. If one fails, all are closed.

        Raises:
            FreeExportError: If a bundle cannot be opened. See `Session`.
        """
        with ExitStack() as stack:
            named = zip(self.options.names, self.options.bundles, strict=True)
            opened = {
                name: stack.enter_context(Session(path, self.options.session))
                for name, path in named
            }
            self._open = stack.pop_all()
        for session in opened.values():
            # The first constraint loads the vocabulary, which holds the GIL.
            with suppress(OptionError):
                session.prepare(choice=["a"])
        if any(session.manifest.speech for session in opened.values()):
            self.audio.prepare()
        self.trials = {name: GrammarTrial(session.bundle.path) for name, session in opened.items()}
        self.sessions = opened
        if self.state == "loading":
            self.state = "ready"

    def close(self) -> None:
        """Close the sessions. Requests that still run end with an error."""
        self.audio.close()
        self._open.close()

    async def drain(self) -> None:
        """Reject new requests, wait up to `shutdown_timeout` for running ones, then end them."""
        self.state = "draining"
        await self.answers.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), self.options.shutdown_timeout)
        for trial in self.trials.values():
            await trial.close()
        await asyncio.to_thread(self.close)

    def ready(self) -> dict[str, Session]:
        """Return the sessions by model name.

        Raises:
            ApiError: If the models are being loaded or the server shuts down.
        """
        if self.state == "loading":
            raise ApiError(503, "the model is loading; retry later", "loading", retry_after=1)
        if self.state == "draining":
            raise draining()
        return self.sessions

    def session(self, name: str | None) -> tuple[str, Session]:
        """Return the name and session of a model.

        Args:
            name: Model name in the request. Default: the only model.

        Raises:
            ApiError: If the name is unknown or missing, or the server is not ready.
        """
        self.ready()
        choices = " or ".join(map(repr, self.sessions))
        if name is None and len(self.sessions) > 1:
            raise ApiError(400, f"model is missing; choose {choices}", "missing_model", "model")
        name = next(iter(self.sessions)) if name is None else name
        if name not in self.sessions:
            raise ApiError(
                404,
                f"model {shown(name)} not found; choose {choices}",
                "model_not_found",
                "model",
            )
        return name, self.sessions[name]
