"""``torchrun --nproc-per-node 2 -m bursar.train CONFIG.toml``: ``bursar train`` in every rank."""

import sys


def main() -> None:
    """Hand the command line on to the shell above, which is imported only when this is run."""
    from bursar.cli import main as command

    command(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
