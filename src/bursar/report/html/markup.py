"""Elements of HTML and SVG as text. What is not already markup is escaped; a document allows its own style and script.

Names of modules are anyone's: control characters are written out, and the content policy runs nothing that is not ours.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from bursar.errors import printable

_VOID = frozenset({"br", "hr", "input", "link", "meta", "wbr"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Markup:
    r"""``value`` as markup that shows it: escaped for elements and for quoted attributes alike.

    >>> text("<b>\x1b"), text(Markup("<b>"))
    ('&lt;b&gt;\\x1b', '<b>')
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(printable(str(value), keep=""), quote=True))


def clipped(name: str, most: int = 160) -> str:
    """``name`` cut in its middle where it is longer: a page says it many times, and its ends tell it.

    >>> clipped("layers.0"), len(clipped("x" * 9999))
    ('layers.0', 160)
    """
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def tag(_name: str, *children: object, **attributes: object) -> Markup:
    """An element. None and False leave an attribute out, True gives it no value; ``_`` is written ``-``, and dropped at
    the end, so that ``class_`` is ``class``.

    >>> tag("a", "<here>", href="?a=1&b", class_="x", hidden=True, title=None)
    '<a href="?a=1&amp;b" class="x" hidden>&lt;here&gt;</a>'
    """
    parts = [_name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        parts.append(name if value is True else f'{name}="{text(_number(value))}"')
    opened = f"<{' '.join(parts)}>"
    return Markup(opened if _name in _VOID else f"{opened}{join(children)}</{_name}>")


def join(children: Iterable[object], between: str = "") -> Markup:
    """Children one after the other, None left out."""
    return Markup(between.join(text(child) for child in children if child is not None))


def _number(value: object) -> object:
    """Coordinates to a tenth: a hundredth of a pixel helps nobody and fills the file."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def data(value: Any, id_: str) -> Markup:
    """``value`` as JSON that a script reads; no string in it ends the element. NaN raises ValueError.

    >>> data("</script>", "x")
    '<script type="application/json" id="x">"\\\\u003c/script\\\\u003e"</script>'
    """
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and its like are escaped too
    for character in "<>&":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Markup(plain), type="application/json", id=id_)


def asset(name: str) -> str:
    """A file that stands beside this one: ``style.css`` or ``report.js``."""
    return files("bursar.report.html").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


def policy(style: str, script: str) -> str:
    """The content policy of a document with this style and script inside: nothing else is loaded, run or sent."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )


def document(title: str, body: Iterable[object], lang: str = "en") -> str:
    """A whole page with the house's style and script inside. It works without the script."""
    style, script = asset("style.css"), asset("report.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    whole = tag("html", head, tag("body", *body, tag("script", Markup(script))), lang=lang)
    return f"<!DOCTYPE html>\n{whole}\n"
