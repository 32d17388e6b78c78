"""The program ``crossval``, and ``python -m crossval``."""

from bitnet_py.start import run


def main() -> None:
    """Run the command line."""
    run("crossval.cli", "crossval")


if __name__ == "__main__":
    main()
