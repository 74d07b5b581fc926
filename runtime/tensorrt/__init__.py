"""Engines on NVIDIA's TensorRT. Not yet run on a GPU; checked against tests/fakes/fake_tensorrt.py, which has the names
and signatures of its package."""
