"""``bursar models``: the catalogue of models."""

from __future__ import annotations

from bursar import architecture
from bursar.cli import common


def models(name: str | None = None, /, *, json: common.Json = False) -> None:
    """The models bursar knows, or one of them with its shape and parameters.

    Parameters
    ----------
    name:
        a preset, its sizes changed if you like: llama3-8b, gpt2:L=2,d=256
    """
    from bursar.report import catalogues

    found = [architecture.preset(n) for n in (architecture.known_models() if name is None else (name,))]
    if json:
        common.print_json({"schema_version": 1, "models": [catalogues.model_record(m) for m in found]})
        return
    common.print_page(*(catalogues.models_page(found) if name is None else catalogues.model_page(found[0])))
