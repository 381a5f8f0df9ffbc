"""What has to be done differently for some of the torch versions we support (2.11 to 2.13), and for which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from bursar.trace.patches import Undo


def truncated_normal(undo: Undo) -> None:
    """Initialise fake tensors without looking at them: torch 2.12 began to draw again until all is within bounds."""
    plain = torch.nn.init._no_grad_trunc_normal_

    def trunc_normal_(tensor: Any, mean: float, std: float, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return plain(tensor, mean, std, *args, **kwargs)
        with torch.no_grad():
            return tensor.normal_(mean, std)

    undo.set(torch.nn.init, "_no_grad_trunc_normal_", trunc_normal_)
