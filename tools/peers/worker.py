"""Runs a decoder in its own process and sends it requests (tools/peers/decoders.py)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import FreeExportError


class PeerError(FreeExportError):
    """Raised if a peer cannot be installed, converted, loaded or run. Shown in its table row."""


class Worker:
    """A decoder in its own process. Thread pools of two libraries slow each other down within one.

    Args:
        command: Command of the process.
        variables: Added to its environment.

    Raises:
        PeerError: If it cannot be started.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        # Keeps stderr, to report why the process died. Unnamed, so that no file remains.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {**os.environ, **variables}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=self._log,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{command[0]} cannot be started ({error.strerror})") from None

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """Send a request and return the answer. After a failure the process cannot be used any
        more.

        Args:
            request: The request.
            limit: Time limit in seconds.

        Raises:
            PeerError: If the request fails, or takes too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # the process has ended
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            self.close()
            raise PeerError(f"{request['op']} took more than {limit:.0f} s and was stopped")
        if not line:
            raise PeerError(self._death())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"it answered {line.strip()[:80]!r}, which is not JSON") from None
        if "error" in answer:
            raise PeerError(" ".join(str(answer["error"]).split())[:300])
        return answer

    def close(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _death(self) -> str:
        code = self._process.wait()
        if self._log.closed:
            return "its process was stopped"
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()][-3:]
        reason = f": {' / '.join(lines)[-300:]}" if lines else ""
        killed = " (killed: out of memory?)" if code == -9 else ""
        return f"its process ended with code {code}{killed}{reason}"
