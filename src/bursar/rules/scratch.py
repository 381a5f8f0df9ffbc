"""Scratch on the CPU: what a kernel takes from the allocator for itself and gives back before it returns. No torch.

No op shows it, and the allocator's record does. Each function says, from an op's shapes, how many bytes stand above its
outputs at the kernel's fullest moment. torch's own kernels are read off their source, and were held against the record
of single ops (`tests/test_scratch.py`), so they are exact; oneDNN's depend on its choice of kernel, which follows the
instruction set, the threads and the version: those are `LIBRARY`, their figures here are estimates, and
`bursar.trace.scratch` may ask the library itself by one call.

    B batch   H heads   S queries   K keys   D head   T threads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bursar.rules import Op, Tensor

SIZES = {"fp64": 8, "int64": 8, "complex64": 8, "complex128": 16, "fp32": 4, "int32": 4, "bf16": 2, "fp16": 2,
         "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "fp8": 1}  # fmt: skip
HALF = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Processor:
    """What a kernel's scratch depends on besides its shapes."""

    threads: int
    isa: str  # "amx", "avx512", "avx2" or "other": oneDNN packs and blocks by it


SCRATCH: dict[str, Callable[[Op, Processor], int]] = {}
LIBRARY: dict[str, str] = {}  # oneDNN's ops, and what their scratch is called


def scratch(*names: str, library: str = "") -> Callable[[Callable[[Op, Processor], int]], Any]:
    """Register the decorated function as the scratch of the ops ``names``; ``library`` says whose and what for."""

    def register(n_bytes: Callable[[Op, Processor], int]) -> Callable[[Op, Processor], int]:
        for name in names:
            if name in SCRATCH:
                raise ValueError(f"{name} already has its scratch, {SCRATCH[name].__name__}")
            SCRATCH[name] = n_bytes
            if library:
                LIBRARY[name] = library
        return n_bytes

    return register


def scratch_bytes(op: Op, cpu: Processor) -> int:
    """Bytes above its outputs that ``op`` holds while it runs, by formula; 0 where nobody has written one."""
    found = SCRATCH.get(op.name)
    if found is not None:
        return max(0, found(op, cpu))
    return promoted(op) if "pointwise" in op.tags else 0


def library_of(op: Op) -> str:
    """The library whose choice of kernel decides the scratch, and what it is for; empty where torch's own code does."""
    found = LIBRARY.get(op.name, "")
    if found == PACKING and not any(t.dtype in HALF for t in op.inputs):
        return ""  # fp32 products are MKL's, whose buffers are its own and not the allocator's
    return found


# ---- torch's own kernels


def promoted(op: Op) -> int:
    """Operands of a dtype that is not the common one are cast whole first; so is an output in place, and cast back.

    Source: TensorIterator's promote_inputs_to_common_dtype and cast_common_dtype_to_outputs, CPU only.
    """
    inputs = [t for name, value in op.args.items() if name not in ("condition", "mask") for t in _tensors(value)]
    kinds = {t.dtype for t in inputs if t.shape} or {t.dtype for t in inputs}
    if len(kinds) < 2 or op.name.endswith("copy_"):
        return 0
    common = _common(kinds)
    cast = sum(t.numel for t in inputs if t.dtype != common) * SIZES.get(common, 4)
    for name in op.writes:
        cast += sum(t.numel for t in _tensors(op.args.get(name)) if t.dtype != common) * SIZES.get(common, 4)
    return cast


@scratch("aten.mse_loss", "aten.smooth_l1_loss", "aten.huber_loss")
def reduced_loss(op: Op, cpu: Processor) -> int:
    """The loss of each element, where the kernel adds them up; two iterators each cast what is of another dtype."""
    if not op["reduction"]:
        return promoted(op)
    kinds = {t.dtype for t in op.inputs[:2]}
    return 2 * promoted(op) + op.inputs[0].numel * SIZES.get(_common(kinds), 4) + _mean_of_losses(op)


@scratch("aten.binary_cross_entropy")
def binary_cross_entropy(op: Op, cpu: Processor) -> int:
    """The losses of the elements stay with the output (`trace.scratch.Scratch.as_real`)."""
    return _mean_of_losses(op)


def _mean_of_losses(op: Op) -> int:
    x = op.inputs[0]
    return _mean_of_half(x.numel, 1) if x.dtype in HALF and op["reduction"] == 1 else 0


@scratch("aten.mean")
def mean(op: Op, cpu: Processor) -> int:
    """In bf16 the sum is taken of an fp32 copy into an fp32 output."""
    x = op.inputs[0]
    return _mean_of_half(x.numel, op.output.numel) if x.dtype in HALF else 0


@scratch("aten.native_layer_norm_backward")
def layer_norm_backward(op: Op, cpu: Processor) -> int:
    """Each thread sums its own dgamma and dbeta: 2·T vectors (layer_norm_kernel.cpp)."""
    weight = op["weight"]
    wants = (op["output_mask"] or (True, True, True))[1:]
    return 2 * cpu.threads * weight.numel * SIZES.get(weight.dtype, 4) if weight is not None and any(wants) else 0


@scratch("aten.native_group_norm_backward")
def group_norm_backward(op: Op, cpu: Processor) -> int:
    """Two fp32 sums for each sample and channel (group_norm_kernel.cpp)."""
    return 2 * 4 * int(op["N"]) * int(op["C"])


@scratch("aten.native_batch_norm", "aten._native_batch_norm_legit")
def batch_norm(op: Op, cpu: Processor) -> int:
    """Scale and shift by channel."""
    return 2 * 4 * int(op.inputs[0].shape[1]) if op.inputs[0].dtype != "fp64" else 0


@scratch("aten.native_batch_norm_backward")
def batch_norm_backward(op: Op, cpu: Processor) -> int:
    """The input's gradient is made twice, the first let go (batch_norm_backward_cpu, contiguous path)."""
    x = op["input"]
    wants = (op["output_mask"] or (True, True, True))[0]
    return x.numel * SIZES.get(x.dtype, 4) if wants else 0


@scratch("aten.binary_cross_entropy_with_logits")
def loss_of_logits(op: Op, cpu: Processor) -> int:
    """The logarithm and the loss of each element, or a product with the target (Loss.cpp)."""
    x = op.inputs[0]
    return (2 if op["reduction"] else 1) * x.numel * SIZES.get(x.dtype, 4)


@scratch("aten.logsumexp")
def logsumexp(op: Op, cpu: Processor) -> int:
    """The exponentials."""
    return op.inputs[0].numel * SIZES.get(op.inputs[0].dtype, 4)


@scratch("aten.native_dropout", "aten.native_dropout_backward")
def dropout(op: Op, cpu: Processor) -> int:
    """input · mask before it is scaled; in backward the mask as floats."""
    return op.output.numel * SIZES.get(op.output.dtype, 4)


@scratch("aten.upsample_nearest2d", "aten.upsample_bilinear2d")
def upsample(op: Op, cpu: Processor) -> int:
    """Input and output once more with the channels last (UpSampleKernel.cpp)."""
    x = op.inputs[0]
    return (x.numel + op.output.numel) * SIZES.get(x.dtype, 4)


# Arguments, by place, that a kernel copies whole where they are not contiguous
CONTIGUOUS = {
    "aten.embedding_dense_backward": (0,), "aten.native_layer_norm": (0,), "aten.native_layer_norm_backward": (0, 1),
    "aten._softmax": (0,), "aten._softmax_backward_data": (0, 1), "aten._log_softmax": (0,),
    "aten._log_softmax_backward_data": (0, 1), "aten.nll_loss_forward": (0,), "aten.max_pool2d_with_indices": (0,),
}  # fmt: skip

PACKING = "oneDNN's packed operands"


def _splits(op: Op) -> tuple[int, int, int]:
    """Queries and keys that a thread takes at once, and D (FlashAttentionKernel.cpp: 32, 64 or 256, and 512)."""
    S, K = op["query"].shape[-2], op["key"].shape[-2]
    split = 256 if S >= 768 else 64 if S >= 192 else 32
    return min(split, S), min(512, K), op["query"].shape[-1]


@scratch("aten._scaled_dot_product_flash_attention_for_cpu", library=PACKING)
def flash_attention(op: Op, cpu: Processor) -> int:
    """A thread's scores, their maxima and sums, and its output in fp32; in bf16 the scores again, and K and V packed
    where the instruction set multiplies bf16 (FlashAttentionKernel.cpp, size_per_thread and need_pack)."""
    q, kv, D = _splits(op)
    n = cpu.threads * 4 * (q * kv + 2 * q + q * D)
    if op["query"].dtype in HALF:
        n += cpu.threads * 2 * q * kv
        if cpu.isa == "amx":
            B, H = op["query"].shape[:2]
            n += 2 * 2 * B * H * op["key"].shape[-2] * D + cpu.threads * 2 * kv * D
    return n


@scratch("aten._scaled_dot_product_flash_attention_for_cpu_backward", library=PACKING)
def flash_attention_backward(op: Op, cpu: Processor) -> int:
    """A thread's scores and their gradients, in fp32 and again in bf16 where that is the dtype; a sum per query."""
    q, kv, _ = _splits(op)
    half = op["query"].dtype in HALF
    return cpu.threads * 2 * q * kv * (6 if half else 4) + 4 * q


# ---- oneDNN's kernels: estimates. `bursar.trace.scratch` asks the library for the figure


@scratch("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.addmv", library=PACKING)
def product(op: Op, cpu: Processor) -> int:
    """Half precision: the second operand packed for the tile registers, a mebibyte at a time; a tile's accumulators.

    MKL multiplies fp32 with buffers of its own.
    """
    found = [t for t in op.inputs if len(t.shape) >= 2][-2:]
    if not any(t.dtype in HALF for t in op.inputs) or not found or cpu.isa != "amx":
        return 0
    second = found[-1]
    return min(2 * second.shape[-1] * second.shape[-2], 2**20) + 5120 * cpu.threads


BLOCKS = "oneDNN's blocked layouts"


@scratch("aten.convolution", library=BLOCKS)
def convolution(op: Op, cpu: Processor) -> int:
    """Input, weight and output in blocks of channels beside the plain ones; the input's are gone when the output is
    put back (mkldnn_convolution: reorder, convolve, reorder).
    """
    x, w, y = op["input"], op["weight"], op.output
    if not _reordered(op):
        return 0
    size = SIZES.get(x.dtype, 4)
    blocked_x = _blocked(x, 1, cpu) * size if x.shape[1] >= 16 else 0
    blocked_y = _blocked(y, 1, cpu) * size
    return max(blocked_x + _blocked(w, 0, cpu) * size + blocked_y - y.numel * size, blocked_y)


@scratch("aten.convolution_backward", library=BLOCKS)
def convolution_backward(op: Op, cpu: Processor) -> int:
    """For the input's gradient: both in blocks, with the weight. For the weight's: output gradient and input in blocks,
    beside the input's gradient, which is there already.
    """
    dy, x, w = op["grad_output"], op["input"], op["weight"]
    if not _reordered(op):
        return 0
    size = SIZES.get(x.dtype, 4)
    wants_x, wants_w, _ = op["output_mask"] or (True, True, True)
    blocked_y, blocked_x = _blocked(dy, 1, cpu) * size, (_blocked(x, 1, cpu) * size if x.shape[1] >= 16 else 0)
    blocked_w = _blocked(w, 0, cpu) * size
    made = sum(t.n_bytes for t in op.outputs)
    made_x = x.numel * size if wants_x else 0
    to_x = max(blocked_y + blocked_w + blocked_x, made_x + blocked_x) if wants_x else 0
    to_w = made_x + blocked_y + blocked_x + blocked_w if wants_w else 0
    return max(to_x, to_w) - made


def _reordered(op: Op) -> bool:
    """oneDNN takes 2-d and 3-d convolutions of floats without transposition; a single group or one per channel."""
    return not op["transposed"] and op["input"].dtype in ("fp32", *HALF)


def _blocked(x: Tensor, channels: int, cpu: Processor) -> int:
    """Elements of ``x`` with its channels filled up to whole blocks of 16, or 8."""
    block = 8 if cpu.isa == "avx2" else 16
    n = x.shape[channels]
    return x.numel // max(n, 1) * (-(-n // block) * block)


WORKSPACE = "oneDNN's gates and reordered weights"


@scratch("aten.mkldnn_rnn_layer", library=WORKSPACE)
def recurrent(op: Op, cpu: Processor) -> int:
    """The gates of all steps, where the input's product is made for all at once; both weights in blocks."""
    x: Tensor = op["input"]
    size = SIZES.get(x.dtype, 4)
    gates = 4 * int(op["hidden_size"])
    weights = sum(int(op[name].numel) for name in ("weight0", "weight1"))
    return size * (weights + gates) + (4 * (x.numel // x.shape[-1]) * gates if size == 4 else 2**15)


@scratch("aten.mkldnn_rnn_layer_backward", library=WORKSPACE)
def recurrent_backward(op: Op, cpu: Processor) -> int:
    """As forward; in bf16 the gradients of the weights and of the input in fp32 beside."""
    x: Tensor = op["input"]
    size = SIZES.get(x.dtype, 4)
    gates = 4 * int(op["hidden_size"])
    weights = sum(int(op[name].numel) for name in ("weight1", "weight2"))
    if size == 4:
        return size * (weights + gates) + 4 * (x.numel // x.shape[-1]) * gates
    return (size + 4) * weights + 6 * x.numel + 2**16


def lstm_workspace(steps: int, batch: int, width: int, hidden: int, size: int) -> int:
    """Bytes that oneDNN's LSTM layer keeps from forward for backward, an estimate: it may round less.

    Gates of all steps; inputs, states, cell states of all steps and layers, and room for the gradients of inputs and
    states; each filled up to cache lines, not a multiple of 256 elements, and to whole pages (ref_rnn, set_offsets).

    >>> lstm_workspace(64, 16, 128, 128, 4), lstm_workspace(64, 16, 128, 128, 2)
    (8011776, 5636096)
    """

    def pages(rows: int, row: int, size: int) -> int:
        line = 64 // size
        row = -(-row // line) * line
        row += line if row % 256 == 0 else 0
        return -(-rows * row * size // 4096) * 4096

    rows, wide = 2 * (steps + 1) * batch, max(width, hidden)
    return (pages(steps * batch, 4 * hidden, size) + 2 * pages(rows, wide, size) + pages(rows, hidden, 4)
            + 2 * pages(rows, wide, 4) + pages(steps * batch, hidden, size))  # fmt: skip


# ---- small things


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _common(kinds: set[str]) -> str:
    """The dtype that torch computes in: the widest float, else the widest integer (bf16 with fp16 is fp32)."""
    floats = [k for k in kinds if k.startswith(("fp", "bf", "complex"))]
    if {"bf16", "fp16"} <= kinds:
        return "fp32" if "fp64" not in kinds else "fp64"
    return max(floats or kinds, key=lambda k: (SIZES.get(k, 4), k))


def _mean_of_half(elements: int, outputs: int) -> int:
    return 4 * elements + 4 * outputs
