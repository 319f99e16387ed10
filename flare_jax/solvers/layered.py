"""Every state of a part built layer by layer, by one block elimination up and one sweep down.

Planes of nodes couple only to their neighbours, so that the stiffness of a voxel mesh is block
tridiagonal, A_k on plane k and B_k between planes k and k + 1. Building adds layers on top of
equilibrium: layer l's elements arrive without stress, their shrinkage pulls with forces f_l on
their own planes, and the increment du_l solves the stiffness of all elements so far. Each of these
systems is the one before, grown at its end. Elimination from the base up is therefore shared:

    S_k = A_k - B_{k-1}^T S_{k-1}^{-1} B_{k-1}                     of the elements so far
    g_k = f_k - B_{k-1}^T S_{k-1}^{-1} g_{k-1}                     within a layer, 0 below it
    own = S^{-1} g                                                 at the top plane of a layer

and since below its own layer an increment is du(k) = -S_k^{-1} B_k du(k + 1), so is its sum over
layers. With U_k the sum at plane k, one sweep down ends the simulation of all layers:

    rest_k = S_k^{-1} (g_k - B_k U_{k+1}),    U_k = rest_k + own_k  (own_k = 0 inside a layer)

The elements above plane k were placed after own_k had happened: `rest` is what strains them.

A part with p planes of m nodes costs about p (3 m)^3 (1/3 + 1 + 2) float64 operations, whatever the
number of layers, most of them in products of matrices, and keeps p (3 m)^2 numbers. Conjugate
gradients with a diagonal preconditioner would need 170 to 380 iterations (four parts of 1,800 to
15,500 nodes, to 1e-6) for each layer, and a look at whether they converged; here the residual is
that of rounding. Float64 costs little where it is fast (data-centre GPUs) and is slow on others.

Matrices are padded to a few sizes, so that few programs are compiled; a padded unknown has a one on
the diagonal. No sum depends on the order of threads: assembly writes each entry once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flare_jax.solvers import voxels
from flare_jax.solvers.voxels import Mesh

SIZES = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024)  # nodes of a plane
STEP = 256  # between larger sizes

_QUADRANTS = np.array([[y, x] for y in (0, 1) for x in (0, 1)])  # voxels around a node, in a plane
_OFFSETS = np.array([[y, x] for y in (-1, 0, 1) for x in (-1, 0, 1)])  # its neighbours


class Slab(NamedTuple):
    """One layer of voxels: which surround its nodes, and where their neighbours are.

    Neighbours that do not exist have numbers >= m of their own, which scatters drop and gathers
    fill with zero.
    """

    below: Float[np.ndarray, "m 4"]  # 1 where the voxel in a quadrant of a lower node exists
    above: Float[np.ndarray, "m 4"]  # the same around upper nodes
    along_below: Int[np.ndarray, "m 9"]  # lower neighbours of lower nodes
    across: Int[np.ndarray, "m 9"]  # upper neighbours of lower nodes
    along_above: Int[np.ndarray, "m 9"]  # upper neighbours of upper nodes


class Tables(NamedTuple):
    """Blocks of the element stiffness by quadrant and neighbour, and its loads."""

    below: Float[np.ndarray, "4 81"]  # lower with lower nodes
    across: Float[np.ndarray, "4 81"]  # lower with upper
    above: Float[np.ndarray, "4 81"]  # upper with upper
    load_below: Float[np.ndarray, "4 3"]
    load_above: Float[np.ndarray, "4 3"]


class Sums(NamedTuple):
    """Displacement of every node, and that of it which strains the elements above the node."""

    total: Float[np.ndarray, "n 3"]
    rest: Float[np.ndarray, "n 3"]


def padded(count: int) -> int:
    """The size to which a plane of `count` nodes is padded."""
    if count > SIZES[-1]:
        return -(-count // STEP) * STEP
    return next(size for size in SIZES if size >= count)


def tables(k: Float[np.ndarray, "24 24"], f: Float[np.ndarray, "24"]) -> Tables:
    """Sorts an element's stiffness and load by what a node sees around it."""
    blocks = np.zeros((2, 2, 4, 9, 3, 3))  # [level, level of the neighbour, quadrant, offset]
    k, f = k.reshape(2, 2, 2, 3, 2, 2, 2, 3), f.reshape(2, 2, 2, 3)
    loads = np.zeros((2, 4, 3))
    for q, quadrant in enumerate(_QUADRANTS):
        y, x = 1 - quadrant  # corner of that voxel at which the node is
        loads[:, q] = f[:, y, x]
        for o, (dy, dx) in enumerate(_OFFSETS):
            if 0 <= y + dy <= 1 and 0 <= x + dx <= 1:
                block = k[:, y, x, :, :, y + dy, x + dx]  # [level, 3, level, 3]
                blocks[:, :, q, o] = block.transpose(0, 2, 1, 3)
    flat = lambda a: a.reshape(4, 81)
    return Tables(flat(blocks[0, 0]), flat(blocks[0, 1]), flat(blocks[1, 1]), *loads)


def slabs(solid: Bool[np.ndarray, "nx ny nz"], mesh: Mesh) -> list[Slab]:
    """All layers of voxels, each padded to the larger of its two planes."""
    nz = solid.shape[2]
    starts = np.searchsorted(mesh.index[:, 2], np.arange(nz + 2))
    number = np.pad(mesh.number, ((1, 1), (1, 1), (0, 0)), constant_values=-1)
    filled = np.pad(solid, ((1, 1), (1, 1), (0, 0)))

    def around(k: int, size: int):
        """Nodes of plane k: [m, 4] functions of their voxels, [m, 9] of their neighbours."""
        i, j, _ = mesh.index[starts[k] : starts[k + 1]].T + 1
        quadrants = lambda layer: _pad(
            np.stack([filled[i - 1 + x, j - 1 + y, layer] for y, x in _QUADRANTS], 1), size
        )

        def neighbours(plane):
            at = np.stack([number[i + x, j + y, plane] for y, x in _OFFSETS], 1)
            absent = np.arange(size, size + 9, dtype=np.int32)[None]
            at = np.where(at < 0, absent, at - starts[plane]).astype(np.int32)
            return np.concatenate([at, np.repeat(absent, size - len(at), 0)])

        return quadrants, neighbours

    result = []
    for k in range(nz):
        size = padded(np.diff(starts[k : k + 3]).max())
        (below, along), (above, along_above) = around(k, size), around(k + 1, size)
        result.append(Slab(below(k), above(k), along(k), along(k + 1), along_above(k + 1)))
    return result


def _pad(a: np.ndarray, size: int) -> Float[np.ndarray, "m c"]:
    """`a` as floats, with rows of zeros below."""
    return np.pad(a.astype(float), ((0, size - len(a)), (0, 0)))


def build(solid: Bool[np.ndarray, "nx ny nz"], mesh: Mesh, k, f, per_layer: int) -> Sums:
    """Displacements when layers of `per_layer` voxels are added one after another, shrinking.

    Args:
        solid: voxels, every layer of which stands on the base with those below it.
        mesh: of the solid.
        k, f: stiffness [24, 24] of a voxel and load [24] of its shrinkage.
        per_layer: layers of voxels that are added at once.

    A matrix that is not positive definite gives NaN; nothing is raised here.
    """
    with jax.enable_x64(True):
        table, layers = jax.device_put((tables(k, f), slabs(solid, mesh)))
        schur, load = _founded(layers[0], table)
        own, kept = {}, {}
        for plane in range(1, len(layers) + 1):
            if plane % per_layer == 0 or plane == len(layers):
                own[plane] = _settled(schur, load, layers[plane - 1])
                load = jnp.zeros_like(load)
            if plane < len(layers):
                size = len(layers[plane].below)
                schur, load = _resized(schur, size), _resized(load, size)
                kept[plane], schur, load = _eliminated(schur, load, layers[plane], table)
        total = {len(layers): own[len(layers)]}
        rest = {len(layers): jnp.zeros_like(load)}
        for plane in reversed(range(1, len(layers))):
            size = len(layers[plane].below)
            after = _resized(total[plane + 1], size)
            rest[plane] = _descended(*kept.pop(plane), after, layers[plane], table)
            total[plane] = rest[plane] + (_resized(own[plane], size) if plane in own else 0)
        counts = np.bincount(mesh.index[:, 2])
        return Sums(*(_joined(jax.device_get(part), counts) for part in (total, rest)))


def release(
    solid: Bool[np.ndarray, "nx ny nz"], mesh: Mesh, k, voxel, force: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n 3"]:
    """Displacement of the whole part under a force on its base that no longer is held.

    The force balances itself, as that of the plate does. The solution is that without mean
    displacement and rotation of the base. Elimination goes from the top down, so that the base is
    the last plane: the part is turned over.
    """
    over = np.arange(8) ^ 4  # corners with their z bits changed
    k = k.reshape(8, 3, 8, 3)[over][:, :, over].reshape(24, 24)
    flipped, counts = solid[:, :, ::-1], np.bincount(mesh.index[:, 2])
    with jax.enable_x64(True):
        found = slabs(flipped, voxels.mesh(flipped))
        table, layers = jax.device_put((tables(k, np.zeros(24)), found))
        size, kept = len(layers[0].below), []
        schur, load = jnp.zeros((3 * size, 3 * size)), jnp.zeros(3 * size)
        for slab in layers:
            size = len(slab.below)
            schur, load = _resized(schur, size), _resized(load, size)
            factor, schur, load = _eliminated(schur, load, slab, table)
            kept.append(factor)
        pad = lambda a: np.pad(a, [(0, 3 * size - len(a))] + [(0, 0)] * (a.ndim - 1))
        base = force[: counts[0]].ravel()
        modes = _rigid(mesh.index[: counts[0]] * np.asarray(voxel))
        u = _settled(schur + _stiff(schur, pad(modes)), pad(base), layers[-1])
        planes = {0: u}
        for plane, (slab, factor) in enumerate(zip(layers[::-1], kept[::-1], strict=True), 1):
            u = _descended(*factor, _resized(u, len(slab.below)), slab, table)
            planes[plane] = u
        planes = jax.device_get(planes)
    return np.concatenate([planes[p].reshape(-1, 3)[:m] for p, m in enumerate(counts)])


def _rigid(place: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "3*m 6"]:
    """Orthonormal displacements of the base without strain."""
    x, y, z = (place - place.mean(0, keepdims=True)).T
    zero, one = np.zeros_like(x), np.ones_like(x)
    moves = [(one, zero, zero), (zero, one, zero), (zero, zero, one)]
    turns = [(zero, -z, y), (z, zero, -x), (-y, x, zero)]
    modes = np.stack([np.stack(mode, 1).ravel() for mode in moves + turns], 1)
    return np.linalg.qr(modes)[0]


@jax.jit
def _stiff(schur: Float[Array, "d d"], modes: Float[Array, "d 6"]) -> Float[Array, "d d"]:
    """What makes a free base's matrix regular without changing the solution."""
    return jnp.max(jnp.diag(schur)) * modes @ modes.T


def _joined(planes: dict[int, np.ndarray], counts: np.ndarray) -> Float[np.ndarray, "n 3"]:
    """Values of all nodes; the base does not move."""
    parts = [planes[k].reshape(-1, 3)[:m] for k, m in enumerate(counts) if k > 0]
    return np.concatenate([np.zeros((counts[0], 3)), *parts])


def _resized(a: Float[Array, "..."], size: int) -> Float[Array, "..."]:
    """A matrix or vector of the unknowns of a plane, for another number of (padded) nodes."""
    return a if len(a) == 3 * size else _cut_or_padded(a, 3 * size)


@partial(jax.jit, static_argnums=1)
def _cut_or_padded(a: Float[Array, "..."], size: int) -> Float[Array, "..."]:
    a = a[(slice(size),) * a.ndim]
    return jnp.pad(a, [(0, size - n) for n in a.shape])


@jax.jit
def _founded(slab: Slab, table: Tables):
    """Schur complement and load of the first plane above the base."""
    schur = _matrix(_blocks(slab.above, table.above), slab.along_above)
    return schur, (slab.above @ table.load_above).ravel()


@jax.jit
def _settled(schur, load, slab: Slab) -> Float[Array, "d"]:
    """Displacement of the top plane of a layer under the layer's own load."""
    factor = jnp.linalg.cholesky(_with_ones(schur, slab.above.sum(1) > 0))
    return jax.scipy.linalg.cho_solve((factor, True), load)


@partial(jax.jit, donate_argnums=0)
def _eliminated(schur, load, slab: Slab, table: Tables):
    """(factor, load) of the lower plane, and Schur complement and load of the upper one."""
    load = load + (slab.below @ table.load_below).ravel()
    matrix = schur + _matrix(_blocks(slab.below, table.below), slab.along_below)
    factor = jnp.linalg.cholesky(_with_ones(matrix, slab.along_below[:, 4] < len(slab.below)))
    across = _matrix(_blocks(slab.below, table.across), slab.across)
    right = jnp.concatenate([across.T, load[None]])  # solved from the right: the rows are upper
    solved = jax.lax.linalg.triangular_solve(factor, right, lower=True, transpose_a=True)
    w, y = solved[:-1], solved[-1]
    above = _matrix(_blocks(slab.above, table.above), slab.along_above)
    return (factor, load), above - w @ w.T, (slab.above @ table.load_above).ravel() - w @ y


@jax.jit
def _descended(factor, load, after, slab: Slab, table: Tables) -> Float[Array, "d"]:
    """S^-1 (g - B u) of the lower plane, for u of the upper."""
    neighbours = after.reshape(-1, 3).at[slab.across].get(mode="fill", fill_value=0)
    force = jnp.einsum("mnij,mnj->mi", _blocks(slab.below, table.across), neighbours)
    return jax.scipy.linalg.cho_solve((factor, True), load - force.ravel())


def _blocks(quadrants: Float[Array, "m 4"], table: Float[Array, "4 81"]):
    """Stiffness between every node and each of its nine neighbours."""
    return (quadrants @ table).reshape(-1, 9, 3, 3)


def _matrix(blocks: Float[Array, "m 9 3 3"], neighbours: Int[Array, "m 9"]) -> Float[Array, "d d"]:
    """The blocks in their places in a dense matrix."""
    m = len(blocks)
    nodes = jnp.broadcast_to(jnp.arange(m, dtype=neighbours.dtype)[:, None], (m, 9))
    empty = jnp.zeros((m, m, 3, 3))
    filled = empty.at[nodes, neighbours].set(blocks, mode="drop", unique_indices=True)
    return filled.swapaxes(1, 2).reshape(3 * m, 3 * m)


def _with_ones(matrix: Float[Array, "d d"], exists: Bool[Array, "m"]) -> Float[Array, "d d"]:
    """Ones on the diagonal of nodes that do not exist, or not yet."""
    return matrix + jnp.diag(jnp.repeat(1.0 - exists, 3))
