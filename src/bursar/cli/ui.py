"""``bursar ui``: the web page, on this machine only."""

from __future__ import annotations

import sys


def ui(*, port: int = 8765) -> None:
    """The web page: choose model, cluster, batch, precision and layout; see memory, time, MFU, days and dollars.

    It answers this machine's browser only and reads nothing but the form. Ctrl-C ends it.

    Parameters
    ----------
    port:
        where it listens on 127.0.0.1; 0 takes any port that is free
    """
    from bursar.web.serve import serve

    def started(url: str) -> None:
        print(f"bursar ui: {url}", flush=True)
        print("Ctrl-C ends it", file=sys.stderr, flush=True)

    serve(port, started)
