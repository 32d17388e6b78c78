"""``python -m crossval``."""

from crossval.cli import main

if __name__ == "__main__":
    main(prog_name="crossval")
