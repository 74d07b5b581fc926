"""Engines on a CUDA device: memory, streams, calls, and what ONNX Runtime's provider runs.

Not yet run on a GPU; checked against tests/fakes, which have the names and signatures of cuda-python and of ONNX
Runtime's provider.
"""
