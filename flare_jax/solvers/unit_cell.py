"""Geometry of the elasticity benchmark: a unit square with a random void, and its mesh.

**Void.** Centred, with radius r(t) = 0.2 + 0.2 / (1 + exp(g(t))) over the polar angle t, where

    g ~ N(0, 4^2 (-d^2/dt^2 + 3^2)^-1) on the circle, Fourier modes 1 to 5

as remembered from the paper (see `elasticity.py`). The published files describe each outline by ten
coefficients, five pairs without a constant mode; hence modes 1 to 5.

**Mesh.** 36 x 3 quadrilaterals of nine nodes: nine along each side of the square, three from void
to square on straight rays from the centre. The corners of the square are nodes, elements are about
as wide as high, and nothing folds as long as the void stays inside the square. Of the divisions of
108 elements, 36 x 3 is the one whose 36 is a multiple of four sides and resolves the fifth mode, by
14 nodes a wave. A mesh has 8 rays of nodes for each element along a side.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SIDES, LAYERS = 9, 3  # elements along a side of the square, and from void to square
MODES = 5  # Fourier modes of the void's outline


def radius(xi: Float[Array, "K 2"], angles: Float[np.ndarray, "t"]) -> Float[Array, "t"]:
    """Radius of the void for standard normal coefficients of cos(k t) and sin(k t), 1 <= k <= K.

        g = sum_k 4 (k^2 + 9)^(-1/2) (xi_k1 cos(k t) + xi_k2 sin(k t)) / sqrt(pi)

    The basis cos(k t)/sqrt(pi), sin(k t)/sqrt(pi) is orthonormal on the circle.
    """
    k = np.arange(1, len(xi) + 1)
    waves = np.stack([np.cos(np.outer(angles, k)), np.sin(np.outer(angles, k))], -1)  # [t, K, 2]
    waves *= 4 / np.sqrt(np.pi * (k[:, None] ** 2 + 9.0))
    return 0.2 + 0.2 * jax.nn.sigmoid(-jnp.einsum("tkc,kc->t", waves, xi))


def outline(sides: int = SIDES) -> Float[np.ndarray, "rays 2"]:
    """Nodes on the square, equally spaced, counterclockwise from (0, 0): 8 for each of `sides`."""
    t = np.arange(2 * sides) / (2 * sides)
    zero, one = np.zeros_like(t), np.ones_like(t)
    edges = (t, zero), (one, t), (1 - t, one), (zero, 1 - t)
    return np.concatenate([np.stack(edge, -1) for edge in edges])


def ray_angles(sides: int = SIDES) -> Float[np.ndarray, "rays"]:
    """Polar angle of each ray about the centre of the cell."""
    x, y = (outline(sides) - 0.5).T
    return np.arctan2(y, x)


def mesh(
    r: Float[Array | np.ndarray, "rays"], layers: int = LAYERS
) -> Float[Array, "rays rings 2"]:
    """Nodes of the cell whose void has radius r on each ray; rings = 2 layers + 1."""
    outer = outline(len(r) // 8)
    angles = ray_angles(len(r) // 8)
    inner = 0.5 + jnp.asarray(r)[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    s = np.linspace(0, 1, 2 * layers + 1)[None, :, None]
    return (1 - s) * inner[:, None] + s * outer[:, None]


def check_radius(r: Float[np.ndarray, "rays"], ligament: float = 0.02) -> None:
    """Raises ValueError unless the void keeps `ligament` of material everywhere, and is one."""
    r = np.asarray(r)
    if r.ndim != 1 or len(r) == 0 or len(r) % 8:
        raise ValueError(f"r must hold one radius for each of 8 n rays, got shape {r.shape}")
    reach = np.linalg.norm(outline(len(r) // 8) - 0.5, axis=1) - ligament
    bad = ~((r > 0) & (r <= reach))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"the void must leave a ligament of {ligament}: radius {r[i]} on ray {i} is not in "
            f"(0, {reach[i]:.3f}]"
        )
