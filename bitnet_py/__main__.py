"""The program ``bitnet``, and ``python -m bitnet_py``."""

from bitnet_py.start import run


def main() -> None:
    """Run the command line."""
    run("bitnet_py.cli", "bitnet")


if __name__ == "__main__":
    main()
