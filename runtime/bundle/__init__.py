"""A bundle on disk: manifest, calibration and its Beta mixture, all checked when read."""
