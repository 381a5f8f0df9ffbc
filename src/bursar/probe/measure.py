"""The signal through a real model, on real tensors: measured at every layer and laid beside what theory predicts.

forward     a TorchFunctionMode sees every torch function   →  theory.RULES carry a Signal along with each tensor
            module hooks say where a layer begins and ends  →  one row per layer, its output measured
backward    a hook on each row's output                     →  the gradient's norm there
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bursar.errors import BadInput
from bursar.probe import theory
from bursar.probe.schemes import Place, initialise, scheme, truncation
from bursar.probe.theory import Call, Signal
from bursar.probe.verdict import ERRORS, Evidence, judge
from bursar.report.probe import Layer, Probe
from bursar.units import format_count
from bursar.workload.resolve import tensors_in

MAX_PARAMETERS = 10**9  # with a copy and gradients 12 GB in fp32
LEARNING_RATE = 1e-3
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)  # their parts are not called as modules


def probe(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    init: str | None = None,
    name: str = "",
    lr: float = LEARNING_RATE,
    seed: int = 0,
    remarks: Mapping[str, str] | None = None,
) -> Probe:
    """Forward and backward signal through every layer of ``model``, as it is or re-initialised by the rule ``init``.

    ``batch`` is a tensor, a tuple of arguments or a dict of keyword arguments; without ``loss`` the gradient comes from
    the loss the model returns, or from `random_direction`; ``remarks`` says by parameter what is to
    be said of its layer. The model is copied, and it and torch's random numbers are left as they were. Raises BadInput
    for a model too large to run here or with parameters without data, UnknownName for ``init``.
    """
    return compare(model, batch, loss=loss, init=init, name=name, lr=lr, seed=seed, remarks=remarks)[-1]


def compare(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    init: str | None = None,
    name: str = "",
    lr: float = LEARNING_RATE,
    seed: int = 0,
    remarks: Mapping[str, str] | None = None,
    keep: bool = True,
) -> tuple[Probe, ...]:
    """The probe of ``model`` as it is and, with ``init``, the one after that rule. Raises what `probe` raises.

    Without ``keep`` the model itself is run and re-initialised, which saves the copy's memory.
    """
    if init is not None:
        scheme(init)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise BadInput("the model has lazy layers whose sizes are not known yet; run it once on a batch, then probe it")
    check_size(sum(p.numel() for p in model.parameters()), name or type(model).__name__)
    if any(p.is_meta for p in model.parameters()):
        raise BadInput("the model's parameters hold no data (device meta); a probe measures real numbers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mine = copy.deepcopy(model) if keep else model
        run = _Run(mine, batch, loss or random_direction, name or type(model).__name__, lr)
        before, seen = run.measure(None, remarks or {})
        if init is None:
            return (before,)
        torch.manual_seed(seed)
        initialise(mine, init, seen)
        return before, run.measure(init, {})[0]


def random_direction(model: nn.Module, batch: Any) -> Tensor:
    """The loss a model returns; else its output times Gaussian numbers, over √n, so that the gradient's norm is 1.

    The mean of an output would not do: behind a norm its gradient is zero.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(found, Tensor):
        return found
    floats = [t for t in tensors_in(out) if t.is_floating_point()]
    if not floats:
        raise BadInput("the model's output has no tensor of floats, so there is no signal to probe")
    first = next((t for t in floats if t.requires_grad), floats[0])
    return first if first.dim() == 0 else (first * torch.randn_like(first)).sum() / math.sqrt(first.numel())


def check_size(parameters: int, name: str) -> None:
    """Raise BadInput for a model that is too large to be probed on real tensors."""
    if parameters > MAX_PARAMETERS:
        raise BadInput(
            f"{name} has {format_count(parameters)} parameters; a probe runs on real tensors and takes at most "
            f"{format_count(MAX_PARAMETERS)}. Fewer and narrower layers show the same signal, as in gpt2:L=2 or "
            "llama3-8b:L=1,d=512,h=8,kv=4,F=1024"
        )


@contextlib.contextmanager
def watching(said: list[tuple[Tensor, str]]) -> Iterator[None]:
    """While a model is made, note the calls of ``nn.init.trunc_normal_`` whose bounds cut nothing."""
    original = nn.init.trunc_normal_

    def watched(
        tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, **kwargs: Any
    ) -> Tensor:
        message = truncation(float(std), float(a) - mean, float(b) - mean)
        if message:
            said.append((tensor, message))
        return original(tensor, mean, std, a, b, **kwargs)

    nn.init.trunc_normal_ = watched  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.init.trunc_normal_ = original


def remarks_of(model: nn.Module, said: Sequence[tuple[Tensor, str]]) -> dict[str, str]:
    """By parameter name, what `watching` noted of the tensor it was made from."""
    by_place = {tensor.data_ptr(): message for tensor, message in said}
    return {name: by_place[p.data_ptr()] for name, p in model.named_parameters() if p.data_ptr() in by_place}


# ---- one pass


@dataclass(slots=True)
class _Row:
    """One layer while it runs. Filled in as the forward and the backward pass by."""

    name: str
    kind: str
    parameters: list[nn.Parameter]
    mean: float = math.nan
    second: float = math.nan
    signal: Signal | None = None
    weight: nn.Parameter | None = None
    place: Place | None = None
    bias: float = 0.0  # E[b²]
    image: bool = False
    rescaled: bool = False
    residual: bool = False
    activation: str | None = None  # that it runs, or that its output went through
    follows: str | None = None  # the first function its output went through, in whatever layer
    dead: float | None = None
    zero: float | None = None
    saturated: float | None = None
    gradient_squared: list[float] = field(default_factory=list)
    measured: bool = False


@dataclass(slots=True)
class _Run:
    """A model that may be changed, its batch and its loss."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    name: str
    lr: float

    def measure(self, init: str | None, remarks: Mapping[str, str]) -> tuple[Probe, dict[nn.Parameter, Place]]:
        """One forward and backward pass; what it showed, and how each weight was used."""
        self.model.zero_grad(set_to_none=True)
        watch = _Watch(self.model)
        with torch.enable_grad(), watch.hooks(), watch:
            value = self.loss(self.model, _marked(self.batch))
        if value.requires_grad:
            value.backward()
        rows = [row for row in watch.rows if row.measured]
        if not rows:
            raise BadInput(f"{self.name} has no layer whose output is a tensor of floats: nothing to probe")
        names = {p: n for n, p in self.model.named_parameters()}
        order = {id(row): i for i, row in enumerate(rows)}
        at = {i: order[id(row)] for i, row in enumerate(watch.rows) if id(row) in order}
        layers, evidence = [self._layer(row) for row in rows], [_evidence(row, at) for row in rows]
        judged, overall = judge(layers, evidence)
        said = [next((remarks[n] for p in row.parameters if (n := names.get(p, "")) in remarks), "") for row in rows]
        judged = tuple(x if x.message else replace(x, message=text) for x, text in zip(judged, said, strict=True))
        seen: dict[nn.Parameter, Place] = {}
        for row in rows:
            if row.weight is not None and row.place is not None:
                branches = max(1, watch.branches) if row.residual else 1
                place = replace(row.place, branches=branches, follows=row.follows)
                if row.weight not in seen or place.fan_in > seen[row.weight].fan_in:
                    seen[row.weight] = place
        return Probe(
            model=self.name,
            parameters=sum(p.numel() for p in self.model.parameters()),
            loss=float(value.detach()),
            layers=judged,
            verdict=overall,
            scheme=init,
            assumptions=self._assumptions(),
        ), seen

    def _layer(self, row: _Row) -> Layer:
        signal = row.signal
        known = signal if signal is not None and signal.predicted else None
        grads = [p.grad for p in row.parameters if p.grad is not None]
        norm = _norm(grads) if grads else None
        matrices = [p for p in row.parameters if p.dim() > 1] or row.parameters
        size, step = _norm(matrices), _norm([p.grad for p in matrices if p.grad is not None])
        return Layer(
            name=row.name,
            kind=row.kind,
            forward_mean=row.mean,
            forward_second_moment=row.second,
            predicted_second_moment=known.second if known else None,
            tolerance=_tolerance(known.spread) if known else None,
            growth=row.second / signal.reference if signal is not None and signal.reference > 0 else None,
            gain=theory.second_moment(row.weight) * row.place.fan_in
            if row.place is not None and row.weight is not None
            else None,
            fan_in=row.place.fan_in if row.place is not None else None,
            fan_out=row.place.fan_out if row.place is not None else None,
            activation=row.activation,
            dead_share=row.dead,
            zero_share=row.zero,
            saturated_share=row.saturated,
            output_gradient_norm=math.sqrt(sum(row.gradient_squared)) if row.gradient_squared else None,
            gradient_norm=norm,
            update_to_weight=self.lr * step / size if grads and size > 0 else None,
        )

    def _assumptions(self) -> tuple[str, ...]:
        return (
            "theory takes weights to be independent with mean 0; their variance and the biases' are read off the model",
            "where theory is silent (attention, pooling, an unknown function) the path goes on from what is measured",
            f"tolerance: {ERRORS} standard errors, relative variance 2/(n_out · d) a layer, d independent samples",
            f"update/weight is one plain gradient step at a learning rate of {self.lr:g}, ‖lr · gradient‖ / ‖weights‖; "
            "a weight that is shared has one gradient, the sum of its uses",
            "without a loss of the model's own, the gradient starts from a random direction of norm 1 at the output",
            "the probe runs on the CPU in the model's own dtype and mode (training or evaluation), with seeded numbers",
        )


def _evidence(row: _Row, at: Mapping[int, int]) -> Evidence:
    signal = row.signal
    count = row.weight.numel() if row.weight is not None else 0
    return Evidence(
        growth=row.second / signal.reference if signal is not None and signal.reference > 0 else 1.0,
        depth=signal.depth if signal is not None else 1,
        drift=signal.drift if signal is not None else 0.0,
        path=frozenset(at[i] for i in signal.path if i in at) if signal is not None else frozenset(),
        bias_share=min(1.0, row.bias / row.second) if row.second > 0 else 0.0,
        rescaled=row.rescaled,
        residual=row.residual,
        trained=any(p.requires_grad for p in row.parameters),
        weight_second=theory.second_moment(row.weight) if row.weight is not None else None,
        weight_count=count,
        in_first=row.place.in_first if row.place is not None else False,
    )


def _tolerance(spread: float) -> float:
    """Four standard errors of the logarithm; a product of many layers has its median at exp(−spread/2)."""
    return math.expm1(min(700.0, ERRORS * math.sqrt(spread) + spread / 2))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(map(theory.square_sum, tensors)))


def _marked(value: Any) -> Any:
    """The batch with a signal on each tensor of floats; the user's own tensors stay as they are."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        mine = value.detach()
        second = theory.second_moment(mine)
        _mark(mine, Signal(second, theory.independent(mine, mine.dim() > 3)[1], reference=second))
        return mine
    if isinstance(value, Mapping):
        return {key: _marked(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_marked(v) for v in value)
    return value


def _mark(tensor: Tensor, signal: Signal) -> None:
    tensor._bursar_signal = signal  # type: ignore[attr-defined]


class _Watch(TorchFunctionMode):
    """Sees every torch function of a forward pass, carries the signals along and fills the rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: list[_Row] = []
        self.branches = 0  # sums of a stream and a branch
        self._model = model
        self._names = {p: n for n, p in model.named_parameters()}
        self._open: list[int] = []  # rows of the layers that are running
        self._tables: set[nn.Parameter] = set()  # read by a lookup
        self._busy = False

    # ---- layers

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch every layer of the model begin and end."""
        handles = []
        inside: set[nn.Module] = set()
        for name, module in self._model.named_modules():
            if module in inside or not _is_layer(module):
                continue
            inside |= set(module.modules())
            handles.append(module.register_forward_pre_hook(self._begin(name or "(model)")))
            handles.append(module.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str) -> Callable[[nn.Module, Any], None]:
        def begin(module: nn.Module, args: Any) -> None:
            self._open.append(len(self.rows))
            calls = sum(row.name.split(" (")[0] == name for row in self.rows)
            self.rows.append(
                _Row(f"{name} ({calls + 1})" if calls else name, type(module).__name__, list(module.parameters()))
            )

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        index = self._open.pop()
        self._busy = True
        found = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if found is not None:
            self._fill(index, found)
        self._busy = False

    def _fill(self, index: int, output: Tensor) -> None:
        """The row's figures from its output, and the hook that waits for the output's gradient."""
        row, data = self.rows[index], output.detach()
        row.measured, row.mean, row.second = True, float(data.double().mean()), theory.second_moment(data)
        row.signal = theory.signal_of(output)
        if "RMSNorm" in row.kind and row.parameters and row.signal is not None and not row.signal.predicted:
            # Written out with pow and rsqrt, as transformers does: the module's name tells what its functions do not.
            row.signal = self._restart(row.signal, theory.second_moment(row.parameters[0]), output)
        if row.signal is not None:
            row.signal = replace(row.signal, producers=row.signal.producers | {index}, path=row.signal.path | {index})
            _mark(output, row.signal)
        if output.requires_grad:

            def keep(gradient: Tensor) -> None:
                row.gradient_squared.append(theory.square_sum(gradient))

            output.register_hook(keep)

    def _restart(self, before: Signal, second: float, output: Tensor) -> Signal:
        """A norm ends the paths that lead to it and begins a new one."""
        for i in before.producers:
            self.rows[i].rescaled = True
        count = max(before.n, theory.independent(output)[1])
        own = 1e-4  # relative variance: the norm's ε is not known here, and takes a per cent of a small signal
        return Signal(second, count, own, own, gaussian=True, predicted=True, reference=second)

    # ---- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_") if func.__name__ != "__get__" else "get"
        inputs = tuple(s for t in tensors_in((args, kwargs)) if (s := theory.signal_of(t)) is not None)
        output = func(*args, **kwargs)
        if self._busy or not isinstance(output, (Tensor, tuple, list)):
            return output
        self._busy = True
        try:
            self._see(name, func, args, kwargs, output, inputs)
        finally:
            self._busy = False
        return output

    def _see(self, name: str, func: Any, args: Any, kwargs: Any, output: Any, inputs: tuple[Signal, ...]) -> None:
        outputs = [t for t in tensors_in(output) if t.is_floating_point()]
        if not outputs:
            return
        if name in theory.VIEWS:
            first = args[0] if args else kwargs.get("input")
            weight = theory.weight_of(first)
            for t in outputs:
                if (
                    weight is not None
                    and name == "getitem"
                    and any(not x.is_floating_point() for x in tensors_in(args[1]))
                ):
                    second = theory.second_moment(t)  # a table read by its rows
                    _mark(t, Signal(second, theory.independent(t)[1], reference=second))
                elif weight is not None and not isinstance(t, nn.Parameter):
                    t._bursar_weight = weight  # type: ignore[attr-defined]
                elif inputs and t.numel() > 0:
                    _mark(t, inputs[0])
            return
        call = Call(name, func, args, kwargs, outputs[0], inputs)
        used = theory.product(call)
        if used is not None and (x := theory.signal_of(used.x)) is not None:
            self._product(used, x, outputs[0])
            return
        if not inputs and name != "embedding":
            return
        rule = theory.RULES.get(name)
        found = rule(call) if rule is not None and len(outputs) == 1 else None
        if rule is theory.norm and found is not None:
            for i in inputs[0].producers:
                self.rows[i].rescaled = True
        elif rule is theory.norm:
            found = self._restart(inputs[0], theory.second_moment(outputs[0]), outputs[0])
            found = replace(found, predicted=False)
        elif rule is theory.embedding and found is not None:
            found = replace(found, producers=self._table(args, kwargs, outputs[0], found))
        elif rule is theory.add and len(inputs) == 2:
            self._sum(*inputs)
        elif rule is theory.activation:
            found = self._activation(name, inputs[0], found, outputs[0])
        if found is None and inputs:
            found = self._silent(inputs, outputs[0])
        for t in outputs:
            if found is not None:
                _mark(t, found)

    def _product(self, used: theory.Product, x: Signal, output: Tensor) -> None:
        found = theory.after_product(used, x)
        if used.weight in self._tables:
            # A tied head meets its own rows in the stream: a token's own logit adds up to fan_in/fan_out of E[y²].
            own = (used.place.fan_in / used.place.fan_out / ERRORS) ** 2
            found = replace(found, spread=found.spread + own, drift=found.drift + own)
        index = self._row_of(used.weight)
        row = self.rows[index]
        row.weight, row.place, row.image = used.weight, used.place, used.image
        row.bias = theory.second_moment(used.bias) if isinstance(used.bias, Tensor) else 0.0
        _mark(output, replace(found, producers=frozenset({index})))
        if index not in self._open:
            self._fill(index, output)

    def _table(self, args: Any, kwargs: Any, output: Tensor, found: Signal) -> frozenset[int]:
        weight = theory.weight_of(args[1] if len(args) > 1 else kwargs["weight"])
        assert weight is not None  # the rule was not silent
        self._tables.add(weight)
        index = self._row_of(weight)
        if index not in self._open:
            _mark(output, found)
            self._fill(index, output)
        return frozenset({index})

    def _row_of(self, weight: nn.Parameter) -> int:
        """The row of the layer that runs, or a new one with the parameter's name where no layer does."""
        if self._open:
            return self._open[-1]
        name = self._names.get(weight, "(a tensor outside the model)").removesuffix(".weight")
        self.rows.append(_Row(name, "Parameter", [weight]))
        return len(self.rows) - 1

    def _sum(self, a: Signal, b: Signal) -> None:
        """A stream and a branch: the branch is what was computed last."""
        if a.producers != b.producers:
            stream, branch = sorted((a, b), key=lambda s: max(s.producers, default=-1))
            self.branches += 1
            for i in branch.producers - stream.producers:
                self.rows[i].residual = True

    def _activation(self, name: str, x: Signal, found: Signal | None, output: Tensor) -> Signal:
        """Share dead or saturated, told of the layer that runs, or of the one whose output this is."""
        if found is None:
            found = self._silent((x,), output)
        for producer in x.producers:
            self.rows[producer].follows = self.rows[producer].follows or name
        index = self._open[-1] if self._open else max(x.producers, default=None)
        if index is None:
            return found
        row, data = self.rows[index], output.detach()
        row.activation = name
        image = data.dim() > 2 and any(self.rows[i].image for i in x.producers)
        zero = data == 0
        row.zero = float(zero.double().mean())
        if name in theory.RECTIFIERS:
            units = zero.transpose(1, -1) if image else zero
            row.dead = float(units.reshape(-1, units.shape[-1]).all(0).double().mean())
        if name in theory.BOUNDED:
            near = data.abs() > 0.99 if name not in ("sigmoid", "hardsigmoid") else (data - 0.5).abs() > 0.49
            row.saturated = float(near.double().mean())
        return found

    def _silent(self, inputs: tuple[Signal, ...], output: Tensor) -> Signal:
        """Theory has no rule here: the path goes on from what is measured."""
        longest = max(inputs, key=lambda s: s.depth)
        return replace(
            longest,
            second=theory.second_moment(output),
            n=theory.independent(output)[1],
            spread=0.0,
            gaussian=False,
            predicted=False,
            path=frozenset(),
            producers=frozenset().union(*(s.producers for s in inputs)),
        )


def _is_layer(module: nn.Module) -> bool:
    """A module without parts and with at most one matrix; others get a row for each of their own parameters."""
    if isinstance(module, _WHOLE):
        return True
    own = sum(p.dim() > 1 for p in module.parameters(recurse=False))
    return own <= 1 and next(module.children(), None) is None
