"""``torchrun --nproc-per-node 2 -m bursar.train CONFIG.toml``: ``bursar train`` in every rank."""

import sys

if __name__ == "__main__":
    import importlib  # a shell above this floor, wanted only when this is run

    importlib.import_module("bursar.cli").main(["train", *sys.argv[1:]])
