"""Costs of decoding, what an exit saves by them, and the sentences that say so."""
