"""The experiments' own mathematics, and that they run and write what the results page reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from experiments import conditioning, report, report_sections, scaling, spectrum


def written(path, section):
    """The record a command wrote, and the page's section made of it."""
    record = json.loads(path.read_text())
    assert record["device"] and record["date"] and record["command"].startswith("python -m")
    assert path.with_suffix(".png").exists()
    return record, section({path.stem: record}, report.published())


# ------------------------------------------------------------------------ scaling ---


@pytest.fixture(scope="module")
def layers():
    return {layer.name: layer for layer in scaling.layers([4], 16, 2, "float32")}


def test_layers_treat_points_as_a_set(layers):
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    order = np.random.default_rng(0).permutation(12)
    for name in ("softmax attention", "physics attention", "FLARE, xla"):
        f = jax.jit(layers[name].apply)
        y = f(layers[name].params, x)
        assert relative(f(layers[name].params, x[:, order]), y[:, order]) <= 1e-5, name


def test_physics_attention_is_transolvers_equation(layers):
    p = jax.tree.map(np.asarray, layers["physics attention"].params)
    x = np.random.default_rng(1).standard_normal((1, 12, 16)).astype(np.float32)
    softmax = lambda s: np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    y = np.zeros((12, 16))
    for part in (slice(0, 8), slice(8, 16)):
        project = lambda n, part=part: x[0] @ p[n]["kernel"][:, part] + p[n]["bias"][part]
        w = softmax(2 * (project("x") @ p["slices"]["kernel"] + p["slices"]["bias"]))  # [N, M]
        s = w.T @ project("f") / (w.sum(0)[:, None] + 1e-5)
        q, k, v = (s @ p[n]["kernel"] for n in "qkv")
        y[:, part] = w @ softmax(q @ k.T / np.sqrt(8)) @ v
    want = y @ p["out"]["kernel"] + p["out"]["bias"]
    got = scaling.physics_attention(p, jnp.asarray(x), 2)[0]
    assert relative(got, want) <= 1e-5


def test_scaling_writes_its_record_and_skips_what_takes_too_long(tmp_path, monkeypatch, layers):
    some = [layers[name] for name in ("softmax attention", "physics attention")]
    monkeypatch.setattr(scaling, "layers", lambda *_: some)
    out = tmp_path / "scaling.json"
    sizes = ["8", "16", "9000000"]
    scaling.main(["--smoke", "--dtype", "float32", "--out", str(out), "--tokens", *sizes])
    record, page = written(out, report_sections.scaling)
    by_size = {(r["implementation"], r["N"]): r for r in record["rows"]}
    for name in ("softmax attention", "physics attention"):
        assert max(by_size[name, 8]["error"].values()) <= 1e-5
        assert by_size[name, 16]["ms"] > 0 and by_size[name, 16]["peak_bytes"] > 16 * 16 * 4
        assert "a call" in by_size[name, 9_000_000]["skipped"]
    assert "physics attention, M=4" in page and "N=9,000,000" in page


def test_a_wrong_layer_is_not_timed(layers):
    layer = layers["FLARE, xla"]
    wrong = scaling.Layer("wrong", 4, lambda p, x: 2 * x, layer.params, reference=layer.apply)
    first, second = scaling.rows_of(wrong, [8, 16], 16, 2, "float32", 1.0, {})
    assert "wrong" in first.measure()["skipped"]
    assert second.measure() == {"skipped": "wrong at N=8"}


# ------------------------------------------------------------------- conditioning ---


def test_naive_softmax_breaks_where_ours_does_not(tmp_path, monkeypatch):
    kinds = ("offset", "masked")
    few = [conditioning.Case("inputs", kind, n=24, m=4, d=4, kind=kind) for kind in kinds]
    monkeypatch.setattr(conditioning, "cases", lambda *_: few)
    precisions = {"float32": conditioning.PRECISIONS["float32"]}
    monkeypatch.setattr(conditioning, "PRECISIONS", precisions)
    out = tmp_path / "conditioning.json"
    conditioning.main(["--out", str(out)])
    record, page = written(out, report_sections.conditioning)
    for row in record["rows"]:
        found = {r["implementation"]: r for r in row["results"]}
        for name, error in found["xla"]["error"].items():
            assert error <= 8 * 2.0**-24 * (1 + row["condition"][name]), (row["name"], name)
        assert np.isnan(found["naive"]["error"]["y"]) == (row["kind"] == "offset")
    assert "| inputs: offset |" in page and "nan / nan" in page


def test_condition_number_of_a_known_case():
    case = conditioning.Case("inputs", "equal", n=16, m=4, d=4, kind="equal")
    arrays = conditioning.rounded(case.arrays(), "float32")
    found = conditioning.condition(case, arrays)
    assert found["dk"] == 0  # q is zero, whatever moves
    assert 0.5 < found["y"] < 4 and 0.5 < found["dv"] < 4  # means, of v and of dy: near 1


# ----------------------------------------------------------------------- spectrum ---


def test_spectrum_experiment_writes_its_record(tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(spectrum, "MOMENTS", (0, 1))
    out = tmp_path / "spectrum.json"
    spectrum.main(["--smoke", "--out", str(out)])
    record, page = written(out, report_sections.spectra)
    for row in record["rows"]:
        block = row["blocks"][0]
        assert block["median_eigenvalues"][0] == pytest.approx(1, abs=1e-12)
        assert 1 <= block["effective_rank"] <= len(block["median_eigenvalues"])
    base, same = (r for r in record["rows"] if (r["sweep"], r["N"]) == ("training", 81))
    assert base["blocks"] != same["blocks"]  # one step moved them
    assert "latents M 2" in page
