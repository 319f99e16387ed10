"""Laser powder bed fusion by inherent strain: parts shrink layer by layer while they are built.

A part stands on a rigid plate at z = 0. Layers of LAYER mm are added from below; each arrives free
of stress on whatever shape the part below has by then, wants to shrink by the inherent strain e,
and the whole part so far finds a new equilibrium:

    div d_sigma = 0,   d_sigma = C (d_eps - e [new layer]),   d_u = 0 on the plate,   free elsewhere

Displacements add up from the layer in which a node is made; the last field is the result, on the
plate or, if asked for, after the part is cut from it. Lengths are in mm, stresses in MPa.

**Material.** Linear elasticity with the constants of Ti-6Al-4V at room temperature. Nothing yields:
stresses at edges and at the plate grow beyond the yield stress. What is learned, displacement, does
not depend on Young's modulus at all.

**Inherent strain** is plastic and keeps volume: (-e, -e, 2 e) with one number e, the same for all
parts. It is calibrated, not measured: displacement and stress are proportional to it, and with this
one the mean of the largest displacements of the parts kept is about as much below the published
mean as that of the largest stresses is above it (`experiments/lpbf_parts.py` has both). A larger e
brings the displacement nearer, and has more parts rejected.

**Discretisation.** Equal hexahedra (`voxels.py`), a whole number of them to a layer, and a direct
solution of all layers at once in float64 (`layered.py`). Stress is the mean over the elements
around a node of the stress at their centres, and from it the von Mises value.

**Data set.** The published one (vedantpuri/LPBF_FLARE: 3,398 CAD models simulated in a commercial
program, 1,390 kept) was kept by the limits below and by element shape, which here is that of the
voxels. `edge_index` holds the edges of the hexahedra in both directions: published meshes have 5.4
columns a node, a solid grid has nearly 6. The limit on displacement is on the largest of
|u_z|, where the published filter looks at u_z. That on stress is on the largest nodal value from
the top of the first layer on: where the rigid plate ends nothing gives way, and the stress there,
nearly always the largest of the part, grows without bound as voxels shrink; so does that a voxel
above the plate. `vmstr` has it all.
"""

import collections
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import Progress
from scipy import ndimage

from flare_jax.solvers import layered, parts, voxels

VERSION = {"paper": 2, "small": 3}  # raise when `generate` gives other numbers for an index
LAYER = parts.LAYER
YOUNGS, POISSON = 113.8e3, 0.342  # MPa, of Ti-6Al-4V
STRAIN = -0.003, -0.003, 0.006  # of xx, yy, zz; see above
TOLERANCE = 1e-8  # unbalanced force over that of the inherent strain
MAX_NODES, MAX_EDGES = {"paper": 50_000, "small": 640}, 250_000
MAX_DISPLACEMENT, MAX_STRESS = 1.0, 2000.0  # mm upwards or downwards, MPa
MAX_PLANE = 8_000  # nodes at one height: about 5 GB a matrix
MAX_ATTEMPTS = 100  # candidates for one part
WORKERS = 3  # parts in work at once on an accelerator: the host prepares one while another runs


class SolverError(RuntimeError):
    """Forces do not balance, or no candidate is accepted."""


class PartMesh(NamedTuple):
    """One built part: its mesh before deformation, and fields at its nodes."""

    name: str
    pos: Float[np.ndarray, "n 3"]  # mm; the plate is z = 0, its centre x = y = 0
    elems: Int[np.ndarray, "e 8"]  # nodes in the order of VTK_HEXAHEDRON
    edge_index: Int[np.ndarray, "2 E"]  # edges of the hexahedra, in both directions
    disp: Float[np.ndarray, "n 3"]  # mm, after the last layer
    vmstr: Float[np.ndarray, "n"]  # von Mises stress, MPa
    rejected: tuple[str, ...] = ()  # why candidates before it were not kept


def simulate(
    solid: Bool[np.ndarray, "nx ny nz"],
    voxel: tuple[float, float, float],
    *,
    layer: float = LAYER,
    strain: tuple[float, float, float] = STRAIN,
    release: bool = False,
    name: str = "part",
) -> PartMesh:
    """Builds a part that is given as voxels; the grid's centre is put over that of the plate.

    Args:
        solid: voxels of the part; z = 0 is on the plate.
        voxel: their size (dx, dy, dz) in mm.
        layer: height in mm of what is added at once, a multiple of dz; the last may be lower.
        strain: inherent strain (xx, yy, zz) of a layer.
        release: cut the part from the plate in the end. Its foot then keeps its mean position and
            rotation.
        name: of the part, for messages and the result.

    Raises:
        ValueError: for a part that is empty, in pieces, too wide, or in the air when a layer is
            built, and for sizes that are not positive or do not fit together.
        SolverError: when forces do not balance to TOLERANCE.
    """
    solid = np.asarray(solid)
    per_layer = check(solid, voxel, layer, strain, name)
    mesh = voxels.mesh(solid)
    hooke, eigen = voxels.elasticity(YOUNGS, POISSON), np.array([*strain, 0.0, 0.0, 0.0])
    k, f = voxels.element(voxel, hooke, eigen)
    total, rest = layered.build(solid, mesh, k, f, per_layer)
    upper = voxels.CORNERS[:, 0] == 1
    u = np.where(upper[None, :, None], total[mesh.corners], rest[mesh.corners]).reshape(-1, 24)
    fixed = mesh.index[:, 2] == 0
    if release:
        held = np.where(fixed[:, None], _forces(mesh, u, k, f), 0.0)
        cut = layered.release(solid, mesh, k, voxel, -held)
        total, u = total + cut, u + cut[mesh.corners].reshape(-1, 24)
        fixed = np.zeros_like(fixed)
    _check_balance(_forces(mesh, u, k, f)[~fixed], np.sqrt(len(u)) * np.linalg.norm(f), name)
    stress = (u @ voxels.strain_matrix((0.5, 0.5, 0.5), voxel).T - eigen[None]) @ hooke
    half = np.array([solid.shape[0] * voxel[0] / 2, solid.shape[1] * voxel[1] / 2, 0.0])
    return PartMesh(
        name,
        (mesh.index * np.array(voxel)[None] - half[None]).astype(np.float32),
        mesh.corners[:, voxels.VTK],
        voxels.edges(solid, mesh.number),
        total.astype(np.float32),
        voxels.von_mises(voxels.nodal_mean(mesh, stress)).astype(np.float32),
    )


def _forces(mesh: voxels.Mesh, u: Float[np.ndarray, "e 24"], k, f) -> Float[np.ndarray, "n 3"]:
    """Sum at each node of the forces that its elements need to be in their present shape."""
    return voxels.nodal_sum(mesh, (u @ k - f[None]).reshape(-1, 8, 3))


def _check_balance(force: Float[np.ndarray, "n 3"], scale: float, name: str) -> None:
    residual = np.linalg.norm(force) / (scale if scale > 0 else 1.0)
    if not residual <= TOLERANCE:
        raise SolverError(
            f"{name}: unbalanced force {residual:.1e} of that of the inherent strain, wanted "
            f"{TOLERANCE:.0e}"
        )


def check(solid: np.ndarray, voxel, layer: float, strain, name: str) -> int:
    """Voxels to a layer; raises ValueError for what cannot be built."""
    if solid.ndim != 3 or solid.dtype != bool:
        raise ValueError(
            f"{name}: solid must be boolean [nx, ny, nz], got {solid.dtype} {solid.shape}"
        )
    if len(voxel) != 3 or not all(np.isfinite(v) and v > 0 for v in voxel):
        raise ValueError(f"{name}: voxel must be three positive lengths in mm, got {voxel}")
    per_layer = round(layer / voxel[2]) if np.isfinite(layer) else 0
    if per_layer < 1 or not np.isclose(per_layer * voxel[2], layer, rtol=1e-6):
        raise ValueError(
            f"{name}: layer must be a multiple of the voxels' height {voxel[2]} mm, got {layer} mm"
        )
    if len(strain) != 3 or not np.isfinite(strain).all():
        raise ValueError(f"{name}: strain must be three finite numbers, got {strain}")
    if not solid.any():
        raise ValueError(f"{name}: solid has no voxel that is true, so no elements")
    if not solid[:, :, 0].any():
        lowest = int(np.argmax(solid.any((0, 1))))
        raise ValueError(
            f"{name}: the part does not stand on the plate: its lowest voxels have z index {lowest}"
        )
    label, count = ndimage.label(solid)
    if count > 1:
        sizes = np.bincount(label.ravel())[1:]
        i, j, k = (int(c) for c in np.argwhere(label == 1 + sizes.argmin())[0])
        raise ValueError(
            f"{name}: {count} loose pieces that share no face of a voxel, of {sizes.tolist()} "
            f"voxels; one holds voxel ({i}, {j}, {k})"
        )
    widest = np.bincount(voxels.mesh(solid).index[:, 2]).max()
    if widest > MAX_PLANE:
        raise ValueError(
            f"{name}: {widest:,} nodes at one height, at most {MAX_PLANE:,} can be solved for; "
            "take larger voxels"
        )
    loose = voxels.unsupported(solid, per_layer)
    if loose.any():
        i, j, k = (int(c) for c in np.argwhere(loose)[0])
        raise ValueError(
            f"{name}: voxel ({i}, {j}, {k}) hangs in the air when layer {k // per_layer} is built"
        )
    return per_layer


def generate(
    indices: Sequence[int],
    *,
    seed: int,
    size: str = "paper",
    progress: bool = True,
) -> Iterator[PartMesh]:
    """Accepted parts of a data set, one after another in the order of `indices`.

    Part i is the first acceptable one of a sequence of candidates that depends on `(seed, i)`
    alone: not on which other parts are asked for.

    Args:
        indices: which parts.
        seed: of the whole data set.
        size: "paper" for meshes like the published ones, "small" for simpler ones, of a few hundred
            nodes and without overhangs.
        progress: show a progress bar on stderr, and in the end what rejected candidates.

    Raises:
        ValueError: for a size that does not exist.
        SolverError: naming the part that does not balance, or has no acceptable candidate.
    """
    if size not in parts.SIZES:
        raise ValueError(f"size must be one of {', '.join(parts.SIZES)}, got {size!r}")
    return _generated(indices, seed, size, progress)


def _generated(indices, seed, size, progress) -> Iterator[PartMesh]:
    workers = 1 if jax.default_backend() == "cpu" else WORKERS
    console, rejected = Console(stderr=True), collections.Counter()
    waiting, ahead = iter(indices), collections.deque()
    with (
        blas_threads(size),
        ThreadPoolExecutor(workers) as pool,
        Progress(console=console, disable=not (progress and console.is_terminal)) as bar,
    ):
        task = bar.add_task(f"LPBF, {size} parts", total=len(indices))
        try:
            while True:
                for index in itertools.islice(waiting, workers + 1 - len(ahead)):
                    ahead.append(pool.submit(accepted, index, seed, size))
                if not ahead:
                    break
                part = ahead.popleft().result()
                rejected.update(part.rejected)
                bar.advance(task)
                yield part
        finally:
            pool.shutdown(cancel_futures=True)
    if progress:
        total = len(indices) + rejected.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items()))
        console.print(
            f"{len(indices)} of {total} candidates accepted; rejected: {reasons or 'none'}"
        )


def blas_threads(size: str) -> contextlib.AbstractContextManager:
    """One on a CPU for the matrices of small parts: more would mostly wait for each other."""
    if size != "small" or jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def accepted(index: int, seed: int, size: str) -> PartMesh:
    """The first acceptable candidate of a part."""
    reasons: list[str] = []
    for attempt in range(MAX_ATTEMPTS):
        part = parts.candidate(seed, index, attempt, size)
        reason = too_big(part, MAX_NODES[size])
        if reason is None:
            name = f"part_{index:05d}_{part.family}"
            mesh = simulate(part.solid, part.voxel, name=name)
            reason = too_much(mesh)
            if reason is None:
                return mesh._replace(rejected=tuple(reasons))
        reasons.append(reason)
    raise SolverError(
        f"part {index} (seed {seed}, {size}): none of {MAX_ATTEMPTS} candidates is acceptable"
    )


def too_big(part: parts.Part | None, most: int) -> str | None:
    """Why a candidate is not worth solving."""
    if part is None:
        return "mostly in the air"
    if len(voxels.mesh(part.solid).index) > most:
        return f"over {most} nodes"
    return f"over {MAX_EDGES} edges" if voxels.edge_count(part.solid) > MAX_EDGES else None


def too_much(mesh: PartMesh) -> str | None:
    """Why a built part is not kept."""
    if np.abs(mesh.disp[:, 2]).max() > MAX_DISPLACEMENT:
        return f"over {MAX_DISPLACEMENT:g} mm"
    return f"over {MAX_STRESS:g} MPa" if largest_stress(mesh) > MAX_STRESS else None


def largest_stress(mesh: PartMesh) -> float:
    """The largest von Mises stress from the top of the first layer on, MPa."""
    first = min(LAYER, mesh.pos[:, 2].max())
    return float(mesh.vmstr[mesh.pos[:, 2] > 0.99 * first].max())  # positions are rounded
