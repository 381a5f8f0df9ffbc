"""Every sample of every op of torch's database under a trace: ``python benchmarks/op_database.py``, to op_database.md.

Some minutes, on one core. An op counts as priced when all its samples are, forward and backward.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
warnings.simplefilter("ignore")

import torch  # noqa: E402

from op_database import UNPRICED, op_db, survey  # noqa: E402


def main() -> None:
    """Print the table."""
    print("# torch's op database under a trace\n")
    print(
        "Every sample input of `torch.testing._internal.common_methods_invocations.op_db`, forward and backward: priced"
    )
    print("where every op that runs has a rule. The exceptions are held by `tests/test_op_database.py`.\n")
    print(f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, Python {platform.python_version()}, "
          "`python benchmarks/op_database.py`\n")  # fmt: skip
    print("| traced as | ops | samples | priced ops | share | seconds |")
    print("|---|---|---|---|---|---|")
    wrong = {}
    for on, label in ((None, "a fake GPU"), ("cpu", "the CPU")):
        start = time.perf_counter()
        rows = list(survey(on))
        wrong[on] = {name: why for name, _, why in rows if why}
        priced = len(rows) - len(wrong[on])
        print(f"| {label} | {len(rows)} | {sum(n for _, n, _ in rows)} | {priced} | {priced / len(rows):.1%} | "
              f"{time.perf_counter() - start:.0f} |")  # fmt: skip
    assert len(op_db) > 600
    for on, label in ((None, "a fake GPU"), ("cpu", "the CPU")):
        print(f"\n## Not priced as {label}\n\n| op | why | first error |\n|---|---|---|")
        for name, why in sorted(wrong[on].items()):
            error = why[0].split(" at ")[0].replace("|", "\\|")[:100]
            print(f"| `{name}` | {UNPRICED[on].get(name, 'not listed')} | {error} |")


if __name__ == "__main__":
    main()
