"""Builds a decoder as ONNX graphs: one description as data, two dialects of operators."""
