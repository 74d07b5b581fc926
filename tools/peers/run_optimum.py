"""optimum's models for ONNX Runtime, exported from a Hugging Face directory in float32."""

from __future__ import annotations

from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM
from run_transformers import generator
from transformers import AutoConfig
from wire import Generate, serve, versions


def convert(source: str, out: str, options: dict[str, Any]) -> None:
    _class(source).from_pretrained(source, export=True).save_pretrained(out)


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    torch.set_num_threads(threads)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads, session.inter_op_num_threads = threads, 1
    model = _class(path).from_pretrained(path, session_options=session, provider="CPUExecutionProvider")
    return generator(model, {}), {"versions": versions("optimum-onnx", "onnxruntime", "transformers")}


def _class(path: str) -> Any:
    return ORTModelForSeq2SeqLM if AutoConfig.from_pretrained(path).is_encoder_decoder else ORTModelForCausalLM


if __name__ == "__main__":
    serve(load, convert)
