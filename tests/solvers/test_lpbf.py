import jax
import numpy as np
import pytest

from flare_jax.solvers import layered, lpbf, voxels
from flare_jax.solvers.parts import SIZES, standing

VOXEL = 1.5, 1.25, 1.25
E, NU = lpbf.YOUNGS, lpbf.POISSON


def ragged(per_layer, seed=0):
    """A solid without any symmetry that can be built."""
    solid = np.random.default_rng(seed).random((5, 4, 6)) < 0.75
    return standing(solid, per_layer)


def table():
    """A foot with a deck that hangs over on one side."""
    solid = np.zeros((8, 4, 6), bool)
    solid[:3] = True
    solid[:, 1:, 4:] = True
    return solid


def built_by_skfem(solid, voxel, per_layer, strain):
    """Independent elements, quadrature and assembly; one sparse system for each layer."""
    skfem = pytest.importorskip("skfem", reason="needs scikit-fem")
    from scipy.sparse.linalg import splu
    from skfem.helpers import ddot, eye, sym_grad, trace

    bits = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    mesh = voxels.mesh(solid)
    order = [x + 2 * y + 4 * z for x, y, z in bits]  # in voxels.CORNERS
    places = (mesh.index * np.array(voxel)).T
    lame, shear = E * NU / ((1 + NU) * (1 - 2 * NU)), E / (2 * (1 + NU))
    eigen = np.diag(strain)[:, :, None, None]

    def stress(e):
        return lame * eye(trace(e), 3) + 2 * shear * e

    @skfem.BilinearForm
    def stiffness(u, v, _):
        return ddot(stress(sym_grad(u)), sym_grad(v))

    @skfem.LinearForm
    def shrinkage(v, _):
        return ddot(stress(eigen + np.zeros_like(sym_grad(v))), sym_grad(v))

    def system(elements):
        used, t = np.unique(mesh.corners[elements][:, order], return_inverse=True)
        basis = skfem.Basis(
            skfem.MeshHex(places[:, used], t.reshape(-1, 8).T),
            skfem.ElementVector(skfem.ElementHex1()),
        )
        return used, basis, basis.nodal_dofs.T  # [node, component]

    total = np.zeros((len(mesh.index), 3))
    for start in range(0, solid.shape[2], per_layer):
        layer = mesh.layer // per_layer * per_layer
        used, basis, dofs = system(layer <= start)
        new, new_basis, new_dofs = system(layer == start)
        load = np.zeros(basis.N)
        load[dofs[np.searchsorted(used, new)]] = shrinkage.assemble(new_basis)[new_dofs]
        k = stiffness.assemble(basis).tocsc()
        free = dofs[mesh.index[used, 2] > 0].ravel()
        u = np.zeros(basis.N)
        u[free] = splu(k[free][:, free]).solve(load[free])
        total[used] += u[dofs]
    return total


@pytest.mark.parametrize("per_layer", [1, 4])
def test_agrees_with_layer_after_layer_of_other_elements(per_layer):
    """The last of the six layers of voxels are a lower layer of the build."""
    solid = ragged(per_layer)
    strain = -0.004, -0.006, 0.007
    part = lpbf.simulate(solid, VOXEL, layer=per_layer * VOXEL[2], strain=strain)
    expected = built_by_skfem(solid, VOXEL, per_layer, strain)
    np.testing.assert_allclose(part.disp, expected, atol=1e-6 * np.abs(expected).max())


def test_patch_of_uniform_strain():
    """Built in one piece and cut off, a part takes the inherent strain and keeps no stress."""
    solid, strain = ragged(6), np.array([-0.005, -0.005, 0.007])
    part = lpbf.simulate(solid, VOXEL, layer=6 * VOXEL[2], strain=tuple(strain), release=True)
    foot = part.pos[part.pos[:, 2] == 0].mean(0, keepdims=True)
    np.testing.assert_allclose(part.disp, (part.pos - foot) * strain[None], atol=1e-7)
    assert part.vmstr.max() < 1e-6 * E * 0.007


def test_bar_under_the_weight_of_its_layers():
    """A bar without Poisson's ratio: the layer that ends at (l + 1) h shortens what is below.

    du(z) = -W z / (E A) below the layer, -W (l + 1/2) h / (E A) at its top.
    """
    n, (dx, dy, h), weight = 7, VOXEL, 3.0
    solid = np.ones((2, 1, n), bool)
    k, _ = voxels.element(VOXEL, voxels.elasticity(E, 0.0), np.zeros(6))
    f = np.tile([0.0, 0.0, -weight / 16], 8)  # two voxels to a layer, eight corners
    mesh = voxels.mesh(solid)
    total, _ = layered.build(solid, mesh, k, f, 1)
    plane = np.arange(n + 1)
    own = np.where(plane > 0, plane - 0.5, 0)
    expected = -weight * h / (E * 2 * dx * dy) * (own + plane * (n - plane))
    np.testing.assert_allclose(total[:, 2], expected[mesh.index[:, 2]], rtol=1e-9)
    np.testing.assert_allclose(total[:, :2], 0, atol=1e-12)


def test_film_on_the_plate():
    """Far from its sides nothing moves along the plate: stress E e / (1 - nu) in every layer.

    e_zz = inherent e_zz - 2 nu e / (1 - nu), and a layer moves up by that times its height.
    """
    e, up = 0.005, 0.01
    part = lpbf.simulate(
        np.ones((15, 15, 2), bool), (1.0, 1.0, 0.5), layer=0.5, strain=(-e, -e, up)
    )
    middle = (np.abs(part.pos[:, :2]) < 1).all(1)
    top = middle & (part.pos[:, 2] > 0)
    np.testing.assert_allclose(part.disp[top, 2], 0.5 * (up - 2 * NU * e / (1 - NU)), rtol=0.01)
    np.testing.assert_allclose(part.vmstr[middle], E * e / (1 - NU), rtol=0.01)


def test_errors_fall_with_the_voxels():
    def tip(n):
        solid = np.repeat(np.repeat(np.repeat(table(), n, 0), n, 1), n, 2)[:, n : 2 * n]
        return lpbf.simulate(solid, (2.5 / n,) * 3, layer=2.5).disp[:, 2].max()

    coarse, middle, fine = (tip(n) for n in (1, 2, 3))
    assert abs(fine - middle) < 0.6 * abs(middle - coarse) < 0.2 * fine


def test_errors_fall_with_the_layers():
    solid = np.ones((4, 4, 8), bool)
    thick, coarse, middle, fine = (
        lpbf.simulate(solid, VOXEL, layer=n * VOXEL[2]).disp for n in (8, 4, 2, 1)
    )
    steps = [np.linalg.norm(b - a) for a, b in ((thick, coarse), (coarse, middle), (middle, fine))]
    assert steps[1] < 0.7 * steps[0] and steps[2] < 0.7 * steps[1]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("release", [False, True])
def test_a_mirrored_part_moves_as_the_mirror_image(axis, release):
    solid = ragged(2, seed=1)
    part, image = (
        lpbf.simulate(s, VOXEL, layer=2 * VOXEL[2], release=release)
        for s in (solid, np.flip(solid, axis))
    )
    sign = np.where(np.arange(3) == axis, -1, 1)[None]
    order, mirrored = (np.lexsort(p.round(4).T) for p in (part.pos, image.pos * sign))
    moved = (image.disp * sign)[mirrored]
    np.testing.assert_allclose(part.disp[order], moved, atol=1e-6 * np.abs(moved).max())
    np.testing.assert_allclose(part.vmstr[order], image.vmstr[mirrored], rtol=1e-5, atol=1e-3)


def test_the_plate_holds_until_the_cut():
    held, free = (lpbf.simulate(table(), VOXEL, layer=2.5, release=r) for r in (False, True))
    base = held.pos[:, 2] == 0
    assert (held.disp[base] == 0).all() and np.abs(free.disp[base]).max() > 1e-3
    np.testing.assert_allclose(free.disp[base].mean(0), 0, atol=1e-7)
    assert free.vmstr.mean() < held.vmstr.mean()  # the cut lets energy out


def test_an_overhang_curls_up():
    part = lpbf.simulate(table(), VOXEL, layer=2.5)
    assert part.disp[:, 2].argmax() in np.flatnonzero(part.pos[:, 0] == part.pos[:, 0].max())


def test_edges_are_those_of_the_hexahedra():
    part = lpbf.simulate(ragged(1), VOXEL, layer=VOXEL[2])
    corners = part.elems[:, [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4]]]
    upright = np.stack([part.elems[:, :4], part.elems[:, 4:]], -1)
    pairs = np.concatenate([corners, upright], 1).reshape(-1, 2)
    expected = {tuple(p) for p in pairs} | {tuple(p[::-1]) for p in pairs}
    assert sorted(map(tuple, part.edge_index.T)) == sorted(expected)
    lengths = np.linalg.norm(np.diff(part.pos[part.edge_index], axis=0)[0], axis=1)
    np.testing.assert_allclose(np.unique(lengths.round(4)), [1.25, 1.5])
    jacobian = np.cross(*(part.pos[part.elems[:, i]] - part.pos[part.elems[:, 0]] for i in (1, 3)))
    assert (jacobian[:, 2] > 0).all()  # the lower face counterclockwise


@pytest.fixture(scope="module")
def parts():
    """Of the small kind but for their meshes, which are coarser yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", SIZES["small"]._replace(widths=(3.0, 3.0)))
        yield list(lpbf.generate(range(4), seed=0, size="small", progress=False))


def test_parts_depend_on_seed_and_index_alone(parts):
    (again,) = lpbf.generate(range(2, 3), seed=0, size="small", progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(parts[2], again, strict=True))


def test_generated_parts_are_within_the_limits(parts):
    for part in parts:
        n, largest = len(part.pos), np.abs(part.pos).max(0)
        assert 8 < n <= lpbf.MAX_NODES["small"] and part.edge_index.shape[1] <= lpbf.MAX_EDGES
        assert (largest[:2] <= 10.001).all() and largest[2] <= 20.001 and part.pos.min(0)[2] == 0
        assert 0 < np.abs(part.disp[:, 2]).max() <= 1 and 0 < lpbf.largest_stress(part) <= 2000
        assert part.disp.shape == (n, 3) and part.vmstr.shape == (n,)
        assert part.elems.min() == 0 and part.elems.max() == n - 1
        assert [a.dtype.name for a in part[1:6]] == ["float32", "int32", "int32"] + ["float32"] * 2
    assert len({part.name for part in parts}) == 4


def test_a_part_says_why_candidates_before_it_were_rejected(monkeypatch, parts):
    monkeypatch.setattr(lpbf, "too_big", lambda part, most: None if calls.pop() else "too big")
    monkeypatch.setattr(lpbf, "simulate", lambda solid, voxel, name: parts[0])
    calls = [True, False, False]
    (part,) = lpbf.generate(range(1), seed=0, size="small", progress=False)
    assert part.rejected == ("too big", "too big")


def test_stress_at_the_plate_rejects_nothing(parts):
    part, plate = parts[0], parts[0].pos[:, 2] == 0
    assert part.vmstr[plate].max() > lpbf.largest_stress(part)
    high = part._replace(vmstr=np.where(plate, np.float32(3000), part.vmstr))
    assert lpbf.too_much(high) is None
    low = np.float32([[0, 0, 0], [0, 0, 1]])  # lower than a layer
    assert lpbf.largest_stress(part._replace(pos=low, vmstr=np.array([9.0, 2.0]))) == 2


def test_candidates_beyond_the_limits_are_rejected(monkeypatch):
    monkeypatch.setattr(lpbf, "MAX_STRESS", 1.0)
    monkeypatch.setattr(lpbf, "MAX_ATTEMPTS", 1)
    with pytest.raises(lpbf.SolverError, match="part 0 .seed 0, small.: none of 1 candidates"):
        next(lpbf.generate(range(1), seed=0, size="small", progress=False))
    monkeypatch.setattr(lpbf, "MAX_DISPLACEMENT", 1e-6)
    part = lpbf.simulate(table(), VOXEL, layer=2.5)
    assert lpbf.too_much(part) == "over 1e-06 mm"
    assert lpbf.too_much(part._replace(disp=0 * part.disp)) == "over 1 MPa"


def test_forces_that_do_not_balance_are_named(monkeypatch):
    nothing = lambda solid, mesh, *_: layered.Sums(*np.full((2, len(mesh.index), 3), np.nan))
    monkeypatch.setattr(layered, "build", nothing)
    with pytest.raises(lpbf.SolverError, match="crooked bracket: unbalanced force nan"):
        lpbf.simulate(table(), VOXEL, layer=2.5, name="crooked bracket")


def floating():
    solid = table()
    solid[:, :, 0] = False
    return solid


def islands():
    solid = table()
    solid[7, 0, 0] = True
    return solid


def hook():
    """Hangs down from the deck: in the air until that is built."""
    solid = table()
    solid[7, 3, 2:4] = True
    return solid


@pytest.mark.parametrize(
    "solid, voxel, layer, message",
    [
        (table().astype(float), VOXEL, 2.5, "solid must be boolean .nx, ny, nz., got float64"),
        (table()[0], VOXEL, 2.5, r"boolean .nx, ny, nz., got bool \(4, 6\)"),
        (table() & False, VOXEL, 2.5, "no elements"),
        (floating(), VOXEL, 2.5, "does not stand on the plate: its lowest voxels have z index 1"),
        (islands(), VOXEL, 2.5, r"2 loose pieces.*one holds voxel \(7, 0, 0\)"),
        (hook(), VOXEL, 2.5, r"voxel \(7, 3, 2\) hangs in the air when layer 1 is built"),
        (table(), (1.0, np.nan, 1.0), 2.5, "three positive lengths in mm, got .1.0, nan"),
        (table(), (1.0, 1.0, -1.0), 2.5, "three positive lengths"),
        (table(), (1.0, 1.0), 2.5, "three positive lengths"),
        (table(), VOXEL, 2.0, "multiple of the voxels' height 1.25 mm, got 2.0 mm"),
        (table(), VOXEL, np.inf, "multiple of the voxels' height"),
    ],
)
def test_what_cannot_be_built_is_refused(solid, voxel, layer, message):
    with pytest.raises(ValueError, match=f"gearbox: .*{message}"):
        lpbf.simulate(solid, voxel, layer=layer, name="gearbox")


def test_strains_and_parts_that_cannot_be_solved_for_are_refused():
    with pytest.raises(ValueError, match="three finite numbers, got .nan"):
        lpbf.simulate(table(), VOXEL, layer=2.5, strain=(np.nan, 0.0, 0.0))
    with pytest.raises(ValueError, match="sheet: 10,201 nodes at one height, at most 8,000"):
        lpbf.simulate(np.ones((100, 100, 1), bool), (1.0, 1.0, 2.5), name="sheet")


def test_a_size_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of paper, small, got 'large'"):
        lpbf.generate(range(1), seed=0, size="large")


def test_generating_leaves_the_precision_as_it_was(parts):
    assert jax.numpy.zeros(1).dtype == np.float32
