"""Run the command line as ``python -m bitnet_py``."""

from bitnet_py.cli import main

if __name__ == "__main__":
    main(prog_name="bitnet")
