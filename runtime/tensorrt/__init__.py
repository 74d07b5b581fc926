"""TensorRT engines on a CUDA stream."""
