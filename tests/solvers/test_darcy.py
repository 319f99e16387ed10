import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from flare_jax.solvers import darcy


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def coefficient():
    with jax.enable_x64(True):
        return np.asarray(darcy.coefficient(jax.random.key(3), 33))


def solve(a, f=1.0):
    solution = jax.jit(darcy.solve)(a, f)
    assert solution.residual <= 2 * darcy.TOLERANCE
    return np.asarray(solution.u)


def manufactured_error(size):
    """Largest error for u = sin(pi x) sin(2 pi y) and a = 2 + x + cos(y)."""
    x, y = np.meshgrid(*[np.linspace(0, 1, size)] * 2, indexing="ij")
    sin, cos, pi = np.sin, np.cos, np.pi
    u, a = sin(pi * x) * sin(2 * pi * y), 2 + x + cos(y)
    grad_a_grad_u = pi * cos(pi * x) * sin(2 * pi * y) - sin(y) * 2 * pi * sin(pi * x) * cos(
        2 * pi * y
    )
    return np.abs(solve(a, 5 * pi**2 * a * u - grad_a_grad_u) - u).max()


def test_error_falls_with_the_square_of_the_spacing():
    errors = [manufactured_error(size) for size in (17, 33, 65)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 2, atol=0.05)


def test_agrees_with_sparse_direct_solver(coefficient):
    size = len(coefficient)
    inner = np.arange(size * size).reshape(size, size)[1:-1, 1:-1]
    matrix = scipy.sparse.lil_matrix((size * size, size * size))
    a = coefficient.ravel()
    for i in inner.ravel():
        for j in (i - 1, i + 1, i - size, i + size):
            face = (a[i] + a[j]) / 2 * (size - 1) ** 2
            matrix[i, i] += face
            matrix[i, j] -= face
    matrix = matrix.tocsc()[inner.ravel()][:, inner.ravel()]
    expected = scipy.sparse.linalg.spsolve(matrix, np.ones(inner.size))
    np.testing.assert_allclose(solve(coefficient)[1:-1, 1:-1].ravel(), expected, rtol=1e-9)


@pytest.mark.parametrize("move", [np.transpose, np.flipud, np.fliplr])
def test_moving_the_coefficient_moves_the_solution(coefficient, move):
    np.testing.assert_allclose(solve(move(coefficient)), move(solve(coefficient)), atol=1e-11)


def test_solution_lies_between_those_of_constant_coefficients(coefficient):
    u = solve(coefficient)
    assert (u[1:-1, 1:-1] > 0).all()
    assert (u[[0, -1]] == 0).all() and (u[:, [0, -1]] == 0).all()
    low, high = (solve(np.full_like(coefficient, c)).sum() for c in (darcy.HIGH, darcy.LOW))
    assert low < u.sum() < high


@pytest.mark.parametrize("factor", [7.0, -1e-40, 1e40])
def test_solution_is_linear_in_the_source(coefficient, factor):
    np.testing.assert_allclose(solve(coefficient, factor), factor * solve(coefficient), rtol=1e-9)
    assert (solve(coefficient, 0.0) == 0).all()


@pytest.mark.parametrize("size", [17, 65, 129])
def test_iterations_do_not_grow_with_the_grid(size):
    assert jax.jit(darcy.sample, static_argnums=1)(jax.random.key(0), size)[1].iterations <= 22


def test_field_has_the_stated_covariance():
    size, draws = 9, 4000
    keys = jax.random.split(jax.random.key(0), draws)
    g = jax.vmap(lambda key: darcy.gaussian_field(key, size))(keys)
    k = np.arange(size)
    phi = np.where(k == 0, 1, np.sqrt(2)) * np.cos(np.pi * np.outer(k, k) / (size - 1))
    power = (np.pi**2 * (k[:, None] ** 2 + k**2) + 9.0) ** -2
    power[0, 0] = 0
    expected = phi**2 @ power @ phi.T**2  # variance at each node
    np.testing.assert_allclose(np.var(g, axis=0), expected, rtol=0.15)


def test_coefficient_takes_two_values(coefficient):
    assert set(np.unique(coefficient)) == {darcy.LOW, darcy.HIGH}


def test_samples_depend_on_seed_and_index_alone():
    options = {"grid": 21, "progress": False}
    a, u = darcy.generate(range(5), **options)
    a_again, u_again = darcy.generate([4, 1, 3], batch_size=2, **options)
    assert np.array_equal(a[[4, 1, 3]], a_again)
    np.testing.assert_allclose(u[[4, 1, 3]], u_again, rtol=1e-6)
    assert len(np.unique(a, axis=0)) == 5
    assert not np.array_equal(a, darcy.generate(range(5), seed=1, **options)[0])


def test_same_call_gives_the_same_bits():
    one, two = (darcy.generate(range(3), grid=21, batch_size=2, progress=False) for _ in "12")
    assert np.array_equal(one, two)


def test_stride_keeps_every_other_node():
    fine = darcy.generate(range(2), grid=21, progress=False)
    coarse = darcy.generate(range(2), grid=21, stride=4, progress=False)
    assert coarse[0].shape == (2, 6, 6) and coarse[0].dtype == np.float32
    for a, b in zip(fine, coarse, strict=True):
        assert np.array_equal(a[:, ::4, ::4], b)


def test_failure_to_converge_names_the_sample(monkeypatch):
    solution = darcy.Solution(None, jnp.array([1e-11, np.nan]), jnp.array([20, 200]))
    with pytest.raises(darcy.ConvergenceError, match="sample 8 .seed 5.*after 200 iterations"):
        darcy._check_converged(solution, np.array([7, 8]), 5, 21)


def test_iteration_that_is_cut_short_shows_in_the_residual(coefficient):
    assert darcy.solve(coefficient, max_iterations=3).residual > 1e-4


@pytest.mark.parametrize("grid, stride", [(2, 1), (21, 3), (21, 0)])
def test_bad_grids_are_refused(grid, stride):
    with pytest.raises(ValueError, match="grid|stride"):
        darcy.generate([0], grid=grid, stride=stride)


def test_float32_is_refused(coefficient):
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="enable_x64"):
        darcy.solve(coefficient)
