"""``python -m bursar``."""

from bursar.cli import main

main()
