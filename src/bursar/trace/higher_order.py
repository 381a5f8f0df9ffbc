"""torch's higher-order operators, whose arguments are functions: loops run, branches weighed, attention by its mask.

`torch.compile` keeps them whole; eager torch runs their bodies, and so does a trace, above autograd, where they are
ordinary code. Two things are data and not code. How often a `while_loop` goes round is found by running its condition,
which mostly counts. Which branch a `cond` takes is looked up where it is known, else the one with more FLOPs counts,
and the ledger says so.

Flex attention is one kernel that never writes the scores; which pairs it visits is found by asking the mask function
about every pair, on the host. A Triton kernel is one row with its own name, uncounted until it has a rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from bursar import rules
from bursar.errors import TraceFailed
from bursar.ledger import Call, Row
from bursar.rules import Op

if TYPE_CHECKING:
    from bursar.trace.patches import Undo
    from bursar.trace.recorder import Recorder

MOST_TRIPS = 10_000  # about a minute of tracing
MOST_PAIRS_AT_ONCE = 2**22
MOST_PAIRS = 2**30  # beyond, asking the mask about each takes more than some ten seconds

UNKNOWN_MASK = "flex attention's mask reads data or does not run on index tensors: every pair is counted"
UNKNOWN_BRANCH = "which branch of torch.cond runs is data: the one with more FLOPs is counted"
FLEX = "bursar::flex_attention"


def patch(undo: Undo, recorder: Recorder) -> None:
    """Take the operators of `EAGER` apart from now on, until ``undo``."""
    _define()
    plain: Any = torch._ops.HigherOrderOperator.__call__

    @functools.wraps(plain)
    def call(operator: Any, *args: Any, **kwargs: Any) -> Any:
        run = EAGER.get(operator.name())
        if run is not None:
            return run(recorder, *args, **kwargs)
        try:
            return plain(operator, *args, **kwargs)
        except NotImplementedError as error:
            if "HigherOrderOperator" not in str(error):
                raise
            raise TraceFailed(
                f"the higher-order operator {operator.name()} is not one that a trace can take apart (it knows "
                f"{', '.join(sorted(EAGER))}). Write its body as plain torch code for the trace."
            ) from error

    undo.set(torch._ops.HigherOrderOperator, "__call__", call)


# ---------------------------------------------------------------------------------------------------- control flow


def _while_loop(recorder: Recorder, condition: Any, body: Any, carried: Any, additional: Any = (), **_: Any) -> Any:
    trips = 0
    while bool(condition(*carried, *additional)):  # unknown: the error of a branch on data, with the user's line
        carried = body(*carried, *additional)
        trips += 1
        if trips > MOST_TRIPS:
            raise TraceFailed(f"a while_loop went round more than {MOST_TRIPS} times; trace it with fewer")
    _assume(recorder, f"a while_loop went round {trips} times, found by running its condition")
    return tuple(carried)


def _cond(recorder: Recorder, predicate: Any, true_body: Any, false_body: Any, operands: Any = ()) -> Any:
    try:
        taken = bool(predicate)
    except DataDependentOutputException:
        _assume(recorder, UNKNOWN_BRANCH)
        taken = _weigh(recorder, true_body, operands) >= _weigh(recorder, false_body, operands)
    return (true_body if taken else false_body)(*operands)


def _assume(recorder: Recorder, text: str) -> None:
    recorder.values.relied_on[text] = None


def _weigh(recorder: Recorder, body: Any, operands: Any) -> int:
    """FLOPs of a branch, tried out beside the ledger."""
    scales = type(recorder)(recorder.mode, recorder.device_type, recorder.tf32)
    scales.values = recorder.values
    recorder.muted += 1
    try:
        with torch.no_grad(), scales:
            body(*operands)
    finally:
        recorder.muted -= 1
    return sum(row.work.flops for row in scales.rows)


def _map(recorder: Recorder, body: Any, xs: Any, additional: Any = ()) -> Any:
    n = pytree.tree_leaves(xs)[0].shape[0]
    results = [body(*pytree.tree_map(lambda x, i=i: x[i], tuple(xs)), *additional) for i in range(n)]
    return _stacked(results)


def _scan(recorder: Recorder, body: Any, init: Any, xs: Any, additional: Any = ()) -> Any:
    carry, kept = list(init), []
    for i in range(xs[0].shape[0] if xs else 0):
        found = pytree.tree_leaves(body(*carry, *[x[i] for x in xs], *additional))
        carry, out = found[: len(carry)], found[len(carry) :]
        kept.append(out)
    return [*carry, *(_stacked(kept) if kept else [])]


def _stacked(results: list[Any]) -> Any:
    leaves = [pytree.tree_flatten(r) for r in results]
    stacked = [torch.stack(parts) for parts in zip(*(flat for flat, _ in leaves), strict=True)]
    return pytree.tree_unflatten(stacked, leaves[0][1])


# ----------------------------------------------------------------------------------------------------- attention


def _flex(
    recorder: Recorder, query: Any, key: Any, value: Any, score_mod: Any, block_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """(out, logsumexp, maxima) of softmax(score_mod(QK^T) where the mask is true) V, one kernel."""
    pairs = _mask_pairs(block_mask, query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if pairs is None:
        _assume(recorder, UNKNOWN_MASK)
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    out, logsumexp = torch.ops.bursar.flex_attention(query, key, value, pairs)
    return out, logsumexp, logsumexp.detach()


def _mask_pairs(block_mask: Any, B: int, H: int, S: int, T: int) -> int | None:
    """Pairs that the mask lets through over all samples and heads; None when only the data can tell."""
    mask, blocks = block_mask[-1], block_mask[2]
    samples, heads = blocks.shape[:2] if isinstance(blocks, torch.Tensor) else (1, 1)  # 1: the same for all
    if samples * heads * S * T > MOST_PAIRS:
        return None
    rows = max(1, MOST_PAIRS_AT_ONCE // max(1, samples * heads * T))
    found = 0
    with _disable_current_modes(), torch.no_grad():
        b, h, k = (torch.arange(n, device="cpu").view(shape) for n, shape in
                   ((samples, (-1, 1, 1, 1)), (heads, (1, -1, 1, 1)), (T, (1, 1, 1, -1))))  # fmt: skip
        for first in range(0, S, rows):
            q = torch.arange(first, min(S, first + rows), device="cpu").view(1, 1, -1, 1)
            try:
                seen = mask(b, h, q, k)
                found += int(seen.expand(samples, heads, q.shape[2], T).sum())
            except Exception:  # the user's function, written for one index at a time and maybe for captured tensors
                return None
    return found * (B // samples) * (H // heads)


def _flex_shapes(query: Any, key: Any, value: Any, pairs: int) -> Any:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _define() -> None:
    """Register flex attention as an op with a gradient, once per process."""
    if _libraries:
        return
    flex = torch.library.custom_op(
        FLEX, _never, mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value, int pairs) -> (Tensor, Tensor)",
    )  # fmt: skip
    flex.register_fake(_flex_shapes)
    back = torch.library.custom_op(
        FLEX + "_backward", _never, mutates_args=(),
        schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, int pairs) "
               "-> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    back.register_fake(lambda grad, q, k, v, out, logsumexp, pairs: tuple(torch.empty_like(t) for t in (q, k, v)))

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.pairs = inputs[3]

    def gradient(ctx: Any, grad_out: Any, grad_logsumexp: Any) -> Any:
        q, k, v, out, logsumexp = ctx.saved_tensors
        return (*torch.ops.bursar.flex_attention_backward(grad_out, q, k, v, out, logsumexp, ctx.pairs), None)

    flex.register_autograd(gradient, setup_context=save)
    _libraries.extend((flex, back))


_libraries: list[Any] = []


def _never(*args: Any) -> Any:
    raise AssertionError("flex attention's stand-in was called outside a trace")


# -------------------------------------------------------------------------------------------------- Triton kernels


def _triton(recorder: Recorder, *, kernel_idx: int, kwargs: dict[str, Any], **_: Any) -> None:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(kernel_idx)
    kernel = getattr(kernel, "fn", kernel)  # autotuned, or compiled
    name = f"triton.{getattr(kernel, '__name__', 'kernel')}"
    seen: dict[int, None] = {}
    op = Op(name, {k: recorder._describe(v, seen) for k, v in kwargs.items()}, ())
    kind, work = rules.cost(op) or ("uncounted", op.moving())
    phase = recorder._phase(torch._C._current_autograd_node() if recorder.backward_depth else None)
    shapes, dtypes = tuple(t.shape for t in op.inputs), tuple(t.dtype for t in op.inputs)
    dtype = next((t.dtype for t in op.inputs if t.is_float), "none")
    recorder.rows.append(Row(phase, kind, name, recorder.module, dtype, shapes, dtypes, work, 0, False))
    if recorder.calls is not None:
        recorder.calls.append(Call(name, (), (), (), 0, 0))


def _triton_functional(recorder: Recorder, *, kwargs: dict[str, Any], tensors_to_clone: list[str], **more: Any) -> Any:
    copies = {k: v.clone() if k in tensors_to_clone else v for k, v in kwargs.items()}
    _triton(recorder, kwargs=copies, **more)
    return {k: copies[k] for k in tensors_to_clone}


EAGER: dict[str, Callable[..., Any]] = {
    "while_loop": _while_loop,
    "cond": _cond,
    "map_impl": _map,
    "scan": _scan,
    "flex_attention": _flex,
    "triton_kernel_wrapper_mutation": _triton,
    "triton_kernel_wrapper_functional": _triton_functional,
}
