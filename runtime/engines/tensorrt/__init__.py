"""Engines on NVIDIA TensorRT.

Not yet run on a GPU. Tested against tests/fakes/fake_tensorrt.py, which follows the names and
signatures of NVIDIA's package.
"""
