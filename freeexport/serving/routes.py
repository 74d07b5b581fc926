"""HTTP endpoints.

They are OpenAI's, Anthropic's /v1/messages, vLLM's /tokenize, KServe's health checks, metrics for
Prometheus, a page to chat, and an OpenAPI document of them all.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import threading
import time
from dataclasses import replace
from typing import Any, Literal

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from freeexport.serving import messages, openapi, protocol
from freeexport.serving.embeddings import Embedder, EmbeddingRequest
from freeexport.serving.errors import ApiError, api_error, invalid
from freeexport.serving.events import ClientGone, while_there
from freeexport.serving.generation import ChoiceStream, begin, encoded_prompts
from freeexport.serving.middleware import Unambiguous, UnreadBody
from freeexport.serving.page import page
from freeexport.serving.parsing import Body, parse
from freeexport.serving.prometheus import SessionCollector
from freeexport.serving.replies import Reply
from freeexport.serving.responses import ResponseReply, ResponseRequest
from freeexport.serving.service import RequestLog, Service
from freeexport.serving.transcriptions import (
    LARGEST_AUDIO,
    Transcription,
    TranscriptStream,
    checked,
    form_fields,
    late,
)
from runtime import FreeExportError, PromptError, Session
from runtime.errors import cut
from runtime.speech.audio import RATE, LateError
from runtime.text.prompt import check_text
from runtime.text.tokenizer import Tokenizer

GenerationBody = (
    protocol.ChatRequest | protocol.CompletionRequest | ResponseRequest | messages.MessagesRequest
)
# Time limit for receiving a body, in seconds.
BODY_SECONDS = 30.0
LARGEST_BODY = 4 << 20  # bytes


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def application(service: Service) -> Starlette:
    """Return the ASGI application of a service."""
    endpoints = Endpoints(service)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/responses", endpoints.responses, methods=["POST"]),
        Route(messages.PATH, endpoints.messages, methods=["POST"]),
        Route(f"{messages.PATH}/count_tokens", endpoints.count_tokens, methods=["POST"]),
        Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
        Route("/v1/audio/transcriptions", endpoints.transcriptions, methods=["POST"]),
        Route("/v1/audio/translations", endpoints.translations, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.model),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/health", endpoints.ready),
        Route("/v2/health/live", endpoints.live),
        Route("/v2/health/ready", endpoints.ready),
        Route("/v2/models/{model:path}/ready", endpoints.model_ready),
        Route("/metrics", endpoints.metrics),
        Route("/openapi.json", endpoints.openapi),
    ]
    if service.options.page:
        routes.append(Route("/", endpoints.page))
    origins = list(service.options.origins)
    allow = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
    )
    served = Starlette(
        routes=routes,
        middleware=[
            Middleware(UnreadBody),
            Middleware(Unambiguous),
            *([allow] if origins else []),
        ],
        exception_handlers=dict.fromkeys(
            (ApiError, FreeExportError, HTTPException, Exception), _refuse
        ),
    )
    # A redirection would go to the host that the client names.
    served.router.redirect_slashes = False
    return served


class Endpoints:
    """Handlers of a service, one method per route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()  # not the global one: a process may have more services
        self._registry.register(SessionCollector(service))
        self._embedder = Embedder()

    async def chat(self, request: Request) -> Any:
        return await self._generate(request, protocol.ChatRequest)

    async def completions(self, request: Request) -> Any:
        return await self._generate(request, protocol.CompletionRequest)

    async def responses(self, request: Request) -> Any:
        return await self._generate(request, ResponseRequest)

    async def messages(self, request: Request) -> Any:
        return await self._generate(request, messages.MessagesRequest)

    async def count_tokens(self, request: Request) -> Response:
        parsed = (await self._parsed(request, messages.CountRequest)).chat()
        _, session = self._service.session(parsed.model)
        (ids,) = await asyncio.to_thread(encoded_prompts, session, parsed)
        return json({"input_tokens": len(ids)})

    async def _generate(self, request: Request, kind: type[GenerationBody]) -> Any:
        record = RequestLog(self._service, request.scope["path"])
        options = self._service.options
        try:
            body = await self._parsed(request, kind)
            parsed = (
                body.chat()
                if isinstance(body, ResponseRequest | messages.MessagesRequest)
                else body
            )
            if options.log_prompts:
                record.line["prompt"] = parsed.prompts
            name, session = self._service.session(parsed.model)
            reply: Reply
            if isinstance(body, ResponseRequest):
                reply = ResponseReply(session, name, parsed, body)
            elif isinstance(body, messages.MessagesRequest):
                reply = messages.MessageReply(session, name, parsed, body)
            else:
                reply = Reply(session, name, parsed)
            record.line |= {"id": reply.id, "model": name, "stream": parsed.stream}
            generation = await begin(
                session,
                self._service.trials[name],
                parsed,
                mode=options.mode,
                deadline=options.deadline,
                answers=self._service.answers,
            )
            reply.prompts = generation.prompts
            record.line["prompt_tokens"] = sum(generation.prompts)
            if parsed.stream:
                return ChoiceStream(generation, reply, parsed, record)
            try:
                whole = await while_there(request.receive, generation.results())
            finally:
                record.results = await generation.end()
        except BaseException as error:
            return _failed(record, error)
        record.end(200)
        return json(reply.whole(whole, generation.prompts), headers={"x-request-id": reply.id})

    async def embeddings(self, request: Request) -> Response:
        record = RequestLog(self._service, request.scope["path"])
        try:
            parsed = await self._parsed(request, EmbeddingRequest)
            name, session = self._service.session(parsed.model)
            record.line["model"] = name
            work = self._embedder.embed(session, parsed.prompts, self._service.options.deadline)
            embeddings, tokens = await while_there(request.receive, work)
            record.line["prompt_tokens"] = tokens
        except BaseException as error:
            return _failed(record, error)
        record.end(200)
        return json(parsed.answer(name, embeddings, tokens))

    async def transcriptions(self, request: Request) -> Any:
        return await self._transcribe(request, "transcribe")

    async def translations(self, request: Request) -> Any:
        return await self._transcribe(request, "translate")

    async def _transcribe(self, request: Request, task: Literal["transcribe", "translate"]) -> Any:
        record = RequestLog(self._service, request.scope["path"])
        options = self._service.options
        try:
            self._authorize(request)
            if not any(session.manifest.speech for session in self._service.ready().values()):
                raise invalid(
                    "model", "no served model accepts speech; use a server with a speech model"
                )
            body = await read_body(
                request, LARGEST_AUDIO if options.max_body is None else options.max_body
            )
            until = math.inf if options.deadline is None else time.monotonic() + options.deadline
            fields = await asyncio.to_thread(
                form_fields, request.headers.get("content-type", ""), body
            )
            transcription = Transcription.of(fields, task, options.mode, options.deadline)
            name, session = self._service.session(transcription.model)
            if session.manifest.speech is None:
                raise invalid("model", f"model {name!r} accepts only text; use a speech model")
            record.line["model"] = name
            try:
                samples = await asyncio.to_thread(
                    self._service.audio.read, transcription.file, until
                )
            except LateError:
                raise late(options.deadline) from None
            left = None if options.deadline is None else max(until - time.monotonic(), 1e-3)
            chosen = replace(transcription.options, deadline=left)
            if transcription.stream:
                cancel = threading.Event()
                segments = session.transcribe(samples, chosen, cancel=cancel)
                return TranscriptStream(segments, cancel, options.deadline, record)
            result = await while_there(request.receive, session.agenerate(samples, chosen))
            record.results = [result]
            checked(result, options.deadline)
        except BaseException as error:
            return _failed(record, error)
        record.end(200)
        content = transcription.answer(result, len(samples) / RATE)
        return (
            Response(content, media_type="text/plain")
            if isinstance(content, str)
            else json(content)
        )

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return json(
            {"object": "list", "data": [self._model(name) for name in self._service.sessions]}
        )

    async def model(self, request: Request) -> Response:
        self._authorize(request)
        name, _ = self._service.session(request.path_params["model"])
        return json(self._model(name))

    async def tokenize(self, request: Request) -> Response:
        parsed = await self._parsed(request, protocol.TokenizeRequest)
        _, session = self._service.session(parsed.model)
        most = session.manifest.encoder_capacity or session.capacity
        if parsed.messages and parsed.prompt is None:
            ids = (
                await asyncio.to_thread(session.encode, protocol.plain(parsed.messages))
            ).tolist()
        elif parsed.prompt is not None and parsed.messages is None:
            if parsed.prompt:
                check_text(parsed.prompt, most)
            tokenizer = _tokenizer(session)
            ids = await asyncio.to_thread(
                tokenizer.encode, parsed.prompt, special=parsed.add_special_tokens
            )
        else:
            raise invalid("prompt", "send either prompt or messages")
        return json({"count": len(ids), "max_model_len": most, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        parsed = await self._parsed(request, protocol.DetokenizeRequest)
        _, session = self._service.session(parsed.model)
        most = max(session.manifest.encoder_capacity, session.capacity)
        vocabulary = session.manifest.vocab_size
        if len(parsed.tokens) > most:
            raise invalid("tokens", f"tokens has {len(parsed.tokens)} ids; send at most {most}")
        wrong = next((token for token in parsed.tokens if token >= vocabulary), None)
        if wrong is not None:
            raise invalid(
                "tokens", f"tokens has {wrong}; ids of this model are 0 to {vocabulary - 1}"
            )
        return json({"prompt": _tokenizer(session).decode(parsed.tokens)})

    async def live(self, request: Request) -> Response:
        return json({"live": True})

    async def ready(self, request: Request) -> Response:
        state = self._service.state
        return json({"status": state, "ready": state == "ready"}, 200 if state == "ready" else 503)

    async def model_ready(self, request: Request) -> Response:
        name, _ = self._service.session(request.path_params["model"])
        return json({"name": name, "ready": True})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        options = self._service.options
        return json(openapi.document(options.api_key is not None, options.page))

    async def page(self, request: Request) -> Response:
        return page()

    async def _parsed(self, request: Request, kind: type[Body]) -> Body:
        self._authorize(request)
        most = self._service.options.max_body
        return parse(await read_body(request, LARGEST_BODY if most is None else most), kind)

    def _authorize(self, request: Request) -> None:
        key = self._service.options.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(
                401,
                "missing or invalid API key; send the header Authorization: Bearer KEY",
                "invalid_api_key",
            )

    def _model(self, name: str) -> dict[str, Any]:
        session = self._service.sessions[name]
        manifest = session.manifest
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "freeexport",
            "max_model_len": manifest.encoder_capacity or session.capacity,
            "free": {
                "exit_layer": manifest.exit_layer,
                "layers": manifest.layers,
                "threshold": session.threshold,
                "mode": self._service.options.mode or session.default_mode.mode,
                "chat": session.tokenizer is not None
                and session.tokenizer.chat_template is not None,
            },
        }


def _failed(record: RequestLog, error: BaseException) -> Response:
    """End the record of a failed request. Return status 499 if the client has disconnected.

    Raises:
        ApiError: The error for the client, if it is still connected.
        Exception: The original error, if its status is 500.
    """
    if isinstance(error, (ClientGone, ClientDisconnect)):
        record.end(499)
        return Response(status_code=499)
    failed = api_error(error)
    record.end(failed.status, failed)
    if failed.status == 500:
        raise error
    raise failed from None


async def read_body(request: Request, most: int) -> bytes:
    """Read the body of a request.

    Args:
        request: The request.
        most: Maximum size in bytes.

    Raises:
        ApiError: If the body is too large or does not arrive in time.
    """
    declared = request.headers.get("content-length", "")
    too_large = ApiError(
        413, f"the body is larger than {most} bytes; send a smaller one", "body_too_large"
    )
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        late = f"the body was not received within {BODY_SECONDS:g} s; retry"
        raise ApiError(408, late, "body_timeout") from None
    return bytes(body)


def _tokenizer(session: Session) -> Tokenizer:
    if session.tokenizer is None:
        raise PromptError("the bundle has no tokenizer; use token ids")
    return session.tokenizer


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        path = cut(request.scope["path"])
        method = request.method
        known = {
            404: f"path {path} not found",
            405: f"method {cut(method)} is not allowed for this path",
        }
        failed = ApiError(error.status_code, known.get(error.status_code, error.detail))
        failed.headers = dict(error.headers or {})
    else:
        failed = api_error(error)
    body = failed.body
    if request.scope["path"].startswith(messages.PATH):
        body = messages.error_body(failed)
    return json(body, failed.status, failed.headers)
