"""Random parts."""
import numpy as np
def candidate(seed, index, attempt, size):
    rng = np.random.default_rng([seed, index, attempt])
    n = (10, 8, 8)
    solid = np.zeros(n, bool)
    solid[:4] = True
    solid[:, :, 4:6] = rng.random() < 0.5
    solid[3:, 2:6, -3:] = True
    return solid, (2.5, 2.5, 2.5)
