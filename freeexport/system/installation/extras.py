"""The optional dependencies of the distribution: which packages an extra brings, and how to install it."""

from __future__ import annotations

# The same names as [project.optional-dependencies] in pyproject.toml, in the spelling of the package index.
EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu", "cuda-python"),
    "tensorrt": ("tensorrt", "cuda-python"),
    "convert": (
        "torch",
        "transformers",
        "accelerate",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "gguf",
        "sentencepiece",
        "protobuf",
    ),
    "serve": ("starlette", "uvicorn", "msgspec", "prometheus-client"),
    "bench": ("matplotlib",),
    "calibrate": ("scipy",),
    "metrics": ("rouge-score", "sacrebleu", "jiwer"),
    "evaluate": ("httpx",),
    "demo": ("rapidfuzz",),
    "train": ("peft", "tensorboard"),
    "optimum": ("optimum-onnx",),
}

PURPOSES: dict[str, str] = {
    "cpu": "decode on the CPU",
    "gpu": "decode on an NVIDIA GPU",
    "tensorrt": "build and run TensorRT engines (NVIDIA GPU)",
    "convert": "convert and verify checkpoints",
    "train": "train LoRA adapters, and record in TensorBoard",
    "serve": "serve bundles over HTTP",
    "bench": "plot what was measured",
    "calibrate": "fit the exit threshold",
    "metrics": "compare outputs when calibrating",
    "evaluate": "compare methods on a task, and have outputs judged",
    "demo": "run the demo",
    "optimum": "export encoders that the builder does not know (holds transformers at 4.57)",
}

# Import names that differ from the distribution that brings them.
_DISTRIBUTIONS = {
    "rouge_score": "rouge-score",
    "google": "protobuf",
    "optimum": "optimum-onnx",
    "cuda": "cuda-python",
    "prometheus_client": "prometheus-client",
}


def extra_of(module: str) -> str | None:
    """The first extra whose packages bring `module` (a dotted import name); None where none does."""
    top = module.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(top, top)
    return next((extra for extra, packages in EXTRAS.items() if distribution in packages), None)


def install_command(extra: str | None) -> str:
    """The shell command that installs `extra`, or the base distribution where it is None."""
    return f"pip install 'freeexport[{extra}]'" if extra else "pip install freeexport"
