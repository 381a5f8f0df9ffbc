"""Recurrent layers: whole layers as one kernel (cuDNN, oneDNN), and the elementwise cells of the unfused path.

T steps, B batch, I input, H hidden. Each weight matrix meets each step's vector once: 2·T·B·(elements of the weight).
A whole layer counts its products alone, for the gates ride in their epilogue; the unfused cells count 1 per function.
"""

from __future__ import annotations

from typing import Any

from bursar.rules import Op, Tensor, Work, rule


def _steps(op: Op) -> tuple[int, int]:
    """(time steps times batch, batch). A packed input is (all steps, I)."""
    return op["input"].numel // op["input"].shape[-1], (op["hx"] or op["hx_"]).shape[-2]


def _matrices(op: Op) -> list[Tensor]:
    """The weight matrices; oneDNN's layer has two, and their biases or what stands for them after."""
    weights: Any = op["weight"]
    if weights is None:
        weights = [op[n] for n in ("weight0", "weight1", "weight2") if op[n]][:2]
    return [w for w in weights if len(w.shape) == 2]


@rule("aten._cudnn_rnn", "aten.miopen_rnn", "aten.mkldnn_rnn_layer", kind="matmul")
def layers(op: Op) -> Work:
    """All steps, layers and directions: 2·T·B per element of every weight matrix."""
    return op.moving(2 * _steps(op)[0] * sum(w.numel for w in _matrices(op)))


@rule("aten._cudnn_rnn_backward", "aten.miopen_rnn_backward", "aten.mkldnn_rnn_layer_backward", kind="matmul")
def layers_backward(op: Op) -> Work:
    """dW of every matrix; back through time for all steps, the first only if the initial state wants a gradient; to
    the input of the first layer only if that wants one. Equal to what the unfused path's products add up to.
    """
    steps, batch = _steps(op)
    matrices = _matrices(op)
    wants_x, wants_h = (*(op["output_mask"] or ()), True, True)[:2]
    per_direction = 3 if op["proj_size"] else 2  # input, hidden (, projection)
    directions = 2 if op["bidirectional"] and len(matrices) > per_direction else 1
    flops = 0
    for i, w in enumerate(matrices):
        layer, which = i // (per_direction * directions), i % per_direction
        flops += 2 * steps * w.numel  # dW
        if which == 0:
            flops += 2 * steps * w.numel if layer or wants_x else 0
        else:
            flops += 2 * (steps if wants_h or which == 2 else steps - batch) * w.numel
    return op.moving(flops)


@rule("aten._thnn_fused_lstm_cell", kind="elementwise")
def lstm_cell(op: Op) -> Work:
    """Each of 4 gates: input + hidden 1, two biases 2, its function 1; c = f·c + i·g 3, tanh 1, h 1."""
    return op.moving((4 * (2 + 2 * (op["input_bias"] is not None)) + 5) * op["cx"].numel)


@rule("aten._thnn_fused_lstm_cell_backward_impl", kind="elementwise")
def lstm_cell_backward(op: Op) -> Work:
    """tanh(c) 1, do 1, dc = dh·o·(1 - t²) + dc 5, di dg df dc 4; through 3 sigmoids and a tanh 3 each."""
    return op.moving((11 + 4 * 3) * op["cx"].numel)


@rule("aten._thnn_fused_gru_cell", kind="elementwise")
def gru_cell(op: Op) -> Work:
    """r and z: sum 1, biases 2, function 1; n: r·h 1, sum 1, biases 2, function 1; h = (h - n)·z + n 3."""
    return op.moving((3 * (2 + 2 * (op["input_bias"] is not None)) + 1 + 3) * op["hx"].numel)


@rule("aten._thnn_fused_gru_cell_backward", kind="elementwise")
def gru_cell_backward(op: Op) -> Work:
    """dn through its tanh 5, dz 5, dr 4, to the old state 1, to the hidden part of n 1."""
    return op.moving(16 * op["grad_hy"].numel)
