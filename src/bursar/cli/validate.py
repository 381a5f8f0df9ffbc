"""``bursar validate``: forecasts scored on published runs."""

from __future__ import annotations

from pathlib import Path

from bursar.cli import common


def validate(
    folder: Path,
    /,
    *,
    others: Path | None = None,
    markdown: Path | None = None,
    learn: Path | None = None,
    json: common.Json = False,
) -> None:
    """Forecast every published run in FOLDER/runs.csv from its configuration alone, and score the forecasts.

    Parameters
    ----------
    folder:
        holds runs.csv, one measured run per row
    others:
        another such folder, whose rows are not scored: scales per GPU type may learn from them too
    markdown:
        write the scoreboard to this file as well
    learn:
        write the errors found to this file, for intervals to learn from (catalog/errors.toml)
    """
    from bursar.plan.published import read
    from bursar.plan.validate import validate as score
    from bursar.report import validate as page

    runs = read(folder)
    with common.progress(f"forecasting {len(runs)} runs"):
        board = score(runs, read(others) if others is not None else ())
        if learn is not None or markdown is not None:
            board = score(runs, read(others) if others is not None else (), known=board.errors())
    if learn is not None:
        from bursar.plan.intervals import as_toml

        learn.write_text(as_toml(board.errors()), encoding="utf-8")
    if markdown is not None:
        from bursar import __version__

        markdown.write_text(page.markdown(board, str(folder), f"bursar {__version__}"), encoding="utf-8")
    if json:
        common.print_json(page.record(board))
    else:
        common.print_page(*page.page(board, str(folder)))
