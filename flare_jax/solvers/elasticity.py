"""A square cell with a random void, pulled at the top: finite elements for an incompressible solid.

The elasticity benchmark of Li et al., "Fourier neural operator with learned deformations" (Geo-FNO,
arXiv 2207.05209, section 4.1):

    div P = 0 in the cell,  u = 0 at the bottom,  P n = (0, 100) at the top,  P n = 0 elsewhere

with P = dW/dF the first Piola-Kirchhoff stress, F = I + grad u, of the incompressible
Rivlin-Saunders (Mooney-Rivlin) solid W = C1 (I1 - 3) + C2 (I2 - 3), C1 = 1.863e5, C2 = 9.79e3.

**Plane stress.** Stress across the plane is zero and volume is kept, so the stretch across it is
1/J, J = det F of the plane, and W becomes a function of the plane's F alone:

    I1 = |F|^2 + J^-2,    I2 = J^2 + |F|^2 J^-2

No pressure is left to solve for. The Cauchy stress is sigma = P F^T and the target its von Mises
value, sqrt(s11^2 - s11 s22 + s22^2 + 3 s12^2), in the units of C1, C2 and the traction.

**What the definition rests on.** The published files hold 2,000 samples of 972 points and no
generator. Constants, boundary conditions and void are those of the paper as remembered, not copied
from it. Plane stress, and the points at which stress is given, are inferred: the public generator
of a sister problem by one of its authors (PlatePull.jl, for de Hoop et al., "The cost-accuracy
trade-off in operator learning with neural networks") has this material in plane stress, clamped
below and under a traction of mean 100 above, and stores the von Mises stress at the 3 x 3 Gauss
points of quadratic quadrilaterals. 972 = 108 x 9, and the paper speaks of about 100 such elements.
That program has + C2 C where dI2/dC asks for - C2 C; here the sign is that of the equations above.

**Void and mesh** are those of `unit_cell.py`: 108 elements of nine nodes, whose Gauss points are
ordered along the rays of the mesh, ray after ray. Stresses are taken where they are computed:
nothing is extrapolated or averaged.

**Solver.** Newton's method with exact derivatives, float64, from u = 0 in one load step, until the
unbalanced force is TOLERANCE times the load: strains are at most about 1e-3, and two or three
iterations do. Its linear systems are block-cyclic in the angle, since a column of elements joins
three neighbouring rays of 14 unknowns. A scan over the columns eliminates ray after ray by Cholesky
factors of 28 x 28 and comes back to the first ray: 36 small steps, about a hundred times fewer
operations than one dense factorisation of 1,008 unknowns, and one code for CPU, GPU and `vmap`.

`generate` switches float64 on for itself. The pure functions below it are called inside
`with jax.enable_x64(True):`, which has to enclose any `jit` or `vmap` around them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress

from flare_jax.solvers.unit_cell import (
    LAYERS,
    MODES,
    SIDES,
    check_radius,
    mesh,
    radius,
    ray_angles,
)

VERSION = 1  # raise when `sample` gives other numbers for the same key
C1, C2 = 1.863e5, 9.79e3  # of the material
TRACTION = 100.0  # at the top, upwards, per length before deformation
POINTS = 9 * 4 * SIDES * LAYERS  # nine in each of 36 x 3 elements
TOLERANCE = 1e-10  # unbalanced force over the load
MAX_ITERATIONS = 20

_GAUSS = np.sqrt(0.6) * np.array([-1.0, 0.0, 1.0])  # points and weights on [-1, 1]
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 9


class SolverError(RuntimeError):
    """Newton's method failed, or the stress is not positive and finite."""


class Solution(NamedTuple):
    """Displacement of every node, and how well it balances the load."""

    u: Float[Array, "rays rings 2"]
    residual: Float[Array, ""]  # norm of the unbalanced force over that before the first iteration
    iterations: Int[Array, ""]


class Sample(NamedTuple):
    """One cell: where stress is given, the stress, and the displacement there."""

    points: Float[Array, "N 2"]  # before deformation
    sigma: Float[Array, "N"]  # von Mises
    displacement: Float[Array, "N 2"]
    solution: Solution


def energy(gradient: Float[Array, "2 2"]) -> Float[Array, ""]:
    """W of the displacement gradient in the plane; incompressible, in plane stress."""
    f = jnp.eye(2) + gradient
    square, j = jnp.sum(f * f), f[0, 0] * f[1, 1] - f[0, 1] * f[1, 0]
    return C1 * (square + j**-2 - 3) + C2 * (j**2 + square * j**-2 - 3)


def von_mises(gradient: Float[Array, "2 2"]) -> Float[Array, ""]:
    """Von Mises value of the Cauchy stress P F^T at a displacement gradient."""
    s = jax.grad(energy)(gradient) @ (jnp.eye(2) + gradient).T
    return jnp.sqrt(s[0, 0] ** 2 - s[0, 0] * s[1, 1] + s[1, 1] ** 2 + 3 * s[0, 1] ** 2)


def elements(a: Float[Array, "rays rings 2"]) -> Float[Array, "columns layers 9 2"]:
    """Values at the nodes of each element; node 3 i + j is ray i, ring j of the element."""
    rays, rings, _ = a.shape
    ray = (np.arange(0, rays, 2)[:, None] + np.arange(3)) % rays  # [columns, 3]
    ring = np.arange(0, rings - 1, 2)[:, None] + np.arange(3)  # [layers, 3]
    picked = a[ray[:, None, :, None], ring[None, :, None, :]]
    return picked.reshape(len(ray), len(ring), 9, 2)


def assembled(parts: Float[Array, "columns layers 9 2"]) -> Float[Array, "rays rings 2"]:
    """Sum at each node over its elements, the transpose of `elements`, in a fixed order."""
    columns, layers = parts.shape[:2]
    column = jnp.zeros((columns, 3, 2 * layers + 1, 2))
    for layer in range(layers):
        part = parts[:, layer].reshape(columns, 3, 3, 2)
        column = column.at[:, :, 2 * layer : 2 * layer + 3].add(part)
    even, odd = column[:, 0] + jnp.roll(column[:, 2], 1, 0), column[:, 1]
    return jnp.stack([even, odd], 1).reshape(2 * columns, -1, 2)


def shapes() -> tuple[Float[np.ndarray, "9 9"], Float[np.ndarray, "9 9 2"]]:
    """Nine-node shape functions [point, node] at the Gauss points; gradients by (ring, ray)."""
    x = _GAUSS[:, None]
    n = np.concatenate([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2], 1)  # [point, node]
    dn = np.concatenate([x - 0.5, -2 * x, x + 0.5], 1)
    product = lambda ray, ring: np.einsum("pi,qj->pqij", ray, ring).reshape(9, 9)
    return product(n, n), np.stack([product(n, dn), product(dn, n)], -1)


def geometry(nodes: Float[Array, "rays rings 2"]):
    """Shape gradients [columns, layers, point, node, 2] in space, and weights times areas."""
    jacobian = jnp.einsum("clai,qaj->clqij", elements(nodes), shapes()[1])
    (a, b), (c, d) = jnp.moveaxis(jacobian, (-2, -1), (0, 1))
    det = a * d - b * c
    inverse = jnp.stack([jnp.stack([d, -b], -1), jnp.stack([-c, a], -1)], -2) / det[..., None, None]
    gradients = jnp.einsum("qaj,clqji->clqai", shapes()[1], inverse)
    return gradients, det * np.outer(_WEIGHTS, _WEIGHTS).reshape(1, 1, 9)


def strains(u: Float[Array, "rays rings 2"], gradients) -> Float[Array, "columns layers 9 2 2"]:
    """Displacement gradient du_i/dx_j at the Gauss points."""
    return jnp.einsum("clai,clqaj->clqij", elements(u), gradients)


def internal_force(u, gradients, weights) -> Float[Array, "rays rings 2"]:
    """Force of the stresses on each node, the derivative of the stored energy by u."""
    stress = _everywhere(jax.grad(energy))(strains(u, gradients))
    force = jnp.einsum("clq,clqij,clqaj->clai", weights, stress, gradients)
    return assembled(force)


def stiffness(u, gradients, weights) -> Float[Array, "columns d d"]:
    """Second derivative of the energy of each column; d = 3 rays x rings x 2, in that order."""
    tangent = _everywhere(jax.hessian(energy))(strains(u, gradients))
    blocks = jnp.einsum(
        "clq,clqijkm,clqaj,clqbm->claibk", weights, tangent, gradients, gradients, optimize=True
    )
    columns, layers = blocks.shape[:2]
    rings = 2 * layers + 1
    blocks = blocks.reshape(columns, layers, 3, 3, 2, 3, 3, 2)
    k = jnp.zeros((columns, 3, rings, 2, 3, rings, 2))
    for layer in range(layers):
        part = slice(2 * layer, 2 * layer + 3)
        k = k.at[:, :, part, :, :, part].add(blocks[:, layer])
    return k.reshape(columns, 6 * rings, 6 * rings)


def solve_cyclic(
    k: Float[Array, "columns d d"], f: Float[Array, "rays m"]
) -> Float[Array, "rays m"]:
    """Solves the assembled system sum_c K_c x = f, symmetric positive definite, d = 3 m.

    Column c joins rays 2c, 2c + 1, 2c + 2, around the circle. What the columns so far leave of the
    system is (s, g) on two rays, the first and the last of them; a column adds its own and two rays
    are eliminated. The last column ends on the first ray.
    """
    m = f.shape[1]
    f_column = column_unknowns(f).at[:, :m].set(0)  # a ray's load goes with the column it ends

    def eliminate(a, b, inner):
        """(s, g) of the outer unknowns, and y, z with x_inner = z - y x_outer."""
        outer = np.setdiff1d(np.arange(len(b)), inner)
        factor = jnp.linalg.cholesky(a[np.ix_(inner, inner)]), True
        solved = jax.scipy.linalg.cho_solve(
            factor, jnp.concatenate([a[np.ix_(inner, outer)], b[inner, None]], 1)
        )
        y, z = solved[:, :-1], solved[:, -1]
        coupling = a[np.ix_(outer, inner)]
        return (a[np.ix_(outer, outer)] - coupling @ y, b[outer] - coupling @ z), (y, z)

    def forward(carry, column):
        s, g = carry
        a = jnp.zeros((4 * m, 4 * m)).at[: 2 * m, : 2 * m].set(s).at[m:, m:].add(column[0])
        b = jnp.zeros(4 * m).at[: 2 * m].set(g).at[m:].add(column[1])
        return eliminate(a, b, np.arange(m, 3 * m))

    def backward(after, kept):
        x = kept[1] - kept[0] @ jnp.concatenate([first, after])
        return x[:m], x.reshape(2, m)  # the ray where the column begins, and its middle ray

    carry, (y, z) = eliminate(k[0], f_column[0], np.arange(m, 2 * m))
    (s, g), kept = jax.lax.scan(forward, carry, (k[1:], f_column[1:]))
    closed = s[:m, :m] + s[:m, m:] + s[m:, :m] + s[m:, m:]
    first = jax.scipy.linalg.solve(closed, g[:m] + g[m:], assume_a="pos")
    after, x = jax.lax.scan(backward, first, kept, reverse=True)  # x [columns - 1, 2, m]
    middle = z - y @ jnp.concatenate([first, after])
    return jnp.concatenate([first[None], middle[None], x.reshape(-1, m)])


def column_unknowns(a: Float[Array | np.ndarray, "rays m"]) -> Float[Array, "columns d"]:
    """Values at the unknowns of each column: three rays after one another, d = 3 m."""
    return jnp.concatenate([a[::2], a[1::2], jnp.roll(a[::2], -1, 0)], 1)


def equilibrium(
    nodes: Float[Array, "rays rings 2"],
    load: Float[Array | np.ndarray, "rays rings 2"],
    free: Float[Array | np.ndarray, "rays rings 2"],
    u: Float[Array, "rays rings 2"],
) -> Solution:
    """Newton's method for internal_force(u) = load where `free` is 1; elsewhere u stays as given.

    Pure, ready for `jit` and `vmap`. Failure raises nothing here: look at `residual`, which is then
    above TOLERANCE or NaN.
    """
    _require_float64()
    gradients, weights = geometry(nodes)
    mask = column_unknowns(free.reshape(len(free), -1))
    fixed = np.eye(mask.shape[1])[None] * (1 - mask[:, None])
    mask = mask[:, None] * mask[:, :, None]  # [columns, d, d]

    def unbalanced(u):
        return (load - internal_force(u, gradients, weights)) * free

    def unfinished(state):
        _, force, k = state
        return (jnp.linalg.norm(force) > TOLERANCE * scale) & (k < MAX_ITERATIONS)

    def iterate(state):
        u, force, k = state
        matrix = stiffness(u, gradients, weights) * mask + fixed
        u = u + solve_cyclic(matrix, force.reshape(len(u), -1)).reshape(u.shape)
        return u, unbalanced(u), k + 1

    start = unbalanced(u)
    scale = jnp.linalg.norm(start)
    u, force, k = jax.lax.while_loop(unfinished, iterate, (u, start, jnp.int32(0)))
    return Solution(u, jnp.linalg.norm(force) / jnp.where(scale > 0, scale, 1), k)


def pulled(sides: int = SIDES, layers: int = LAYERS, traction: float = TRACTION):
    """(load, free) of the benchmark: forces of the traction on the top, 0 at clamped unknowns."""
    rays, rings = 8 * sides, 2 * layers + 1
    load, free = np.zeros((rays, rings, 2)), np.ones((rays, rings, 2))
    free[: 2 * sides + 1, -1] = 0  # the bottom is the first edge, the top the third
    top = np.arange(4 * sides, 6 * sides, 2)
    for node, weight in enumerate((1 / 6, 4 / 6, 1 / 6)):  # Simpson's rule is exact here
        load[top + node, -1, 1] += weight * traction / sides
    return load, free


def solve(
    r: Float[Array | np.ndarray, "rays"], *, layers: int = LAYERS, traction: float = TRACTION
) -> tuple[Float[Array, "rays rings 2"], Solution]:
    """Nodes and displacement of the cell whose void has radius r on each ray.

    Pure, ready for `jit` and `vmap`. Outside them a void that leaves no ligament is a ValueError.
    """
    _require_float64()
    if not isinstance(r, jax.core.Tracer):
        check_radius(r)
    nodes = mesh(r, layers)
    load, free = pulled(len(r) // 8, layers, traction)
    return nodes, equilibrium(nodes, load, free, jnp.zeros_like(nodes))


def at_points(a: Float[Array, "columns layers 9 *f"]) -> Float[Array, "N *f"]:
    """Values at the Gauss points in order of the data: along a ray of points, ray after ray."""
    columns, layers, _, *fields = a.shape
    a = a.reshape(columns, layers, 3, 3, *fields)
    return jnp.moveaxis(a, 2, 1).reshape(columns * layers * 9, *fields)


def sample(key: Array) -> Sample:
    """Draws one void and solves its cell: pure, ready for `vmap`."""
    _require_float64()
    xi = jax.random.normal(key, (MODES, 2), jnp.float64)
    nodes, solution = solve(radius(xi, ray_angles()))
    interpolate = lambda a: at_points(jnp.einsum("qa,clai->clqi", shapes()[0], elements(a)))
    strain = strains(solution.u, geometry(nodes)[0])
    sigma = at_points(_everywhere(von_mises)(strain))
    return Sample(interpolate(nodes), sigma, interpolate(solution.u), solution)


def generate(
    indices: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Samples of the benchmark, float32: points [n, N, 2], sigma [n, N], displacement [n, N, 2].

    Sample i depends on `(seed, i)` alone: not on which other samples are asked for, nor on the
    batch size. Every residual and every stress is checked.

    Args:
      indices: which samples, `range(1000)` for one.
      seed: of the whole data set.
      batch_size: samples solved at once. None: 16 on a CPU, 500 on an accelerator.
      progress: show a progress bar on stderr.

    Raises:
      SolverError: naming the first sample that does not converge or whose stress is not positive.
    """
    if batch_size is None:
        batch_size = 16 if jax.default_backend() == "cpu" else 500
    arrays = {
        "points": np.empty((len(indices), POINTS, 2), np.float32),
        "sigma": np.empty((len(indices), POINTS), np.float32),
        "displacement": np.empty((len(indices), POINTS, 2), np.float32),
    }
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("elasticity, 108 elements", total=len(indices))
        for start in range(0, len(indices), batch_size):
            batch = np.asarray(indices[start : start + batch_size], np.uint32)
            filled = np.resize(batch, batch_size)  # so that all batches share one compilation
            with jax.enable_x64(True):
                samples = jax.device_get(_sample_batch(seed, filled))
            _check(samples, batch, seed)
            for name, array in arrays.items():
                array[start : start + len(batch)] = getattr(samples, name)[: len(batch)]
            bar.advance(task, len(batch))
    return arrays


@jax.jit
def _sample_batch(seed, indices):
    """Samples `indices` of data set `seed`."""
    return jax.vmap(lambda i: sample(jax.random.fold_in(jax.random.key(seed), i)))(indices)


def _check(samples: Sample, batch: np.ndarray, seed: int) -> None:
    """Raises SolverError for the first sample that is not balanced, or not under stress."""
    residual, iterations = samples.solution.residual, samples.solution.iterations
    for i, index in enumerate(batch):
        name = f"elasticity sample {index} (seed {seed})"
        if not residual[i] <= TOLERANCE:
            raise SolverError(
                f"{name}: unbalanced force {residual[i]:.1e} of the load after {iterations[i]} "
                f"iterations, wanted {TOLERANCE:.0e}"
            )
        bad = ~(np.isfinite(samples.sigma[i]) & (samples.sigma[i] > 0))
        if bad.any():
            at = int(np.argmax(bad))
            raise SolverError(
                f"{name}: von Mises stress {samples.sigma[i, at]} at point {at} must be positive "
                "and finite"
            )


def _everywhere(f):
    """`f` of one displacement gradient, at all Gauss points."""
    for _ in range(3):
        f = jax.vmap(f)
    return f


def _require_float64() -> None:
    """Raises unless float64 is on: silently solving in float32 would lose half the digits."""
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise RuntimeError("the elasticity solver needs float64: use `with jax.enable_x64(True):`")
