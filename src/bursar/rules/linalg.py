"""Factorisations and solves: the textbook's leading terms, whole numbers of FLOPs. Their kind is ``matmul``: blocked,
they run as products.

m rows, n columns, k = min(m, n) reflectors or pivots, r right-hand sides; every count times the batch.

Sources: LAPACK Working Note 41 (Blackford and Dongarra, 1999), tables of operation counts, without the lower terms;
Golub and Van Loan, Matrix Computations, 4th edition (GVL), for the iterative ones, whose true count depends on the
data.
"""

from __future__ import annotations

import math

from bursar.rules import Op, Tensor, Work, rule

ITERATIVE = "an iterative algorithm, counted by the estimate of Golub and Van Loan"


def _sides(x: Tensor) -> tuple[int, int, int]:
    """(batch, rows, columns)."""
    return math.prod(x.shape[:-2]), x.shape[-2], x.shape[-1]


def lu_flops(m: int, n: int) -> int:
    """GETRF: L·k² - k³/3 with L the longer side; square, 2n³/3.

    >>> lu_flops(30, 30) == 2 * 30**3 // 3
    True
    """
    k = min(m, n)
    return max(m, n) * k * k - k**3 // 3


def qr_flops(m: int, n: int) -> int:
    """GEQRF, the factor R and the reflectors: 2Lk² - 2k³/3; square, 4n³/3."""
    k = min(m, n)
    return 2 * max(m, n) * k * k - 2 * k**3 // 3


def reflector_flops(m: int, n: int, k: int) -> int:
    """ORGQR, the first n columns of Q from k reflectors: 4mnk - 2(m + n)k² + 4k³/3."""
    return 4 * m * n * k - 2 * (m + n) * k * k + 4 * k**3 // 3


def svd_flops(m: int, n: int, vectors: bool, full: bool) -> int:
    """GVL figure 8.6.1, Golub-Reinsch, m >= n: values 4mn² - 4n³/3; thin U and V 14mn² + 8n³; full U and V
    4m²n + 8mn² + 9n³."""
    m, n = max(m, n), min(m, n)
    if not vectors:
        return 4 * m * n * n - 4 * n**3 // 3
    return 4 * m * m * n + 8 * m * n * n + 9 * n**3 if full else 14 * m * n * n + 8 * n**3


def _columns(op: Op, b: Tensor, a: Tensor) -> int:
    """Right-hand sides: B is a matrix, or a vector per matrix of the batch (torch's rule)."""
    is_vector = len(b.shape) == 1 or (len(a.shape) - 1 == len(b.shape) and b.shape == a.shape[:-1])
    if is_vector:
        return 1
    return b.shape[-1] if op["left"] in (None, True) else b.shape[-2]


@rule("aten.cholesky", "aten.linalg_cholesky_ex", "aten.linalg_ldl_factor_ex", kind="matmul")
def cholesky(op: Op) -> Work:
    """POTRF, SYTRF: n³/3."""
    B, n, _ = _sides(op["self"])
    return op.moving(B * n**3 // 3)


@rule("aten.cholesky_inverse", kind="matmul")
def cholesky_inverse(op: Op) -> Work:
    """POTRI, the inverse from the factor: 2n³/3."""
    B, n, _ = _sides(op["self"])
    return op.moving(B * 2 * n**3 // 3)


@rule("aten.cholesky_solve", "aten.linalg_ldl_solve", "aten._cholesky_solve_helper", "aten.linalg_lu_solve",
      kind="matmul")  # fmt: skip
def two_triangles(op: Op) -> Work:
    """POTRS, SYTRS, GETRS, two triangular solves: 2n²r."""
    x = op.output
    n = (op["LU"] or op["LD"] or op["input2"] or op["A"]).shape[-1]
    return op.moving(2 * n * x.numel)


@rule("aten.linalg_solve_triangular", "aten.triangular_solve", kind="matmul")
def one_triangle(op: Op) -> Work:
    """TRTRS: n²r."""
    n = (op["A"] or op["self"]).shape[-1]
    return op.moving(n * op.output.numel)


@rule("aten.linalg_lu", "aten.linalg_lu_factor_ex", "aten._linalg_det", "aten._linalg_slogdet", kind="matmul")
def lu(op: Op) -> Work:
    """GETRF. A determinant is its diagonal's product."""
    B, m, n = _sides(op["A"])
    return op.moving(B * lu_flops(m, n))


@rule("aten._linalg_solve_ex", kind="matmul")
def solve(op: Op) -> Work:
    """GESV, LU and two triangular solves: 2n³/3 + 2n²r."""
    B, n, _ = _sides(op["A"])
    return op.moving(B * (lu_flops(n, n) + 2 * n * n * _columns(op, op["B"], op["A"])))


@rule("aten.linalg_inv_ex", kind="matmul")
def inverse(op: Op) -> Work:
    """GETRF and GETRI: 2n³/3 + 4n³/3 = 2n³."""
    B, n, _ = _sides(op["A"])
    return op.moving(B * 2 * n**3)


@rule("aten.geqrf", kind="matmul")
def geqrf(op: Op) -> Work:
    """R and the reflectors."""
    B, m, n = _sides(op["self"])
    return op.moving(B * qr_flops(m, n))


@rule("aten.linalg_qr", kind="matmul")
def qr(op: Op) -> Work:
    """GEQRF, and ORGQR unless only R is wanted; reduced, 4mn² - 4n³/3."""
    B, m, n = _sides(op["A"])
    q = 0 if op["mode"] == "r" else reflector_flops(m, m if op["mode"] == "complete" else min(m, n), min(m, n))
    return op.moving(B * (qr_flops(m, n) + q))


@rule("aten.linalg_householder_product", kind="matmul")
def householder_product(op: Op) -> Work:
    """ORGQR."""
    B, m, n = _sides(op["input"])
    return op.moving(B * reflector_flops(m, n, op["tau"].shape[-1]))


@rule("aten.ormqr", kind="matmul")
def ormqr(op: Op) -> Work:
    """Q times an (m, n) matrix, Q of k reflectors of length q: 4mnk - 2k²·(mn / q)."""
    B, m, n = _sides(op["input3"])
    k = op["input2"].shape[-1]
    across = n if op["left"] in (None, True) else m
    return op.moving(B * (4 * m * n * k - 2 * across * k * k))


@rule("aten._linalg_eigh", kind="matmul")
def eigh(op: Op) -> Work:
    """GVL section 8.3: values 4n³/3 (tridiagonal form, then QR steps); with vectors 9n³."""
    B, n, _ = _sides(op["A"])
    return op.moving(B * (4 * n**3 // 3 if op["compute_v"] is False else 9 * n**3), assumes=ITERATIVE)


@rule("aten.linalg_eig", "aten.linalg_eigvals", "aten._linalg_eigvals", kind="matmul")
def eig(op: Op) -> Work:
    """GVL section 7.5: values 10n³ (Hessenberg form, then QR steps); with vectors 25n³."""
    B, n, _ = _sides(op["self"])
    return op.moving(B * (25 if op.name.endswith("eig") else 10) * n**3, assumes=ITERATIVE)


@rule("aten._linalg_svd", kind="matmul")
def svd(op: Op) -> Work:
    """Values; thin; or full."""
    B, m, n = _sides(op["A"])
    flops = svd_flops(m, n, op["compute_uv"] is not False, bool(op["full_matrices"]))
    return op.moving(B * flops, assumes=ITERATIVE)


@rule("aten.linalg_pinv", kind="matmul")
def pinv(op: Op) -> Work:
    """The thin SVD (symmetric: the eigenvectors), and the product of its factors: 2mnk."""
    B, m, n = _sides(op["self"])
    factors = 9 * n**3 if op["hermitian"] else svd_flops(m, n, True, False)
    return op.moving(B * (factors + 2 * m * n * min(m, n)), assumes=ITERATIVE)


@rule("aten.linalg_lstsq", kind="matmul")
def lstsq(op: Op) -> Work:
    """GELS by QR: R, Qᵀb 4mnr - 2n²r, and a triangular solve n²r (m >= n; else with sides exchanged)."""
    B, m, n = _sides(op["self"])
    r, long, short = _columns(op, op["b"], op["self"]), max(m, n), min(m, n)
    return op.moving(B * (qr_flops(m, n) + 4 * long * short * r - short * short * r),
                     assumes="counted as a least-squares solve by QR, of full rank")  # fmt: skip


@rule("aten.linalg_matrix_exp", kind="matmul")
def matrix_exp(op: Op) -> Work:
    """Taylor's polynomial of degree 18 in 5 products (Bader, Blanes, Casas 2019): 10n³."""
    B, n, _ = _sides(op["self"])
    return op.moving(B * 10 * n**3, assumes="a Taylor polynomial of degree 18, nothing squared: a norm of about 1")
