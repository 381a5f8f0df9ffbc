"""``torchrun --nproc-per-node 2 -m bursar.train CONFIG.toml``: ``bursar train`` in every rank."""

import sys

if __name__ == "__main__":
    from bursar.cli import main

    main(["train", *sys.argv[1:]])
