"""The command line: flare-jax {train, evaluate, predict, generate, spectrum, info}."""

import argparse
import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flare_jax import __version__, parallel, spectra
from flare_jax.data.buckets import describe
from flare_jax.data.meshes import check_written, write_mesh
from flare_jax.ops.flare import DEFAULT, IMPLEMENTATIONS
from flare_jax.ops.fused import mlp
from flare_jax.plots import prediction_figure, spectra_figure
from flare_jax.predict import (
    CHUNK,
    Surrogate,
    Which,
    load_data,
    load_run,
    one_sample,
    parameters_of,
    test_errors,
)
from flare_jax.problems.mesh import fields_of
from flare_jax.problems.problem import buckets_of, count_of
from flare_jax.solvers.darcy import ConvergenceError
from flare_jax.solvers.elasticity import SolverError
from flare_jax.solvers.lpbf import SolverError as PartError
from flare_jax.train.checkpoint import CheckpointError, steps_in
from flare_jax.train.config import PROBLEMS, Config, config_class, from_dict, preset, read_config
from flare_jax.train.loop import CHECKPOINTS, Interrupted, NonFiniteError, check_folder, fit

console = Console()
Run = Annotated[Path, tyro.conf.Positional]  # folder of a training run
ERRORS = (ValueError, OSError, NotImplementedError, CheckpointError, NonFiniteError, Interrupted)
ERRORS += (ConvergenceError, SolverError, PartError)
DTYPES = "float32", "bfloat16"  # that `info` tells about


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    commands = {
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "generate": generate,
        "spectrum": spectrum,
        "info": info,
    }
    parser = argparse.ArgumentParser(
        "flare-jax",
        description="Train and use FLARE surrogates of PDE solvers.",
        epilog="flare-jax COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        choices=commands,
        help="; ".join(
            f"{name}: {f.__doc__.splitlines()[0].rstrip('.').lower()}"
            for name, f in commands.items()
        ),
        metavar="COMMAND",
    )
    command = parser.parse_args(argv[:1]).command
    try:
        commands[command](argv[1:])
    except ERRORS as error:
        print(f"flare-jax {command}: {error}", file=sys.stderr)
        return 1
    return 0


def train(argv: list[str]) -> None:
    """Train a surrogate; makes or reads its data, writes a run folder with a figure."""
    problem, options, rest = problem_arguments("train", argv, training=True)
    among = (options.coordinator, options.num_processes, options.process_id)
    if options.distributed or any(x is not None for x in among):
        parallel.connect(*among)
        if options.out is None:
            raise ValueError("several processes need one folder: name it with --out")
    folder = options.out
    if options.resume:
        folder = folder or newest_run(problem, options.preset)
        values = read_config(folder)
        values.pop("fields", None)
        if (name := values.pop("name")) != problem:
            raise ValueError(f"{folder} is a run of {name}, not of {problem}")
        default = from_dict(config_class(problem), values)
    else:
        default = preset(problem, options.preset)
    config = parse(config_class(problem), default, f"flare-jax train {problem}", rest)
    with made_if_used(folder or new_run(problem, options.preset)) as folder:
        train_into(folder, problem, config, options)


def train_into(folder: Path, problem: str, config: Config, options: argparse.Namespace) -> None:
    """Makes or reads the samples, trains, draws and reports."""
    check_folder(folder, problem, config, options.resume)
    t = config.train
    batch = t.batch_size if t.batch_tokens is None else jax.device_count()  # fits any mesh
    mesh = parallel.make_mesh(options.mesh, batch)
    say = console.print if parallel.is_main() else lambda *_: None
    say(f"{problem} on {parallel.describe(mesh)}, into {folder}")
    module, _ = PROBLEMS[problem]
    data = parallel.main_first(lambda: module.load(config.problem))
    say(f"training samples: {describe(data.train)}")
    result = fit(data, config, folder, resume=options.resume, mesh=mesh, fsdp=options.fsdp)
    if parallel.is_main():
        figure = folder / "figure.png"
        draw_test_samples(figure, load_run(folder), data)
        report(result, folder, figure)


def evaluate(argv: list[str]) -> None:
    """Test error of a run's parameters."""

    def arguments(
        run: Run, which: Which = "best", cache: Path | None = None
    ) -> tuple[Path, str, Path | None]:
        """Prints the test error.

        Args:
            run: folder of a training run.
            which: parameters best on validation, the last ones, or their running average.
            cache: folder of generated samples, as in training; None: the default one.
        """
        return run, which, cache

    folder, which, cache = tyro.cli(arguments, prog="flare-jax evaluate", args=argv)
    surrogate = load_run(folder, which)
    data = load_data(surrogate, cache)
    errors = test_errors(surrogate, data)
    console.print(
        f"test rel-L2 ({parameters_of(surrogate)}): {errors.mean():.5f}, "
        f"median {np.median(errors):.5f}, worst {errors.max():.5f} of {len(errors)} samples; "
        f"predicting the training mean: {data.mean_error:.5f}"
    )


def predict(argv: list[str]) -> None:
    """Fields for new inputs, from a file to a file and a picture."""

    def arguments(
        run: Run,
        file: Annotated[Path, tyro.conf.Positional],
        out: Path | None = None,
        which: Which = "best",
        chunk: int = CHUNK,
    ) -> tuple[Path, Path, Path | None, str, int]:
        """Writes predictions in physical units.

        Args:
            run: folder of a training run.
            file: new inputs: for darcy a .npz with `coefficient` or a .mat with `coeff`, [n, s, s];
                for elasticity a .npz with `points`, [n, N, 2], or a .npy as published, [N, 2, n];
                for lpbf and mesh a mesh as .npz, .vtu, .vtk or .ply, with the run's input fields.
            out: the file to write, a .npz (for lpbf and mesh also a .vtu or .vtk); None:
                prediction.npz, or prediction.vtu for a mesh that is no .npz. A .png goes beside it.
            which: parameters best on validation, the last ones, or their running average.
            chunk: points on the device at once; larger samples go through it in parts.
        """
        return run, file, out, which, chunk

    folder, file, out, which, chunk = tyro.cli(arguments, prog="flare-jax predict", args=argv)
    surrogate = load_run(folder, which)
    problem, _ = PROBLEMS[surrogate.problem]
    if hasattr(problem, "mesh_inputs"):
        predict_mesh(surrogate, file, out, chunk)
        return
    out = out or Path("prediction.npz")
    if out.suffix != ".npz":
        raise ValueError(f"predictions of {surrogate.problem} are written as .npz, got {out}")
    check_parent(out)
    inputs, targets = problem.INPUTS, problem.TARGETS
    x, shape = problem.inputs_from(file)
    fields = surrogate(x, chunk=chunk)
    arrays = {n: fields[..., i].reshape(len(x), *(shape or [-1])) for i, n in enumerate(targets)}
    np.savez_compressed(out, **arrays)
    picture = out.with_suffix(".png")
    prediction_figure(picture, x[:3], fields[:3], inputs=inputs, targets=targets, shape=shape)
    console.print(f"{len(x)} predictions of {', '.join(targets)} in {out}, picture in {picture}")


def predict_mesh(surrogate: Surrogate, file: Path, out: Path | None, chunk: int) -> None:
    """Fields at the points of the mesh in a file, to a file with its points and cells."""
    module, _ = PROBLEMS[surrogate.problem]
    config = surrogate.config.problem
    out = out or Path("prediction").with_suffix(".npz" if file.suffix == ".npz" else ".vtu")
    check_written(out)
    check_parent(out)
    mesh, x = module.mesh_inputs(file, config)
    values = surrogate(x[None], chunk=chunk)[0]
    names = getattr(config, "targets", surrogate.targets)
    fields = fields_of(values, surrogate.targets, names)
    write_mesh(out, mesh._replace(fields=fields))
    picture, columns = out.with_suffix(".png"), surrogate.targets
    prediction_figure(picture, x[None], values[None], inputs=surrogate.inputs, targets=columns)
    console.print(f"{', '.join(fields)} at {len(x)} points in {out}, picture in {picture}")


def check_parent(out: Path) -> None:
    """Raises FileNotFoundError unless the folder of a file to write is there."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} into")


def generate(argv: list[str]) -> None:
    """Make a problem's data and keep it in the cache."""
    problem, options, rest = problem_arguments("generate", argv)
    module, cls = PROBLEMS[problem]
    config = parse(
        cls, preset(problem, options.preset).problem, f"flare-jax generate {problem}", rest
    )
    data = module.load(config)
    sizes = {n: getattr(data, n) for n in ("train", "valid", "test")}
    text = ", ".join(f"{count_of(s)} {name}" for name, s in sizes.items() if s is not None)
    points = sorted({split.x.shape[1] for split in buckets_of(data.train)})
    console.print(f"{problem}: {text} samples of {' or '.join(map(str, points))} points")


def spectrum(argv: list[str]) -> None:
    """What the mixers of a run learned: eigenvalues of every block and head."""

    def arguments(
        run: Run,
        samples: int = 4,
        out: Path | None = None,
        which: Which = "best",
        cache: Path | None = None,
    ) -> tuple[Path, int, Path, str, Path | None]:
        """Prints a table, writes all eigenvalues as spectrum.json and draws spectrum.png.

        Args:
            run: folder of a training run.
            samples: how many test samples, from the first; of meshes, in the fullest bucket.
            out: folder for the two files; None: that of the run.
            which: parameters best on validation, the last ones, or their running average.
            cache: folder of generated samples, as in training; None: the default one.
        """
        return run, samples, out or run, which, cache

    folder, samples, out, which, cache = tyro.cli(arguments, prog="flare-jax spectrum", args=argv)
    surrogate = load_run(folder, which)
    data = load_data(surrogate, cache)
    test = max(buckets_of(data.test), key=lambda split: len(split.x))
    if not 1 <= samples <= len(test.x):
        raise ValueError(f"samples must be 1 to {len(test.x)} test samples, got {samples}")
    x = data.x_normalizer.decode(test.x[:samples])
    mask = None if test.mask is None else test.mask[:samples]
    found = spectra.model_spectra(surrogate, x, mask)
    facts = {"run": str(folder), "problem": surrogate.problem, "which": surrogate.which}
    facts |= {"seed": surrogate.seed, "samples": samples}
    out.mkdir(parents=True, exist_ok=True)
    spectra.write(out / "spectrum.json", found, **facts)
    title = f"{surrogate.problem}: eigenvalues of the mixing matrices"
    spectra_figure(out / "spectrum.png", found.eigenvalues, found.floor.max(), title=title)
    console.print(spectra.summary_table(spectra.summary(found), title))
    console.print(f"eigenvalues: {out / 'spectrum.json'}\nfigure: {out / 'spectrum.png'}")


def info(argv: list[str]) -> None:
    """Devices, versions, and which implementation of the operator runs here and why."""
    tyro.cli(lambda: None, prog="flare-jax info", description=info.__doc__, args=argv)
    table = Table("", "", show_header=False)
    for name in ("flare-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(PackageNotFoundError):
            table.add_row(name, version(name))
    for device in jax.devices():
        table.add_row(f"device {device.id}", f"{device.device_kind} ({device.platform})")
    console.print(table)
    table = Table("operator, H = 8, D = 8, M = 64", *DTYPES)
    for name in DEFAULT:
        table.add_row(name, *(availability(name, dtype) for dtype in DTYPES))
    table.add_section()
    table.add_row("fused residual MLP, C = 64", *(mlp_availability(d) for d in DTYPES))
    console.print(table)
    console.print("The first that runs is taken, unless implementation= names one.")


def availability(name: str, dtype: str) -> str:
    """ "runs", or the reason why not, for one implementation of the operator."""
    shapes = (64, 8, 8), (1, 1024, 8, 8), (1, 1024, 8, 8)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return why_not(IMPLEMENTATIONS[name].supports, *arrays, None)


def mlp_availability(dtype: str) -> str:
    """The same for the kernels of the residual MLPs."""
    x, kernel, bias = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 1024, 64), dtype), ((64, 64), "float32"), ((64,), "float32"))
    )
    return why_not(mlp.supports, x, [(kernel, bias)])


def why_not(supports, *arguments) -> str:
    try:
        supports(*arguments)
        return "runs"
    except NotImplementedError as reason:
        return str(reason)


def problem_arguments(command: str, argv: list[str], training: bool = False):
    """The problem's name, --preset (and --out, --resume), and the remaining arguments."""
    names = list(PROBLEMS)
    parser = argparse.ArgumentParser(
        f"flare-jax {command}",
        add_help=False,
        allow_abbrev=False,
        usage=f"flare-jax {command} "
        f"{{{','.join(names)}}} [--preset NAME] [options]; --help after the problem lists them",
    )
    parser.add_argument("problem", choices=names)
    if argv[:1] in (["-h"], ["--help"]):
        parser.print_help()
        sys.exit(0)
    problem = parser.parse_args(argv[:1]).problem
    presets = list(PROBLEMS[problem][0].PRESETS)
    parser.add_argument("--preset", choices=presets, default=presets[0])
    if training:
        parser.add_argument("--out", type=Path, help="folder of the run")
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        parser.add_argument("--mesh", help="devices, such as data=2,tokens=4")
        parser.add_argument("--fsdp", action="store_true", help="parameters in parts over data")
        parser.add_argument("--distributed", action="store_true", help="one of several processes")
        parser.add_argument("--coordinator", help="HOST:PORT of process 0")
        parser.add_argument("--num-processes", type=int)
        parser.add_argument("--process-id", type=int)
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(
            f"--preset {{{','.join(presets)}}}  starting values of all options below "
            f"(default: {presets[0]}; shown: {options.preset})"
        )
        if training:
            print(
                "--out FOLDER  of the run (default: a new one under runs/)\n"
                "--resume  go on from the last checkpoint of --out or of the newest run\n"
                "--mesh data=D,tokens=T  samples of a batch over D devices, points of each over T\n"
                "    (default: all devices, as many on data as divide the batch)\n"
                "--fsdp  parameters and optimizer state in parts over data\n"
                "--distributed  one of several processes, started by SLURM, Open MPI or on the\n"
                "    hosts of a TPU pod; elsewhere name them all:\n"
                "--coordinator HOST:PORT --num-processes N --process-id I\n"
            )
    return problem, options, rest


def parse(cls: type, default, prog: str, argv: list[str]):
    """The config `cls` from flags without prefixes, starting from `default`."""
    return tyro.cli(tyro.conf.OmitArgPrefixes[cls], default=default, prog=prog, args=argv)


def runs_of(problem: str, name: str) -> Iterator[Path]:
    """The folders that runs of a problem and preset get, one after the other."""
    base = Path("runs") / f"{problem}-{name}"
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def new_run(problem: str, name: str) -> Path:
    """A new folder under runs/, made at once: a run that starts beside this one gets another."""
    for folder in runs_of(problem, name):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


@contextlib.contextmanager
def made_if_used(folder: Path) -> Iterator[Path]:
    """Takes the folder away again where an error leaves it empty."""
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def newest_run(problem: str, name: str) -> Path:
    """The newest run of this problem and preset that saved a checkpoint; raises ValueError."""
    made = itertools.takewhile(Path.exists, runs_of(problem, name))
    saved = [folder for folder in made if steps_in(folder / CHECKPOINTS)]
    if not saved:
        first = next(runs_of(problem, name))
        raise ValueError(f"there is no run {first} to resume: name one with --out")
    return saved[-1]


def draw_test_samples(path: Path, surrogate: Surrogate, data) -> None:
    """The test samples with the smallest, the median and the largest error."""
    errors = test_errors(surrogate, data)
    order = np.argsort(errors)
    places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    rows = {row: name for name, row in places.items()}  # fewer than three with few samples
    x, fields, truth = zip(*(one_sample(surrogate, data, row) for row in rows), strict=True)
    prediction_figure(
        path,
        x,
        fields,
        truth,
        inputs=data.inputs,
        targets=data.targets,
        shape=data.shape,
        titles=[f"{name}: {errors[row]:.2%}" for row, name in rows.items()],
    )


def report(result: dict, folder: Path, figure: Path) -> None:
    """The summary at the end of a run."""
    table = Table(title=f"{result['problem']}: test rel-L2", show_header=False)
    for name, error in result["rel_l2"].items():
        label = {"best": "best on validation", "last": "last", "ema": "running average"}[name]
        spread = f" +- {error['std']:.5f}" if len(error["seeds"]) > 1 else ""
        table.add_row(label, f"{error['mean']:.5f}{spread}")
    for name, errors in result.items():  # that of a target field, or of the published LPBF table
        if name.startswith("rel_l2 of ") or name == "legacy":
            label = "legacy metric" if name == "legacy" else name.replace("rel_l2", "rel-L2")
            table.add_row(label, f"{errors[result['chosen']]['mean']:.5f}")
    table.add_row("predicting the training mean", f"{result['mean_predictor_rel_l2']:.5f}")
    table.add_row("parameters", f"{result['parameters']:,}")
    if result["milliseconds_per_step"] is not None:
        table.add_row("time per step", f"{result['milliseconds_per_step']:.2f} ms")
    table.add_row("training time", f"{result['seconds']:.0f} s")
    if result["peak_bytes"]:
        table.add_row("peak memory", f"{result['peak_bytes'] / 1e9:.2f} GB")
    console.print(table)
    console.print(f"run: {folder}\nfigure: {figure}")


if __name__ == "__main__":
    sys.exit(main())
