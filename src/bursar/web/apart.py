"""One answer in a process of its own: the address comes as an argument, the answer goes out as JSON."""

from __future__ import annotations

import sys
from urllib.parse import parse_qsl

import msgspec

from bursar.errors import BursarError
from bursar.web.answers import found
from bursar.web.state import parse


def main(query: str) -> int:
    """Print the answer to ``query``; 2 and the reason on stderr where there is none."""
    try:
        answered = found(parse(parse_qsl(query)).first)
    except BursarError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    sys.stdout.buffer.write(msgspec.json.encode(answered))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
