"""`evaluate`: ways of decoding compared on a task, by quality and speed together."""
