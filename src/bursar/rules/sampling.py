"""Resizing and sampling of images: each output is a weighted sum of taps, 2 FLOPs per tap, forward and backward alike.

The weights of a position are shared by all channels and not counted.
"""

from __future__ import annotations

from bursar.rules import Op, Work, rule

# How many input values make one output value (per gradient value, how many it goes to)
TAPS = {"linear1d": 2, "bilinear2d": 4, "trilinear3d": 8, "bicubic2d": 16}
# With antialias the support widens with the factor of shrinking, in rows and then in columns
SUPPORT = {"bilinear2d_aa": 2, "bicubic2d_aa": 4, "lanczos2d_aa": 6}
NEAREST = [f"{p}{d}d" for p in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)]


@rule(*(f"aten.upsample_{n}" for n in TAPS), kind="reduction")
def interpolate(op: Op) -> Work:
    """2 per tap and output element."""
    return op.moving(2 * TAPS[op.name.removeprefix("aten.upsample_")] * op.output.numel)


@rule(*(f"aten.upsample_{n}_backward" for n in TAPS), kind="reduction")
def interpolate_backward(op: Op) -> Work:
    """Each gradient is weighted and added to its taps."""
    name = op.name.removeprefix("aten.upsample_").removesuffix("_backward")
    return op.moving(2 * TAPS[name] * op["grad_output"].numel)


@rule(*(f"aten.{n}" for n in NEAREST), kind="copy")
def nearest(op: Op) -> Work:
    """Copies one value each."""
    return op.moving()


@rule(*(f"aten.{n}_backward" for n in NEAREST), kind="reduction")
def nearest_backward(op: Op) -> Work:
    """Each gradient is added where its value came from."""
    return op.moving(op["grad_output"].numel)


def _antialiased(op: Op, before: tuple[int, ...], after: tuple[int, ...]) -> Work:
    name = op.name.removeprefix("aten._upsample_").removesuffix("_backward")
    (N, C, h, w), (_, _, H, W) = before, after
    rows, columns = (round(SUPPORT[name] * max(1.0, a / b)) for a, b in ((h, H), (w, W)))
    return op.moving(2 * N * C * (h * W * columns + H * W * rows))  # columns first, then rows


@rule(*(f"aten._upsample_{n}" for n in SUPPORT), kind="reduction")
def antialiased(op: Op) -> Work:
    """Two passes of one dimension each, the kernel widened by the factor of shrinking."""
    return _antialiased(op, op["self"].shape, op.output.shape)


@rule(*(f"aten._upsample_{n}_backward" for n in SUPPORT), kind="reduction")
def antialiased_backward(op: Op) -> Work:
    """The same taps the other way."""
    return _antialiased(op, op.output.shape, op["grad_output"].shape)


def _grid_taps(op: Op) -> int:
    """Interpolation 0 (bi- or tri-)linear, 1 nearest, 2 bicubic."""
    dims = op["grid"].shape[-1]
    return int({0: 2**dims, 1: 1, 2: 4**dims}[op["interpolation_mode"] or 0])


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten._grid_sampler_2d_cpu_fallback", "aten.cudnn_grid_sampler",
      kind="reduction")  # fmt: skip
def grid_sample(op: Op) -> Work:
    """2 per tap and output element."""
    return op.moving(2 * _grid_taps(op) * op.output.numel)


@rule("aten.grid_sampler_2d_backward", "aten.grid_sampler_3d_backward", "aten._grid_sampler_2d_cpu_fallback_backward",
      "aten.cudnn_grid_sampler_backward", kind="reduction")  # fmt: skip
def grid_sample_backward(op: Op) -> Work:
    """Per tap and gradient element: 2 to the input and, where the grid wants one, 2 per dimension of the grid."""
    wanted = op["output_mask"] or (True, True)
    per_tap = 2 * bool(wanted[0]) + 2 * op["grid"].shape[-1] * bool(wanted[1])
    return op.moving(per_tap * _grid_taps(op) * op["grad_output"].numel)


@rule("torchvision.roi_align", kind="reduction")
def roi_align(op: Op) -> Work:
    """Each output averages a grid of bilinear samples, 4 taps each; a ratio of 0 adapts to the box: 2 is assumed."""
    ratio = op["sampling_ratio"] or 0
    n = op.output.numel * (ratio if ratio > 0 else 2) ** 2
    return op.moving(2 * 4 * n, assumes="" if ratio > 0 else "roi_align samples 2 x 2 points per output")


@rule("torchvision._roi_align_backward", kind="reduction")
def roi_align_backward(op: Op) -> Work:
    """The same taps the other way."""
    ratio = op["sampling_ratio"] or 0
    return op.moving(2 * 4 * op["grad"].numel * (ratio if ratio > 0 else 2) ** 2)
