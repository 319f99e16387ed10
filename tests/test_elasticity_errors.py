import numpy as np

from experiments import elasticity_errors as experiment


def test_coordinates_have_variance_one_and_training_cells_do_not_count_themselves():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 2)) * (5, 1)  # points move along two directions, unequally far
    cells = np.einsum("nk,kpd->npd", wide, rng.normal(size=(2, 6, 2)))
    found = experiment.coordinates(cells)(cells)
    assert found.shape == (40, 2)
    np.testing.assert_allclose(found.std(0), 1, rtol=1e-9)
    itself = experiment.distances(found, found, own=False)["distance"]
    others = experiment.distances(found, found, own=True)["distance"]
    assert (others > itself).all()


def test_errors_that_grow_with_distance_correlate_with_it():
    where = {"distance": np.arange(8.0), "radius": -np.arange(8.0)}
    found = experiment.statistics(np.stack([np.arange(8.0), 2 * np.arange(8.0)]), where)
    assert found["spearman_distance"] == 1 and found["spearman_radius"] == -1
    np.testing.assert_allclose(found["quarters_by_distance"], [0.75, 3.75, 6.75, 9.75])
    np.testing.assert_allclose(found["correlation_of_seeds"], 1)
