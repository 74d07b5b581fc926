"""OpenAPI document of the server, generated from its request types."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from freeexport import __version__
from freeexport.serving.embeddings import EmbeddingRequest
from freeexport.serving.messages import CountRequest, MessagesRequest
from freeexport.serving.parsing import HARMLESS, NEUTRAL
from freeexport.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from freeexport.serving.responses import ResponseRequest
from freeexport.serving.transcriptions import FORMATS

REFERENCE = "#/components/schemas/"
# By path: summary, type of the request body, required fields of the response.
POST: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "/v1/chat/completions": (
        "Create a chat completion, optionally streamed as server-sent events",
        ChatRequest,
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/completions": (
        "Create a completion of text or token ids, optionally streamed as server-sent events",
        CompletionRequest,
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/responses": (
        "Create a response, optionally streamed as events. Responses are not stored",
        ResponseRequest,
        ("id", "object", "created_at", "model", "status", "output", "usage"),
    ),
    "/v1/messages": (
        "Create a message with Anthropic's API, optionally streamed as events",
        MessagesRequest,
        ("id", "type", "role", "model", "content", "stop_reason", "usage"),
    ),
    "/v1/messages/count_tokens": (
        "Count the tokens of a message's prompt with Anthropic's API",
        CountRequest,
        ("input_tokens",),
    ),
    "/v1/embeddings": (
        "Embed texts: the means of the encoder's states, scaled to length 1",
        EmbeddingRequest,
        ("object", "data", "model", "usage"),
    ),
    "/tokenize": (
        "Tokenize text or a conversation",
        TokenizeRequest,
        ("count", "max_model_len", "tokens"),
    ),
    "/detokenize": ("Detokenize token ids", DetokenizeRequest, ("prompt",)),
}
# By path: summary. All take a form of FIELDS.
FORMS = {
    "/v1/audio/transcriptions": "Transcribe speech in an audio file",
    "/v1/audio/translations": "Translate speech in an audio file into English text",
}
FIELDS = (
    *("file", "model", "language", "prompt", "response_format", "temperature", "stream"),
    "timestamp_granularities[]",
)
ERROR = {"$ref": REFERENCE + "Error"}
# Of every event of a transcript.
SPOKEN = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
# By path: summary, required fields of the response, other statuses.
GET: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "/v1/models": ("List the served models", ("object", "data"), ()),
    "/v1/models/{model}": (
        "Retrieve a model",
        ("id", "object", "created", "owned_by", "max_model_len"),
        (404, 503),
    ),
    "/health": ("Readiness check of the server", ("status", "ready"), (503,)),
    "/v2/health/live": ("Liveness check", ("live",), ()),
    "/v2/health/ready": ("Readiness check of the server", ("status", "ready"), (503,)),
    "/v2/models/{model}/ready": ("Readiness check of a model", ("name", "ready"), (404, 503)),
    "/metrics": ("Metrics in the Prometheus text format", (), ()),
    "/openapi.json": ("OpenAPI document", ("openapi", "info", "paths"), ()),
}
STATUSES = {
    400: "Invalid request; the message names the field",
    401: "Missing or invalid API key",
    404: "Model not found",
    408: "The request's deadline expired before the first token, or the request body timed out",
    413: "Request body too large",
    429: "The request queue is full; retry after the seconds in Retry-After",
    503: "The model is loading, or the server is shutting down",
    504: "The server's time limit expired before the first token",
}


@cache
def document(guarded: bool = False, page: bool = True) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        guarded: Requests need an API key.
        page: The server has a page at `/`.
    """
    kinds = [kind for _, kind, _ in POST.values()]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REFERENCE + "{name}")
    for kind in kinds:
        schema = schemas[kind.__name__]
        neutral: dict[str, Any] = {
            name: {"enum": [*values, None]} for name, values in NEUTRAL.items()
        }
        neutral |= {name: {} for name in HARMLESS}
        schema |= {"properties": neutral | schema["properties"], "additionalProperties": False}
    failed: dict[str, Any] = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": _nullable(),
        "code": _nullable(),
    }
    schemas["Error"] = _object({"error": {**_object(failed), "required": ["message", "type"]}})
    paths: dict[str, Any] = {}
    for path, (purpose, kind, fields) in POST.items():
        answer: dict[str, Any] = {
            "application/json": {"schema": _object({field: {} for field in fields})}
        }
        if "stream" in {field.name for field in msgspec.structs.fields(kind)}:
            answer["text/event-stream"] = {"schema": _event(kind)}
        schema = {"$ref": REFERENCE + kind.__name__}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {
            "post": {**_operation(path, purpose, answer, tuple(STATUSES)), "requestBody": body}
        }
    for path, purpose in FORMS.items():
        form: dict[str, Any] = {name: {"type": "string"} for name in FIELDS}
        form["file"] = {"type": "string", "contentMediaType": "audio/wav"}
        form["response_format"] = {"enum": list(FORMATS)}
        fitting = {**_object(form), "required": ["file"]}
        spoken: dict[str, Any] = {"application/json": {"schema": _object({"text": {}})}}
        spoken["text/plain"] = {"schema": {"type": "string"}}
        spoken["text/event-stream"] = {"schema": _events({"anyOf": [SPOKEN, ERROR]})}
        operation = _operation(path, purpose, spoken, tuple(STATUSES))
        taken: dict[str, Any] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": fitting}},
        }
        paths[path] = {"post": {**operation, "requestBody": taken}}
    for path, (purpose, fields, statuses) in GET.items():
        shown: dict[str, Any] = {"schema": _object({field: {} for field in fields})}
        content = (
            {"application/json": shown}
            if fields
            else {"text/plain": {"schema": {"type": "string"}}}
        )
        operation = _operation(
            path, purpose, content, (*statuses, *([401] if path.startswith("/v1") else []))
        )
        if "{model}" in path:
            text = {"type": "string", "minLength": 1}
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": text}
            ]
        paths[path] = {"get": operation}
    if page:
        html = {"text/html": {"schema": {"type": "string"}}}
        paths["/"] = {"get": _operation("page", "Page to chat with a served model", html, ())}
    components: dict[str, Any] = {"schemas": schemas}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "freeexport", "version": __version__},
        "paths": paths,
    }
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return {**made, "components": components}


def _operation(
    path: str, purpose: str, content: dict[str, Any], statuses: tuple[int, ...]
) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    failed = {"application/json": {"schema": {"$ref": REFERENCE + "Error"}}}
    if "health" in path:  # these endpoints report an unready state in the same format
        failed = content
    responses = {"200": {"description": "The answer", "content": content}}
    responses |= {
        str(status): {"description": STATUSES[status], "content": failed} for status in statuses
    }
    return {"operationId": name, "summary": purpose, "responses": responses}


def _event(kind: Any) -> dict[str, Any]:
    """Return the schema of one event of a stream.

    Before OpenAPI 3.2, clients and OpenAI's own document read `schema` of a stream this way.
    """
    json: dict[str, Any] = {"contentMediaType": "application/json"}
    if kind in (ResponseRequest, MessagesRequest):  # errors have the format of other events
        fields = ("type", "sequence_number") if kind is ResponseRequest else ("type",)
        data = {"type": "string", **json, "contentSchema": _object({field: {} for field in fields})}
        return {**_object({"event": {"type": "string"}, "data": data}), "required": ["data"]}
    chunk = _object({field: {} for field in ("id", "object", "created", "model", "choices")})
    return _events({"anyOf": [chunk, ERROR]})


def _events(content: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an event that is JSON of this schema, or the last one."""
    json = {"contentMediaType": "application/json", "contentSchema": content}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, json]}
    return {**_object({"event": {"type": "string"}, "data": data}), "required": ["data"]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _nullable() -> dict[str, Any]:
    return {"type": ["string", "null"]}
