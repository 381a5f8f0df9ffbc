"""The FLOPs of the ops that really run, by the rules that price a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bursar import rules
from bursar.meter.guard import note
from bursar.trace.recorder import Recorder, _OpInfo, wanted


class FlopMeter(TorchDispatchMode):
    """``model`` and ``hardware`` FLOPs of what this process runs in the block. Compiled code passes it by."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = self.hardware = 0
        self._pricing = Recorder(FakeTensorMode(), device.type)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = rules.RULES.get("{}.{}".format(*func._schema.name.split("::")))
        if found is not None and found.kind in rules.MODEL_KINDS:
            outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
            info, node = _OpInfo(func), torch._C._current_autograd_node()
            if info.asked and node is not None:
                kwargs = {**(kwargs or {}), "output_mask": wanted(info.asked, node)}
            work = self._pricing._cost(info, args, kwargs, outs)[1]
            again = node is not None and torch.is_grad_enabled()  # a checkpoint's second
            self.model += 0 if again else work.flops
            self.hardware += work.flops + work.recompute_flops
        return out

    def __exit__(self, kind: Any, error: Any, where: Any) -> None:
        super().__exit__(kind, error, where)  # type: ignore[no-untyped-call]
        if kind is None:
            note(model_flops=self.model, hardware_flops=self.hardware)
