"""wip"""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from flare_jax.solvers import layered, parts, voxels

VERSION = 1
LAYER = 2.5
YOUNGS, POISSON = 113.8e3, 0.342
STRAIN = (-0.005, -0.005, 0.0)
TOLERANCE = 1e-7

class SolverError(RuntimeError):
    """x"""

class PartMesh(NamedTuple):
    name: str
    pos: Float[np.ndarray, "n 3"]
    elems: Int[np.ndarray, "e 8"]
    edge_index: Int[np.ndarray, "2 E"]
    disp: Float[np.ndarray, "n 3"]
    vmstr: Float[np.ndarray, "n"]

def simulate(solid, voxel, *, layer=LAYER, strain=STRAIN, name="part"):
    per_layer = round(layer / voxel[2])
    mesh = voxels.mesh(solid)
    hooke = voxels.elasticity(YOUNGS, POISSON)
    strain = np.array([*strain, 0, 0, 0])
    k, f = voxels.element(voxel, hooke, strain)
    sums = layered.build(solid, mesh, k, f, per_layer)
    upper = voxels.CORNERS[:, 0] == 1
    u = np.where(upper[None, :, None], sums.total[mesh.corners], sums.rest[mesh.corners])
    force = voxels.nodal_sum(mesh.corners, (u.reshape(-1, 24) @ k - f).reshape(-1, 8, 3), len(mesh.index))
    free = mesh.index[:, 2] > 0
    scale = np.linalg.norm(f)*np.sqrt(len(u))
    residual = np.linalg.norm(force[free]) / scale
    if not residual <= TOLERANCE:
        raise SolverError(f"{name}: unbalanced force {residual:.1e}")
    b = voxels.strain_matrix((0.5, 0.5, 0.5), voxel)
    stress = (u.reshape(-1, 24) @ b.T - strain[None]) @ hooke
    parts_ = np.repeat(np.concatenate([stress, np.ones((len(stress), 1))], 1)[:, None], 8, 1)
    nodal = voxels.nodal_sum(mesh.corners, parts_, len(mesh.index))
    vm = voxels.von_mises(nodal[:, :6] / nodal[:, 6:])
    pos = mesh.index * np.asarray(voxel) - [*(np.array(solid.shape[:2]) * voxel[:2] / 2), 0]
    return PartMesh(name, pos.astype(np.float32), mesh.corners[:, voxels.VTK], voxels.edges(solid, mesh.number), sums.total.astype(np.float32), vm.astype(np.float32))

def generate(indices: range, *, seed: int, size: str = "paper", progress: bool = True) -> Iterator[PartMesh]:
    for i in indices:
        solid, voxel = parts.candidate(seed, i, 0, size)
        yield simulate(solid, voxel, name=f"part_{i:05d}")
