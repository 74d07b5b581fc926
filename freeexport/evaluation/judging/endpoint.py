"""A chat model behind an OpenAI-compatible endpoint, asked until it answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from runtime.errors import FreeExportError, OptionError

# Seconds: of one answer, and the longest pause between two attempts.
TIMEOUT, LONGEST_PAUSE = 120.0, 60.0
ATTEMPTS = 6
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(FreeExportError):
    """The endpoint does not answer."""


class Endpoint:
    """`url`: up to and without /chat/completions. Answers are greedy. Threads may share it; to be closed."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise OptionError(f"--endpoint {url!r} is no address; give one such as https://host/v1")
        self._url, self._model, self._sleep = url.rstrip("/") + "/chat/completions", model, sleep
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(timeout=timeout, headers=headers)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, prompt: str) -> str:
        """The answer's text. Waits and asks again where the endpoint fails, limits rates or takes too long; raises
        JudgeError where that does not help, and at once where it refuses."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(self._pause(attempt, reason))
            reason, text = self._once(prompt)
            if text is not None:
                return text
        raise JudgeError(
            f"{self._url} did not answer in {ATTEMPTS} attempts ({reason.split(';')[0]}); run the same command later: "
            "nothing is judged twice"
        )

    def _once(self, prompt: str) -> tuple[str, str | None]:
        import httpx

        request = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 256,
        }
        try:
            answer = self._client.post(self._url, json=request)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}", None
        if answer.status_code in _TRANSIENT:
            return f"status {answer.status_code};{answer.headers.get('retry-after', '')}", None
        if answer.status_code != 200:
            text = " ".join(answer.text.split())[:120]
            raise JudgeError(
                f"{self._url} refused with status {answer.status_code} ({text}); check --endpoint, --model and the key"
            )
        try:
            found: Any = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return "an answer that is no chat completion", None
        return ("", found) if isinstance(found, str) else ("an answer without text", None)

    @staticmethod
    def _pause(attempt: int, reason: str) -> float:
        """As the endpoint wishes, else longer each time, and not in step with others."""
        wished = reason.partition(";")[2]
        try:
            seconds = float(wished)
        except ValueError:
            seconds = 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
        return min(LONGEST_PAUSE, max(0.0, seconds))
