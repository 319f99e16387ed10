"""Arithmetic shared by the kernels: dot products, exponentials, and how a kernel is launched.

Every helper has two forms: the one for the GPU and a plain twin for interpret mode (inline
assembly has no interpreter). `FLARE_JAX_INTERPRET=1` in the environment makes every kernel run in
interpret mode on any platform, which is how the tests run them on a CPU.
"""

import math
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Pallas Triton is deprecated since jax 0.11; its successor on GPU has no dot narrower than 16.
warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated.*")

LOG2E = math.log2(math.e)


def interpreted() -> bool:
    """True if kernels run in interpret mode."""
    return os.environ.get("FLARE_JAX_INTERPRET", "") == "1"


def nvidia(device: jax.Device) -> bool:
    """Whether the device is a GPU of NVIDIA."""
    return device.platform == "gpu" and "nvidia" in device.device_kind.lower()


def target() -> jax.Device:
    """The device that computations go to: jax's default device, else the first."""
    default = jax.config.jax_default_device
    if isinstance(default, str):  # a platform
        return jax.devices(default)[0]
    return default or jax.devices()[0]


def require_gpu(who: str = "kernels need") -> None:
    """Raises NotImplementedError, with the reason, where kernels cannot run."""
    device = target()
    if not nvidia(device):
        found = f"platform {device.platform!r}, {device.device_kind}"
        raise NotImplementedError(f"{found}: {who} an NVIDIA GPU of Ampere or newer")
    capability = getattr(device, "compute_capability", "0.0")
    if float(capability) < 8.0:
        raise NotImplementedError(f"{who} compute capability 8.0, got {capability}")


def capability() -> str:
    """The target's compute capability; that of an H100 where there is no GPU."""
    return str(getattr(target(), "compute_capability", "9.0"))


def shared_memory() -> int:
    """Bytes of shared memory that a program can have on the target."""
    if capability() in ("8.6", "8.9") or capability().startswith("12."):
        return 101_376
    return 166_912 if capability().startswith("8.") else 232_448


def pallas_call(kernel, *, warps, stages, interpret=None, **kwargs):
    """`pl.pallas_call` on the Triton backend (the default backend differs between jax versions).

    Differentiating the call raises NotImplementedError: see `underivable`.
    """
    call = pl.pallas_call(
        kernel,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpreted() if interpret is None else interpret,
        **kwargs,
    )
    return underivable(call)


def underivable(call):
    """`call`, raising NotImplementedError, with what to do, where it is differentiated.

    Kernels have their derivative written by hand, one order of it.
    """
    wrapped = jax.custom_jvp(call)

    @wrapped.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            "the kernels have first derivatives only, in reverse mode: for second derivatives use "
            'implementation="xla"'
        )

    return wrapped


def f32_precision() -> str:
    """How float32 operands are multiplied, from jax's `default_matmul_precision`.

    "highest" or "float32": "exact", IEEE float32 on the FMA units. Anything else: "fast", three
    bfloat16 products of the operands split in two (relative error 2^-16, TF32 has 2^-11).
    """
    name = str(jax.config.jax_default_matmul_precision or "").lower()
    return "exact" if name in ("highest", "float32", "f32_f32_f32") else "fast"


def split_bf16(x, nearest: bool = False):
    """float32 x = hi + lo in bfloat16, to 2^-16; with `nearest`, one instruction more, to 2^-18.

    By bits: converting would use the unit that exp needs.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + jnp.int32(0x8000) if nearest else bits) & jnp.int32(-65536)
    hi = lax.bitcast_convert_type(bits, jnp.float32)
    return hi.astype(jnp.bfloat16), (x - hi).astype(jnp.bfloat16)


def dot(a, b, contract=(1, 0), precision="fast", init=None):
    """Matrix product with float32 accumulation, contracting a's axis with b's axis; plus `init`.

    `precision` matters to float32 operands only: see `f32_precision`. That of each product is
    named, or jax's `default_matmul_precision` would cast bfloat16 operands to float32 for TF32.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype == jnp.float32 and not interpreted() and precision == "fast":
        # scores are products of thin tiles and feed exp, which makes their error relative
        (ah, al), (bh, bl) = split_bf16(a, contract == (1, 1)), split_bf16(b, True)
        total = init
        for x, y in ((al, bh), (ah, bl), (ah, bh)):
            total = dot(x, y, contract, init=total)
        return total
    exact = a.dtype == jnp.float32 or interpreted()
    out = lax.dot_general(
        a,
        b,
        dims,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    )
    return out if init is None else _apart(init) + out


def _apart(x):
    """x, such that the compiler does not see where it comes from.

    Triton adds into the accumulator of a product, but not if the other term is a product itself.
    The move below hides that and costs nothing: the assembler removes it.
    """
    return x if interpreted() else asm("mov.f32 $0, $1;", x)


def asm(code: str, *args):
    """One float32 result from float32 arguments of one shape: `$0` from `$1`, `$2`, ..."""
    [out] = plgpu.elementwise_inline_asm(
        code,
        args=list(args),
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return out


def float_literal(x: float) -> str:
    """x as a float32 constant in PTX."""
    return "0f" + np.float32(x).view(np.uint32).item().to_bytes(4, "big").hex()


def spread(x, shape, axis):
    """The vector x along `axis` of an array of `shape`."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def exp2_scaled(s, c: float, m, axis: int):
    """2**(s * c - m) with m a vector along `axis`.

    Two instructions. `jnp.exp2(s * c - m)` is six: XLA compiles Pallas Triton without flushing
    denormals and without contracting multiply-adds.
    """
    neg = spread(-m, s.shape, axis)
    if interpreted():
        return jnp.exp2(s * c + neg)
    code = f"fma.rn.ftz.f32 t, $1, {float_literal(c)}, $2; ex2.approx.ftz.f32 $0, t;"
    return asm("{ .reg .f32 t; " + code + " }", s, neg)


def exp2(x):
    """2**x, denormal results flushed to zero on the GPU."""
    return jnp.exp2(x) if interpreted() else asm("ex2.approx.ftz.f32 $0, $1;", x)


def log2(x):
    """log2(x) to float32 accuracy for x >= 1."""
    return jnp.log2(x) if interpreted() else asm("lg2.approx.ftz.f32 $0, $1;", x)


def reciprocal(x):
    """1 / x to one unit in the last place."""
    return 1.0 / x if interpreted() else asm("rcp.approx.ftz.f32 $0, $1;", x)


def multiply(x, y):
    return x * y if interpreted() else asm("mul.ftz.f32 $0, $1, $2;", x, y)


def once(x):
    """x, computed once where it is used as it is and transposed.

    The compiler moves a transpose up through elementwise code to the products it starts from and
    so clones that code. It does not move it through a loop; this one is then removed.
    """
    return x if interpreted() else lax.fori_loop(0, 1, lambda _, x: asm("mov.f32 $0, $1;", x), x)


def barrier():
    """Waits for all threads of a program; then each sees what the others stored."""
    if not interpreted():
        plgpu.debug_barrier()
