"""The seconds that steps take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Clock:
    """``seconds`` of ``steps`` steps: from each ``start`` to the ``stop`` after it, and nothing that lies between."""

    steps: int = 0
    seconds: float = 0.0
    began: float | None = None
    made: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """From now on."""
        self.began = time.perf_counter()

    def stop(self, steps: int) -> None:
        """``steps`` were done since ``start``; without one they do not count."""
        if self.began is not None:
            self.seconds += time.perf_counter() - self.began
            self.steps, self.began = self.steps + steps, None

    @property
    def per_step(self) -> float | None:
        """Seconds of one step; None where none was clocked."""
        return self.seconds / self.steps if self.steps else None

    @property
    def age(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.made
