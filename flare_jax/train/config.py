"""A run's whole configuration: the problem, the model, the optimizer and the loop."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from flare_jax.models.flare import FLAREConfig
from flare_jax.problems import darcy, elasticity, lpbf, mesh
from flare_jax.train.optimizer import OptimizerConfig

PROBLEMS: dict[str, tuple[ModuleType, type]] = {
    "darcy": (darcy, darcy.DarcyConfig),
    "elasticity": (elasticity, elasticity.ElasticityConfig),
    "lpbf": (lpbf, lpbf.LPBFConfig),
    "mesh": (mesh, mesh.MeshConfig),
}
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop; raises ValueError for values out of range."""

    epochs: int = 100  # passes over the training samples
    batch_size: int = 2  # samples a step
    batch_tokens: int | None = None  # points a step, instead: small meshes share a batch
    seed: int = 0  # of initial parameters and sample order
    seeds: int = 1  # runs trained at once, with seed, seed + 1, ...
    precision: Precision = "float32"  # of products; with bfloat16 of all but sums
    eval_every: int = 10  # epochs between validations and checkpoints
    chunk_steps: int = 500  # most steps in one call of the device

    def __post_init__(self):
        for name in ("epochs", "batch_size", "seeds", "eval_every", "chunk_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.precision not in typing.get_args(Precision):
            raise ValueError(
                f"precision must be of {typing.get_args(Precision)}, got {self.precision!r}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers."""

    problem: Any  # the problem's own config, such as DarcyConfig
    model: FLAREConfig = FLAREConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


def config_class(problem: str) -> type:
    """`Config` with the problem's own config class in its annotation, for the command line."""
    _, cls = PROBLEMS[problem]
    return dataclasses.make_dataclass(
        "Config", [("problem", cls, dataclasses.field(default=cls()))], bases=(Config,), frozen=True
    )


def preset(problem: str, name: str) -> Config:
    """A problem's named preset: its flat values spread over the four configs."""
    module, cls = PROBLEMS[problem]
    values = dict(module.PRESETS[name])
    parts = {"problem": cls, "model": FLAREConfig, "optimizer": OptimizerConfig}
    parts["train"] = TrainConfig
    made = {
        part: c(**{f.name: values.pop(f.name) for f in dataclasses.fields(c) if f.name in values})
        for part, c in parts.items()
    }
    if values:
        raise ValueError(f"preset {name} of {problem} sets unknown fields {sorted(values)}")
    return config_class(problem)(**made)


def to_dict(config) -> dict:
    """Plain JSON values of a config."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_config(folder: Path) -> dict:
    """The values in a run's config.json, with the problem's name and the facts of its fields.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or not {"name", "problem", "model"} <= values.keys():
        raise ValueError(f"{path} is damaged: it is not the configuration of a run")
    return values


def from_dict(cls: type, values: dict):
    """The config `cls` from `to_dict`'s values; unknown names raise a ValueError."""
    hints = typing.get_type_hints(cls)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise ValueError(f"{cls.__name__} has no fields {sorted(unknown)}")
    return cls(**{name: _revive(hints[name], value) for name, value in values.items()})


def _revive(kind, value):
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return from_dict(kind, value)
    if value is not None and Path in options:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Lines `name: a -> b` for every value in which two nested dicts differ."""
    lines = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            lines += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            lines.append(f"{prefix}{key}: {x} -> {y}")
    return lines
