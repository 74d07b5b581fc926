"""Decoding of one sequence: loops, decoders, drafts and beam search."""
