"""What `freeexport demo` runs."""
