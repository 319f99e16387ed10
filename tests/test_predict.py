"""What a trained surrogate gives on a problem's samples."""

import numpy as np
import pytest

from flare_jax.models.flare import FLAREConfig
from flare_jax.predict import Surrogate, one_sample, test_errors
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Problem, Split
from flare_jax.train.config import Config

errors_of = test_errors  # under a name that pytest does not collect
del test_errors


@pytest.fixture
def surrogate():
    """Predicts its first input as it is."""
    norms = Normalizer(np.ones(2, np.float32), np.full(2, 2, np.float32))
    out = Normalizer(np.ones(1, np.float32), np.full(1, 2, np.float32))
    config = Config(None, FLAREConfig(8, num_blocks=1, num_heads=1, num_latents=4))
    return Surrogate("toy", config, lambda params, x, mask: x[..., :1], {}, norms, out)


def problem(surrogate, normalizer):
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (3, 6, 2)).astype(np.float32)
    split = Split(normalizer.encode(x), 2 * x[..., :1], rng.random((3, 6)) < 0.7)
    out = surrogate.y_normalizer
    return Problem("toy", split, None, split, normalizer, out, rel_l2, ("x", "a"), ("u",))


def test_samples_are_decoded_as_they_were_encoded(surrogate):
    other = Normalizer(np.zeros(2, np.float32), np.full(2, 3, np.float32))
    data = problem(surrogate, other)
    np.testing.assert_allclose(errors_of(surrogate, data), 0.5, rtol=1e-5)
    x, prediction, truth = one_sample(surrogate, data, 1)
    np.testing.assert_allclose(prediction, x[:, :1], rtol=1e-5)
    np.testing.assert_allclose(truth, 2 * x[:, :1], rtol=1e-5)
