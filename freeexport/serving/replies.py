"""Responses in OpenAI's format: chats, completions, their chunks and usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from freeexport.serving.errors import ApiError
from freeexport.serving.protocol import ChatRequest, CompletionRequest
from freeexport.serving.tools import CallReader, form_of, read_calls
from runtime import GenerationResult, Session, Stats, Token
from runtime.result import PromptLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "deadline": "length"}


class Reply:
    """Formats the response to one request.

    Attributes:
        id: ID of the response and its chunks.
        prompts: Number of tokens of each prompt.
        end: Last line of a stream.
    """

    end = b"data: [DONE]\n\n"

    def __init__(
        self, session: Session, model: str, request: ChatRequest | CompletionRequest
    ) -> None:
        self._chat = isinstance(request, ChatRequest)
        self.id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        self._tokenizer = session.tokenizer
        self._request = request
        self._model = model
        self._created = int(time.time())
        self._ends = frozenset(session.manifest.eos_token_ids)
        self._form = form_of(session.tokenizer) if request.offered else None
        # For each choice of a stream: its parser, and how many unsent tokens the parser has read.
        self._readers: dict[int, CallReader] = {}
        self._read: dict[int, int] = {}
        self.prompts: Sequence[int] = ()
        self._written: dict[int, int] = {}  # tokens of each choice in chunks
        self._places: dict[int, TextPlaces] = {}  # of the tokens of each choice

    def encode(self, data: Any) -> bytes:
        """Serialize a chunk as a server-sent event."""
        return b"data: " + msgspec.json.encode(data) + b"\n\n"

    def failed(self, error: ApiError) -> bytes:
        """Serialize an error as a server-sent event."""
        return self.encode(error.body)

    def whole(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        """Return the body of a complete response.

        Args:
            results: Results of all choices, ordered by prompt.
            prompts: Number of tokens of each prompt.
        """
        choices = list[dict[str, Any]]()
        for index, result in enumerate(results):
            nothing = [None] * len(result.token_ids)
            fields = (
                result.token_ids,
                result.exited,
                result.logprobs or nothing,
                result.top_logprobs or nothing,
                result.sources,
            )
            tokens = [
                Token(
                    token,
                    text="",
                    exited=exited,
                    confidence=None,
                    logprob=prob,
                    top_logprobs=best,
                    source=source,
                )
                for token, exited, prob, best, source in zip(*fields, strict=True)
            ]
            message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
            reason = REASONS[result.finish_reason]
            if self._form is not None:
                text, calls = read_calls(result.text, self._form)
                if calls:
                    message |= {"content": text or None, "tool_calls": calls}
                    reason = "tool_calls" if reason == "stop" else reason
            content = (
                {"message": message} if self._chat else {"text": self._echo(index) + result.text}
            )
            choice = self._choice(index, content, tokens, reason, result.prompt_logprobs)
            choices.append(with_end(choice, result))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage(results, prompts)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before the first token of a choice.

        It has the role in a chat, and the prompt in a completion with `echo`. None in other
        completions.
        """
        if self._chat:
            return self._chunk(index, {"role": "assistant", "content": ""}, (), None)
        text = self._echo(index)
        return self._chunk(index, text, (), None) if text else None

    def _echo(self, index: int) -> str:
        """Return the text of a choice's prompt if the request has `echo`, else ""."""
        request = self._request
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ""
        return self._prompt(index)

    def _prompt(self, index: int) -> str:
        """Return the text of the prompt of a completion's choice."""
        prompt = self._request.prompts[index // self._request.n]
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt)

    def chunk(
        self, index: int, tokens: Sequence[Token], result: GenerationResult | None = None
    ) -> dict[str, Any] | None:
        """Return a chunk of the tokens since the last chunk.

        Returns None while it is unknown if they are text or part of a call. Pass them again
        together with the next tokens.

        Args:
            index: Index of the choice.
            tokens: All tokens since the last chunk.
            result: Result of the choice, for its last chunk.
        """
        text = "".join(token.text for token in tokens)
        reason = None if result is None else REASONS[result.finish_reason]
        calls = list[dict[str, Any]]()
        if self._form is not None:
            reader = self._readers.setdefault(index, CallReader(self._form))
            text, calls = reader.read(
                "".join(token.text for token in tokens[self._read.pop(index, 0) :]),
                result is not None,
            )
            reason = "tool_calls" if reader.count and reason == "stop" else reason
            if not (text or calls or result):
                self._read[index] = len(tokens)
                return None
        delta = (
            ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})
            if self._chat
            else text
        )
        return self._chunk(index, delta, tokens, reason=reason, result=result)

    def usage(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        """Return the chunk with the usage of all choices, which is the last one."""
        return {
            **self._head(self._chunks),
            "choices": [],
            "usage": self._usage(results, prompts),
        }

    def _usage(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        """Return token counts, with accepted and compared tokens by position if requested."""
        counts = usage(results, prompts)
        if self._request.free.sources:
            drafts = Stats.joined([result.stats for result in results]).drafts
            counts["free"]["drafts"] = {name: each.by_position for name, each in drafts.items()}
        return counts

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self,
        index: int,
        delta: Any,
        tokens: Sequence[Token],
        reason: str | None,
        result: GenerationResult | None = None,
    ) -> dict[str, Any]:
        choice = self._choice(
            index, {"delta" if self._chat else "text": delta}, tokens or None, reason
        )
        choice = with_end(choice, result)
        chunk = {**self._head(self._chunks), "choices": [choice]}
        if not self._request.include_usage:
            return chunk
        self._written[index] = self._written.get(index, 0) + len(tokens)
        options = self._request.stream_options
        so_far = None
        if options is not None and options.continuous_usage_stats:
            read = self.prompts[index // self._request.n]
            written = self._written[index]
            so_far = {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
            }
        return {**chunk, "usage": so_far}

    def _choice(
        self,
        index: int,
        content: Any,
        tokens: Sequence[Token] | None,
        reason: str | None,
        prompt: PromptLogprobs | None = None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._request.alternatives is not None and tokens is not None:
            logprobs = self._logprobs(index, tokens, prompt)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        free = dict[str, list[Any]]()
        if self._request.free.exits:
            free["exited"] = [token.exited for token in tokens or ()]
        if self._request.free.sources:
            free["sources"] = [token.source for token in tokens or ()]
        return choice | ({"free": free} if free else {})

    def _logprobs(
        self, index: int, tokens: Sequence[Token], prompt: PromptLogprobs | None
    ) -> dict[str, Any]:
        """Return the log-probabilities of tokens, except end-of-sequence tokens.

        After a prompt, those of its end are included: clients such as lm-evaluation-harness count
        on one entry for every generated token.
        """
        printable = [token for token in tokens if token.id not in self._ends]
        if self._chat:
            content = [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(*best) for best in token.top_logprobs or ()],
                }
                for token in printable
            ]
            return {"content": content, "refusal": None}
        if index not in self._places:
            self._places[index] = TextPlaces(self._tokenizer, len(self._prompt(index)))
        places = self._places[index]
        if prompt is None:
            return self._listed(printable, [places.of(token.id) for token in printable])
        before = TextPlaces(self._tokenizer, 0)
        # Its tokens may have another text than a prompt that the tokenizer normalizes.
        offsets = [min(before.of(token), places.start) for token in prompt.token_ids]
        fields = (prompt.token_ids, prompt.logprobs, prompt.top_logprobs)
        read = [
            Token(
                token,
                text="",
                exited=False,
                confidence=None,
                logprob=logprob,
                top_logprobs=best,
            )
            for token, logprob, best in zip(*fields, strict=True)
        ]
        listed = self._listed(
            [*read, *tokens], [*offsets, *(places.of(token.id) for token in tokens)]
        )
        if listed["top_logprobs"] is not None:
            listed["top_logprobs"][0] = None
        return listed

    def _listed(self, tokens: Sequence[Token], offsets: Sequence[int]) -> dict[str, Any]:
        """Return log-probabilities in the format of completions."""
        return {
            "tokens": [self._spelled(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_text(token) for token in tokens]
            if self._request.alternatives
            else None,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spelled(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _by_text(self, token: Token) -> dict[str, float | None]:
        """Return the log-probabilities of a token's alternatives, best first, and of the token.

        Tokens may have the same text, such as parts of a character. The given token then takes
        precedence, then the most likely one.
        """
        logprobs: dict[str, float | None] = {}
        for alternative, logprob in token.top_logprobs or ():
            logprobs.setdefault(self._spelled(alternative), logprob)
        logprobs[self._spelled(token.id)] = token.logprob
        return logprobs

    def _spelled(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        return self._tokenizer.decode([token]) or self._tokenizer.token(token) or str(token)


class TextPlaces:
    """Where the tokens of a text begin, in characters.

    Attributes:
        start: Place of the first token. Without a tokenizer, that of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, start: int) -> None:
        self.start = start
        self._detokenizer = Detokenizer(tokenizer)
        self._next = start

    def of(self, token: int) -> int:
        """Return the place of the next token. All parts of a character have its place."""
        place = self._next
        self._next += len(self._detokenizer.push(token))
        return place


class EventReply(Reply):
    """Formats one answer whole, or as a series of named events.

    Args:
        session: Session that generates the answer.
        model: Name of the model.
        chat: The equivalent chat request.
        original: The request as it was sent.
    """

    end = b""
    prefix: str
    """First part of the ID."""

    def __init__(
        self, session: Session, model: str, chat: ChatRequest | CompletionRequest, original: Any
    ) -> None:
        super().__init__(session, model, chat)
        self.id = f"{self.prefix}_{secrets.token_hex(12)}"
        self._original = original
        self._reader = None if self._form is None else CallReader(self._form)
        self._parts = list[dict[str, Any]]()  # of the answer so far, of which the last is open

    def encode(self, data: Any) -> bytes:
        """Serialize events."""
        return b"".join(
            b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))
            for event in data
        )


def with_end(answer: dict[str, Any], result: GenerationResult | None) -> dict[str, Any]:
    """Add `free.finish_reason` if a deadline ended the answer. OpenAI has no such finish reason."""
    if result is None or result.finish_reason != "deadline":
        return answer
    return answer | {"free": answer.get("free", {}) | {"finish_reason": "deadline"}}


def usage(results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
    """Return the token counts of all choices.

    Each prompt counts once for all its choices, with the cached tokens of the first. Accepted and
    rejected predictions are those of modes "lossless" and "rollback". In "free" every exit is
    final.

    Args:
        results: Results of all choices, ordered by prompt.
        prompts: Number of tokens of each prompt.
    """
    stats = [result.stats for result in results]
    read = sum(prompts)
    written = sum(each.tokens for each in stats)
    drafting = [each for each in stats if each.mode in ("lossless", "rollback")]
    cached = sum(each.cached_tokens for each in stats[:: max(1, len(stats) // len(prompts))])
    candidates = sum(each.candidates for each in stats)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(each.accepted for each in drafting),
            "rejected_prediction_tokens": sum(each.rejected for each in drafting),
        },
        "prompt_tokens_details": {"cached_tokens": cached},
        "free": {
            "mode": stats[0].mode,
            "exit_rate": round(sum(each.exits for each in stats) / max(1, candidates), 4),
            "sync_passes": sum(each.sync_passes for each in stats),
        },
    }
