"""How good outputs are against references: one scale for `calibrate`, `tune` and `evaluate`."""
