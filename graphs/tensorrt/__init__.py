"""TensorRT engines from the standard dialect's graphs: parsing, profiles, building. NVIDIA's package is not needed to
import this."""
