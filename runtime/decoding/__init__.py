"""One sequence: loops, decoder state, beams."""
