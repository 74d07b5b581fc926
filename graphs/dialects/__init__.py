"""Two dialects of ONNX operators for norms, attention and the KV cache.

`ort` uses ONNX Runtime's fused operators, or freeexport's own for quantized weights.
`standard` uses only opset 24.
"""
