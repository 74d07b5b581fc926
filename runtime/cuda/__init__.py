"""Engines on a CUDA device: memory, streams, calls, and what ONNX Runtime's provider runs."""
