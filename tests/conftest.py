"""Settings of every test: eight fake CPU devices, full float32 products, no silent broadcasting."""

import os
import pathlib

# Tests run side by side, and threads of OpenBLAS that wait for a core spin. Read when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compile time is most of the tests' time. With 0 they run on programs as users have them.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
    # fusions by XLA's older emitters, which compile in two thirds of the time
    older = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {older}"
# Tests, and processes that they start, compile the same programs over and over.
TESTS = pathlib.Path(__file__).parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 inside a tolerance


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def golden():
    """Loads `tests/golden/NAME.npz`, or the larger files of `../shared/golden` where they are."""

    def load(name):
        for folder in (TESTS / "golden", TESTS.parent.parent / "shared" / "golden"):
            if (folder / f"{name}.npz").exists():
                return dict(np.load(folder / f"{name}.npz"))
        pytest.skip(f"{name}.npz is neither in tests/golden nor in ../shared/golden")

    return load


def relative(x, reference, floor=0.0) -> float:
    """||x - reference|| / max(||reference||, floor) in float64; NaN when x holds one."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), floor, 1e-300))
