import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import assert_refused, error_of

from eigensam_jax import tree_math
from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.after_training import changes, sharpness, tables
from eigensam_jax.experiments.after_training import run as after_training
from eigensam_jax.experiments.registry import BASE_OPTIMIZERS, METHODS
from eigensam_jax.experiments.training import loop

SMALL = ["after-training", "--smoke", "--epochs", "2"]
pytestmark = pytest.mark.usefixtures("quick")


def weights(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"kernel": (3, 3, 4, 5), "matrix": (40, 6), "bias": (6,)}
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quantized_to_the_nearest_level_of_each_channel(bits, seed):
    params = weights(seed)
    params["matrix"] = params["matrix"].at[:, 2].set(0.0)  # an output without weights
    rounded = changes.quantized(params, bits)
    np.testing.assert_array_equal(rounded["bias"], params["bias"])
    for name in ("kernel", "matrix"):
        before = np.asarray(params[name]).reshape(-1, params[name].shape[-1]).T
        after = np.asarray(rounded[name]).reshape(before.shape[::-1]).T
        for w, found in zip(before, after, strict=True):
            step = abs(w).max() / (2 ** (bits - 1) - 1)
            levels = step * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
            nearest = levels[abs(w[:, None] - levels).argmin(1)]
            np.testing.assert_allclose(found, nearest, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_pruned_are_the_smallest_of_all_weights(share):
    params = weights(0)
    pruned = changes.pruned(params, share)
    np.testing.assert_array_equal(pruned["bias"], params["bias"])
    both = [np.concatenate([x["kernel"].ravel(), x["matrix"].ravel()])
            for x in (params, pruned)]  # fmt: skip
    gone = both[1] == 0
    assert gone.sum() == round(share * gone.size)
    assert abs(both[0][gone]).max() < abs(both[0][~gone]).min()
    np.testing.assert_array_equal(both[0][~gone], both[1][~gone])


def test_noise_has_the_length_that_is_asked_for_on_average():
    params = weights(0)
    lengths = [
        tree_math.norm(
            tree_math.add_scaled(params, -1, changes.noisy(params, key, 3.0))
        )
        for key in jax.random.split(jax.random.key(1), 64)
    ]
    error = 3 * 9 * np.sqrt(2 / 426 / 64)  # three standard errors, of 426 entries
    assert abs(np.mean(np.square(lengths)) - 9) < error


def test_the_worst_case_is_along_the_top_eigenvector():
    value_fn = lambda p: 0.5 * (3 * p["a"] ** 2 + jnp.sum(p["b"] ** 2))
    params = {"a": jnp.zeros(()), "b": jnp.zeros(2)}
    (moved,) = changes.changes(value_fn, 0)["worst_case"](params, 0.2)
    np.testing.assert_allclose(abs(moved["a"]), 0.2, rtol=1e-3)
    np.testing.assert_allclose(moved["b"], 0, atol=0.01)


MEASURED = sharpness.measured  # which `finished` replaces


def test_the_measures_of_a_quadratic():
    curvatures = {"a": jnp.arange(1.0, 5)[:, None], "b": jnp.array([[6.0, 2.0]])}
    square = lambda w, c: jnp.sum(c * w["kernel"] ** 2) / 2
    value_fn = lambda p: sum(square(p[k], c) for k, c in curvatures.items())
    params = {k: {"kernel": jnp.full(c.shape, 0.5)} for k, c in curvatures.items()}
    found = MEASURED(value_fn, params)
    assert {*found, "train_loss"} == set(sharpness.MEASURES)
    slope = np.sqrt(sum(np.square(0.5 * c).sum() for c in curvatures.values()))
    bound = lambda rho: rho * slope + 0.5 * rho**2 * 6
    for name, expected, rtol in (
        ("lambda_max", 6, 1e-3),
        ("trace", 18, 1e-3),
        ("relative", 4 * 1 + 6 * 0.5, 1e-3),
        ("weight_norm", np.sqrt(1.5), 1e-6),
        ("grad_norm", slope, 1e-6),
        ("average_case", sharpness.AVERAGE_RHO**2 * 18 / 6 / 2, 0.3),
    ):
        np.testing.assert_allclose(found[name], expected, rtol=rtol, err_msg=name)
    rho = sharpness.RHO
    assert rho * slope < found["sam_sharpness"] <= found["worst_case"] < bound(rho)
    # T = |w| + η is 0.51 for all: a ball of so many times the radius.
    assert found["scaled_worst_case"] < bound(0.51 * sharpness.SCALED_RHO)
    assert found["scaled_worst_case"] > 0.51 * sharpness.SCALED_RHO * slope


def test_layers_are_measured_where_the_report_leaves_them_out():
    value_fn = lambda p: sum(jnp.sum(layer["kernel"] ** 2) for layer in p.values())
    params = {f"layer_{i}": {"kernel": jnp.full((2, 1), 0.5)} for i in range(25)}
    found = MEASURED(value_fn, params)
    np.testing.assert_allclose(found["relative"], 25 * 2 * 0.5, rtol=1e-3)


@pytest.fixture(scope="module")
def _measures_are_cheap():
    """The norm of the weights in place of all of them, which have their own test."""
    norm = lambda _, params: float(tree_math.norm(params))
    made = [name for name in sharpness.MEASURES if name != "train_loss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpness, "measured", lambda *x: dict.fromkeys(made, norm(*x)))
        yield


@pytest.fixture(scope="module")
def finished(quick, _measures_are_cheap, tmp_path_factory):
    """A network of each kind, and other data afterwards."""
    out = tmp_path_factory.mktemp("after")
    asked = ["--next-dataset", "digits"]
    assert cli.main([*SMALL, *asked, "--out", str(out)]) == 0
    return out, asked, json.loads((out / "results.json").read_text())


def test_every_network_is_measured_and_changed(finished):
    _, _, document = finished
    runs = document["runs"]
    assert document["complete"] is True
    assert len(runs) == 4
    for run in runs:
        assert {*sharpness.MEASURES} <= set(run)
        for kind, (_, sizes) in changes.SIZES.items():
            assert len(run["after"][f"{kind}_accuracy"]) == len(sizes)
            assert len(run["after"][f"{kind}_loss"]) == len(sizes)
        np.testing.assert_allclose(
            run["after"]["quantized_loss"][0], run["test_loss"], rtol=0.1
        )
        assert run["after"]["worst_case_loss"][0] < run["after"]["worst_case_loss"][-1]
        if run["optimizer"] == "sam_matched":
            key = {x: run[x] for x in ("seed", "tuned")}
            (other,) = (
                x
                for x in runs
                if {**key, "optimizer": "eigen_sam"}.items() <= x.items()
            )
            assert run["rho"] == other["radius"]
    plain = [run for run in runs if run["optimizer"] == "sgd"]
    assert [run["averaged"] for run in plain] == [False, True]
    first, *_ = tables.methods(runs)
    assert first[0] == "SGD"  # against which the others are held
    assert plain[0]["trace"] != plain[1]["trace"]  # the norm of the weights here


def test_what_is_there_is_kept(finished, tmp_path, monkeypatch, capsys):
    _, asked, document = finished
    kept = [run for run in document["runs"] if run["optimizer"] == "eigen_sam"]
    half = {**document, "runs": kept, "complete": False}
    half["wall_time_s"] = 1e4  # which it goes on from
    (tmp_path / "results.json").write_text(json.dumps(half))
    make_run, started = loop.make_run, []

    def counted(*args):
        run = make_run(*args)

        def call(setup, seed, **options):
            if "begin" not in options:
                started.append(setup.optimizer)
            return run(setup, seed, **options)

        return call

    monkeypatch.setattr(loop, "make_run", counted)
    assert cli.main([*SMALL, *asked, "--out", str(tmp_path)]) == 0
    assert started == ["sgd", "sam_matched"]  # one training for SGD's two networks
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["wall_time_s"] > 1e4
    again = results["runs"]
    same = lambda run: (run["optimizer"], run["averaged"])
    pairs = (sorted(runs, key=same) for runs in (again, document["runs"]))
    for run, other in zip(*pairs, strict=True):
        assert {**run, "training_time_s": 0} == {**other, "training_time_s": 0}
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = [" ".join(line.split()) for line in lines]
    for row in tables.methods(again) + tables.after(again, "quantized"):
        assert " ".join(row) in printed


def test_a_run_that_diverges_ends_with_what_to_do(tmp_path, capsys):
    assert cli.main([*SMALL, "--learning-rates", "1e38", "--out", str(tmp_path)]) == 2
    assert "lower the learning rate (now 1e+38)" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("base", BASE_OPTIMIZERS)
def test_rates_are_those_of_the_base_optimizer(base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        after_training, "run", lambda chosen, command: asked.append(chosen)
    )
    assert cli.main(["after-training", "--base-optimizer", base]) == 0
    assert sorted(asked[0].learning_rates) == sorted(
        BASE_OPTIMIZERS[base].learning_rates
    )


def test_other_data_afterwards_are_not_mixed_in(finished, monkeypatch, capsys):
    out, asked, _ = finished
    digits = registry.dataset("digits")
    others = digits._replace(train_labels=digits.train_labels[::-1])
    found = iter([digits, others])
    monkeypatch.setattr(registry, "dataset", lambda *_: next(found))
    assert "(next_crc32 " in error_of([*SMALL, *asked, "--out", str(out)], capsys)


def test_networks_at_another_rate_are_not_mixed_in(finished, capsys):
    out, asked, _ = finished
    rates = ["--learning-rates", "0.1", "0.05", "0.05"]
    error = error_of([*SMALL, *asked, *rates, "--out", str(out)], capsys)
    assert "(learning_rate 0.05, now 0.1); name another folder" in error


def made(optimizer, tuned, seed, held, **more):
    """A record with what tables need."""
    plain = {"longer": 1, "averaged": False, "gradients": 1.0, "radius": tuned}
    figures = {"test_accuracy": held, "train_loss": 0.1, "lambda_max": 1.0}
    of_sizes = {
        f"{k}_accuracy": [held - 0.1 * i for i in range(4)] for k in changes.SIZES
    }
    after = {"after": of_sizes}
    own = {"optimizer": optimizer, "tuned": tuned, "seed": seed, "held_accuracy": held}
    return {**plain, **figures, **after, **own, **more}


def test_each_method_is_shown_at_what_was_best_on_what_is_held_out():
    runs = [
        made("sgd", rate, seed, 0.8 - rate + 0.01 * seed)
        for seed in (0, 1)
        for rate in (0.1, 0.2)
    ]
    runs += [
        made(name, rho, seed, 0.8 + sign * rho + 0.02 * seed)
        for seed in (0, 1)
        for rho in (0.05, 0.1)
        for name, sign in (("eigen_sam", 1), ("sam_matched", -1))
    ]
    rows = {row[0]: row[1:] for row in tables.methods(runs)}
    assert rows["SGD"][1] == "0.1"
    sam, ours = (METHODS[x].label for x in ("sam_matched", "eigen_sam"))
    assert rows[ours][1] == "0.1"
    assert rows[sam][1] == "0.1"  # as its method, though 0.05 is better
    after = {row[0]: row[1:] for row in tables.after(runs, "pruned")}
    assert [x.split()[0] for x in after["SGD"]] == ["70.5", "60.5", "50.5", "40.5"]
    less = {row[0]: row[1:] for row in tables.differences(runs, "noise")}
    assert less[f"{ours} − {sam}"] == ["+20.00 ± 0.00"] * 4
    assert less[f"{ours} − SGD"][0].startswith("+20.50 ± 6.")


def test_ranks_are_kendalls_tau_within_each_seed():
    """A measure that orders the networks of each seed, at levels of their own."""
    runs = [
        made("sgd", rate, seed, 0.5, test_loss=x + 7 * seed, train_loss=5.0 * seed)
        | {
            name: 100.0 * seed + y
            for name in sharpness.MEASURES
            if name != "train_loss"
        }
        | {"after": {"quantized_loss": [0, 0, 3 * x + 7 * seed, 0]}}
        for seed in (0, 1)
        for rate, x, y in ((0.1, 1, 1), (0.2, 2, 3), (0.3, 3, 2), (0.4, 4, 4))
    ]
    rows = {row[0]: row[1:] for row in tables.ranks(runs, ["gap", "quantized:3"])}
    assert rows["λ_max"] == ["+0.67 ± 0.00"] * 2  # five pairs of six in order


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--next-dataset mnist", "--next-dataset mnist", "--next-dir"),
        ("--dataset digits --next-dataset fashion_mnist", "--next-dataset", "digits"),
        ("--next-dir .", "--next-dir .", "name --next-dataset"),
        ("--out pyproject.toml", "pyproject.toml", "another folder"),
        ("--optimizers sam sam_matched", "sam_matched", "name eigen_sam too"),
        ("--label-noise 1.5", "--label-noise 1.5", "at most 1"),
    ],
)
def test_what_cannot_be_run_is_refused(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    assert_refused(
        "after-training", options, wrong, right, capsys, monkeypatch, tmp_path
    )
