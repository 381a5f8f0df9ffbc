"""The process behind the page: a port of this machine, taken or refused, until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

from bursar.errors import BadInput, MissingExtra

LOOPBACK = "127.0.0.1"
_NEEDS = ("starlette", "uvicorn", "jinja2")


def need_web() -> None:
    """Raise MissingExtra where a part of the page is not installed."""
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in _NEEDS):
        raise MissingExtra("web", "the page is served by starlette and uvicorn")


def listen(port: int) -> socket.socket:
    """A socket of the loopback on ``port``; 0 takes any that is free. Raises BadInput for one that is taken."""
    # named as TCP, or asyncio leaves Nagle's algorithm on and every reply waits 40 ms for an acknowledgement
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that ended a moment ago leaves its port waiting
    try:
        made.bind((LOOPBACK, port))
        made.listen(256)
    except OverflowError:
        made.close()
        raise BadInput(f"no port {port}; give one from 1 to 65535, or 0 for any that is free") from None
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise BadInput(
                f"port {port} is taken, perhaps by another bursar ui; give another with --port, or 0 for any"
            ) from None
        raise BadInput(f"cannot listen on port {port}: {error.strerror}; give another with --port") from None
    return made


def serve(port: int, started: Callable[[str], None]) -> None:
    """Serve the page on ``port`` until it is interrupted; ``started`` is told its address once it answers."""
    need_web()
    import uvicorn

    from bursar.web.server import app, hosts

    sock = listen(port)
    port = sock.getsockname()[1]
    config = uvicorn.Config(
        app(hosts(port)), log_level="error", access_log=False, server_header=False, date_header=False,
        proxy_headers=False, forwarded_allow_ips="", ws="none", limit_concurrency=1000, backlog=256,
        timeout_keep_alive=10, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=16_384,
    )  # fmt: skip
    with contextlib.closing(sock), contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        started(f"http://{LOOPBACK}:{port}/")
        uvicorn.Server(config).run(sockets=[sock])
