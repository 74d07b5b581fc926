"""Engines on a CUDA device: memory, streams, calls, and ONNX Runtime's CUDA provider.

Not yet run on a GPU. Tested against tests/fakes, which follow the names and signatures of
cuda-python and of ONNX Runtime's provider.
"""
