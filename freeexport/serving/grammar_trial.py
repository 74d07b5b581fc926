"""Compiles what clients constrain outputs with, first in a process of its own.

A grammar of a few letters can take minutes, and the library that compiles it cannot be interrupted: the process is
ended. A session then compiles what ended in time. As a module it is that process: lines of JSON `[kind, text]` on its
standard input, an error or null for each on its standard output, after one that says it is ready.
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

from freeexport.serving.protocol import ApiError
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError, one_line
from runtime.text.grammar import Grammars
from runtime.text.tokenizer import Tokenizer

# Seconds of processor time in which a constraint must be compiled, and of the clock, for a machine that is busy; and
# seconds in which the process must have started.
COMPILE_SECONDS, LATEST_SECONDS, START_SECONDS = 2, 10.0, 60.0
# Seconds that a request waits while those of others are compiled.
WAIT_SECONDS = 20.0
# Constraints whose outcome is remembered.
MOST_KNOWN = 4096
PACKAGES = str(Path(__file__).resolve().parents[2])


class GrammarTrial:
    """Compiles constraints for a bundle, one after the other, and remembers which it refused. Its process starts with
    the first one."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._turn = bundle, asyncio.Lock()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, kind: str, text: str) -> None:
        """Raise OptionError for a constraint that cannot be compiled in time, ApiError where that cannot be found out
        now."""
        key = sha256(json.dumps([kind, text]).encode()).digest()
        if key not in self._known:
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._turn.acquire()
            except TimeoutError:
                raise _busy("others are compiled") from None
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
        return f"{kind} cannot be used: it takes more than {COMPILE_SECONDS} s to compile; make it simpler"

    async def _start(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(self._bundle)),
                stdin=pipe,
                stdout=pipe,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # signals of a terminal are the server's
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
            raise _busy("the process that compiles them did not start")
        return process

    async def close(self) -> None:
        """End the process. The next constraint starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdout is not None and not process.stdout.at_eof():  # else it ended by itself
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def _busy(problem: str) -> ApiError:
    message = f"constraints cannot be compiled now ({problem}); ask again later"
    return ApiError(503, message, "constraints_busy", retry_after=1)


def main(bundle: str) -> None:
    """Answer the lines of the server until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opened = Bundle.open(bundle, "sizes")
    manifest = opened.manifest
    tokenizer = Tokenizer.load(opened.path, manifest.files)
    grammars = Grammars(tokenizer, manifest.vocab_size, manifest.eos_token_ids)
    with suppress(OptionError):  # the tokens are read once, which takes longest
        grammars.open("choice", '["a"]', 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        _limit_processor_time()
        kind, text = json.loads(line)
        problem = None
        try:
            grammars.open(kind, text, 1)
        except OptionError as error:
            problem = str(error)
        print(json.dumps(problem), file=answers, flush=True)


def _limit_processor_time() -> None:
    """Let the system end this process after so many more seconds, also where the server has ended before."""
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
