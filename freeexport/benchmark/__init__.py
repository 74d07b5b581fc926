"""`freeexport bench`: contenders, rounds, rows, report."""
