"""The sections of the results page: what each makes of the records that belong to it."""

from collections.abc import Callable

from experiments.markdown import DASH, error, number, picture, source, table


def training(record: dict) -> dict | None:
    """The summary of a training run that the record is or holds."""
    run = record.get("result", record)
    told = isinstance(run, dict) and {"rel_l2", "mean_predictor_rel_l2", "config"} <= run.keys()
    return run if told else None


METHODS = ("softmax attention", "Transolver", "Transolver, convolution", "FLARE")  # published


def surrogates(records: dict, published: dict) -> str:
    """The paper's main table."""
    rows, runs, known = [], {name: training(r) for name, r in records.items()}, published["pde"]
    problems = [*known["rel_l2"], *(r["problem"] for r in runs.values())]
    for problem in dict.fromkeys(problems):
        values = known["rel_l2"].get(problem, {})
        theirs = [error(values.get(method)) for method in METHODS]
        ours = {name: r for name, r in runs.items() if r["problem"] == problem} or {"": None}
        for name, run in ours.items():
            if run and "legacy" in run:  # what is published is no rel-L2
                rows.append([problem, *[DASH] * len(METHODS), *run_cells(name, run)])
                rows.append([f"{problem}, legacy", *theirs, *run_cells(name, run, "legacy")])
            else:
                rows.append([problem, *theirs, *run_cells(name, run)])
    head = ["test rel-L2 × 10³", *METHODS, "ours: last", "best on validation"]
    head += ["mean predictor", "parameters", "C, B, M, H", "record"]
    lines = [
        f"- {source(name, records[name] | runs[name] | records[name]).strip()}" for name in runs
    ]
    text = f"""\
The first four columns are published, the others ours. Published: {known["source"]}

The mean predictor gives every sample the mean of the training samples, point by point. Parts of
lpbf have points of their own, so there it is one number, the mean displacement at all points of the
training parts.

"""
    text += table(head, rows) + "\n" + "\n".join(lines) + ("\n" if lines else "")
    pictures = [picture(f"{name}_{what}") for name in runs for what in ("samples", "prediction")]
    return text + "".join(pictures)


def run_cells(name: str, run: dict | None, metric: str = "rel_l2") -> list[str]:
    if run is None:
        return [DASH] * 6
    errors = [run[metric].get(which) for which in ("last", "best")]
    cells = [DASH if e is None else error(e["mean"], e["std"]) for e in errors]
    model = run["config"]["model"]
    heads = model["num_heads"] or model["channel_dim"] // 8
    sizes = model["channel_dim"], model["num_blocks"], model["num_latents"], heads
    mean = error(run.get(f"mean_predictor_{metric}"))
    return [*cells, mean, f"{run['parameters']:,}", ", ".join(map(str, sizes)), name]


def runs_in_time(records: dict, published: dict) -> str:
    """Training runs with their validations: how far they came and how long it took."""
    rows, lines = [], []
    for name, r in records.items():
        lines.append(f"- {source(name, r).strip()}")
        if g := r.get("generation"):
            lines[-1] += f"; {g['samples']:,} samples on a grid of {g['grid']} took "
            lines[-1] += f"{g['seconds']:.3g} s, {g['first']:.3g} s with compilation"
        if "history" not in r:
            continue
        h = r["history"]
        epochs, seconds = ([0.0, *h[key]] for key in ("epoch", "seconds"))
        pace = (seconds[-1] - seconds[1]) / (epochs[-1] - epochs[1]) if len(epochs) > 2 else None
        reach = r.get("seconds_to_reach", {}).get("valid_ema", {})
        rows.append([name, f"{len(r['seeds'])}", f"{r['epochs_done']:g} of {r['epochs']}"])
        rows[-1] += [number(pace), number(seconds[-1], ".0f")]
        rows[-1] += [number(reach.get(goal), ".0f") for goal in ("0.01", "0.005", "0.0034")]
        rows[-1] += [error(sum(h[k][-1]) / len(h[k][-1])) for k in ("valid", "valid_ema")]
    head = ["", "seeds", "epochs", "s an epoch", "s of steps"]
    head += [f"s to {goal}" for goal in ("1 %", "0.5 %", "0.34 %")]
    head += ["validation rel-L2 × 10³", "running average"]
    text = "Seconds to an error: until the running average's validation error is at or below it."
    text += "\n\n" + table(head, rows) + "\n" + "\n".join(lines) + "\n"
    curves = ("error_epochs", "error_time")
    return text + "".join(picture(f"{name}_{what}") for name in records for what in curves)


def parts(records: dict, published: dict) -> str:
    """Generated parts of powder bed fusion beside the published set."""
    text = ""
    for name, r in records.items():
        keys = ("mean", "std", "min", "median", "max")
        rows = [
            [f"{row['quantity']}, {who}", *(number(row[who].get(key)) for key in keys)]
            for row in r["rows"]
            for who in ("published", "ours")
        ]
        why = ", ".join(f"{n} {reason}" for reason, n in r["rejected"].items())
        text += table([r["size"], *keys], rows)
        text += f"\n{r['parts']} of {r['asked']} parts"
        if "parts_per_second" in r:
            text += f", {r['parts_per_second']:.2f} a second"
            text += (
                f", {r['parts_per_second_last_half']:.2f} in the last half, which compiles little"
            )
        text += f"; rejected: {why}.\n"
        text += source(name, r) + picture(name)
    return text


def sizes(records: dict, published: dict) -> str:
    """What meshes of different sizes cost in training."""
    rows = []
    for name, r in records.items():
        cost, epochs = r["cost_of_sizes"], r.get("epochs")
        rows.append([name, f"{len(r['seeds'])}"])
        rows[-1] += [f"{r['epochs_done']:.3g} of {epochs}" if epochs else DASH]
        rows[-1] += [number(r.get("seconds_per_epoch")), f"{cost['padding']:.1%}"]
        rows[-1] += [number(cost["points_per_second"], ".2f", 1e-6)]
        rows[-1] += [number(cost.get("ratio"), ".3f")]
        for key in ("valid", "valid_ema"):
            errors = r["rows"][-1].get(key)
            rows[-1].append(error(sum(errors) / len(errors)) if errors else DASH)
        rows[-1].append(error(r.get("mean_predictor_rel_l2")))
    head = ["", "seeds", "epochs", "s an epoch", "padding", "million real points/s", "ratio"]
    head += ["validation rel-L2 × 10³", "running average", "mean predictor"]
    text = (
        "Of one seed. Padding: the points that it adds, over the real ones. Ratio: to training on "
        "meshes that all have the mean size. Mean predictor: one number, the mean displacement.\n\n"
    )
    lines = "".join(source(name, r) + picture(name) for name, r in records.items())
    return text + table(head, rows) + lines


def many_devices(records: dict, published: dict) -> str:
    text = ""
    for name, r in records.items():
        head = ["step", "remat", "scan", "devices", "ms", "GB a device", "bytes a point"]
        rows = [
            [f"C={x['C']} M={x['M']} N={x['N']:,}", *(str(x[k]) for k in ("remat", "scan"))]
            + [str(x["devices"]), number(x.get("ms")), number(x.get("bytes"), ".3g", 1e-9)]
            + [number(x.get("bytes_per_point"))]
            for x in r["rows"]
        ]
        text += table(head, rows) + "\n"
        rows = [
            [f"{x['kind']}, C={x['C']}, N={x['N on one']:,} on one", f"{x['devices']}"]
            + [number(x["time"]), number(x["memory"])]
            for x in r["scaling"]
        ]
        text += table(["efficiency", "devices", "time", "memory"], rows) + source(name, r)
    return text


def ablations(records: dict, published: dict) -> str:
    text = ""
    for name, record in records.items():
        text += f"Published after 500 epochs, ours after {record['epochs']}: compare their order, "
        text += "not their values.\n\n"
        rows = [
            [r["case"], error(r["published_rel_l2"])]
            + [error(r["rel_l2"]["last"]["mean"], r["rel_l2"]["last"]["std"])]
            + [f"{r['parameters']:,}"]
            for r in record["rows"]
        ]
        head = ["test rel-L2 × 10³, last parameters", "published", "ours", "parameters"]
        text += table(head, rows) + source(name, record)
    return text


def steps_and_cells(records: dict, published: dict) -> str:
    """What elasticity learns in fewer steps, from more cells, in less precision."""
    size = lambda r: (r["result"]["steps"], r["result"]["config"]["problem"]["num_train"])
    rows = []
    for r in sorted(records.values(), key=size):
        last, valid = r["result"]["rel_l2"]["last"], r["history"]["valid"][-1]
        loss = r["history"].get("loss", [None])[-1]
        rows.append([*(f"{n:,}" for n in size(r)), number(r["epochs_done"]), r["precision"]])
        rows[-1].append(f"{len(r['seeds'])}")
        rows[-1] += [error(last["mean"], last["std"]), error(sum(valid) / len(valid)), error(loss)]
    head = ["steps", "training cells", "epochs", "precision", "seeds"]
    head += ["test rel-L2 × 10³, last parameters", "validation", "training"]
    text = "The paper's recipe, with its schedule over as many steps. Training: the mean loss "
    text += "of the last steps, those of one call.\n\n"
    lines = "".join(f"- {source(name, r).strip()}\n" for name, r in records.items())
    return text + table(head, rows) + "\n" + lines


def elasticity_errors(records: dict, published: dict) -> str:
    """Errors of cells by how far they are from training cells."""
    text = "Quarters of the cells, from the nearest to a training cell to the farthest; rank "
    text += (
        "correlation (Spearman) of the error with that distance, and with the distance from the "
    )
    text += "mean shape; correlation of the errors of two seeds. Training: the first `--train` of "
    text += "the training cells only, 200 unless the command says otherwise.\n"
    for name, r in records.items():
        rows = [
            [row["split"], error(row["mean"]), *map(error, row["quarters_by_distance"])]
            + [number(row[f"spearman_{to}"], ".2f") for to in ("distance", "radius")]
            + [number(row["correlation_of_seeds"], ".2f")]
            for row in r["rows"]
        ]
        head = ["rel-L2 × 10³", "mean", "nearest", "second", "third", "farthest"]
        head += ["distance", "radius", "seeds"]
        text += "\n" + table(head, rows) + source(name, r) + picture(name)
    return text


def darcy_16(records: dict, published: dict) -> str:
    ((name, record),) = records.items()
    rows = []
    for model in ("FLARE", "FNO"):
        r = record[model]
        e = r["test_rel_l2"]
        rows.append([model, error(e["mean"], e["standard_error"]), error(r["valid_rel_l2"])])
        rows[-1] += [f"{r['parameters']:,}", number(r["seconds"], ".0f")]
    rows.append(["mean predictor", error(record["mean_predictor_rel_l2"]), *[DASH] * 3])
    gap = record["FLARE_minus_FNO"]
    rows.append(["FLARE − FNO", error(gap["mean"], gap["standard_error"]), *[DASH] * 3])
    head = ["", "test rel-L2 × 10³ ± standard error", "validation", "parameters", "s a run"]
    return table(head, rows) + source(name, record)


def scaling(records: dict, published: dict) -> str:
    text, known = "", published["scaling"]
    tokens = known["tokens"]
    for name, record in records.items():
        for key, title, form, factor in (
            ("ms", "ms, forward and backward", ".3g", 1.0),
            ("peak_bytes", "peak memory, GB", ".3g", 1e-9),
        ):
            ours: dict = {}
            for r in record["rows"]:
                label = f"{r['implementation']}, M={r['M']}" if r.get("M") else r["implementation"]
                ours.setdefault(label, {})[r["N"]] = r.get(key)
            columns = sorted({n for values in ours.values() for n in values})
            rows = [
                [k, *(number(v.get(n), form, factor) for n in columns)] for k, v in ours.items()
            ]
            text += table([title, *(f"N={n:,}" for n in columns)], rows) + "\n"
        text += source(name, record) + picture(name) + "\n"
    for key, title in (("ms", "published: ms"), ("gigabytes", "published: GB")):
        rows = [[k, *map(number, values)] for k, values in known[key].items()]
        text += table([title, *(f"N={n:,}" for n in tokens)], rows) + "\n"
    return text + f"Published: {known['source']}.\n"


def benchmark(records: dict, published: dict) -> str:
    text = ""
    for name, record in records.items():
        rows = []
        for r in record["rows"]:
            words = [r["problem"]] if "problem" in r else []
            words += [f"{k}={r[k]}" for k in ("C", "M", "H", "N", "B") if k in r]
            words += [f"seeds={r['seeds']}"] if r.get("seeds", 1) > 1 else []
            size = " ".join(words)
            e = max(r["error"].values()) if "error" in r else None
            rows.append([r["part"], f"{size} {r.get('dtype', '')}", r["implementation"]])
            rows[-1] += [number(e, ".1e"), number(r.get("forward_ms")), number(r.get("ms"))]
            rows[-1] += [number(r.get("peak_bytes"), ".3g", 1e-9)]
            rows[-1] += [number(r.get("share_of_bytes_per_s"), ".0%")]
            rows[-1] += [number(r.get("share_of_exps_per_s"), ".0%")]
        head = ["part", "case", "implementation", "worst error", "forward ms", "ms", "peak GB"]
        text += table([*head, "of copy", "of exp"], rows) + source(name, record) + "\n"
    return text


def spectra(records: dict, published: dict) -> str:
    text, known = "", published["spectra"]
    limits = [*known["blocks"]["1"]]
    rows = [
        [f"published, block {b}", DASH, DASH, DASH] + [number(v[t]) for t in limits]
        for b, v in known["blocks"].items()
    ]
    for name, record in records.items():
        if "summary" in record:
            rows += [
                [f"{name}, block {b['block']}", *summary_cells(b, limits)]
                for b in record["summary"]
            ]
    head = ["medians over heads", "effective rank", "λ₂", "averaging heads"]
    text += table(head + [f"λ > {t}" for t in limits], rows)
    text += f"\nPublished: {known['source']}.\n"
    for name, record in records.items():
        if "summary" not in record:
            text += "\n" + sweeps(record) + source(name, record)
        text += picture(name)
    return text


def summary_cells(block: dict, limits: list[str]) -> list[str]:
    cells = [number(block["effective_rank"]), number(block["second_eigenvalue"], ".2g")]
    cells.append(number(block["averaging_heads"], ".0%"))
    return cells + [number(block["eigenvalues_above"][t]) for t in limits]


def sweeps(record: dict) -> str:
    """How spectra move: means over seeds, one row a value of each sweep."""
    groups: dict = {}
    for row in record["rows"]:
        groups.setdefault((row["sweep"], row["value"]), []).append(row)
    rows = []
    for (sweep, value), same in groups.items():
        mean = lambda f, same=same: sum(map(f, same)) / len(same)
        cells = [f"{sweep} {value:g}", error(mean(lambda r: r["test_rel_l2"]))]
        for key, form in (
            ("effective_rank", ".1f"),
            ("second_eigenvalue", ".2g"),
            ("averaging_heads", ".0%"),
        ):
            blocks = range(len(same[0]["blocks"]))
            values = [mean(lambda r, b=b, key=key: r["blocks"][b][key]) for b in blocks]
            cells.append(", ".join(format(v, form) for v in values))
        rows.append(cells)
    base = ", ".join(f"{k} {v}" for k, v in record["base"].items())
    head = ["Darcy flow, per block", "test rel-L2 × 10³", "effective rank", "λ₂", "averaging heads"]
    return f"Base model: {base}. Means over seeds.\n\n" + table(head, rows)


def conditioning(records: dict, published: dict) -> str:
    text = (
        "Relative L2 errors against float64 of y / of the worst of dq, dk, dv, and the condition "
        "numbers of both; the cases and words are explained in "
        "[conditioning.py](conditioning.py), the limits in "
        "[how it works](../docs/how_it_works.md). `naive` is softmax without a maximum. TF32 is "
        "float32 under jax's `tensorfloat32`, in which `fused` takes three bfloat16 products.\n"
    )
    for name, record in records.items():
        columns = list(
            dict.fromkeys(
                (r["implementation"], r["precision"])
                for row in record["rows"]
                for r in row["results"]
                if "error" in r
            )
        )
        rows = []
        for row in record["rows"]:
            found = {(r["implementation"], r["precision"]): r.get("error") for r in row["results"]}
            pairs = [row["condition"], *(found.get(c) for c in columns)]
            rows.append([f"{row['sweep']}: {row['name']}", *map(pair, pairs)])
        told = {"tf32": "TF32"}  # what training calls tf32 is something else
        head = ["case", "condition", *(f"{i} {told.get(p, p)}" for i, p in columns)]
        text += "\n" + table(head, rows) + source(name, record) + picture(name)
    return text


def pair(values: dict | None) -> str:
    """y / the worst gradient; NaN where either is not finite."""
    if values is None:
        return DASH
    gradients = [values[n] for n in ("dq", "dk", "dv")]
    worst = max(gradients, key=lambda x: (x != x, x))  # NaN is the worst
    return f"{values['y']:.0e} / {worst:.0e}"


Belongs = Callable[[str, dict], bool]
named = lambda prefix: lambda name, record: name.startswith(prefix)
of_cells = lambda name, _: name.startswith("elasticity_") and name.split("_")[1].isdecimal()
SECTIONS: list[tuple[str, Belongs, Callable[[dict, dict], str]]] = [
    ("Surrogates", lambda n, r: training(r) is not None and not of_cells(n, r), surrogates),
    (
        "Training, in time",
        lambda n, r: bool({"history", "generation"} & r.keys()) and not of_cells(n, r),
        runs_in_time,
    ),
    ("Ablations on elasticity", named("ablations"), ablations),
    (
        "Elasticity: steps, cells and precision",
        lambda n, r: of_cells(n, r) or n == "elasticity",
        steps_and_cells,
    ),
    ("Which cells of elasticity are hard", named("elasticity_errors"), elasticity_errors),
    ("Generated parts of powder bed fusion", named("lpbf_parts"), parts),
    ("Meshes of different sizes", lambda n, r: "cost_of_sizes" in r, sizes),
    ("Beside a Fourier neural operator, 16 × 16 nodes", named("darcy_16"), darcy_16),
    (
        "Time and memory of one layer",
        lambda n, r: n.split("_")[0] == "scaling" and "devices" not in n,
        scaling,
    ),
    ("One device and many", named("scaling_devices"), many_devices),
    ("Benchmark", named("benchmark"), benchmark),
    ("Spectra of the mixing matrices", named("spectrum"), spectra),
    ("Conditioning and errors", named("conditioning"), conditioning),
]
ALWAYS = ("Surrogates", "Time and memory of one layer")
