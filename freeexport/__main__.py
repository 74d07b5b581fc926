"""`python -m freeexport`: the same as the `freeexport` command."""

from freeexport.cli import main

if __name__ == "__main__":
    main(prog_name="freeexport")
