"""What every surrogate problem states: its samples, their normalisation, loss and field names."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from flare_jax.problems.metrics import AnyArray, rel_l2, rel_l2_on_host


class Normalizer(NamedTuple):
    """Per-field shift and scale, `encoded = (physical - mean) / std`. A pytree of two arrays."""

    mean: Float[AnyArray, "F"]
    std: Float[AnyArray, "F"]

    def encode(self, x: Float[AnyArray, "*any F"]) -> Float[AnyArray, "*any F"]:
        """Physical values to values of about zero mean and unit variance."""
        mean, std = self._aligned(x.ndim)
        return (x - mean) / std

    def decode(self, x: Float[AnyArray, "*any F"]) -> Float[AnyArray, "*any F"]:
        """Inverse of `encode`."""
        mean, std = self._aligned(x.ndim)
        return x * std + mean

    def _aligned(self, ndim: int) -> "Normalizer":
        """Mean and std of rank `ndim`, fields last: jax may be told to refuse rank promotion."""
        return Normalizer(*(s.reshape((1,) * (ndim - 1) + (-1,)) for s in self))

    @classmethod
    def fit(
        cls,
        x: Float[np.ndarray, "n N F"],
        mask: Bool[np.ndarray, "n N"] | None = None,
        *,
        raw: Sequence[int] = (),
    ) -> "Normalizer":
        """Mean and standard deviation of each field over samples and real points, in float32.

        Sums are taken in float64. A field that is constant to float32 rounding gets std 1. Fields
        whose index is in `raw` (positions, for one) are left as they are: mean 0, std 1.
        """
        where = True if mask is None else np.asarray(mask)[..., None]
        if not np.any(where):
            raise ValueError("cannot normalise: the mask holds no real point")
        mean = np.mean(x, axis=(0, 1), dtype=np.float64, where=where)
        std = np.std(x, axis=(0, 1), dtype=np.float64, where=where)
        return cls._of(mean, std, raw)

    @classmethod
    def fit_parts(cls, parts: Sequence[Float[np.ndarray, "n F"]]) -> "Normalizer":
        """`fit` over the points of meshes of any sizes, which are not put together."""
        return cls._of(*moments(parts))

    @classmethod
    def _of(cls, mean, std, raw=()):
        std = np.where(std <= np.finfo(np.float32).eps * np.abs(mean), 1.0, std)
        raw = list(raw)
        mean[raw], std[raw] = 0.0, 1.0
        return cls(mean.astype(np.float32), std.astype(np.float32))


def moments(
    parts: Sequence[Float[np.ndarray, "n F"]],
) -> tuple[Float[np.ndarray, "F"], Float[np.ndarray, "F"]]:
    """Mean and standard deviation of each column over the rows of all parts, in float64."""
    count = sum(map(len, parts))
    mean = sum(x.sum(0, dtype=np.float64) for x in parts) / count
    square = sum(np.square(x - mean).sum(0) for x in parts)
    return mean, np.sqrt(square / count)


class Split(NamedTuple):
    """Samples of one split, as NumPy arrays on the host."""

    x: Float[AnyArray, "n N in"]  # model inputs, already encoded
    y: Float[AnyArray, "n N O"]  # targets in physical units
    mask: Bool[AnyArray, "n N"] | None = None  # True = a real point; None when every point is real


DIGEST_POINTS = 64  # about as many of a sample go into a digest

Samples = Split | tuple[Split, ...]  # of one size; or meshes of many, padded: one Split a bucket


def buckets_of(samples: Samples) -> tuple[Split, ...]:
    """The buckets of `samples`; those that all have one size are one bucket."""
    return (samples,) if isinstance(samples, Split) else tuple(samples)


def count_of(samples: Samples) -> int:
    """Number of samples in all buckets."""
    return sum(len(split.x) for split in buckets_of(samples))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A surrogate problem, ready to train on. Shapes and values are checked at construction.

    Samples of one size are a Split; meshes of different sizes are padded, a Split for each of a few
    sizes (`data/buckets.py`). Statistics in the normalisers come from the training split alone.
    `valid` is cut from training samples and is what selects checkpoints and settings; `test` only
    measures the end result.
    """

    name: str
    train: Samples
    valid: Samples | None  # None when there are no validation samples
    test: Samples
    x_normalizer: Normalizer  # over all input columns; identity for positions
    y_normalizer: Normalizer
    loss: Callable  # loss(prediction, target, mask) -> [B], on physical fields, pure jax
    inputs: tuple[str, ...]  # names of the input columns
    targets: tuple[str, ...]  # names of the output fields
    shape: tuple[int, ...] | None = None  # grid shape for plots, such as (85, 85)
    # further errors that a result reports beside rel_l2, by name; like `loss`
    metrics: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    units: Float[np.ndarray, "O"] | None = None  # of the fields in rel_l2; None: as they are
    generated: bool = False  # samples come from a solver: made elsewhere, the same to rounding only

    def __post_init__(self):
        for name in ("train", "valid", "test"):
            split = getattr(self, name)
            if name == "valid" and split is None:
                continue
            for bucket in buckets_of(split):
                _check_split(f"{self.name}: {name}", bucket, len(self.inputs), len(self.targets))
                points = bucket.x.shape[1]
                if self.shape is not None and points != np.prod(self.shape):
                    raise ValueError(
                        f"{self.name}: {name} has {points} points, grid is {self.shape}"
                    )
            if not buckets_of(split):
                raise ValueError(f"{self.name}: {name} holds no samples")
        for name, normalizer, fields in (
            ("x_normalizer", self.x_normalizer, self.inputs),
            ("y_normalizer", self.y_normalizer, self.targets),
        ):
            _check_normalizer(f"{self.name}: {name}", normalizer, len(fields))
        if self.units is None:
            _check_squares(f"{self.name}: y", self.y_normalizer)

    @property
    def rel_l2(self) -> Callable:
        """The error that is reported and selects, in the fields' units."""
        return rel_l2 if self.units is None else functools.partial(rel_l2, units=self.units)

    @property
    def contents(self) -> dict[str, dict]:
        """{split: samples, their points, and a digest of them}, which a run keeps as JSON.

        The digest is that of targets at some points of every sample, in any order of the samples.
        Generated samples have none: their configuration says which they are.
        """
        splits = {name: getattr(self, name) for name in ("train", "valid", "test")}
        return {name: _contents(s, not self.generated) for name, s in splits.items() if s}

    def check_contents(self, saved: Mapping[str, dict] | None, data: Path | None) -> None:
        """Raises ValueError, with what differs, where a run has `saved` other contents.

        Args:
            saved: what `contents` was when the run began; None of runs that did not keep it.
            data: the folder of the samples, for the message.
        """
        now, lines = self.contents, []
        for name in () if saved is None else ("train", "valid", "test"):
            if saved.get(name) != now.get(name):
                lines.append(f"{name}: {_told(saved.get(name))} -> {_told(now.get(name))}")
        if lines:
            where = "generated" if data is None else f"in {data}"
            raise ValueError(
                f"the samples {where} are not those that the run was trained on, or are split "
                "otherwise (run -> now):\n  " + "\n  ".join(lines)
            )

    @property
    def mean_error(self) -> float:
        """Mean test rel-L2 of the trivial baseline: predicting the training mean for every sample.

        Where no sample is padded the mean is taken point by point over the training samples;
        otherwise it is one number per field. A surrogate that learned anything is far below it.
        """
        mean, train, tests = self.y_normalizer.mean, buckets_of(self.train), buckets_of(self.test)
        sizes = {s.y.shape[1] for s in (*train, *tests)}
        if train[0].mask is None and len(sizes) == 1:
            mean = np.mean(train[0].y, axis=0, dtype=np.float64).astype(np.float32)  # [N, O]
        errors = [
            rel_l2_on_host(np.broadcast_to(mean, s.y.shape), s.y, s.mask, self.units) for s in tests
        ]
        return float(np.mean(np.concatenate(errors)))


def _contents(samples: Samples, digest: bool) -> dict:
    digests, points = [], 0
    for split in buckets_of(samples):
        real = np.ones(split.y.shape[:2], bool) if split.mask is None else split.mask
        for y, mask in zip(split.y, real, strict=True):
            count = int(mask.sum())
            points += count
            some = y[mask][:: max(1, count // DIGEST_POINTS)] if digest else y[:0]
            digests.append(hashlib.sha256(f"{count}".encode() + some.tobytes()).digest())
    found = {"samples": len(digests), "points": points}
    if digest:  # sorted: buckets order samples by what else is in the folder
        found["digest"] = hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
    return found


def _told(contents: Mapping | None) -> str:
    return "none" if contents is None else ", ".join(f"{v} {k}" for k, v in contents.items())


def _check_split(name: str, split: Split, num_inputs: int, num_targets: int) -> None:
    """Raises ValueError unless the split holds samples of the stated widths and finite values."""
    x, y, mask = split
    if x.ndim != 3 or y.ndim != 3:
        raise ValueError(f"{name}: x and y must be [n, N, fields], got {x.shape} and {y.shape}")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"{name}: x {x.shape} and y {y.shape} differ in samples or points")
    if 0 in x.shape[:2]:
        raise ValueError(f"{name}: holds no samples or no points, x is {x.shape}")
    if x.shape[2] != num_inputs or y.shape[2] != num_targets:
        raise ValueError(
            f"{name}: x has {x.shape[2]} columns for {num_inputs} input names, "
            f"y has {y.shape[2]} fields for {num_targets} target names"
        )
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != bool):
        raise ValueError(f"{name}: mask must be bool {x.shape[:2]}, got {mask.dtype} {mask.shape}")
    for field, values in (("x", x), ("y", y)):
        if values.dtype != np.float32:
            raise ValueError(f"{name}: {field} must be float32, got {values.dtype}")
        bad = ~np.isfinite(values).all(axis=(1, 2))
        if bad.any():
            raise ValueError(f"{name}: {field} of sample {np.argmax(bad)} is not finite")


def _check_normalizer(name: str, normalizer: Normalizer, fields: int) -> None:
    """Raises ValueError unless mean and std are finite [fields] arrays and std is positive."""
    mean, std = np.asarray(normalizer.mean), np.asarray(normalizer.std)
    if mean.shape != (fields,) or std.shape != (fields,):
        raise ValueError(f"{name}: mean {mean.shape} and std {std.shape} must be [{fields}]")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"{name}: needs a finite mean and a finite positive std")


def _check_squares(name: str, normalizer: Normalizer) -> None:
    """Raises ValueError for fields so small or large that float32 does not hold their squares."""
    size = float(np.max(np.hypot(normalizer.mean, normalizer.std)))
    if not 1e-15 < size < 1e15:
        raise ValueError(
            f"{name}: values are of the order of {size:.0e}, and float32 does not hold their "
            "squares: give the fields in other units"
        )
