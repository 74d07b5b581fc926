"""(optional step) two ways to write attention, norms, cache."""
