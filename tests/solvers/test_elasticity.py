import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flare_jax.solvers import elasticity, unit_cell

WAVY = 0.3 + 0.06 * np.cos(2 * unit_cell.ray_angles(3)) + 0.04 * np.sin(3 * unit_cell.ray_angles(3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def samples():
    return elasticity.generate(range(5), progress=False)


def balance(nodes, load, free, u):
    solution = jax.jit(elasticity.equilibrium)(nodes, load, free, jnp.asarray(u))
    assert solution.residual <= elasticity.TOLERANCE
    return solution


def stresses(nodes, u):
    strain = elasticity.strains(u, elasticity.geometry(nodes)[0])
    return jax.vmap(elasticity.von_mises)(strain.reshape(-1, 2, 2))


def boundary_fixed(nodes):
    """1 at unknowns inside the cell, 0 on square and void."""
    free = np.ones(nodes.shape)
    free[:, [0, -1]] = 0
    return free


def test_patch_of_uniform_deformation():
    nodes = unit_cell.mesh(WAVY, 1)
    gradient = np.array([[0.1, 0.2], [-0.05, 0.3]])
    affine, free = np.einsum("ij,tsj->tsi", gradient, nodes), boundary_fixed(nodes)
    moved = affine + 0.005 * free * np.random.default_rng(0).normal(size=free.shape)
    solution = balance(nodes, np.zeros_like(nodes), free, moved)
    np.testing.assert_allclose(solution.u, affine, atol=1e-12)
    uniform = elasticity.von_mises(jnp.asarray(gradient))
    np.testing.assert_allclose(stresses(nodes, solution.u), uniform, rtol=1e-9)


def manufactured(x):
    return 0.1 * jnp.array([jnp.sin(2 * x[0] + x[1]), jnp.cos(x[0] - 3 * x[1])])


def manufactured_error(sides, layers):
    """Largest nodal error for a large deformation known in closed form."""
    nodes = unit_cell.mesh(np.full(8 * sides, 0.3), layers)
    flat = nodes.reshape(-1, 2)
    exact = np.asarray(jax.vmap(manufactured)(flat)).reshape(nodes.shape)
    stress = lambda x: jax.grad(elasticity.energy)(jax.jacfwd(manufactured)(x))
    body_force = lambda x: -jnp.einsum("ijj->i", jax.jacfwd(stress)(x))
    gauss = jnp.einsum("qa,clai->clqi", elasticity.shapes()[0], elasticity.elements(nodes))
    f = jax.jit(jax.vmap(body_force))(gauss.reshape(-1, 2)).reshape(gauss.shape)
    weights = elasticity.geometry(nodes)[1]
    parts = jnp.einsum("clq,qa,clqi->clai", weights, elasticity.shapes()[0], f)
    load = elasticity.assembled(parts)
    free = boundary_fixed(nodes)
    solution = balance(nodes, load, free, exact)
    return np.abs(solution.u - exact).max()


def test_error_falls_with_the_cube_of_the_spacing():
    coarse, fine = (manufactured_error(2 * n, n) for n in (2, 4))
    assert 2.7 < np.log2(coarse / fine) < 4 and fine < 1e-4


def test_small_loads_agree_with_linear_elasticity():
    """Independent elements, quadrature, assembly and solver: E = 6 (C1 + C2), nu = 1/2."""
    skfem = pytest.importorskip("skfem", reason="needs scikit-fem")
    from skfem.helpers import ddot, sym_grad, trace

    nodes, solution = elasticity.solve(WAVY, layers=2, traction=1.0)
    rays, rings, _ = nodes.shape
    ray, ring = np.meshgrid(np.arange(0, rays, 2), np.arange(0, rings - 1, 2), indexing="ij")
    around = [(0, 0), (0, 2), (2, 2), (2, 0), (0, 1), (1, 2), (2, 1), (1, 0), (1, 1)]
    cells = np.stack([((ray + i) % rays * rings + ring + j).ravel() for i, j in around])
    corners, t = np.unique(cells[:4], return_inverse=True)
    flat = np.asarray(nodes).reshape(-1, 2)
    mesh = skfem.MeshQuad2.from_mesh(skfem.MeshQuad(flat[corners].T, t.reshape(4, -1)))
    places = mesh.doflocs.copy()
    places[:, mesh.dofs.element_dofs] = flat[cells].transpose(2, 0, 1)  # curved edges
    mesh = skfem.MeshQuad2(places, mesh.t)
    basis = skfem.Basis(mesh, skfem.ElementVector(skfem.ElementQuad2()), intorder=5)
    shear = 2 * (elasticity.C1 + elasticity.C2)

    @skfem.BilinearForm
    def stored(u, v, _):  # plane stress at nu = 1/2: sigma = 2 G (strain + I tr strain)
        a, b = sym_grad(u), sym_grad(v)
        return 2 * shear * (ddot(a, b) + trace(a) * trace(b))

    @skfem.LinearForm
    def pull(v, _):
        return v[1]

    top = basis.boundary(mesh.facets_satisfying(lambda x: np.isclose(x[1], 1)))
    bottom = basis.get_dofs(mesh.facets_satisfying(lambda x: np.isclose(x[1], 0)))
    u = skfem.solve(*skfem.condense(stored.assemble(basis), pull.assemble(top), D=bottom))
    expected = np.empty(nodes.shape).reshape(-1, 2)
    expected[cells] = u[basis.element_dofs].reshape(9, 2, -1).swapaxes(1, 2)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(solution.u.reshape(-1, 2), expected, atol=1e-5 * scale)


def test_a_symmetric_void_gives_a_symmetric_stress():
    nodes, solution = elasticity.solve(np.full(24, 0.3), layers=1)
    u = np.asarray(solution.u)
    mirror = np.roll(u[::-1], 7, 0) * [-1, 1]  # ray j of the bottom is ray 6 - j mirrored
    np.testing.assert_allclose(u, mirror, atol=1e-9 * np.abs(u).max())


def test_forces_on_the_clamp_balance_the_traction():
    nodes, solution = elasticity.solve(WAVY, layers=2)
    force = elasticity.internal_force(solution.u, *elasticity.geometry(nodes))
    load, free = elasticity.pulled(3, 2)
    np.testing.assert_allclose((force * (1 - free)).sum((0, 1)), [0, -100], atol=1e-6)
    np.testing.assert_allclose(load.sum((0, 1)), [0, 100], rtol=1e-12)


def test_assembly_is_the_transpose_of_taking_elements():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 2)))
    parts = jnp.cos(elasticity.elements(u))
    (expected,) = jax.linear_transpose(elasticity.elements, u)(parts)
    np.testing.assert_allclose(elasticity.assembled(parts), expected, rtol=1e-12)


def test_cyclic_solver_equals_dense_solver():
    rng = np.random.default_rng(0)
    rays, m = 8, 3
    k = rng.normal(size=(rays // 2, 3 * m, 3 * m))
    k = k @ k.swapaxes(1, 2)
    full = np.zeros((rays * m, rays * m))
    for c, block in enumerate(k):
        index = (np.arange(2 * c * m, (2 * c + 3) * m)) % (rays * m)
        full[np.ix_(index, index)] += block
    f = rng.normal(size=(rays, m))
    x = jax.jit(elasticity.solve_cyclic)(k, f)
    np.testing.assert_allclose(x.ravel(), np.linalg.solve(full, f.ravel()), rtol=1e-8)


def test_stress_of_simple_tension():
    """Stretch s along y, free sideways: sigma = 2 (s^2 - 1/s) (C1 + C2/s)."""
    s = 1.5
    value = elasticity.von_mises(jnp.diag(jnp.array([s**-0.5 - 1, s - 1])))
    expected = 2 * (s**2 - 1 / s) * (elasticity.C1 + elasticity.C2 / s)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_void_has_the_stated_covariance():
    angles = np.linspace(0, 2 * np.pi, 9)
    xi = jax.random.normal(jax.random.key(0), (20_000, unit_cell.MODES, 2))
    r = jax.vmap(lambda xi: unit_cell.radius(xi, angles))(xi)
    g = np.log(0.2 / (r - 0.2) - 1)
    k = np.arange(1, 6)
    lag = np.cos(np.outer(angles, k)) @ (16 / (np.pi * (k**2 + 9)))
    np.testing.assert_allclose(np.mean(g[:, :1] * g, axis=0), lag, atol=0.05)
    np.testing.assert_allclose(r[:, 0], r[:, -1], rtol=1e-9)


def test_no_void_folds_the_mesh_or_leaves_the_cell(samples):
    xi = 3 * jax.random.normal(jax.random.key(0), (200, unit_cell.MODES, 2))  # wilder than any
    r = jax.vmap(lambda xi: unit_cell.radius(xi, unit_cell.ray_angles()))(xi)
    assert (r > 0.2).all() and (r < 0.4).all()
    areas = jax.vmap(lambda r: elasticity.geometry(unit_cell.mesh(r))[1])(r)
    assert areas.shape[1:] == (36, 3, 9) and (areas > 0).all()
    assert (samples["points"] > 0).all() and (samples["points"] < 1).all()


def test_samples_are_pulled_cells(samples):
    assert {k: v.shape[1:] for k, v in samples.items()} == {
        "points": (972, 2),
        "sigma": (972,),
        "displacement": (972, 2),
    }
    assert all(v.dtype == np.float32 for v in samples.values())
    assert (samples["sigma"] > 0).all() and (samples["sigma"].mean(1) > 100).all()
    top = samples["points"][..., 1] > 0.95
    assert (samples["displacement"][..., 1][top] > 0).all()


def test_samples_depend_on_seed_and_index_alone(samples):
    again = elasticity.generate([4, 1, 3], batch_size=2, progress=False)
    for name in samples:
        np.testing.assert_allclose(samples[name][[4, 1, 3]], again[name], rtol=2e-6, atol=1e-12)
    assert len(np.unique(samples["points"], axis=0)) == 5
    other = elasticity.generate([4, 1], seed=1, batch_size=2, progress=False)
    assert not np.isclose(other["sigma"], again["sigma"][:2]).all()


def test_same_call_gives_the_same_bits(samples):
    again = elasticity.generate(range(5), progress=False)
    assert all(np.array_equal(samples[name], again[name]) for name in samples)


def test_newton_that_fails_shows_in_the_residual():
    _, solution = elasticity.solve(WAVY, layers=1, traction=-1e6)  # far beyond buckling
    assert not solution.residual <= elasticity.TOLERANCE


@pytest.mark.parametrize(
    "residual, sigma, message",
    [
        (1e-3, 5.0, "unbalanced force"),
        (np.nan, 5.0, "unbalanced"),
        (0, 0.0, "stress 0.0 at point 2"),
    ]
    + [(0, np.nan, "stress nan at point 2"), (0, -1.0, "positive and finite")],
)
def test_bad_samples_are_named(residual, sigma, message):
    solution = elasticity.Solution(None, np.array([1e-12, residual]), np.array([3, 20]))
    sigmas = np.ones((2, 4))
    sigmas[1, 2] = sigma
    with pytest.raises(elasticity.SolverError, match=f"sample 8 .seed 5.*{message}"):
        elasticity._check(elasticity.Sample(None, sigmas, None, solution), np.array([7, 8]), 5)


@pytest.mark.parametrize("radius", [0.5, 0.49, 0.0, -0.1, np.nan])
def test_a_void_without_a_ligament_is_refused(radius):
    r = np.full(24, 0.3)
    r[3] = radius  # the middle of the bottom
    with pytest.raises(ValueError, match="ligament of 0.02.*on ray 3"):
        elasticity.solve(r)


def test_float32_is_refused():
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="enable_x64"):
        elasticity.solve(WAVY)
