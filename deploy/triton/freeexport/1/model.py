"""A bundle as a model of Triton's Python backend: a response for each token, requests side by side."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from runtime import OptionError, PromptError, QueueFullError, Session


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Called when the model is loaded. `bundle`, `threads`, `slots` and `mode` are parameters of config.pbtxt."""
        given = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in given.items()}
        self._mode = parameters["mode"]
        self._session = Session(
            parameters["bundle"], threads=int(parameters["threads"]), slots=int(parameters["slots"])
        )

    async def execute(self, requests: list[Any]) -> None:
        """On the event loop of the instance, which takes further requests meanwhile."""
        await asyncio.gather(*map(self._answer, requests))

    def finalize(self) -> None:
        self._session.close()

    async def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            options = {name: _value(request, name) for name in ("max_new_tokens", "threshold")}
            known = {name: value for name, value in options.items() if value is not None}
            prompt = _value(request, "prompt").decode()
            async with self._session.astream(prompt, mode=self._mode, **known) as stream:
                async for token in stream:
                    if sender.is_cancelled():
                        break
                    sender.send(_response(token.text, token.exited))
        except Exception as error:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _code(error))))
        finally:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _value(request: Any, name: str) -> Any:
    """The one element of an input; None where it is not given."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()[0]


def _response(text: str, exited: bool) -> Any:
    tensors = [
        pb_utils.Tensor("text", np.array([text.encode()], np.object_)),
        pb_utils.Tensor("exited", np.array([exited], np.bool_)),
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _code(error: Exception) -> int:
    if isinstance(error, QueueFullError):
        return pb_utils.TritonError.UNAVAILABLE
    if isinstance(error, PromptError | OptionError | UnicodeDecodeError):
        return pb_utils.TritonError.INVALID_ARG
    return pb_utils.TritonError.INTERNAL
