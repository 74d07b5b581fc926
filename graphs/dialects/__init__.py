"""Two dialects of ONNX operators for attention, norms and the KV cache."""
