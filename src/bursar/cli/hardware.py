"""``bursar hardware``: the catalogue of accelerators."""

from __future__ import annotations

from bursar.cli import common
from bursar.hardware import accelerator, accelerators


def hardware(name: str | None = None, /, *, json: common.Json = False) -> None:
    """The accelerators bursar knows, or one of them with the source of each figure.

    Parameters
    ----------
    name:
        one row of the catalogue: h100-sxm
    """
    from bursar.report import catalogues

    found = accelerators() if name is None else (accelerator(name),)
    if json:
        records = [catalogues.accelerator_record(a) for a in found]
        common.print_json({"schema_version": 1, "hardware": records})
        return
    common.print_page(*(catalogues.accelerators_page(found) if name is None else catalogues.accelerator_page(found[0])))
