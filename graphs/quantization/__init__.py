"""Linear layers and embeddings in 8 and 4 bits: rounding, the rule that keeps a tensor higher, and graph passes."""
