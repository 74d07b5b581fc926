"""The same on TensorRT engines."""
