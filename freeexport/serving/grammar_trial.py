"""Tests the constraints of clients by compiling them in a separate process.

A short grammar can take minutes to compile, and the compiler cannot be interrupted, so the process
is killed instead. The session then compiles only constraints that passed.

This module is also the program of that process. It reads lines of JSON, `[kind, text]`, from
standard input. It writes one line when it is ready, then an error message or null for each input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from freeexport.serving.errors import ApiError
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError, one_line
from runtime.text.grammar import Grammars
from runtime.text.tokenizer import Tokenizer

COMPILE_SECONDS = 2  # limit for compiling a constraint, in processor time
LATEST_SECONDS = 10.0  # the same in wall-clock time, for busy machines
START_SECONDS = 60.0  # limit for starting the process
# Limit for waiting while constraints of other requests are compiled, in seconds.
WAIT_SECONDS = 20.0
# Number of cached outcomes.
MOST_KNOWN = 4096
PACKAGES = str(Path(__file__).resolve().parents[2])


class GrammarTrial:
    """Compiles constraints for a bundle, one at a time, and caches the outcomes.

    The process starts with the first constraint.
    """

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._turn = asyncio.Lock()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, kind: str, text: str) -> None:
        """Check that a constraint compiles.

        Raises:
            OptionError: If the constraint is invalid or takes too long.
            ApiError: If it cannot be checked now (status 503).
        """
        key = sha256(json.dumps([kind, text]).encode()).digest()
        if key not in self._known:
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._turn.acquire()
            except TimeoutError:
                raise _busy("busy with other requests") from None
            try:
                if key not in self._known:
                    self._known[key] = await self._try(kind, text)
            finally:
                self._turn.release()
        self._known.move_to_end(key)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        if (problem := self._known[key]) is not None:
            raise OptionError(problem)

    async def _try(self, kind: str, text: str) -> str | None:
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(LATEST_SECONDS):
                    process.stdin.write(json.dumps([kind, text]).encode() + b"\n")
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
        finally:
            if not answer.endswith(b"\n"):
                await self.close()
        if answer.endswith(b"\n"):
            problem: str | None = json.loads(answer)
            return problem
        return (
            f"{kind} cannot be used: it takes more than {COMPILE_SECONDS} s to compile; "
            "make it simpler"
        )

    async def _start(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(self._bundle)),
                stdin=pipe,
                stdout=pipe,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # only the server receives the signals of a terminal
            )
        except OSError as error:
            raise _busy(one_line(error)) from None
        assert process.stdout is not None
        ready = b""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(START_SECONDS):
                    ready = await process.stdout.readline()
        finally:
            if not ready:
                await self.close()
        if not ready:
            raise _busy("the compiler process did not start")
        return process

    async def close(self) -> None:
        """End the process. The next constraint starts a new one."""
        process = self._process
        self._process = None
        if process is None:
            return
        if process.stdout is not None and not process.stdout.at_eof():  # at EOF it has exited
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def _busy(problem: str) -> ApiError:
    message = f"cannot compile constraints now ({problem}); retry later"
    return ApiError(503, message, "constraints_busy", retry_after=1)


def main(bundle: str) -> None:
    """Check constraints for the server until it closes standard input."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opened = Bundle.open(bundle, "sizes")
    manifest = opened.manifest
    tokenizer = Tokenizer.load(opened.path, manifest.files)
    grammars = Grammars(tokenizer, manifest.vocab_size, manifest.eos_token_ids)
    with suppress(OptionError):  # loads the vocabulary, which is the slowest part
        grammars.open("choice", '["a"]', 1)
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        _limit_processor_time()
        kind, text = json.loads(line)
        problem = None
        try:
            grammars.open(kind, text, 1)
        except OptionError as error:
            problem = str(error)
        print(json.dumps(problem), file=output, flush=True)


def _limit_processor_time() -> None:
    """Limit the processor time of the next constraint.

    The system enforces the limit, even if the server has exited.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time()) + COMPILE_SECONDS + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


if __name__ == "__main__":
    main(sys.argv[1])
