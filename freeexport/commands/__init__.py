"""The verbs: click options, printing. No logic that another room imports."""
