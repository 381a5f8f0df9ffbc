"""``bursar lecture``: the notes' claims, executed."""

from __future__ import annotations

from bursar.cli import common


def lecture(chapter: int | None = None, /, *, json: common.Json = False, explain: common.Explain = False) -> None:
    """The claims of the lecture notes, executed: what they say, what bursar computes, verdict and correction.

    Every value is computed here and now by bursar's own code; a verdict follows from comparing it with the notes'.

    Parameters
    ----------
    chapter:
        7 (FLOPs of operations), 8 (of gradients), 9 (initialisation) or 10 (optimizers); without it, all four
    """
    from bursar import lecture as claims

    claims.check(chapter)
    common.need_torch("the claims are executed by tracing the notes' models")
    with common.progress("executing the notes' claims"):
        lines = claims.execute(chapter)
    from bursar.report import lecture as page

    if json:
        common.print_json(page.lecture_record(lines))
        return
    common.print_page(*page.render(lines, explain=explain))
