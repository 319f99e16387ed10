"""From a module to a pure function and a plain nested dict of parameters."""

from collections.abc import Callable

import jax
from flax import nnx

Params = dict  # nested dict with string keys; leaves are arrays


def functional(model: nnx.Module, method: Callable | None = None) -> tuple[Callable, Params]:
    """Splits a module into `apply(params, *args)` and `params`.

    `apply` calls the module, or `method(module, *args)` where one is given.

    `apply` is pure: it can be jitted, differentiated, vmapped and sharded with `jax` alone, and
    costs less Python time per call than `nnx.jit`. Keys of `params` follow the modules' attribute
    names, `params["blocks"]["0"]["att"]["latent_q"]`.

    Raises:
        ValueError: the model holds state other than `nnx.Param`.
    """
    graphdef, state = nnx.split(model, nnx.Param)

    def apply(params: Params, *args, **kwargs):
        module = nnx.merge(graphdef, _rename(params, _integer))
        return method(module, *args, **kwargs) if method else module(*args, **kwargs)

    return apply, _rename(nnx.to_pure_dict(state), str)


def num_parameters(params: Params) -> int:
    """Scalars in all leaves."""
    return sum(x.size for x in jax.tree.leaves(params))


def _rename(tree, f: Callable):
    """Applies f to every key: list positions are integers in a module and strings in a dict."""
    return {f(k): _rename(v, f) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _integer(key: str) -> int | str:
    return int(key) if key.isdecimal() else key
