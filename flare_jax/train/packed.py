"""A training state of a few vectors in place of a thousand arrays.

A call of a compiled step hands every array of the state to the device and takes it back: 1,267 of
them for eight blocks (parameters, their average, two moments), 3 to 7 ms of the host's time, more
than the step itself takes on small meshes. Where a call is many steps nobody notices; where each
step is a call, on meshes of different sizes, the state travels as vectors.

    packed   = {"kernel": weights and latent queries, "rest": biases and norms}     a vector each
    gradient = that of loss(unpacked(packed)), so a vector each too

The optimizer works on the vectors as on any parameters: all it does is elementwise, but for the
global norm, and for weight decay, which takes what is called "kernel".
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flare_jax.models.functional import Params
from flare_jax.train.optimizer import decayed

KERNEL, REST = "kernel", "rest"


class Packing:
    """Parameters shaped like `params` as vectors, and states that hold trees of such shape."""

    def __init__(self, params: Params):
        leaves, self.tree = jax.tree.flatten(params)
        self.shapes = [leaf.shape for leaf in leaves]
        kinds = [KERNEL if kind else REST for kind in jax.tree.leaves(decayed(params))]
        self.groups = {
            name: [i for i, k in enumerate(kinds) if k == name] for name in (KERNEL, REST)
        }

    def vectors(self, params: Params) -> dict[str, jax.Array]:
        leaves = jax.tree.leaves(params)
        joined = lambda group: jnp.concatenate([leaves[i].ravel() for i in group])
        return {name: joined(group) for name, group in self.groups.items()}

    def params(self, vectors: dict[str, jax.Array]) -> Params:
        """The inverse; one split a vector, whose derivative is one concatenation."""
        leaves = [jnp.zeros(0)] * len(self.shapes)
        for name, group in self.groups.items():
            sizes = [math.prod(self.shapes[i]) for i in group]
            for i, part in zip(group, lax.split(vectors[name], sizes), strict=True):
                leaves[i] = part.reshape(self.shapes[i])
        return self.tree.unflatten(leaves)

    def packed(self, state):
        """The state, or any tree, with each tree of parameters in it as vectors."""
        like = lambda x: jax.tree.structure(x) == self.tree
        return jax.tree.map(lambda x: self.vectors(x) if like(x) else x, state, is_leaf=like)

    def unpacked(self, state):
        """The inverse of `packed`."""
        like = lambda x: isinstance(x, dict) and x.keys() == self.groups.keys()
        return jax.tree.map(lambda x: self.params(x) if like(x) else x, state, is_leaf=like)

    def loss(self, loss_fn: Callable) -> Callable:
        """`loss_fn(params, batch)` as a function of the vectors."""
        return lambda vectors, batch: loss_fn(self.params(vectors), batch)
