"""A decoder's training step in closed form: the trace's second witness, and what a planner can afford to ask. No torch.

`count` writes down the kernels that one step of a GPT or a Llama launches on a GPU, each by hand from the shape: FLOPs,
bytes read and written, bytes that backward keeps. It shares no code with the tracer but the conventions of
`docs/counting.md`; `tests/test_transformer.py` holds the two equal, kind by kind.

    B batch   S sequence   N = B·S tokens   T positions   V vocabulary   L layers
    D model   F hidden   H query heads   K key-value heads   C head size   Q = H·C   E = K·C

Every count is arithmetic on + - * // and comparisons, so B, S and any size of the shape may be NumPy arrays, which
broadcast: a thousand batch sizes cost ten times what one does. int64 holds 9.2e18; give ``dtype=object`` beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bursar.errors import BadInput, UnknownName
from bursar.rules import KINDS, MODEL_KINDS

Count = Any  # an int, or an array of them


class Kernel(NamedTuple):
    """One launch. ``kind`` is a kind of `rules.KINDS`; the rest are counts."""

    kind: str
    flops: Count
    read_bytes: Count
    written_bytes: Count
    recompute_flops: Count = 0  # done again inside the kernel: flash attention's second QK^T in backward
    full_square_flops: Count = 0  # the literature's count of an attention kernel


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a model: its kernels by phase, what backward keeps of it, and its parameters."""

    forward: tuple[Kernel, ...] = ()
    backward: tuple[Kernel, ...] = ()
    recompute: tuple[Kernel, ...] = ()
    saved_bytes: Count = 0
    parameters: Count = 0

    def __add__(self, other: Piece) -> Piece:
        """One after the other."""
        return Piece(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
            self.saved_bytes + other.saved_bytes,
            self.parameters + other.parameters,
        )

    def flops(self, phase: str, kinds: Iterable[str] = MODEL_KINDS) -> Count:
        """FLOPs of ``forward``, ``backward`` or ``recompute``, of the kinds given, without `recompute_flops`."""
        return _sum(k.flops for k in getattr(self, phase) if k.kind in kinds)


class Bytes(NamedTuple):
    """Bytes of one element: of a parameter, of the stream between blocks, of a product's operands, of the loss."""

    parameter: int
    stream: int
    product: int
    loss: int

    @property
    def mixed(self) -> bool:
        """Whether autocast casts what goes into a product."""
        return self.product != self.stream


PRECISIONS = {
    "fp32": Bytes(4, 4, 4, 4),
    "tf32": Bytes(4, 4, 4, 4),
    "bf16": Bytes(2, 2, 2, 2),
    "bf16-mixed": Bytes(4, 4, 2, 4),
}


class Update(NamedTuple):
    """What an optimizer costs per parameter: FLOPs, elements read and written, state tensors."""

    flops: int
    read: int
    written: int
    states: int


# One row per optimizer of elementwise list kernels, kernel by kernel (FLOPs, reads, writes of each):
#   mul_ add_ sqrt div_ 1,1,1   add_(other) 1,2,1   lerp_ addcmul_ 3,2,1   addcdiv_ 3,3,1   sign_ 1,1,1
# Those with norms or matrices (LAMB, Adafactor, Muon, 8-bit) cost per tensor, not per parameter: trace them.
UPDATES = {
    "sgd": Update(1, 2, 1, 0),  # add_
    "momentum": Update(3, 5, 3, 1),  # mul_ add_ add_
    "nesterov": Update(4, 7, 4, 1),  # mul_ add_ add_ add_
    "adagrad": Update(9, 8, 5, 1),  # addcmul_ sqrt add_ mul addcdiv_
    "rmsprop": Update(9, 8, 5, 1),  # mul_ addcmul_ sqrt add_ addcdiv_
    "adam": Update(13, 11, 7, 2),  # lerp_ mul_ addcmul_ sqrt div_ add_ addcdiv_
    "adamw": Update(14, 12, 8, 2),  # mul_, then adam's
    "lion": Update(8, 7, 4, 1),  # lerp sign_ lerp_ add_
}


@dataclass(frozen=True, slots=True)
class Totals:
    """One training step on one device: FLOPs, bytes, parameters; ints, or arrays as B and S were."""

    n_blocks: Count
    embedding: Piece
    block: Piece  # one of them
    head: Piece  # the last norm, the head and the loss
    update: Kernel
    saved_bytes: Count  # what backward keeps, at its fullest
    block_input_bytes: Count  # the tensor between two blocks: all a checkpointed block keeps
    parameter_bytes: Count
    state_bytes: Count

    @property
    def parameters(self) -> Count:
        """Trainable parameters, a tied table counted once."""
        return self._of(lambda piece: piece.parameters)

    @property
    def forward(self) -> Count:
        """Forward FLOPs of the kinds matmul and attention."""
        return self._of(lambda piece: piece.flops("forward"))

    @property
    def backward(self) -> Count:
        """Backward FLOPs, likewise."""
        return self._of(lambda piece: piece.flops("backward"))

    @property
    def recompute(self) -> Count:
        """What a checkpoint does again, and the scores that a fused attention does again in backward."""
        return self._of(lambda p: p.flops("recompute") + _sum(k.recompute_flops for k in p.backward))

    @property
    def model(self) -> Count:
        """Forward + backward."""
        return self.forward + self.backward

    @property
    def hardware(self) -> Count:
        """Model FLOPs + recompute."""
        return self.model + self.recompute

    @property
    def by_kind(self) -> dict[str, Count]:
        """FLOPs of the step by kind, all phases."""
        found: dict[str, Count] = dict.fromkeys(KINDS, 0)
        for times, kernel in self._kernels():
            found[kernel.kind] = found[kernel.kind] + times * (kernel.flops + kernel.recompute_flops)
        return found

    @property
    def bytes_moved(self) -> dict[str, Count]:
        """Bytes read and written by kind, all phases."""
        found: dict[str, Count] = dict.fromkeys(KINDS, 0)
        for times, kernel in self._kernels():
            found[kernel.kind] = found[kernel.kind] + times * (kernel.read_bytes + kernel.written_bytes)
        return found

    @property
    def attention(self) -> Count:
        """FLOPs of the attention kind over all phases: what the mask lets through."""
        return self.by_kind["attention"]

    def _of(self, ask: Any) -> Count:
        return ask(self.embedding) + self.n_blocks * ask(self.block) + ask(self.head)

    def _kernels(self) -> Iterable[tuple[Count, Kernel]]:
        for times, piece in ((1, self.embedding), (self.n_blocks, self.block), (1, self.head)):
            for kernel in (*piece.forward, *piece.backward, *piece.recompute):
                yield times, kernel
        yield 1, self.update


def count(
    shape: Any,
    B: Count,
    S: Count,
    *,
    precision: str = "fp32",
    optimizer: str = "adamw",
    recompute: str = "none",
) -> Totals:
    """One training step of the decoder ``shape`` (`architecture.Transformer`, or any record with its fields).

    B samples of S tokens, next-token cross-entropy, gradients freed after the update. ``precision`` is fp32, tf32, bf16
    or bf16-mixed, ``recompute`` none or full (every block checkpointed), as for `bursar.step`.

    Raises UnknownName for what is in no table, and BadInput for a shape the closed form does not cover: BERT, and in 16
    bits heads that are no multiple of 8 (torch pads them) or wider than 256 (no flash kernel).
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS, "The closed form has no loss scaling; trace it.")
    if optimizer not in UPDATES:
        raise UnknownName("closed form of an optimizer", optimizer, UPDATES, "bursar step traces the others.")
    if recompute not in ("none", "full"):
        raise UnknownName("recompute in closed form", recompute, ("none", "full"), "bursar step traces the others.")
    if shape.family not in ("gpt", "llama"):
        raise BadInput(f"{shape.name}: the closed form covers the decoders of family gpt and llama, not {shape.family}")
    b = PRECISIONS[precision]
    if b.product == 2 and _any((shape.head_dim % 8 != 0) | (shape.head_dim > 256)):
        raise BadInput(
            f"{shape.name}: in {precision} the closed form takes heads of 8, 16, … 256, not {shape.head_dim}; trace it"
        )
    N, D, L = B * S, shape.d_model, shape.n_layers
    before = _embedding(shape, B, S, b)
    block = _block(shape, B, S, b)
    head = _head(shape, N, b)
    stream = N * D * b.stream
    saved = before.saved_bytes + L * block.saved_bytes + head.saved_bytes
    if recompute == "full":
        # Either all blocks' inputs and the head are held, or, the head being done, one block made again in full
        inputs = before.saved_bytes + L * stream
        saved = _most(inputs + head.saved_bytes, inputs + block.saved_bytes - stream)
        # The second forward stops at the last tensor it has to make: the operands of the block's last product
        block = replace(block, recompute=block.forward[:-2], saved_bytes=stream)
    parameters = before.parameters + L * block.parameters + head.parameters
    update = UPDATES[optimizer]
    p = parameters * b.parameter
    return Totals(
        L, before, block, head, Kernel("optimizer", update.flops * parameters, update.read * p, update.written * p),
        saved, stream, p, update.states * p,
    )  # fmt: skip


# ---- the parts of a decoder


def _embedding(shape: Any, B: Count, S: Count, b: Bytes) -> Piece:
    """Tokens to the stream. Learned positions are looked up once and added; rotary ones are a table of angles."""
    N, D, V, T, s = B * S, shape.d_model, shape.vocab_size, shape.max_seq_len, b.parameter
    tokens = Piece((_lookup(N, D, s),), (_lookup_backward(N, V, D, s),), parameters=V * D)
    if shape.position == "learned":
        forward = (_fill(8 * S), _lookup(S, D, s), _pointwise(N * D, N * D * s + S * D * s, N * D * s))
        backward = (_reduce(N * D, N * D * s, S * D * s), _lookup_backward(S, T, D, s))
        return tokens + Piece(forward, backward, saved_bytes=8 * S, parameters=T * D)  # the positions' indices
    half = shape.head_dim // 2
    small = [_pointwise(half, size * half, 4 * half) for size in (8, 4, 4, 4)]  # 1 / theta^(2i/C)
    table = [_pointwise(S * half, 8 * S + 4 * half, 4 * S * half)] + 2 * [_pointwise(S * half, *2 * [4 * S * half])]
    cast = 2 * [_copy(4 * S * half, b.stream * S * half)] if b.stream != 4 else []
    angles = (_fill(8 * S), _fill(8 * half), *small, *table, *cast)
    return tokens + Piece(angles, saved_bytes=2 * S * half * b.stream)  # cos and sin, for every layer's backward


def _block(shape: Any, B: Count, S: Count, b: Bytes) -> Piece:
    """x + attention(norm(x)), then x + mlp(norm(x)). The last two kernels of forward are a product and a sum."""
    N, D, F, bias = B * S, shape.d_model, shape.d_ff, shape.bias
    H, K, C = shape.n_heads, shape.n_kv_heads, shape.head_dim
    fused = shape.family == "gpt"  # one matrix for queries, keys and values
    if fused:
        joined = Piece(backward=(_copy(*2 * [3 * N * D * b.product]),))  # the three gradients side by side
        project = _linear(N, D, 3 * D, b, bias) + joined
    else:
        q, k, v = (_linear(N, D, heads * C, b, bias) for heads in (H, K, K))
        project = q + k + v + _sums(2, N * D, b) + _turned(N, S, H, C, b) + _turned(N, S, K, C, b)
        project = project + _relaid(N, H, C, b.product, H > 1, S) + _relaid(N, K, C, b.product, K > 1, S)
    core = _attention(B, S, H, K, C, b, fused)
    attention = _norm(shape, N, b) + project + core + _linear(N, H * C, D, b, bias, cast=False) + _residual(N * D, b)
    inner = 2 if shape.gated_mlp else 1  # matrices D -> F
    widen = _sum_pieces([_linear(N, D, F, b, bias)] * inner) + _sums(inner - 1, N * D, b)
    narrow = _linear(N, F, D, b, bias, cast=False) + _residual(N * D, b)
    return attention + _norm(shape, N, b) + widen + _activation(N * F, b, shape.gated_mlp) + narrow


def _head(shape: Any, N: Count, b: Bytes) -> Piece:
    """The last norm, D -> V, and mean cross-entropy. A tied table's two gradients are added."""
    D, V = shape.d_model, shape.vocab_size
    made = _norm(shape, N, b) + _linear(N, D, V, b, bias=False) + _cross_entropy(N, V, b)
    if not shape.tied_embeddings:
        return made
    add = _pointwise(V * D, 2 * V * D * b.parameter, V * D * b.parameter)
    return replace(made, backward=(*made.backward, add), parameters=made.parameters - V * D)


def _linear(N: Count, n: Count, m: Count, b: Bytes, bias: bool, cast: bool = True) -> Piece:
    """(N, n) @ (n, m): 2Nnm forward, as much for dX and for dW.

    Under autocast it casts its weights, and its input where that is of the stream (``cast``); backward keeps what was
    multiplied, and casts the gradients back. Without autocast whoever made the input keeps it.
    """
    e, weights, flops = b.product, n * m, 2 * N * n * m
    to_product: list[Kernel] = []
    back: list[Kernel] = []
    saved: Count = 0
    if b.mixed:
        if cast:
            to_product.append(_copy(N * n * b.stream, N * n * e))
            back.append(_copy(N * n * e, N * n * b.stream))
            saved = saved + N * n * e
        for size in (weights, m) if bias else (weights,):
            to_product.append(_copy(size * b.parameter, size * e))
            back.append(_copy(size * e, size * b.parameter))
        saved = saved + weights * e
    product = Kernel("matmul", flops, (N * n + weights + m * bias) * e, N * m * e)
    d_input = Kernel("matmul", flops, (N * m + weights) * e, N * n * e)
    d_weight = Kernel("matmul", flops, (N * m + N * n) * e, weights * e)
    d_bias = [_reduce(N * m, N * m * e, m * e)] if bias else []
    return Piece((*to_product, product), (d_input, d_weight, *d_bias, *back), (), saved, weights + m * bias)


def _attention(B: Count, S: Count, H: Count, K: Count, C: Count, b: Bytes, fused: bool) -> Piece:
    """softmax(QK^T)V under a causal mask, by the kernel torch takes on CUDA.

    Flash in 16 bits; in fp32 memory-efficient, and where key-value heads are shared the unfused products, full-square.
    """
    N, Q, E, e = B * S, H * C, K * C, b.product
    shared = _all(K < H)
    if e == 4 and shared:
        return _unfused_attention(B, S, H, K, C, e)
    pairs = S * (S + 1) // 2
    forward, square = 4 * B * H * pairs * C, 4 * B * H * S * S * C
    # Statistics: log-sum-exp per query, padded to 32 by the efficient kernel; flash's dropout seed 24 B, efficient's 16
    stats = 4 * B * H * S + 24 if e == 2 else 4 * B * H * (-(-S // 32) * 32) + 16
    inputs, out = N * (Q + 2 * E) * e, N * Q * e
    kernel = Kernel("attention", forward, inputs, out + stats, 0, square)
    scores = 2 * B * H * pairs * C
    backward = Kernel("attention", 2 * forward, inputs + 2 * out + stats, inputs, scores, 2 * square)
    saved = inputs + out + stats  # q, k, v, the output and the statistics
    if b.mixed and not fused:  # rotary queries and keys are of the stream: cast for the product, gradients back
        casts = [_copy(n * b.stream, n * e) for n in (N * Q, N * E)]
        backs = [_copy(n * e, n * b.stream) for n in (N * Q, N * E)]
        made = Piece((*casts, kernel), (backward, *backs), (), saved)
    else:
        made = Piece((kernel,), (backward,), (), saved)
    if fused or e == 4:
        return made
    # flash lays its output as its queries, head by head: the next product wants tokens together, a copy that it keeps
    moves = (H > 1) * (S > 1)
    return made + Piece((_copy(*2 * [out * moves]),), saved_bytes=out * moves)


def _unfused_attention(B: Count, S: Count, H: Count, K: Count, C: Count, e: int) -> Piece:
    """aten's math path: q and k scaled by the root of the scale each, a causal bias, S x S scores in memory."""
    Q, E, scores, flops = B * S * H * C, B * S * K * C, B * H * S * S, 2 * B * H * S * S * C
    scale = _pointwise(Q, Q * e, Q * e)
    bias = (_fill(S * S), _copy(S * S, S * S), _fill(e), _fill(e), _pointwise(S * S, S * S + 2 * e, S * S * e))
    repeat = _copy(E * e, Q * e)
    relaid, joined = Q * e * (B > 1), E * e * (K > 1)  # gradients copied to the other order, where there is one
    product = Kernel("matmul", flops, 2 * Q * e, scores * e)  # two of (S, C) to one of (S, S)
    apply = Kernel("matmul", flops, (scores + Q) * e, Q * e)  # (S, S) and (S, C) to (S, C)
    forward = (
        scale, *bias, repeat, repeat, scale, product,
        _pointwise(scores, (scores + S * S) * e, scores * e),
        Kernel("reduction", 5 * scores, scores * e, scores * e),
        apply, _copy(Q * e, Q * e),
    )  # fmt: skip
    backward = (
        _copy(relaid, relaid), apply, product,
        Kernel("reduction", 4 * scores, 2 * scores * e, scores * e),
        apply, apply, scale, _reduce(Q, Q * e, E * e), _reduce(Q, Q * e, E * e), scale,
        _copy(joined, joined),  # the values' gradient, tokens together
    )  # fmt: skip
    return Piece(forward, backward, (), (4 * Q + scores) * e)  # q and k scaled, v repeated, the output; the softmax


def _turned(N: Count, S: Count, heads: Count, C: Count, b: Bytes) -> Piece:
    """Rotary positions: a·cos - b·sin, b·cos + a·sin on the halves, 6 FLOPs a pair; and back. The angles are the
    stream's, so under autocast the result is too."""
    half, s, e = N * heads * C // 2, b.stream, b.product
    angles = S * (C // 2) * s
    into = 4 * [_pointwise(half, half * e + angles, half * s)] + 2 * [_pointwise(half, 2 * half * s, half * s)]
    out = 4 * [_pointwise(half, half * s + angles, half * s)] + [_pointwise(half, half * s, half * s)]
    sums = 2 * [_pointwise(half, 2 * half * e, half * e)]
    cast = 4 * [_copy(half * s, half * e)] if b.mixed else []
    join = [_copy(2 * half * s, 2 * half * s)], [_copy(2 * half * e, 2 * half * e)]
    return Piece((*into, *join[0]), (*out, *sums, *cast, *join[1]))


def _relaid(N: Count, heads: Count, C: Count, e: int, several: Count, S: Count) -> Piece:
    """A gradient that lies head by head, copied so that tokens lie together; with one head it does already."""
    n = N * heads * C * e * several * (S > 1)
    return Piece(backward=(_copy(n, n),))


def _norm(shape: Any, N: Count, b: Bytes) -> Piece:
    """LayerNorm 7 and 12 FLOPs per element, RMSNorm 4 and 9. It keeps its input and fp32 statistics per token; without
    autocast its output too, for the products that read it. Its input forks, so backward adds two gradients there."""
    D, s = shape.d_model, b.stream
    layer = shape.norm == "layernorm"
    n_stats, n_weights, flops, back = (2, 2 * D, 7, 12) if layer else (1, D, 4, 9)
    x, stats, weights = N * D * s, 4 * N * n_stats, n_weights * b.parameter
    forward = Kernel("reduction", flops * N * D, x + weights, x + stats)
    backward = Kernel("reduction", back * N * D, 2 * x + stats + weights, x + weights)
    return Piece((forward,), (backward,), (), x + stats + (0 if b.mixed else x), n_weights)


def _residual(n: Count, b: Bytes) -> Piece:
    """x + f(x), and the sum of its two gradients; under autocast the branch's is cast."""
    s, e = b.stream, b.product
    cast = [_copy(n * s, n * e)] if b.mixed else []
    return Piece((_pointwise(n, n * (s + e), n * s),), (*cast, _pointwise(n, 2 * n * s, n * s)))


def _sums(times: int, n: Count, b: Bytes) -> Piece:
    """Gradients of a tensor that several products read, added up."""
    return Piece(backward=tuple(times * [_pointwise(n, 2 * n * b.stream, n * b.stream)]))


def _activation(n: Count, b: Bytes, gated: bool) -> Piece:
    """GELU or SiLU, 1 FLOP each way; gated, times the other branch. Each tensor on the way is kept."""
    e = b.product
    one, two = _pointwise(n, n * e, n * e), _pointwise(n, 2 * n * e, n * e)
    if gated:
        return Piece((one, two), (two, two, two), (), 4 * n * e)
    return Piece((one,), (two,), (), 2 * n * e)


def _cross_entropy(N: Count, V: Count, b: Bytes) -> Piece:
    """log-softmax and the mean of the targets' log-probabilities; autocast computes both in fp32."""
    n, x = N * V, b.loss
    forward = [Kernel("reduction", 5 * n, n * x, n * x), Kernel("reduction", N, N * (8 + x), 2 * x)]
    backward = [_fill(x), Kernel("reduction", 0, 8 * N + x, n * x), Kernel("reduction", 4 * n, 2 * n * x, n * x)]
    if b.mixed:
        forward = [_copy(n * b.product, n * x), *forward]
        backward = [*backward, _copy(n * x, n * b.product)]
    return Piece(tuple(forward), tuple(backward), (), n * x + x)  # the log-probabilities, and the targets' total weight


# ---- kernels


def _copy(read_bytes: Count, written_bytes: Count) -> Kernel:
    return Kernel("copy", 0, read_bytes, written_bytes)


def _fill(n_bytes: Count) -> Kernel:
    return Kernel("copy", 0, 0, n_bytes)


def _pointwise(flops: Count, read_bytes: Count, written_bytes: Count) -> Kernel:
    return Kernel("elementwise", flops, read_bytes, written_bytes)


def _reduce(n: Count, read_bytes: Count, written_bytes: Count) -> Kernel:
    return Kernel("reduction", n, read_bytes, written_bytes)


def _lookup(n: Count, width: Count, e: int) -> Kernel:
    """n rows of a table, their 8-byte indices read."""
    return Kernel("embedding", 0, 8 * n + n * width * e, n * width * e)


def _lookup_backward(n: Count, rows: Count, width: Count, e: int) -> Kernel:
    """Zeros of the table's size, each of n rows added to its place."""
    grad = n * width * e
    return Kernel("embedding", n * width, 8 * n + 2 * grad, rows * width * e + grad)


# ---- arithmetic that ints and arrays share


def _sum(counts: Iterable[Count]) -> Count:
    total: Count = 0
    for n in counts:
        total = total + n
    return total


def _sum_pieces(pieces: Iterable[Piece]) -> Piece:
    total = Piece()
    for piece in pieces:
        total = total + piece
    return total


def _most(a: Count, b: Count) -> Count:
    return a + (b - a) * (b > a)


def _any(condition: Any) -> bool:
    return bool(condition.any() if hasattr(condition, "any") else condition)


def _all(condition: Any) -> bool:
    """One answer for all shapes. Raises BadInput where shapes of an array differ in which kernel they take."""
    if hasattr(condition, "all") and condition.any() != condition.all():
        raise BadInput("shapes with and without shared key-value heads take different kernels; count them apart")
    return _any(condition)
