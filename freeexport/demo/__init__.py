"""The demos of `freeexport demo`."""
