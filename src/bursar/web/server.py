"""Who may ask what of the page: this machine's browser, by GET, within a limit of time. Everything else is refused.

    Guard    method, Host, Origin, length; headers on every reply (FAULTS: rebinding, forged requests, traversal)
    Desk     answers on threads of its own, so that a slow one does not hold up the others; remembers the last ones
    app      the page, its changing part, the levers, JSON, and the files of `FILES`, which are in memory

No address names a file: a name that is not in the table is not found, however it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bursar.errors import BursarError
from bursar.report.outlook import Change
from bursar.web import pages
from bursar.web.answers import Answered, answer, changes, record
from bursar.web.state import EVERY, BadField, Setup, State, parse, query

LONGEST_QUERY = 4096  # bytes; all fields of two set-ups at their longest have fewer
MOST_FIELDS = 64
SECONDS = 95.0  # that one request waits: longer than a search of every layout may take
THREADS = 2  # numbers hold the interpreter's lock, so more would not be faster
WAITING = 200  # answers asked for and not begun; beyond that, come back later
REMEMBERED = 256  # answers
REMEMBERED_BYTES = 12_000_000  # of pages, as they went out
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Guard:
    """Passes on what this machine's browser asks of this page, and puts the headers on every reply."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        refused = self.refusal(scope)
        await (self.app if refused is None else refused)(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """What to say to a request that is not passed on."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value.decode("latin-1"))
        host = headers.get(b"host", [])
        if len(host) != 1 or host[0].lower() not in self.hosts:  # a name that a foreign page had point here
            return _plain(403, f"this page answers to {' and '.join(sorted(self.hosts))} only")
        for origin in headers.get(b"origin", []):
            if origin.lower() not in {f"http://{h}" for h in self.hosts}:
                return _plain(403, "this page answers no other site")
        site, mode = headers.get(b"sec-fetch-site", [""])[0], headers.get(b"sec-fetch-mode", [""])[0]
        if site in ("cross-site", "same-site") and mode != "navigate":  # a link may lead here, a script may not ask
            return _plain(403, "this page answers no other site")
        if scope["method"] not in ("GET", "HEAD"):
            return _plain(405, "this page only reads: GET or HEAD", {"allow": "GET, HEAD"})
        if len(scope["query_string"]) > LONGEST_QUERY:
            return _plain(414, f"an address has {LONGEST_QUERY} bytes after the question mark at most")
        return None


def _plain(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return Response(text + "\n", status, {**(headers or {}), "cache-control": "no-store"}, "text/plain")


class Busy(Exception):
    """Too many wait, or the answer takes too long; the message is for the reader."""


class Desk:
    """Answers questions on a few threads, each of them once; the last ones are remembered.

    Searches of every layout have a thread to themselves, and wait for one another there.
    """

    def __init__(self, work: Callable[[Setup], Answered] = answer, seconds: float = SECONDS) -> None:
        self.work, self.seconds = work, seconds
        self.quick, self.slow = ThreadPoolExecutor(THREADS, "answer"), ThreadPoolExecutor(1, "search")
        self.done: OrderedDict[tuple[str, Setup], asyncio.Future[Any]] = OrderedDict()
        self.open = 0

    async def ask(self, state: State) -> tuple[Answered, Answered | None]:
        """The answers for both set-ups. Raises Busy."""
        asked = [self._one("answer", self.work, state.first)]
        if state.second is not None:
            asked.append(self._one("answer", self.work, state.second))
        found = await self._all(asked)
        return found[0], found[1] if len(found) > 1 else None

    async def levers(self, setup: Setup) -> tuple[Change, ...]:
        """What each lever would do. Raises Busy."""
        found = await self._all([self._one("levers", changes, setup)])
        return tuple(found[0])

    async def _all(self, asked: list[asyncio.Future[Any]]) -> list[Any]:
        done, _ = await asyncio.wait(set(asked), timeout=self.seconds)
        if len(done) < len(set(asked)):
            raise Busy(f"no answer within {self.seconds:g} s: it is still being worked out, so ask again in a while")
        return [a.result() for a in asked]

    def _one(self, what: str, work: Callable[[Setup], Any], setup: Setup) -> asyncio.Future[Any]:
        key = (what, setup)
        known = self.done.get(key)
        if known is not None:
            self.done.move_to_end(key)
            return known
        if self.open >= WAITING:
            raise Busy("too many questions at once; ask again in a moment")
        slow = setup.search == EVERY and what == "answer"
        future = asyncio.wrap_future((self.slow if slow else self.quick).submit(work, setup))
        self.open += 1
        self.done[key] = future
        future.add_done_callback(lambda f: self._finished(key, f))
        while len(self.done) > REMEMBERED:
            self.done.popitem(last=False)
        return future

    def _finished(self, key: tuple[str, Setup], future: asyncio.Future[Any]) -> None:
        self.open -= 1
        if future.cancelled() or future.exception() is not None:
            self.done.pop(key, None)

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self.quick, self.slow):
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Made:
    """A reply as it goes out."""

    status: int
    body: bytes
    type: str
    headers: tuple[tuple[str, str], ...] = ()

    def response(self) -> Response:
        """For starlette."""
        return Response(self.body, self.status, {"cache-control": "no-store", **dict(self.headers)}, self.type)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page, in memory."""

    body: bytes
    type: str
    tag: str


def static() -> dict[str, File]:
    """The files that the page asks for, by name."""
    found = {}
    for name in pages.FILES:
        body = files("bursar.web").joinpath("static", name).read_bytes()
        kind = TYPES[name.rpartition(".")[2]]
        found[name] = File(body, kind, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


class Site:
    """The page's addresses, over one `Desk`."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.files = static()
        self.made: OrderedDict[tuple[str, bytes], Made] = OrderedDict()
        self.made_bytes = 0

    async def page(self, request: Request) -> Response:
        """The whole page."""
        return await self._reply(request, "page", pages.whole, "text/html")

    async def part(self, request: Request) -> Response:
        """What changes on the page as the form does."""
        return await self._reply(request, "part", pages.changing, "text/html")

    async def api(self, request: Request) -> Response:
        """The same as JSON."""
        return await self._reply(request, "api", _json, "application/json")

    async def levers(self, request: Request) -> Response:
        """What each lever alone would do to the first set-up's layout: a part of the page, or a page by itself."""
        part = request.headers.get("hx-request") == "true"
        return await self._reply(request, "levers-part" if part else "levers", pages.levers, "text/html")

    async def file(self, request: Request) -> Response:
        """A file of the table."""
        found = self.files.get(request.path_params["name"])
        if found is None:
            return _plain(404, "no such page; the page is at /")
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers={"etag": found.tag})
        headers = {"etag": found.tag, "cache-control": "no-cache"}
        return Response(found.body, 200, headers, found.type)

    async def missing(self, request: Request, _: Exception) -> Response:
        """Any other address."""
        return _plain(404, "no such page; the page is at /")

    async def _reply(self, request: Request, what: str, render: Callable[..., str | bytes], kind: str) -> Response:
        raw: bytes = request.scope["query_string"]
        known = self.made.get((what, raw))
        if known is not None:
            self.made.move_to_end((what, raw))
            return known.response()
        made = await self._make(raw, what, render, kind)
        if made.status in (200, 422) and (what, raw) not in self.made:
            self.made[what, raw] = made
            self.made_bytes += len(made.body) + len(raw)
            while self.made_bytes > REMEMBERED_BYTES:
                (_, old), gone = self.made.popitem(last=False)
                self.made_bytes -= len(gone.body) + len(old)
        return made.response()

    async def _make(self, raw: bytes, what: str, render: Callable[..., str | bytes], kind: str) -> Made:
        pairs: list[tuple[str, str]] = []
        try:
            pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
        except ValueError:  # too many, or bytes that are no text
            return self._refused(what, pairs, BadField("address", "this address cannot be read"))
        try:
            state = parse(pairs)
            if what.startswith("levers"):
                body = render(state, await self.desk.levers(state.first), what == "levers-part")
            else:
                body = render(state, *await self.desk.ask(state))
        except (BursarError, Busy) as error:
            return self._refused(what, pairs, error)
        more = (("hx-replace-url", "/?" + query(state)),) if what == "part" else ()
        return Made(200, body if isinstance(body, bytes) else body.encode(), kind, more)

    def _refused(self, what: str, pairs: list[tuple[str, str]], error: BursarError | Busy) -> Made:
        name = error.name if isinstance(error, BadField) else ""
        waiting = isinstance(error, Busy)
        status, more = (503, (("retry-after", "2"),)) if waiting else (422, ())
        if what == "api":
            body = msgspec.json.encode({"schema_version": 1, "error": str(error), "field": name or None})
            return Made(status, body, "application/json", more)
        render = pages.whole_refused if what in ("page", "levers") else pages.part_refused
        return Made(status, render(pairs, str(error), name, waiting=waiting).encode(), "text/html", more)


def _json(state: State, first: Answered, second: Answered | None) -> bytes:
    found = {"schema_version": 1, "address": "/?" + query(state), **record(first)}
    if second is not None:
        found["second"] = record(second)
    return msgspec.json.encode(found)


def app(hosts: frozenset[str], desk: Desk | None = None) -> ASGIApp:
    """The page's ASGI application, answering requests for ``hosts`` (``127.0.0.1:8765``) and no others."""
    site = Site(desk or Desk())
    routes = [
        Route("/", site.page, methods=["GET"]),
        Route("/part", site.part, methods=["GET"]),
        Route("/levers", site.levers, methods=["GET"]),
        Route("/api", site.api, methods=["GET"]),
        Route("/static/{name}", site.file, methods=["GET"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        site.desk.close()

    inner = Starlette(routes=routes, exception_handlers={404: site.missing}, lifespan=lifespan)
    return Guard(inner, hosts)


def hosts(port: int) -> frozenset[str]:
    """The names under which a browser may ask for the page on ``port``."""
    plain = frozenset({"127.0.0.1", "localhost"})
    return frozenset(f"{name}:{port}" for name in plain) | (plain if port == 80 else frozenset())
