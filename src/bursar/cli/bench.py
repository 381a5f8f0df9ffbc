"""``bursar bench``: this machine measured, once, for ``--on local``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from bursar.cli import common


def bench(
    *,
    show: Annotated[bool, Parameter(negative=())] = False,
    quick: Annotated[bool, Parameter(negative=())] = False,
    json: common.Json = False,
) -> None:
    """Measure this machine: products, attention, convolution, bandwidth, overhead; kept for --on local.

    Take a quiet machine: what slows the measuring down slows every forecast. OMP_NUM_THREADS sets the threads, and a
    calibration holds for that number of threads alone.

    Parameters
    ----------
    show:
        plot the calibration that is kept, and measure nothing
    quick:
        few and small points, in seconds: to try it out, not to forecast with
    """
    from bursar import store
    from bursar.report import bench as page

    if show:
        found, path = store.load(), store.folder() / "calibration.toml"
    else:
        common.need_torch("measuring this machine runs torch on it")
        import sys

        from bursar.bench import FULL, QUICK, calibrate

        def say(text: str) -> None:
            print(f"measuring {text}", file=sys.stderr)

        found = calibrate(QUICK if quick else FULL, say)
        path = store.save(found)
        if found.busy:
            common.warn([f"{found.busy}; measure again when it is quiet"])
    if json:
        common.print_json(page.record(found, path))
    else:
        common.print_page(*page.render(found, path, curves=show))
