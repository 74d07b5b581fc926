"""One file a CLI verb: click options, printing. No logic that another room imports."""
