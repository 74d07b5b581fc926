"""OpenAI's /v1/embeddings: means of an encoder's states, scaled to length 1."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from freeexport.serving.errors import ApiError, invalid
from runtime import QueueFullError, Session

MOST_INPUTS = 2048  # of a request, as in OpenAI's API


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    input: str | Annotated[list[int | str | list[int]], msgspec.Meta(max_length=MOST_INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input, list) and len({type(part) for part in self.input}) != 1:
            wrong = "mixes text and token ids" if self.input else "is an empty list"
            raise invalid("input", f"input {wrong}; send text, token ids, or a list of either")

    @property
    def prompts(self) -> list[Any]:
        several = isinstance(self.input, list) and not isinstance(self.input[0], int)
        return list(self.input) if several else [self.input]

    def answer(self, model: str, embeddings: Sequence[np.ndarray], tokens: int) -> dict[str, Any]:
        """Return the body of the response.

        Args:
            model: Name of the model.
            embeddings: The embedding of each prompt, float32 [d].
            tokens: Number of tokens of all prompts.
        """
        data = []
        for index, embedding in enumerate(embeddings):
            given: Any = embedding.tolist()
            if self.encoding_format == "base64":
                given = base64.b64encode(embedding.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": given})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}


class Embedder:
    """Embeds the prompts of all requests of a server, one at a time, in the order of arrival."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running = 0

    async def embed(
        self, session: Session, prompts: Sequence[Any], deadline: float | None
    ) -> tuple[list[np.ndarray], int]:
        """Return the embedding of each prompt, float32 [d], and the number of their tokens.

        Args:
            session: Session of the model.
            prompts: Texts or token ids.
            deadline: Time limit in seconds. Default: no limit.

        Raises:
            ApiError: If the deadline passes.
            OptionError: If the bundle has no encoder for text.
            PromptError: If a prompt is not valid or does not fit.
            QueueFullError: If too many requests wait.
        """
        most = session.options.slots + session.options.queue
        if self._running >= most:
            raise QueueFullError(f"{most} requests for embeddings wait; retry later")
        began = time.monotonic()
        self._running += 1
        try:
            embeddings = []
            tokens = 0
            for prompt in prompts:
                async with self._turn:
                    if deadline is not None and time.monotonic() - began > deadline:
                        raise ApiError(
                            504,
                            f"the server's limit of {deadline:g} s expired before all inputs were "
                            "embedded; send fewer",
                            "deadline_exceeded",
                            again=False,
                        )
                    ids = await asyncio.to_thread(session.encode, prompt)
                    made = await asyncio.to_thread(session.embed, ids, normalize=True)
                tokens += len(ids)
                embeddings.append(made[0])
            return embeddings, tokens
        finally:
            self._running -= 1
