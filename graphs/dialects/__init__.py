"""Dialects: two ways to write norms, attention and the KV cache as ONNX operators.

`ort` uses ONNX Runtime's fused operators, or freeexport's own for quantized weights. `standard` uses opset 24 alone.
"""
