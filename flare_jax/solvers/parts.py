"""Random parts for a powder bed: CAD-like shapes as signed distances, sampled on voxels.

A shape is a function of coordinates (x, y, z) in mm that is negative inside and outside is about
the distance to the surface: `min` unites two, `max` intersects them, a minus sign takes the
complement. The plate is z = 0, with its centre at x = y = 0; the build envelope is a cube on it.

Eight families, each with random sizes: plates with ribs and holes, brackets, profiles (L, T, I, U
and box sections, upright or lying), tubes with flanges and windows, lattices of struts and gyroids,
bridges and tables with or without supports, blocks with pockets, and stacks of two of these. The
number of nodes to aim at is drawn too, about as the published meshes have them (calibrated); the
width of the voxels follows from it and from the shape's volume, as a mesher's does from its
settings, and stays below that of walls. Voxels that hang in the air when their layer is built are
dropped, and all but the largest component.

Small parts are simpler. A displacement jumps where a layer begins, between the nodes in it and
those at the top of the layer below, and at the undersides of overhangs; a gap of one voxel does not
show in the nodes at all. So the voxels of small parts are as high as a layer and all of one width,
overhangs are filled down to the plate, and narrow gaps are filled as well: the displacement is then
smooth, and follows from the nodes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from flare_jax.solvers import voxels

LAYER = 2.5  # mm, height of a layer of the simulation
SPREAD = 1.2, 1.5  # of the Beta distribution of the nodes to aim at
UPRIGHT = 0.3  # share of parts that are built as drawn; the others lie on any side
FLATNESS = 0.7  # height over width of voxels: the solver likes many small planes


Coordinate = Float[np.ndarray, "..."]
Shape = Callable[[Coordinate, Coordinate, Coordinate], Float[np.ndarray, "..."]]


class Size(NamedTuple):
    """What parts of one size have in common."""

    box: float  # side of the envelope, mm
    nodes: tuple[int, int]  # fewest and most to aim at
    widths: tuple[float, float]  # smallest and largest of a voxel, cube root of its volume, mm
    per_layer: int  # most voxels in the height of a layer
    filled: bool  # what hangs over is filled down to the plate, and so are gaps of one voxel


SIZES = {
    "paper": Size(60.0, (500, 47_500), (0.7, 3.0), 5, False),
    "small": Size(20.0, (50, 640), (2.2, 2.2), 1, True),
}


class Part(NamedTuple):
    """A solid on voxels, and how wide those are in mm; `family` says which generator drew it."""

    solid: Bool[np.ndarray, "nx ny nz"]
    voxel: tuple[float, float, float]
    family: str


# ---------------------------------------------------------------------- primitives ---


def cuboid(low, high) -> Shape:
    """low <= (x, y, z) <= high."""

    def distance(*place):
        sides = [np.maximum(a - p, p - b) for p, a, b in zip(place, low, high, strict=True)]
        return np.maximum(np.maximum(sides[0], sides[1]), sides[2])

    return distance


def cylinder(centre, radius: float, axis: int, low: float, high: float) -> Shape:
    """Along `axis` from low to high, at `centre` in the other two coordinates."""

    def distance(*place):
        a, b = (p for i, p in enumerate(place) if i != axis)
        side = np.hypot(a - centre[0], b - centre[1]) - radius
        return np.maximum(side, np.maximum(low - place[axis], place[axis] - high))

    return distance


def cone(centre, lower: float, upper: float, low: float, high: float) -> Shape:
    """Upright, with radii `lower` at z = low and `upper` at z = high."""

    def distance(x, y, z):
        radius = lower + (upper - lower) * (z - low) / (high - low)
        side = np.hypot(x - centre[0], y - centre[1]) - radius
        return np.maximum(side, np.maximum(low - z, z - high))

    return distance


def strut(start, end, radius: float) -> Shape:
    """A round bar with round ends."""
    start, axis = np.asarray(start), np.subtract(end, start)

    def distance(*place):
        along = sum((p - s) * a for p, s, a in zip(place, start, axis, strict=True))
        t = np.clip(along / (axis @ axis), 0, 1)
        square = sum((p - s - t * a) ** 2 for p, s, a in zip(place, start, axis, strict=True))
        return np.sqrt(square) - radius

    return distance


def gyroid(period: float, thickness: float) -> Shape:
    """A triply periodic sheet, about `thickness` thick."""
    k = 2 * np.pi / period

    def distance(x, y, z):
        g = sum(np.sin(k * a) * np.cos(k * b) for a, b in ((x, y), (y, z), (z, x)))
        return np.abs(g) / k / 1.5 - thickness / 2

    return distance


def slope(x: float, z: float, angle: float) -> Shape:
    """The half space below a plane through (x, z) that rises along +x by `angle`."""
    return lambda px, py, pz: (pz - z) * np.cos(angle) - (px - x) * np.sin(angle)


def union(*shapes: Shape) -> Shape:
    return lambda *place: _reduced(np.minimum, shapes, place)


def common(*shapes: Shape) -> Shape:
    return lambda *place: _reduced(np.maximum, shapes, place)


def cut(shape: Shape, *tools: Shape) -> Shape:
    """The shape without the tools."""
    return common(shape, *(lambda *place, t=tool: -t(*place) for tool in tools))


def _reduced(combine, shapes, place):
    result = shapes[0](*place)
    for shape in shapes[1:]:
        result = combine(result, shape(*place))
    return result


# ------------------------------------------------------------------------- families ---
# Each draws sizes within a cube of side `box` and returns a shape and its thinnest wall.


def plate(rng, box: float) -> tuple[Shape, float]:
    """A base with ribs across it and holes through it."""
    w, d = rng.uniform(0.5, 1.0, 2) * box / 2
    t, rib = rng.uniform(0.08, 0.2) * box, rng.uniform(0.05, 0.12) * box
    height = t + rng.uniform(0.1, 0.5) * box
    body = [cuboid((-w, -d, 0), (w, d, t))]
    for y in np.linspace(-d + rib, d - rib, rng.integers(0, 4)):
        body.append(cuboid((-w, y - rib / 2, 0), (w, y + rib / 2, height)))
    for x in np.linspace(-w + rib, w - rib, rng.integers(0, 4)):
        body.append(cuboid((x - rib / 2, -d, 0), (x + rib / 2, d, height)))
    holes = [
        cylinder(rng.uniform(-0.7, 0.7, 2) * (w, d), rng.uniform(0.05, 0.15) * box, 2, -1, box)
        for _ in range(rng.integers(0, 4))
    ]
    return cut(union(*body), *holes), rib


def bracket(rng, box: float) -> tuple[Shape, float]:
    """A foot and a wall with holes, joined by gussets."""
    w, d = rng.uniform(0.3, 1.0) * box / 2, rng.uniform(0.5, 1.0) * box / 2
    h, t = rng.uniform(0.4, 1.0) * box, rng.uniform(0.07, 0.18) * box
    body = [cuboid((-d, -w, 0), (d, w, t)), cuboid((-d, -w, 0), (-d + t, w, h))]
    reach = rng.uniform(0.4, 0.9)
    for y in np.linspace(-w + t / 2, w - t / 2, rng.integers(1, 4)):
        rib = cuboid((-d, y - t / 2, 0), (d * (2 * reach - 1), y + t / 2, h * reach))
        body.append(common(rib, slope(-d, h * reach, -np.arctan2(h, 2 * d))))
    holes = [
        cylinder((0.3 * d, y), rng.uniform(0.04, 0.12) * box, 2, -1, t + 1) for y in (-w / 2, w / 2)
    ]
    holes.append(cylinder((0, rng.uniform(0.6, 0.8) * h), rng.uniform(0.08, 0.2) * w, 0, -box, box))
    return cut(union(*body), *holes[: rng.integers(0, 4)]), t


def profile(rng, box: float) -> tuple[Shape, float]:
    """An L, T, I, U or box section, upright or lying."""
    w, h = rng.uniform(0.35, 0.95, 2) * box
    length, t = rng.uniform(0.4, 1.0) * box, rng.uniform(0.08, 0.2) * min(w, h) + 0.03 * box
    bars = {  # (u, v) rectangles, u centred, v from 0
        "foot": (-w / 2, w / 2, 0, t),
        "head": (-w / 2, w / 2, h - t, h),
        "web": (-t / 2, t / 2, 0, h),
        "left": (-w / 2, -w / 2 + t, 0, h),
        "right": (w / 2 - t, w / 2, 0, h),
    }
    sections = ("foot left", "head web", "foot head web", "foot left right", "head left right")
    section = rng.choice([*sections, "foot head left right", "foot web"]).split()
    upright = rng.random() < 0.5
    body = []
    for a, b, c, e in (bars[name] for name in section):
        if upright:
            body.append(cuboid((a, c - h / 2, 0), (b, e - h / 2, length)))
        else:
            body.append(cuboid((a, -length / 2, c), (b, length / 2, e)))
    return union(*body), t


def tube(rng, box: float) -> tuple[Shape, float]:
    """A hollow cylinder or cone, perhaps with flanges and windows."""
    r, top = rng.uniform(0.25, 0.48, 2) * box
    top = r if rng.random() < 0.6 else top
    t, h = rng.uniform(0.05, 0.14) * box, rng.uniform(0.3, 1.0) * box
    body, holes = [cone((0, 0), r, top, 0, h)], [cone((0, 0), r - t, top - t, -1e-6, h + 1e-6)]
    if rng.random() < 0.5:
        body.append(cylinder((0, 0), min(r * 1.3, box / 2), 2, 0, 1.5 * t))
    if rng.random() < 0.3:
        body.append(cylinder((0, 0), min(top * 1.15, box / 2), 2, h - 1.5 * t, h))
    for axis in range(rng.integers(0, 3)):
        hole = rng.uniform(0.06, 0.4) * min(r, top)
        holes.append(cylinder((0, rng.uniform(0.3, 0.7) * h), hole, axis, -box, box))
    return cut(union(*body), *holes), t


def lattice(rng, box: float) -> tuple[Shape, float]:
    """Struts of a body-centred cubic lattice or a gyroid, on a foot and under a cover."""
    w, d, h = rng.uniform(0.4, 0.9, 3) * box
    t = rng.uniform(0.05, 0.1) * box
    low, high = np.array([-w / 2, -d / 2, 0.0]), np.array([w / 2, d / 2, h])
    if rng.random() < 0.5:
        core = gyroid(rng.uniform(0.3, 0.5) * box, t)
    else:
        core = diagonals(low, (high - low) / rng.integers(2, 4, 3), t / 2)
    plates = [cuboid(low, (w / 2, d / 2, t))]
    if rng.random() < 0.7:
        plates.append(cuboid((-w / 2, -d / 2, h - t), high))
    return common(cuboid(low, high), union(core, *plates)), t


def diagonals(low, cell, radius: float) -> Shape:
    """Struts along the four diagonals of every cell of a grid through `low`."""
    ends = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    struts = union(*(strut(end * cell, (1 - end) * cell, radius) for end in ends))
    return lambda *place: struts(
        *(np.mod(p - a, c) for p, a, c in zip(place, low, cell, strict=True))
    )


def bridge(rng, box: float) -> tuple[Shape, float]:
    """A deck on feet, a table or an arch, with or without supports below the overhang."""
    w, d = rng.uniform(0.6, 1.0) * box / 2, rng.uniform(0.2, 0.8) * box / 2
    h, t = rng.uniform(0.3, 0.9) * box, rng.uniform(0.1, 0.22) * box
    body = [cuboid((-w, -d, h - t), (w, d, h))]
    kind = rng.integers(3)
    if kind == 0:  # two walls
        inset = rng.uniform(0, 0.5) * w
        body += [
            cuboid((s * (w - inset) - t / 2, -d, 0), (s * (w - inset) + t / 2, d, h))
            for s in (-0.9, 0.9)
        ]
    elif kind == 1:  # four columns
        ends = [(s * 0.8 * w, u * 0.7 * d) for s in (-1, 1) for u in (-1, 1)]
        body += [cylinder(end, t / 2, 2, 0, h) for end in ends]
    else:
        arch = cuboid((-w, -d, 0), (w, d, h))
        body.append(cut(arch, cylinder((0, 0), min(0.85 * w, h - t), 1, -box, box)))
    pillar = 0.06 * box
    for x in np.linspace(-w, w, rng.integers(2, 6))[1:-1]:  # supports
        body += [cylinder((x, y), pillar / 2, 2, 0, h) for y in (-0.6 * d, 0.6 * d)]
    return union(*body), pillar


def block(rng, box: float) -> tuple[Shape, float]:
    """A block, drum or wedge with pockets and bores."""
    w, d, h = rng.uniform(0.3, 0.9, 3) * box
    body = cuboid((-w / 2, -d / 2, 0), (w / 2, d / 2, h))
    kind = rng.integers(3)
    if kind == 1:
        body = cylinder((0, 0), max(w, d) / 2, 2, 0, h)
    if kind == 2:
        body = common(body, slope(0, 0.6 * h, rng.uniform(0.2, 0.9)))
    holes = []
    for _ in range(rng.integers(0, 4)):
        axis = rng.integers(3)
        middle = [(0, h / 2), (0, h / 2), (0, 0)][axis] + rng.uniform(-0.2, 0.2, 2) * box
        holes.append(cylinder(middle, rng.uniform(0.05, 0.15) * box, axis, -box, box))
    if rng.random() < 0.5:
        x, y = rng.uniform(0.2, 0.35, 2) * (w, d)
        holes.append(cuboid((-x, -y, rng.uniform(0.2, 0.6) * h), (x, y, box)))
    return cut(body, *holes), 0.1 * box


def compound(rng, box: float) -> tuple[Shape, float]:
    """One family's shape on another's, with holes through both."""
    low, high = rng.choice(len(SIMPLE), 2)
    split = rng.uniform(0.3, 0.6) * box
    (a, wall), (b, other) = SIMPLE[low](rng, box), SIMPLE[high](rng, box)
    lower = common(a, cuboid((-box, -box, 0), (box, box, split)))
    raised = lambda x, y, z: b(x, y, z - split)
    joint = cuboid((-0.3 * box, -0.3 * box, split - wall), (0.3 * box, 0.3 * box, split + wall))
    whole = union(lower, raised) if rng.random() < 0.5 else union(lower, raised, joint)
    hole = cylinder(rng.uniform(-0.2, 0.2, 2) * box, rng.uniform(0.05, 0.12) * box, 2, -1, 2 * box)
    return cut(whole, hole) if rng.random() < 0.5 else whole, min(wall, other)


SIMPLE = (plate, bracket, profile, tube, lattice, bridge, block)
FAMILIES = (*SIMPLE, compound)


# ------------------------------------------------------------------------- sampling ---


def candidate(seed: int, index: int, attempt: int, size: str) -> Part | None:
    """One candidate for part `index`; None where most of what was drawn cannot be built.

    Depends on its arguments alone.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    rng = np.random.default_rng([seed, index, attempt])
    box, (fewest, most), widths, per_layer, fill = SIZES[size]
    family = FAMILIES[rng.integers(len(FAMILIES))]
    shape, wall = family(rng, box)
    upright = rng.random() < UPRIGHT
    axes = (*rng.permutation(2), 2) if upright else tuple(rng.permutation(3))
    signs = tuple(rng.choice([-1, 1], 2)) + (1 if upright else rng.choice([-1, 1]),)
    nodes = fewest + (most - fewest) * rng.beta(*SPREAD)
    width = box / 30
    for _ in range(3):  # the first is coarse; then the width follows from the number of nodes
        voxel = voxel_of(width, per_layer)
        drawn = sample(shape, axes, signs, box, voxel)
        drawn = filled(drawn) if fill else drawn
        solid = standing(drawn, round(LAYER / voxel[2]))
        if solid.sum() <= 0.5 * drawn.sum():
            return None
        found = len(voxels.mesh(solid).index)
        width = np.clip(min(width * np.cbrt(found / nodes), 0.7 * wall), *widths)
    return Part(solid, voxel, family.__name__)


def voxel_of(width: float, per_layer: int) -> tuple[float, float, float]:
    """A voxel of about this width, cube root of its volume: 1 to `per_layer` are a layer high."""
    height = LAYER / min(max(1, round(LAYER / (FLATNESS * width))), per_layer)
    across = float(np.sqrt(width**3 / height))
    return across, across, height


def sample(shape: Shape, axes, signs, box: float, voxel) -> Bool[np.ndarray, "nx ny nz"]:
    """The voxels of the envelope whose centres are inside the shape, put down on the plate.

    The shape's axis a lies along axis axes[a] of the envelope, or against it if signs[a] is -1.
    """
    n = [int(box / v + 1e-6) for v in voxel]
    place = [(np.arange(m) + 0.5 - m / 2) * v for m, v in zip(n, voxel, strict=True)]
    place = [p.reshape([-1 if a == b else 1 for b in range(3)]) for a, p in enumerate(place)]
    x, y, z = (sign * place[a] for a, sign in zip(axes, signs, strict=True))
    inside = np.broadcast_to(shape(x, y, z + box / 2) < 0, n)
    return inside[:, :, np.argmax(inside.any((0, 1))) :]


def filled(solid: Bool[np.ndarray, "nx ny nz"]) -> Bool[np.ndarray, "nx ny nz"]:
    """The solid with all that is below it, then with all voxels whose corners are its nodes."""
    solid = np.logical_or.accumulate(solid[:, :, ::-1], axis=2)[:, :, ::-1]
    full = voxels.mesh(solid).number >= 0  # nodes, then edges, faces and voxels whose ends all are
    for axis in range(3):
        full = np.delete(full, -1, axis) & np.delete(full, 0, axis)
    return full


def standing(solid: Bool[np.ndarray, "nx ny nz"], per_layer: int) -> Bool[np.ndarray, "..."]:
    """The largest component of what can be built, cropped in x, y and from above."""
    solid = solid & ~voxels.unsupported(solid, per_layer)
    label, count = ndimage.label(solid)
    if count > 1:
        solid = label == 1 + np.argmax(np.bincount(label.ravel())[1:])
    if count == 0:
        return solid
    (x, y, z) = ndimage.find_objects(solid.astype(np.uint8))[0]
    return np.ascontiguousarray(solid[x, y, : z.stop])
