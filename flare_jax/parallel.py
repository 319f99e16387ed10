"""Many devices: which samples, points and parameters lie where, and how processes find each other.

A mesh of devices has two axes: samples of a batch lie over "data", points of a sample over
"tokens". One step on it is

    shard_map:   loss and gradients of a device's samples and points; tokens meet in the operator
    all-reduce:  gradients, summed over the points and averaged over the samples
    jit:         the optimizer, by every device alike

Parameters and optimizer state are on every device, or with `fsdp` in parts over "data" (the table
RULES): the parts are gathered where a step begins, gradients leave it in parts, and the optimizer
works on those. FLARE models are small (0.6 million parameters at C = 64, 8 MB with Adam's state),
so parts pay off for the widest models only.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flare_jax.ops.fused.math import nvidia
from flare_jax.ops.sharded import whole
from flare_jax.problems.problem import Split

DATA, TOKENS = "data", "tokens"
BATCH = P(DATA, TOKENS)  # of arrays [B, N, ...]

# XLA's scheduler of programs with messages. To have work behind which to hide those, it puts off
# weight gradients until the sum over devices: that of the last MLP then keeps two arrays of points
# through the backward pass of all blocks. Messages here are short: there is little to hide.
MANY_GPUS = {"xla_gpu_enable_latency_hiding_scheduler": False}
# Kernels that do not need each other run at once. A step on few points is a chain of small kernels,
# beside which sums of weight gradients and the pieces of the optimizer then cost little. Arrays
# live longer (3,200 bytes a point where 2,260 would do), so not for many points.
FEW_POINTS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
MANY = 2**16

# Path of a parameter -> the axis, from the last, that `fsdp` cuts; the first rule that matches.
RULES = ((r"kernel$", -1), (r"latent_q$", -3))


# ----------------------------------------------------------------------- processes ---


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a run; call it before anything else of jax.

    Without arguments SLURM, Open MPI and TPU pods are recognised by their environment.

    Raises:
        ValueError: only some of the three arguments are given.
        ConnectionError: the others are not found.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            "--coordinator, --num-processes and --process-id are given together or not at all, "
            f"got {coordinator}, {num_processes}, {process_id}"
        )
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"could not join the other processes: {error}; outside SLURM, Open MPI and TPU pods "
            "give --coordinator HOST:PORT --num-processes N --process-id I"
        ) from error


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def main_first(make: Callable):
    """What `make()` returns, made by the main process first: what that keeps, the others read."""
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    made = make() if is_main() else None
    multihost_utils.sync_global_devices("made by the main process")
    return made if is_main() else make()


# ---------------------------------------------------------------------------- mesh ---


def make_mesh(
    sizes: str | None, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The mesh `data=2,tokens=4`, or None for one device.

    Without `sizes`, as many devices on "data" as divide the batch and the rest on "tokens".

    Raises:
        ValueError: the text is no mesh, asks for other than the devices there are, or its "data"
            does not divide the batch; it says what would fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    fit = math.gcd(batch_size, count)
    data, tokens = (fit, count // fit) if sizes is None else parse_mesh(sizes)
    options = " or ".join(
        f"data={d},tokens={count // d}" for d in range(1, fit + 1) if fit % d == 0
    )
    if data * tokens > count or (jax.process_count() > 1 and data * tokens != count):
        raise ValueError(
            f"mesh data={data},tokens={tokens} needs {data * tokens} devices, there are {count}: "
            f"{options} would fit"
        )
    if batch_size % data:
        raise ValueError(
            f"data={data} must divide the batch of {batch_size}: with {count} devices {options} "
            "would fit"
        )
    if data * tokens == 1:
        return None
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((data, tokens), (DATA, TOKENS), auto, devices=devices[: data * tokens])


def parse_mesh(text: str) -> tuple[int, int]:
    """(devices on "data", devices on "tokens") of a text like `data=2,tokens=4`; the default is 1.

    Raises:
        ValueError: the text is not of that form.
    """
    sizes = {DATA: 1, TOKENS: 1}
    pattern = r"(data|tokens)=([1-9]\d*)"
    found = [re.fullmatch(pattern, part.strip()) for part in text.split(",")]
    names = [match[1] for match in found if match]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(f"mesh must look like data=2,tokens=4, got {text!r}")
    sizes |= {match[1]: int(match[2]) for match in found}
    return sizes[DATA], sizes[TOKENS]


def describe(mesh: Mesh | None) -> str:
    """For the first line that a run prints."""
    device = (jax.devices() if mesh is None else mesh.devices.ravel())[0]
    if mesh is None:
        return f"one {device.device_kind}"
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {device.device_kind} ({axes})"


# --------------------------------------------------------------------- where things lie ---


def place(tree, mesh: Mesh | None, specs=None):
    """The arrays on the devices of `mesh`: by `specs`, a tree of PartitionSpecs; None: on each.

    Every process passes the same whole arrays.
    """
    if mesh is None:
        return jax.device_put(tree)
    shardings = shardings_of(tree, mesh, specs)

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def shardings_of(tree, mesh: Mesh, specs=None):
    """A tree of NamedShardings."""
    if specs is None:
        specs = jax.tree.map(lambda _: P(), tree)
    return jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), tree, specs)


def place_samples(samples: Split, mesh: Mesh | None) -> Split:
    """Samples with their points over "tokens", all samples on each device of "data".

    Where "tokens" does not divide the points, the last ones are padding, masked.
    """
    if mesh is None:
        return jax.device_put(samples)
    n = samples.x.shape[1]
    spare = -n % mesh.shape[TOKENS]
    if spare:
        mask = np.ones(samples.x.shape[:2], bool) if samples.mask is None else samples.mask
        pad = lambda x: np.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
        samples = Split(*map(pad, (samples.x, samples.y, mask)))
    return place(samples, mesh, jax.tree.map(lambda _: P(None, TOKENS), samples))


def parameter_specs(params, mesh: Mesh, fsdp: bool):
    """A PartitionSpec for each parameter: with `fsdp` by RULES where "data" divides the axis.

    Axes are counted from the last: a leading axis of seeds or of stacked blocks changes nothing.
    """

    def spec(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = next((axis for pattern, axis in RULES if re.search(pattern, name)), None)
        if not fsdp or axis is None or x.ndim < -axis or x.shape[axis] % mesh.shape[DATA]:
            return P()
        return P(*[None] * (x.ndim + axis), DATA)

    return jax.tree_util.tree_map_with_path(spec, params)


# ----------------------------------------------------------------------------- a step ---


def model_over(apply: Callable, mesh: Mesh | None) -> Callable:
    """`apply`, told of the axis that its points lie over, if they do."""
    if mesh is None or mesh.shape[TOKENS] == 1:
        return apply
    return lambda params, x, mask: apply(params, x, mask, axis_name=TOKENS)


def loss_over(loss: Callable, mesh: Mesh | None, points: int) -> Callable:
    """`loss(prediction, target, mask) -> [B]` for the points of a device: the loss over all points.

    A loss that takes `axis_name` sums over devices itself. For any other (derivatives on a grid
    need their neighbours) the fields of a sample are gathered: O values a point, beside the
    hundreds that a model keeps. `points` is their number without padding.
    """
    if mesh is None or mesh.shape[TOKENS] == 1:
        return loss
    if "axis_name" in inspect.signature(loss).parameters:
        return lambda prediction, target, mask: loss(prediction, target, mask, axis_name=TOKENS)

    def gathered(prediction, target, mask):
        fields = (prediction, target, mask)
        return loss(*(None if x is None else whole(x, TOKENS)[:, :points] for x in fields))

    return gathered


def value_and_grad(mesh: Mesh | None, fsdp: bool = False) -> Callable:
    """`jax.value_and_grad` for a loss of a device's samples and points, see `loss_over`.

    The gradient of a parameter that many devices hold parts of is such a part.
    """
    if mesh is None:
        return jax.value_and_grad

    def transform(loss_fn: Callable) -> Callable:
        def step(params, batch):
            specs = parameter_specs(params, mesh, fsdp)

            def local(params, batch):
                loss, grads = jax.value_and_grad(loss_fn)(params, batch)
                return lax.pmean(loss, DATA), _reduced(grads, specs, mesh)

            return jax.shard_map(
                local, mesh=mesh, in_specs=(P(), BATCH), out_specs=(P(), specs), check_vma=False
            )(params, batch)

        return step

    return transform


def _reduced(grads, specs, mesh: Mesh):
    """The mean over "data" of the sums over "tokens", or this device's parts of it.

    What every device gets whole is one vector, so one message: where XLA puts gradients together
    for that, it takes them apart again with a copy for each.
    """
    leaves, tree = jax.tree.flatten(grads)
    axes = [list(spec).index(DATA) if DATA in spec else None for spec in jax.tree.leaves(specs)]
    one, unravel = ravel_pytree([g for g, axis in zip(leaves, axes, strict=True) if axis is None])
    sums = iter(unravel(lax.psum(one, (DATA, TOKENS))))

    def reduced(gradient, axis):
        if axis is None:
            return next(sums)
        gradient = lax.psum(gradient, TOKENS)
        return lax.psum_scatter(gradient, DATA, scatter_dimension=axis, tiled=True)

    mean = lambda g: g / jnp.asarray(mesh.shape[DATA], g.dtype)
    return tree.unflatten(mean(reduced(g, axis)) for g, axis in zip(leaves, axes, strict=True))


def compiler_options(points: int, mesh: Mesh | None = None) -> dict[str, bool | str]:
    """`jax.jit`'s for a training step on so many points: less time if they are few, less memory on
    many GPUs, see above. Only the outermost `jit` takes them.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if not nvidia(device):
        return {}
    if mesh is not None and mesh.size > 1:
        return MANY_GPUS
    return FEW_POINTS if points < MANY else {}


def over_samples(f: Callable, mesh: Mesh | None) -> Callable:
    """`f(params, samples) -> [B]` of a device's samples and points, for all of them."""
    if mesh is None:
        return f
    specs = dict(in_specs=(P(), BATCH), out_specs=P(DATA))
    return jax.shard_map(f, mesh=mesh, **specs, check_vma=False)
