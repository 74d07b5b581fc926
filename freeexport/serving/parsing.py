"""Parse request bodies. An error names the field at fault."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from freeexport.serving.errors import ApiError, unsupported
from runtime.errors import cut

# Fields that clients send by default, and their values without effect. Other values are rejected.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "include": ([],),
    "background": (False,),
    "service_tier": ("auto", "default"),
    "thinking": ({"type": "disabled"},),
}
# Fields that are accepted and ignored.
HARMLESS = ("metadata", "store", "truncation", "reasoning_effort")
# Advice for rejected fields of OpenAI. Default: remove the field.
ADVICE = {
    "frequency_penalty": "use chat completions",
    "presence_penalty": "use chat completions",
    "top_logprobs": "set logprobs to the number of alternatives",
    "best_of": "use n",
    "dimensions": "embeddings have the model's size; remove it",
    "previous_response_id": "responses are not stored; send the whole conversation as input",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "tools": "use chat completions or responses",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "use structured_outputs"
    ),
}
MOST_FIELDS = 100  # in a body
Body = TypeVar("Body", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Body]) -> Body:
    """Parse a request body.

    Raises:
        ApiError: If the body is not a JSON object, or a field is unsupported or has a wrong type.
    """
    try:
        try:
            # Values are not decoded yet, so even a million tools cost little.
            given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            raise ApiError(
                400,
                "the body is not a JSON object; send one with the request's fields",
                "invalid_json",
            ) from None
        if len(given) > MOST_FIELDS:
            raise ApiError(
                400,
                f"the body has {len(given)} fields; send at most {MOST_FIELDS}",
                "invalid_json",
            )
        values = {name: bytes(value) for name, value in given.items() if bytes(value) != b"null"}
        known = {field.name for field in msgspec.structs.fields(kind)}
        for name in [name for name in values if name not in known]:
            if not _neutral(name, values.pop(name)) and name not in HARMLESS:
                raise unsupported(cut(name), ADVICE.get(name, "remove it"))
        fields = b",".join(b'"%s":%s' % (name.encode(), value) for name, value in values.items())
        return msgspec.json.decode(b"{%s}" % fields, type=kind)
    except msgspec.ValidationError as error:
        # It ends with the path of the field, and may quote a value of the client before.
        message, at, path = str(error).rpartition(" - at ")
        if not at:
            message, path = path, ""
        param = re.sub(r"^(`key` in )?`\$\.?|`$", "", path) or None
        message = re.sub(
            r"""(["'`]).{80,}\1""", lambda quoted: cut(quoted[0]), message, flags=re.DOTALL
        )
        if message.startswith("Invalid enum value"):
            message += _choices(kind, param or "")
        raise ApiError(400, f"{param or 'the body'}: {message}", "invalid_type", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ApiError(400, f"the body is not JSON: {problem}", "invalid_json") from None


def _choices(kind: type[msgspec.Struct], param: str) -> str:
    """Return the permitted values of a field as the end of an error message, or ""."""
    types: list[Any] = [msgspec.inspect.type_info(kind)]
    for name in re.findall(r"\w+", param):
        types = [
            inner
            for outer in _unions(types)
            for inner in (
                [field.type for field in outer.fields if field.encode_name == name]
                if isinstance(outer, msgspec.inspect.StructType)
                else [outer.item_type]
                if isinstance(outer, msgspec.inspect.ListType)
                else []
            )
        ]
    values = [
        repr(v)
        for each in _unions(types)
        if isinstance(each, msgspec.inspect.LiteralType)
        for v in each.values
    ]
    return f"; choose {', '.join(values)}" if values else ""


def _unions(types: list[Any]) -> list[Any]:
    """Expand unions and remove annotations."""
    listed = list[Any]()
    for each in types:
        while isinstance(each, msgspec.inspect.Metadata):
            each = each.type
        listed += (
            _unions(list(each.types)) if isinstance(each, msgspec.inspect.UnionType) else [each]
        )
    return listed


def _neutral(name: str, value: bytes) -> bool:
    if name not in NEUTRAL or len(value) > 100:
        return False
    try:
        return msgspec.json.decode(value) in NEUTRAL[name]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
