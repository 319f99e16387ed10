"""Activations inside GPU kernels: value and derivative from one sigmoid.

Both activations are `act(h) = h sigmoid(r(h))`:
    silu         r = h
    gelu (tanh)  r = 2 sqrt(2/pi) (h + 0.044715 h^3),  as 0.5 (1 + tanh(r/2)) = sigmoid(r)
so  act'(h) = s (1 + (1 - s) h r'(h))  with s = sigmoid(r(h)): no cancellation at either end.

The compiler of Pallas Triton kernels neither contracts multiply-adds nor flushes
denormals, which doubles the instruction count of plain jnp code: the GPU forms are
inline assembly. Interpret mode runs the jnp twins.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

ACTIVATIONS = ("gelu", "silu")

_A = 2 * math.sqrt(2 / math.pi)  # r(h) = A h + B h^3
_B = 0.044715 * _A


def _f32(value: float) -> str:
    """A float32 constant in PTX."""
    return f"0f{np.float32(value).view(np.uint32).item():08X}"


def _asm(lines: list[str], *args: jax.Array) -> jax.Array:
    """Elementwise inline PTX; `$0` is the result, `$1`.. the arguments, s p r t scratch."""
    (out,) = plgpu.elementwise_inline_asm(
        "{ .reg .f32 s, p, r, t; " + " ".join(lines) + " }",
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return out


@dataclasses.dataclass(frozen=True)
class Activation:
    """`exact`: ex2 and reciprocal (float32 accuracy); else the tanh instruction (2^-11)."""

    name: str
    exact: bool
    interpret: bool

    def __post_init__(self):
        if self.name not in ACTIVATIONS:
            raise NotImplementedError(f"activation {self.name!r}: {ACTIVATIONS} only")

    def _sigmoid_lines(self, out: str) -> list[str]:
        """out = sigmoid(r($1))."""
        # the unit computes 2^x (exact) or tanh(x): sigmoid(r) = 1/(1+2^(-r/ln 2)) = .5+.5 tanh(r/2)
        scale = -math.log2(math.e) if self.exact else 0.5
        if self.name == "gelu":
            lines = [
                "mul.ftz.f32 s, $1, $1;",
                f"fma.rn.ftz.f32 p, s, {_f32(scale * _B)}, {_f32(scale * _A)};",
                "mul.ftz.f32 r, $1, p;",
            ]
        else:
            lines = [f"mul.ftz.f32 r, $1, {_f32(scale)};"]
        if self.exact:
            return lines + [
                "ex2.approx.ftz.f32 t, r;",
                f"add.ftz.f32 t, t, {_f32(1.0)};",
                f"rcp.approx.ftz.f32 {out}, t;",
            ]
        return lines + [
            "tanh.approx.f32 t, r;",
            f"fma.rn.ftz.f32 {out}, t, {_f32(0.5)}, {_f32(0.5)};",
        ]

    def sigmoid(self, h: jax.Array) -> jax.Array:
        """s = sigmoid(r(h)), from which value and gate follow."""
        if self.interpret:
            return jax.nn.sigmoid(_A * h + _B * h**3 if self.name == "gelu" else h)
        return _asm(self._sigmoid_lines("$0"), h)

    def residual(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """x + act(h)."""
        if self.interpret:
            return x + h * self.sigmoid(h)
        lines = self._sigmoid_lines("s")
        return _asm([*lines, "fma.rn.ftz.f32 $0, $1, s, $2;"], h, x)

    def residual_from(self, s: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
        """x + act(h), given s = sigmoid(h)."""
        if self.interpret:
            return x + h * s
        return _asm(["fma.rn.ftz.f32 $0, $1, $2, $3;"], h, s, x)

    def gate(self, s: jax.Array, h: jax.Array) -> jax.Array:
        """act'(h), given s = sigmoid(h)."""
        if self.interpret:
            r1 = _A + 3 * _B * h * h if self.name == "gelu" else 1.0
            return s * (1 + (1 - s) * h * r1)
        if self.name == "gelu":
            slope = [
                "mul.ftz.f32 p, $2, $2;",
                f"fma.rn.ftz.f32 p, p, {_f32(3 * _B)}, {_f32(_A)};",
                "mul.ftz.f32 p, p, $2;",
            ]
        else:
            slope = ["mov.f32 p, $2;"]
        return _asm(
            [
                *slope,  # p = h r'(h)
                "neg.f32 t, $1;",
                "fma.rn.ftz.f32 t, t, p, p;",  # (1 - s) p
                "fma.rn.ftz.f32 $0, $1, t, $1;",
            ],
            s,
            h,
        )
