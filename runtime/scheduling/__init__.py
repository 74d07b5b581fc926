"""Many sequences: turns, batching, who drives."""
