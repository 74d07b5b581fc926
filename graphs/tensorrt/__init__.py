"""TensorRT engines from graphs of the standard dialect: parsing, profiles and builds.

Importing this package does not require TensorRT.
"""
