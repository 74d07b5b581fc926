"""`tune` (exit layer, threshold, max_pending) and `exit-vocab` (gain of a smaller shallow vocabulary)."""
