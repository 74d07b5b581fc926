"""A bundle on disk, checked: the manifest, the calibration, and the Beta mixture that it holds."""
