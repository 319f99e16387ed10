"""Darcy flow on the unit square: random coefficient, finite differences, conjugate gradients.

The benchmark of Li et al., "Fourier neural operator for parametric partial differential
equations" (arXiv 2010.08895, appendix A.3):

    -div(a grad u) = f  on (0, 1)^2,    u = 0 on the boundary,    f = 1
    a = 12 where g >= 0, else 3
    g ~ N(0, (-Laplace + 9 I)^-2), with zero Neumann conditions on the Laplacian

**Coefficient.** g is drawn in the cosine basis, all modes the grid carries. As in the published
generator the constant mode is zero, so that g has zero mean over the square and high and low
coefficient share it about equally in every sample. The scale of g does not matter, only its sign.

**Scheme.** s x s nodes including the boundary, spacing h = 1/(s - 1), the five-point scheme in
flux form. The coefficient of a face is the arithmetic mean of its two nodes, as in the published
generator. The error is O(h^2) for a smooth coefficient, O(h) across jumps.

**One difference from the published files.** Their program draws a at the s x s cell midpoints
(i + 1/2)/s, moves it to the nodes by splines, solves, and moves u back, also by splines. Here a
and u both live on the nodes i/(s - 1): a takes no value but 3 and 12, and u is exactly zero on the
boundary.

**Solver.** Conjugate gradients in float64, preconditioned by the inverse of the
constant-coefficient operator L, which sine matrices diagonalise. The condition number is at most
max(a)/min(a) = 4 on every grid, so about 20 iterations reach 1e-10. The preconditioner runs in
float32: it decides how fast the iteration converges, not what it converges to.

`generate` switches float64 on for itself. The pure functions below it are called inside
`with jax.enable_x64(True):`, which has to enclose any `jit` or `vmap` around them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress

VERSION = 1  # raise when `sample` gives other numbers for the same key
LOW, HIGH = 3.0, 12.0  # the two values of the coefficient
TOLERANCE = 1e-10  # relative residual, see `Solution`


class ConvergenceError(RuntimeError):
    """Conjugate gradients stopped before reaching the tolerance."""


class Solution(NamedTuple):
    """Solution of one Darcy problem, float64.

    `residual` is that of the returned u, recomputed from its definition, r = f - A u, in the norm
    that bounds the error: sqrt(r.L^-1 r / f.L^-1 f). The relative error of u in the energy norm is
    at most sqrt(max(a)/min(a)) times this, on every grid.
    """

    u: Float[Array, "s s"]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]


class Sample(NamedTuple):
    """One random coefficient and the solution that belongs to it."""

    a: Float[Array, "s s"]
    solution: Solution


def gaussian_field(
    key: Array, size: int, *, alpha: float = 2.0, tau: float = 3.0
) -> Float[Array, "s s"]:
    """Draws g ~ N(0, (-Laplace + tau^2 I)^-alpha), Neumann, constant mode zero, on size^2 nodes.

        g(x, y) = sum_jk (pi^2 (j^2 + k^2) + tau^2)^(-alpha/2) xi_jk phi_j(x) phi_k(y)

    with phi_0 = 1, phi_k(x) = sqrt(2) cos(pi k x), xi_jk standard normal, 0 <= j, k < size.
    """
    _require_float64()
    k = np.arange(size)
    power = (np.pi**2 * (k[:, None] ** 2 + k**2) + tau**2) ** (-alpha / 2)
    power[0, 0] = 0.0
    basis = np.cos(np.pi * np.outer(k, k) / (size - 1))  # [node, mode]
    basis[:, 1:] *= np.sqrt(2)
    modes = power * jax.random.normal(key, (size, size), jnp.float64)
    return basis @ modes @ basis.T


def coefficient(key: Array, size: int) -> Float[Array, "s s"]:
    """Draws the two-valued coefficient of the benchmark on size x size nodes, float64."""
    return jnp.where(gaussian_field(key, size) >= 0, HIGH, LOW)


def solve(
    a: Float[Array | np.ndarray, "s s"],
    f: Float[Array | np.ndarray, "s s"] | Float[Array, ""] | float = 1.0,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 200,
) -> Solution:
    """Solves -div(a grad u) = f with u = 0 on the boundary, for positive nodal values of a.

    Pure, ready for `jit` and `vmap`. Failure raises nothing here: look at `residual`, which is
    then above `tolerance` or NaN.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] < 3:
        raise ValueError(f"the coefficient must be [s, s] with s >= 3, got {list(a.shape)}")
    _require_float64()
    size = a.shape[0]
    a = jnp.asarray(a, jnp.float64)
    f = jnp.broadcast_to(jnp.asarray(f, jnp.float64), (size, size))[1:-1, 1:-1]
    largest = jnp.max(jnp.abs(f))
    largest = jnp.where(largest > 0, largest, 1)  # the preconditioner has float32's range only
    u, residual, iterations = _conjugate_gradients(
        functools.partial(_minus_div_a_grad, a=_faces(a)),
        functools.partial(_inverse_laplacian, *_sine_basis(size - 2)),
        f / largest / (size - 1) ** 2,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Solution(jnp.pad(largest * u, 1), residual, iterations)


def sample(key: Array, size: int) -> Sample:
    """Draws one coefficient and solves for its u on size x size nodes: pure, ready for `vmap`."""
    a = coefficient(key, size)
    return Sample(a, solve(a))


def generate(
    indices: Sequence[int],
    *,
    seed: int = 0,
    grid: int = 421,
    stride: int = 1,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[Float[np.ndarray, "n t t"], Float[np.ndarray, "n t t"]]:
    """Samples of the benchmark: coefficients and solutions, float32, t = (grid - 1)/stride + 1.

    Sample i depends on `(seed, i, grid)` alone: not on which other samples are asked for, nor on
    the batch size. Every residual is checked.

    Args:
      indices: which samples, `range(1000)` for one.
      seed: of the whole data set.
      grid: nodes per side, boundary included, on which the equation is solved.
      stride: keep every stride-th node; must divide grid - 1, so that the boundary stays.
      batch_size: samples solved at once. None: 1 on a CPU, 64 on an accelerator.
      progress: show a progress bar on stderr.

    Raises:
      ConvergenceError: naming the first sample whose residual stays above the tolerance.
    """
    if grid < 3:
        raise ValueError(f"grid must be at least 3 nodes a side, got {grid}")
    if stride < 1 or (grid - 1) % stride:
        raise ValueError(f"stride must divide grid - 1 = {grid - 1}, got {stride}")
    if batch_size is None:
        batch_size = 1 if jax.default_backend() == "cpu" else 64
    side = (grid - 1) // stride + 1
    a = np.empty((len(indices), side, side), np.float32)
    u = np.empty_like(a)
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(f"Darcy flow, {grid} x {grid} nodes", total=len(indices))
        for start in range(0, len(indices), batch_size):
            batch = np.asarray(indices[start : start + batch_size], np.uint32)
            filled = np.resize(batch, batch_size)  # so that all batches share one compilation
            with jax.enable_x64(True):
                a_batch, solution = _sample_batch(seed, filled, grid=grid, stride=stride)
            _check_converged(solution, batch, seed, grid)
            a[start : start + len(batch)] = a_batch[: len(batch)]
            u[start : start + len(batch)] = solution.u[: len(batch)]
            bar.advance(task, len(batch))
    return a, u


@functools.partial(jax.jit, static_argnames=("grid", "stride"))
def _sample_batch(seed, indices, *, grid, stride):
    """Samples `indices` of data set `seed`, every stride-th node of them, rounded to float32."""

    def one(index):
        a, solution = sample(jax.random.fold_in(jax.random.key(seed), index), grid)
        a, u = (x[::stride, ::stride].astype(jnp.float32) for x in (a, solution.u))
        return a, solution._replace(u=u)

    return jax.vmap(one)(indices)


def _check_converged(solution: Solution, batch: np.ndarray, seed: int, grid: int) -> None:
    """Raises ConvergenceError for the first sample whose residual is too large or not a number."""
    residual = np.asarray(solution.residual)[: len(batch)]
    failed = ~(residual <= 2 * TOLERANCE)  # the recomputed residual carries rounding of its own
    if failed.any():
        i = np.argmax(failed)
        raise ConvergenceError(
            f"Darcy sample {batch[i]} (seed {seed}, {grid} x {grid} nodes): relative residual "
            f"{residual[i]:.1e} after {solution.iterations[i]} iterations, wanted {TOLERANCE:.0e}"
        )


def _require_float64() -> None:
    """Raises unless float64 is on: silently solving in float32 would lose half the digits."""
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise RuntimeError("the Darcy solver needs float64: use `with jax.enable_x64(True):`")


class _Faces(NamedTuple):
    """Coefficient on the faces between interior nodes and their neighbours, n = s - 2."""

    x: Float[Array, "n+1 n"]  # faces crossed when moving along the first axis
    y: Float[Array, "n n+1"]


def _faces(a: Float[Array, "s s"]) -> _Faces:
    """Arithmetic mean of the two nodes of each face."""
    return _Faces((a[1:, 1:-1] + a[:-1, 1:-1]) / 2, (a[1:-1, 1:] + a[1:-1, :-1]) / 2)


def _minus_div_a_grad(u: Float[Array, "n n"], a: _Faces) -> Float[Array, "n n"]:
    """The five-point operator times h^2 on interior nodes; u is zero on the boundary."""
    flux_x = a.x * jnp.diff(jnp.pad(u, ((1, 1), (0, 0))), axis=0)
    flux_y = a.y * jnp.diff(jnp.pad(u, ((0, 0), (1, 1))), axis=1)
    return -jnp.diff(flux_x, axis=0) - jnp.diff(flux_y, axis=1)


def _sine_basis(n: int) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """Orthonormal eigenvectors S of the discrete Laplacian on n interior nodes, and 1/(l_i + l_j).

    S_ij = sqrt(2/(n+1)) sin(pi i j/(n+1)) is symmetric; l_i = 4 sin^2(pi i/(2(n+1))), times 1/h^2.
    """
    i = np.arange(1, n + 1)
    sine = np.sqrt(2 / (n + 1)) * np.sin(np.pi * np.outer(i, i) / (n + 1))
    eigenvalue = 4 * np.sin(np.pi * i / (2 * (n + 1))) ** 2
    inverse = 1 / (eigenvalue[:, None] + eigenvalue)
    # The barrier keeps XLA from multiplying these constants with a constant f while it compiles.
    return jax.lax.optimization_barrier((jnp.float32(sine), jnp.float32(inverse)))


def _inverse_laplacian(
    sine: Float[Array, "n n"], inverse: Float[Array, "n n"], r: Float[Array, "n n"]
) -> Float[Array, "n n"]:
    """L^-1 r = S ((S r S) / (l_i + l_j)) S in the precision of the basis, returned in that of r."""
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    modes = inverse * multiply(multiply(sine, r.astype(sine.dtype)), sine)
    return multiply(multiply(sine, modes), sine).astype(r.dtype)


def _conjugate_gradients(operator, preconditioner, f, *, tolerance, max_iterations):
    """Preconditioned conjugate gradients for `operator(u) = f`: (u, residual, iterations)."""

    def unfinished(state):
        *_, rho, k = state
        return (rho > tolerance**2 * rho_0) & (k < max_iterations)

    def iterate(state):
        u, r, p, rho, k = state
        q = operator(p)
        step = rho / jnp.vdot(p, q)
        u, r = u + step * p, r - step * q
        z = preconditioner(r)
        rho, rho_old = jnp.vdot(r, z), rho
        return u, r, z + (rho / rho_old) * p, rho, k + 1

    z = preconditioner(f)
    rho_0 = jnp.vdot(f, z)
    state = (jnp.zeros_like(f), f, z, rho_0, jnp.int32(0))
    u, *_, k = jax.lax.while_loop(unfinished, iterate, state)
    r = f - operator(u)
    scale = jnp.where(rho_0 > 0, rho_0, 1)
    return u, jnp.sqrt(jnp.abs(jnp.vdot(r, preconditioner(r))) / scale), k
