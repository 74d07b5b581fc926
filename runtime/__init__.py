"""Embed early-exit decoding: `Session` opens a bundle and generates text. Does not need torch.

from runtime import Session

with Session("bundle") as session:
    print(session.generate("The capital of France is", max_new_tokens=32).text)
"""

import os

# ONNX Runtime 1.29 and later sends telemetry on Linux unless this is set before it is loaded. The
# user can set it to 0 to keep telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from runtime.bundle.bundle import Bundle
from runtime.errors import (
    BatchError,
    BundleError,
    CalibrationError,
    CapacityError,
    DeviceError,
    EngineError,
    FreeExportError,
    HubError,
    OptionError,
    PromptError,
    PromptLengthError,
    QueueFullError,
)
from runtime.options.generation_options import GenerationOptions, SpeechOptions
from runtime.options.session_options import SessionOptions
from runtime.pretrained import FreeModelForCausalLM, FreeModelForSeq2SeqLM
from runtime.requests.metrics import Histogram, Metrics, RequestEvent
from runtime.requests.stream import AsyncStream, SegmentStream, Stream
from runtime.requests.thresholds import DefaultMode
from runtime.result import GenerationResult, Segment, Stats, Token, Word
from runtime.session import Session

__all__ = [
    "AsyncStream",
    "BatchError",
    "Bundle",
    "BundleError",
    "CalibrationError",
    "CapacityError",
    "DefaultMode",
    "DeviceError",
    "EngineError",
    "FreeExportError",
    "FreeModelForCausalLM",
    "FreeModelForSeq2SeqLM",
    "GenerationOptions",
    "GenerationResult",
    "Histogram",
    "HubError",
    "Metrics",
    "OptionError",
    "PromptError",
    "PromptLengthError",
    "QueueFullError",
    "RequestEvent",
    "Segment",
    "SegmentStream",
    "Session",
    "SessionOptions",
    "SpeechOptions",
    "Stats",
    "Stream",
    "Token",
    "Word",
]
