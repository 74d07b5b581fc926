"""A decoder as ONNX: described once as data, emitted by one builder in two dialects."""
