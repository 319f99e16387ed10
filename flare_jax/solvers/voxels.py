"""Voxel solids as meshes of equal hexahedra: nodes, elements, edges, and their element matrices.

A solid is a boolean array [nx, ny, nz]; its elements are the true voxels, its nodes their corners,
numbered along x, then y, then z, so that every plane of nodes is one range of numbers. Elements are
trilinear with 2 x 2 x 2 Gauss points. Strains and stresses are in Voigt's order xx, yy, zz, xy, yz,
zx with engineering shear. Lengths are in mm, moduli and stresses in MPa, forces in N.

Corners of a voxel are kept as (z, y, x) bits in matrices and in the order of VTK_HEXAHEDRON (the
lower face counterclockwise, then the upper one) in `elems`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

CORNERS = np.array([[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)])  # bits (z, y, x)
VTK = np.array([0, 1, 3, 2, 4, 5, 7, 6])  # corner of each node of a VTK_HEXAHEDRON


class Mesh(NamedTuple):
    """Nodes and elements of a solid; `number` is -1 where the grid has no node."""

    number: Int[np.ndarray, "X Y Z"]  # X = nx + 1 and so on
    index: Int[np.ndarray, "n 3"]  # grid coordinates of each node
    corners: Int[np.ndarray, "e 8"]  # nodes of each element in the order of CORNERS
    layer: Int[np.ndarray, "e"]  # z index of each element


def mesh(solid: Bool[np.ndarray, "nx ny nz"]) -> Mesh:
    """Numbers the corners of the true voxels."""
    exists = np.zeros(np.add(solid.shape, 1), bool)
    for z, y, x in CORNERS:
        exists[_from(x), _from(y), _from(z)] |= solid
    number = np.full(exists.shape, -1, np.int32)
    k, j, i = np.nonzero(exists.transpose(2, 1, 0))
    number[i, j, k] = np.arange(len(i))
    cz, cy, cx = np.nonzero(solid.transpose(2, 1, 0))
    corners = np.stack([number[cx + x, cy + y, cz + z] for z, y, x in CORNERS], 1)
    return Mesh(number, np.stack([i, j, k], 1), corners, cz)


def edges(solid: Bool[np.ndarray, "nx ny nz"], number) -> Int[np.ndarray, "2 E"]:
    """Edges of the hexahedra, each in both directions."""
    pairs = []
    for axis in range(3):
        across = [a for a in range(3) if a != axis]
        shape = np.add(solid.shape, [a != axis for a in range(3)])
        used = np.zeros(shape, bool)
        for bits in np.ndindex(2, 2):
            place = [slice(None)] * 3
            for a, bit in zip(across, bits, strict=True):
                place[a] = _from(bit)
            used[tuple(place)] |= solid
        first = np.moveaxis(number, axis, 0)[:-1][np.moveaxis(used, axis, 0)]
        second = np.moveaxis(number, axis, 0)[1:][np.moveaxis(used, axis, 0)]
        pairs += [np.stack([first, second]), np.stack([second, first])]
    return np.concatenate(pairs, 1)


def edge_count(solid: Bool[np.ndarray, "nx ny nz"]) -> int:
    """Columns of `edges`, without numbering anything."""
    return edges(solid, np.zeros(np.add(solid.shape, 1), np.int8)).shape[1]


def _from(bit: int) -> slice:
    """Grid points that are corner `bit` of some voxel along one axis."""
    return slice(1, None) if bit else slice(None, -1)


def unsupported(solid: Bool[np.ndarray, "nx ny nz"], per_layer: int) -> Bool[np.ndarray, "..."]:
    """Voxels that do not hang together with the plate when their layer is built.

    A layer of `per_layer` voxels of height is added at once. Voxels hang together through faces; an
    edge alone would be a hinge. What stands only on unsupported voxels is unsupported too.
    """
    loose = np.zeros_like(solid)
    below = np.ones(solid.shape[:2], bool)  # the plate
    for start in range(0, solid.shape[2], per_layer):
        slab = solid[:, :, start : start + per_layer]
        label, count = ndimage.label(slab)
        stands = np.zeros(count + 1, bool)
        stands[label[:, :, 0][below]] = True
        stands[0] = True  # empty
        loose[:, :, start : start + per_layer] = ~stands[label]
        below = slab[:, :, -1] & stands[label[:, :, -1]]
    return loose


def elasticity(youngs: float, poisson: float) -> Float[np.ndarray, "6 6"]:
    """Hooke's matrix of an isotropic material."""
    lame = youngs * poisson / ((1 + poisson) * (1 - 2 * poisson))
    shear = youngs / (2 * (1 + poisson))
    matrix = np.diag([2 * shear] * 3 + [shear] * 3)
    matrix[:3, :3] += lame
    return matrix


def strain_matrix(place, voxel) -> Float[np.ndarray, "6 24"]:
    """B with strain = B u at a `place` of [0, 1]^3 (x, y, z); u holds (corner, component)."""
    s = np.asarray(place)[::-1]  # (z, y, x)
    size = np.asarray(voxel)[::-1]
    factor = np.where(CORNERS == 1, s, 1 - s)  # [corner, axis]
    slope = np.where(CORNERS == 1, 1.0, -1.0) / size
    dz, dy, dx = (
        slope[:, a] * np.prod(np.delete(factor, a, 1), axis=1) for a in range(3)
    )  # derivatives of the shape functions
    b = np.zeros((6, 8, 3))
    b[0, :, 0] = b[3, :, 1] = b[5, :, 2] = dx
    b[1, :, 1] = b[3, :, 0] = b[4, :, 2] = dy
    b[2, :, 2] = b[4, :, 1] = b[5, :, 0] = dz
    return b.reshape(6, 24)


def element(voxel, hooke, strain) -> tuple[np.ndarray, np.ndarray]:
    """Stiffness [24, 24] of a voxel, and the nodal forces [24] that a stress-free strain exerts.

    K = int B^T C B,    f = int B^T C strain
    """
    gauss = 0.5 + np.array([-0.5, 0.5]) / np.sqrt(3)
    weight = np.prod(voxel) / 8
    k, f = np.zeros((24, 24)), np.zeros(24)
    for place in np.stack(np.meshgrid(gauss, gauss, gauss), -1).reshape(-1, 3):
        b = strain_matrix(place, voxel)
        k += weight * b.T @ hooke @ b
        f += weight * b.T @ hooke @ strain
    return k, f


def nodal_sum(mesh: Mesh, parts: Float[np.ndarray, "e 8 c"]) -> Float[np.ndarray, "n c"]:
    """Sum at each node over its elements, in a fixed order."""
    at, count = mesh.corners.ravel(), len(mesh.index)
    columns = np.moveaxis(parts, -1, 0).reshape(parts.shape[-1], -1)
    return np.stack([np.bincount(at, column, count) for column in columns], -1)


def nodal_mean(mesh: Mesh, values: Float[np.ndarray, "e c"]) -> Float[np.ndarray, "n c"]:
    """Mean at each node over its elements."""
    count = np.bincount(mesh.corners.ravel())
    shape = (len(values), 8, values.shape[1])
    return nodal_sum(mesh, np.broadcast_to(values[:, None], shape)) / count[:, None]


def von_mises(stress: Float[np.ndarray, "n 6"]) -> Float[np.ndarray, "n"]:
    """sqrt(3/2 s:s) of the deviator s of a stress."""
    xx, yy, zz, xy, yz, zx = stress.T
    normal = (xx - yy) ** 2 + (yy - zz) ** 2 + (zz - xx) ** 2
    return np.sqrt(normal / 2 + 3 * (xy**2 + yz**2 + zx**2))
