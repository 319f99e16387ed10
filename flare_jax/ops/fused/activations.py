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


def _asm_pairs(lines: list[str], dtype, *args: jax.Array) -> jax.Array:
    """As _asm, for two neighbours at a time: a 16-bit pair is one register, a float32 pair two.

    Elsewhere the compiler unpacks 16-bit pairs and converts them one by one, on the unit that
    computes exponentials.
    """
    constraints = ["r" if a.dtype.itemsize == 2 else "f,f" for a in args]
    (out,) = plgpu.elementwise_inline_asm(
        "{ .reg .f32 s, p, r, t, a, b; .reg .b32 u, v; .reg .b16 lo, hi; " + " ".join(lines) + " }",
        args=args,
        constraints=",".join(["=r", *constraints]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return out


def _pair_type(dtype) -> str:
    return "bf16x2" if dtype == jnp.bfloat16 else "f16x2"


def _unpack(dtype, pair: str) -> list[str]:
    """The registers a and b, float32, from a 16-bit pair."""
    if dtype == jnp.bfloat16:
        return [
            f"shl.b32 u, {pair}, 16;",
            "mov.b32 a, u;",
            f"and.b32 u, {pair}, 0xffff0000;",
            "mov.b32 b, u;",
        ]
    return [f"mov.b32 {{lo, hi}}, {pair};", "cvt.f32.f16 a, lo;", "cvt.f32.f16 b, hi;"]


def hide(x: jax.Array) -> jax.Array:
    """x, such that the compiler does not see where it comes from (GPU only).

    A sum of two products stays an addition, where a sum of a product and anything else becomes
    the product's accumulator.
    """
    if x.dtype.itemsize == 4:
        return _asm(["mov.b32 $0, $1;"], x)
    return _asm_pairs(["mov.b32 $0, $1;"], x.dtype, x)


def once(x: jax.Array) -> jax.Array:
    """x, computed once where it is used as it is and transposed (GPU only).

    A transpose moves up through elementwise code to the products that it starts from, and all
    of that is computed twice. It stops at a loop; a loop of one step is then removed.
    """
    return jax.lax.fori_loop(0, 1, lambda _, value: hide(value), x)


@dataclasses.dataclass(frozen=True)
class Activation:
    """`exact`: ex2 and reciprocal (float32 accuracy); else the tanh instruction (2^-11)."""

    name: str
    exact: bool
    interpret: bool

    def __post_init__(self):
        if self.name not in ACTIVATIONS:
            raise NotImplementedError(f"activation {self.name!r}: {ACTIVATIONS} only")

    def _sigmoid_lines(self, out: str, h: str = "$1") -> list[str]:
        """out = sigmoid(r(h))."""
        # the unit computes 2^x (exact) or tanh(x): sigmoid(r) = 1/(1+2^(-r/ln 2)) = .5+.5 tanh(r/2)
        scale = -math.log2(math.e) if self.exact else 0.5
        if self.name == "gelu":
            lines = [
                f"mul.ftz.f32 s, {h}, {h};",
                f"fma.rn.ftz.f32 p, s, {_f32(scale * _B)}, {_f32(scale * _A)};",
                f"mul.ftz.f32 r, {h}, p;",
            ]
        else:
            lines = [f"mul.ftz.f32 r, {h}, {_f32(scale)};"]
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
        """x + act(h) in x's dtype."""
        if self.interpret:
            return (x + h * self.sigmoid(h)).astype(x.dtype)
        if x.dtype == jnp.float32:
            lines = self._sigmoid_lines("s")
            return _asm([*lines, "fma.rn.ftz.f32 $0, $1, s, $2;"], h, x)
        lines = [
            *_unpack(x.dtype, "$3"),
            *self._sigmoid_lines("s", "$1"),
            "fma.rn.ftz.f32 a, $1, s, a;",
            *self._sigmoid_lines("s", "$2"),
            "fma.rn.ftz.f32 b, $2, s, b;",
        ]
        return _asm_pairs([*lines, f"cvt.rn.{_pair_type(x.dtype)}.f32 $0, b, a;"], x.dtype, h, x)

    def residual_from(self, s: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
        """x + act(h) in x's dtype, given s = sigmoid(h)."""
        if self.interpret:
            return (x + h * s).astype(x.dtype)
        if x.dtype == jnp.float32:
            return _asm(["fma.rn.ftz.f32 $0, $1, $2, $3;"], h, s, x)
        lines = [
            *_unpack(x.dtype, "$5"),
            "fma.rn.ftz.f32 a, $1, $3, a;",
            "fma.rn.ftz.f32 b, $2, $4, b;",
        ]
        return _asm_pairs([*lines, f"cvt.rn.{_pair_type(x.dtype)}.f32 $0, b, a;"], x.dtype, h, s, x)

    def gate(self, s: jax.Array, h: jax.Array, dtype) -> jax.Array:
        """act'(h) in `dtype`, given s = sigmoid(h)."""
        if self.interpret:
            r1 = _A + 3 * _B * h * h if self.name == "gelu" else 1.0
            return (s * (1 + (1 - s) * h * r1)).astype(dtype)
        if dtype == jnp.float32:
            return _asm(self._gate_lines("$0", "$1", "$2"), s, h)
        lines = [*self._gate_lines("a", "$1", "$3"), *self._gate_lines("b", "$2", "$4")]
        return _asm_pairs([*lines, f"cvt.rn.{_pair_type(dtype)}.f32 $0, b, a;"], dtype, s, h)

    def _gate_lines(self, out: str, s: str, h: str) -> list[str]:
        if self.name == "gelu":
            slope = [
                f"mul.ftz.f32 p, {h}, {h};",
                f"fma.rn.ftz.f32 p, p, {_f32(3 * _B)}, {_f32(_A)};",
                f"mul.ftz.f32 p, p, {h};",
            ]
        else:
            slope = [f"mov.f32 p, {h};"]
        return [
            *slope,  # p = h r'(h)
            f"neg.f32 t, {s};",
            "fma.rn.ftz.f32 t, t, p, p;",  # (1 - s) p
            f"fma.rn.ftz.f32 {out}, {s}, t, {s};",
        ]

    def times_gate(self, g: jax.Array, gate: jax.Array) -> jax.Array:
        """g gate in the gate's dtype; 16-bit: a packed product of the rounded factors."""
        if self.interpret or gate.dtype == jnp.float32:
            return g.astype(gate.dtype) * gate
        pair = _pair_type(gate.dtype)
        lines = [
            f"cvt.rn.{pair}.f32 u, $2, $1;",
            "mov.b32 v, 0x80008000;",  # -0: Ampere multiplies bfloat16 pairs only by fma
            f"fma.rn.{pair} $0, u, $3, v;",
        ]
        return _asm_pairs(lines, gate.dtype, g, gate)
