"""Linear layers and embeddings in 8 and 4 bits: rounding, formats, and graph passes."""
