"""Scripts that run other decoders, each in an environment that has that decoder and nothing of this project."""
