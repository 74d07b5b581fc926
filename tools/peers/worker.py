"""A decoder in a process of its own, which answers the requests of tools/peers/wire.py."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tools.peers.environment import PeerError

_LAST_LINES = 3


class Worker:
    """The process of `command`, with `variables` in its environment. Each decoder has one of its own, because thread
    pools of two libraries slow each other down within one process. Raises PeerError where it fails or takes too long.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        # Its stderr, for the reason where it dies. Unnamed: nothing is left behind.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **variables},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{command[0]} cannot be started ({error.strerror})") from None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The answer to one request, within `limit` seconds; after a failure the process is of no more use."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise PeerError(self._death()) from None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise PeerError(f"{request['op']} took more than {limit:.0f} s, and was ended") from None
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
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _death(self) -> str:
        code = self._process.wait()
        if self._log.closed:
            return "its process was ended"
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()][-_LAST_LINES:]
        reason = f": {' / '.join(lines)[-300:]}" if lines else ""
        killed = " (killed: out of memory?)" if code == -9 else ""
        return f"its process ended with code {code}{killed}{reason}"
