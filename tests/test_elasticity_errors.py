import numpy as np

from experiments import elasticity_errors as experiment
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split


def problem(n=40):
    """Cells whose points move along two directions, five times as far along the first."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(n, 2)) * (5, 1)
    x = np.einsum("nk,kpd->npd", wide, rng.normal(size=(2, 6, 2))).astype(np.float32)
    split = Split(x, x[..., :1])
    raw, one = Normalizer.fit(x, raw=(0, 1)), Normalizer.fit(split.y)
    return Problem("cells", split, None, split, raw, one, rel_l2, ("x", "y"), ("s",))


def test_coordinates_have_variance_one_and_training_cells_do_not_count_themselves():
    data = problem()
    found = experiment.shapes(data.train.x, data.train.x)
    assert found.shape == (40, 2)
    np.testing.assert_allclose(found.std(0), 1, rtol=1e-5)
    itself = experiment.distances(data, data.train, own=False)["distance"]
    others = experiment.distances(data, data.train, own=True)["distance"]
    assert (others > itself).all()


def test_errors_that_grow_with_distance_correlate_with_it():
    where = {"distance": np.arange(8.0), "radius": -np.arange(8.0)}
    found = experiment.statistics(np.stack([np.arange(8.0), 2 * np.arange(8.0)]), where)
    assert found["spearman_distance"] == 1 and found["spearman_radius"] == -1
    np.testing.assert_allclose(found["quarters_by_distance"], [0.75, 3.75, 6.75, 9.75])
    np.testing.assert_allclose(found["correlation_of_seeds"], 1)
