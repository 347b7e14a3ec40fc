import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import assert_refused, error_of

from eigensam_jax import hessian, perturbation, sde, tree_math
from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.sde import checks as sde_checks
from eigensam_jax.experiments.sde import paths as sde_paths
from eigensam_jax.experiments.sde import problem as sde_problem
from eigensam_jax.experiments.sde import tables as sde_tables

SMALL = "sde --smoke --rho 0.02 0.05"
METHODS = ("sam", "sam_again", "order_2", "order_3", *sde_paths.WITHOUT_NOISE)


KEPT = ("train_loss", "parameter_norm", "gradient_norm", "lambda_max")
LOOK = (*KEPT, "lambda_max_residual")
RATES = {f"rate_{x}" for x in sde.SharpnessRates._fields}
RATES -= {"rate_eigenvalue", "rate_residual"}
JOB = ("optimizer", "rho", "alpha", "seed")


def made_up_run(problem, stops, eta, measured_rho):
    """`sde_paths.make_run` without the work: figures that tell jobs apart."""
    del problem, eta

    def run(job):
        name, rho, _, seed = job_of(job)
        number = 1 + sum(map(ord, name)) % 97 / 97 + rho + seed / 10
        for step in (0, stops[-1]):
            look = {key: number + (i + step) / 10 for i, key in enumerate(LOOK)}
            if name in ("sam", "eigen_sam") and rho == measured_rho:
                look |= {key: number + i / 10 for i, key in enumerate(sorted(RATES))}
            yield {"step": step, **look}

    return run


def made_up_check(problem, alpha):
    del problem, alpha
    return errors("sam", 1, (1, 2, 3)) + errors("eigen_sam", 1, (1.5, 2, 3))


def errors(optimizer, steps, powers):
    """Those of orders 1, 2 and 3, as powers of ρ."""
    return [
        {
            **{"optimizer": optimizer, "steps": steps, "rho": rho},
            **{"order": order, "error": 7 * rho**power},
        }
        for rho in (0.1, 0.2, 0.4)
        for order, power in enumerate(powers, 1)
    ]


def job_of(run):
    return tuple(run[key] for key in JOB)


@pytest.fixture
def without_work(monkeypatch):
    monkeypatch.setattr(sde_paths, "make_run", made_up_run)
    monkeypatch.setattr(sde_checks, "one_step", made_up_check)


def saved(out):
    return json.loads((out / "results.json").read_text())


def split(results):
    """The records of paths, and those of checks."""
    runs = results["runs"]
    return [x for x in runs if "check" not in x], [x for x in runs if "check" in x]


@pytest.mark.slow
def test_the_smoke_run(tmp_path):
    assert cli.main([*SMALL.split(), "--out", str(tmp_path)]) == 0
    paths, checks = split(saved(tmp_path))
    assert len(checks) == 2 * 3 * 4
    runs = {job_of(run): run for run in paths}
    for (optimizer, rho, *_), run in runs.items():
        curves = run["curves"]
        assert curves["step"] == [0, 2, 4]
        for values in curves.values():
            assert all(map(math.isfinite, values))
        assert run["lambda_max_residual"] <= 1.5e-4 * max(curves["lambda_max"])
        first = runs["order_1", 0.0, 0.0, 0]["curves"]
        for key in set(curves) - RATES:  # all from the same start
            np.testing.assert_allclose(curves[key][0], first[key][0], rtol=1e-4)
        measured = optimizer in ("sam", "eigen_sam") and rho == 0.02
        assert (set(curves) >= RATES) == measured
    ends = [tuple(run["curves"][x][-1] for x in KEPT) for run in runs.values()]
    assert len(set(ends)) == len(ends)


@pytest.mark.usefixtures("drawn")
def test_a_rho_of_many_digits_is_the_one_in_the_middle(without_work, tmp_path):
    options = ["--rho", "0.0333333333", "0.033333333", "--out", str(tmp_path)]
    assert cli.main(["sde", "--smoke", *options]) == 0
    results = saved(tmp_path)
    assert results["config"]["rhos"] == [0.0333333]
    paths, _ = split(results)
    measured = [run for run in paths if set(run["curves"]) >= RATES]
    assert {run["optimizer"] for run in measured} == {"sam", "eigen_sam"}


@pytest.mark.usefixtures("drawn")
def test_every_path_is_there_and_the_command_says_what_came_out(
    without_work, tmp_path, capsys
):
    assert cli.main([*SMALL.split(), "--seeds", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = saved(tmp_path)
    assert results["complete"] is True
    assert results["commands"] == [f"eigensam {SMALL} --seeds 2 --out {tmp_path}"]
    assert {"jax", "optax", "eigensam_jax"} < set(results["versions"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("off.png", "paths.png", "rates.png", "results.json")
    ]
    paths, checks = split(results)
    assert [x["check"] for x in checks] == ["one_step"] * len(made_up_check(None, 1))
    for run in results["runs"]:  # flat, but for curves
        assert not any(
            isinstance(x, list | dict) for k, x in run.items() if k != "curves"
        )
    assert {job_of(run) for run in paths} == {
        job
        for seed in (0, 1)
        for job in (
            ("order_1", 0.0, 0.0, seed),
            *((name, rho, 0.0, seed) for name in METHODS for rho in (0.02, 0.05)),
            ("eigen_sam", 0.02, 1.0, seed),
        )
    }
    for run in paths:
        measured = run["optimizer"] in ("sam", "eigen_sam") and run["rho"] == 0.02
        expected = RATES if measured else set()
        assert set(run["curves"]) == {"step", *KEPT, *expected}
    assert max(map(len, lines)) <= 80
    assert any("digits, tanh network" in line for line in lines)
    printed = [" ".join(line.split()) for line in lines]
    runs = results["runs"]
    rows = sde_tables.distances(runs) + sde_tables.differences(runs)
    for row in rows + sde_tables.rates(runs) + sde_tables.slopes(runs):
        assert " ".join(row) in printed  # none is broken


def test_what_is_there_is_kept_and_the_rest_is_run(
    without_work, tmp_path, capsys, monkeypatch
):
    """An interrupted smaller command, carried on by a larger one: the same file."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert cli.main([*SMALL.split(), "--seeds", "2", "--out", str(whole)]) == 0
    started = []

    def interrupted_run(*args):
        run = made_up_run(*args)

        def until_third(job):
            started.append(job)
            for look in run(job):
                yield look
                if len(started) == 3:
                    raise KeyboardInterrupt

        return until_third

    monkeypatch.setattr(sde_paths, "make_run", interrupted_run)
    assert cli.main([*SMALL.split(), "--out", str(part)]) == 130
    printed = capsys.readouterr().out.replace("\n", "")
    assert "2 finished runs are in" in printed
    assert saved(part)["complete"] is False
    assert cli.main([*SMALL.split(), "--seeds", "2", "--out", str(part)]) == 0
    expected, results = saved(whole), saved(part)
    assert results["runs"] == expected["runs"]
    assert len(started) == 3 + len(split(expected)[0]) - 2
    before = (part / "results.json").read_bytes()
    other = [*SMALL.split(), "--alpha", "2", "--out", str(part)]
    assert cli.main(other) == 2  # another configuration is refused
    assert "another configuration" in capsys.readouterr().err
    digits = registry.dataset("digits")
    others = digits._replace(train_labels=digits.train_labels[::-1])
    monkeypatch.setattr(registry, "dataset", lambda *_: others)
    assert cli.main([*SMALL.split(), "--seeds", "2", "--out", str(part)]) == 2
    assert "(data_crc32 " in capsys.readouterr().err
    assert (part / "results.json").read_bytes() == before


@pytest.mark.slow
def test_a_look_sees_what_is_there():
    """Of SAM's start, and after two steps, against the formulas."""
    problem = sde_problem.make_problem(registry.dataset("digits"))
    images, labels = problem.batches
    assert images.shape == (16, 64, 8, 8, 1)
    assert labels.shape == (16, 64)
    job = dict(zip(JOB, ("sam", 0.1, 0.0, 3), strict=True))
    looks = [*sde_paths.make_run(problem, (0, 2), 0.1, 0.05)(job)]
    assert [set(look) for look in looks] == 2 * [{"step", *LOOK}]
    params = problem.init(3)
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), 1))[1]
    for index in jax.random.randint(key, (2,), 0, 16):
        batch = jax.tree.map(lambda x, i=index: x[i], problem.batches)
        gradient = jax.jit(jax.grad(lambda p, b=batch: problem.value_fn(p, b)))
        moved = perturbation.sam(gradient(params), 0.1).epsilon
        moved = tree_math.add_scaled(params, 1, moved)
        params = tree_math.add_scaled(params, -0.1, gradient(moved))
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), problem.batches)
    mean = lambda p: problem.value_fn(p, whole)
    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    end = looks[-1]
    np.testing.assert_allclose(end["train_loss"], value, rtol=1e-4)
    norms = [tree_math.norm(x) for x in (params, gradient)]
    seen = [end["parameter_norm"], end["gradient_norm"]]
    np.testing.assert_allclose(seen, norms, rtol=1e-3)
    top = problem.top_eigenpair(params)
    np.testing.assert_allclose(end["lambda_max"], top.eigenvalue, rtol=1e-3)
    product = jax.jit(lambda p, v: hessian.hvp(mean, p, v))(params, top.eigenvector)
    along = tree_math.vdot(top.eigenvector, product)
    np.testing.assert_allclose(top.eigenvalue, along, rtol=1e-4)
    assert end["lambda_max_residual"] <= 1.5e-4 * end["lambda_max"]


@pytest.mark.slow
def test_the_same_path_is_another_on_other_batches_and_eigen_sam_follows_v():
    problem = sde_problem.make_problem(registry.dataset("digits"))
    images, labels = problem.batches
    assert images.shape == (16, 64, 8, 8, 1)
    assert labels.shape == (16, 64)
    state = sde_paths.start("eigen_sam", problem.init(0))
    advance = jax.jit(sde_paths.make_advance(problem, "eigen_sam", 0.1, 20))
    program = lambda key: advance(key, state, jnp.float32(0.1), jnp.float32(1))
    (params, opt_state), other = (program(jax.random.key(i)) for i in (0, 1))
    assert not np.allclose(*(x["Dense_0"]["kernel"] for x in (params, other[0])))
    # v is that of the step before; it has an exact eigenvector's Rayleigh quotient.
    product = hessian.mean_matvec(problem.value_fn, params, problem.batches)
    v = opt_state[0].tracker.eigenvector
    top = problem.top_eigenpair(params)
    quotient = tree_math.vdot(v, product(v))
    assert 0.98 < quotient / top.eigenvalue <= 1.001


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--rho 0", "'0'", "number above 0"),
        ("--alpha x", "'x'", "number above 0"),
        ("--learning-rate 0", "'0'", "number above 0"),
        ("--steps 1.5", "'1.5'", "whole number above 0"),
        ("--seeds 0", "'0'", "whole number above 0"),
        ("--model cnn", "--model", "--help"),
        ("--dataset mnist", "needs --data-dir", "four idx files"),
        ("--out pyproject.toml", "pyproject.toml", "name another folder"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(sde_paths, "make_run", None)  # a path would fail
    assert_refused("sde", options, wrong, right, capsys, monkeypatch, tmp_path)


def test_too_few_images_end_with_one_line(capsys, monkeypatch):
    whole = registry.dataset("digits")
    few = whole._replace(train_images=whole.train_images[:1000])
    monkeypatch.setattr(registry, "dataset", lambda *_: few)
    error = error_of(["sde"], capsys)
    assert "1000 training images, less than the 1024" in error


def test_a_path_that_diverges_ends_with_what_to_do(tmp_path, capsys, monkeypatch):
    def diverging(job):
        raise FloatingPointError("the training loss is nan")

    monkeypatch.setattr(sde_paths, "make_run", lambda *_: diverging)
    assert cli.main(["sde", "--smoke", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "order_1, ρ 0, seed 0: the training loss is nan; lower --rho" in error


def made_up(method, seed, rho, values):
    return {
        **dict(zip(JOB, (method, rho, 0.0, seed), strict=True)),
        "curves": {"train_loss": [9.0, *values], "lambda_max": [9.0, *values]},
    }


def test_distances_are_paired_by_seed_and_relative_to_sam():
    runs = [made_up("sam", seed, 0.1, [1.0, 2.0]) for seed in range(3)]
    for method, shifts in (
        ("sam_again", (0.0, 0.0, 0.0)),
        ("order_2", (0.1, 0.1, 0.4)),
        ("order_3", (-0.1, 0.0, 0.1)),
        ("mean_sam", (1.0, 1.0, 1.0)),
        ("mean_order_2", (1.2, 1.2, 1.2)),
        ("mean_order_3", (1.0, 1.0, 1.0)),
    ):
        runs += [
            made_up(method, seed, 0.1, [1 + shift, 2 + 2 * shift])
            for seed, shift in enumerate(shifts)
        ]
    again, second, third, *without_noise = sde_tables.distances(runs)
    assert again == [
        "SAM, other batches",
        "0.1",
        *2 * ["+0.0 ± 0.0"],
        *2 * ["0.0 ± 0.0"],
    ]
    # 10, 10, 40%: mean 20, standard deviation 10√3, t(0.975, 2) = 4.303.
    assert second == ["order 2", "0.1", *2 * ["+20.0 ± 43.0"], *2 * ["20.0 ± 43.0"]]
    # −10, 0, 10%: mean 0, deviation 10; distances 10, 0, 10: mean 6.7.
    assert third[:3] == ["order 3", "0.1", "+0.0 ± 24.8"]
    assert third[4].startswith("6.7 ± ")
    # Of the paths without noise, 2.2 and 4.4 where theirs of SAM are 2 and 4.
    assert [row[2] for row in without_noise] == ["+10.0 ± 0.0", "+0.0 ± 0.0"]
    # Differences of distances 0, −10, −30%: mean −13.3.
    ((rho, loss, *_, without),) = sde_tables.differences(runs)
    assert rho == "0.1"
    assert loss.startswith("-13.3 ± ")
    assert without == "-10.0 ± 0.0"


def test_the_plotted_radius_is_the_middle_one():
    assert sde_paths.middle((0.1,)) == 0.1
    assert sde_paths.middle((0.2, 0.05, 0.1)) == 0.1
    assert sde_paths.middle((0.025, 0.05, 0.1, 0.2)) == 0.05


@pytest.mark.slow
def test_the_checks_say_what_they_should():
    problem = sde_problem.make_problem(registry.dataset("digits"))
    runs = [{"check": "one_step", **x} for x in sde_checks.one_step(problem, 1.0)]
    runs += [{"check": "many_steps", **x} for x in sde_checks.many_steps(problem, 0.1)]
    rows = sde_tables.slopes(runs)
    assert [row[0] for row in rows] == [
        *("SAM, one step", "Eigen-SAM, one step", "SAM, 50 steps")
    ]
    for _, *slopes in rows:
        np.testing.assert_allclose([*map(float, slopes)], (1, 2, 3), atol=0.1)
    found = sde_checks.moments(problem, 0.02, 0.1, 200)
    rows = sde_tables.moments([{"check": "moments", **x} for x in found])
    assert len(rows) == 10
    assert max(abs(float(row[-1])) for row in rows) < 4
    costs = {x["optimizer"]: x for x in sde_checks.costs(problem, 0.05)}
    operations = [costs[f"order_{k}"]["operations"] for k in (1, 2, 3)]
    assert 0.99 < operations[0] < 1.01 < 2 < operations[1] < operations[2] < 5


def test_tables_of_checks_are_computed_from_their_records():
    runs = [{"check": "one_step", **x} for x in made_up_check(None, None)]
    runs += [{"check": "many_steps", **x} for x in errors("sam", 50, (1, 2.2, 3))]
    assert sde_tables.slopes(runs) == [
        ["SAM, one step", "1.00", "2.00", "3.00"],
        ["Eigen-SAM, one step", "1.50", "2.00", "3.00"],
        ["SAM, 50 steps", "1.00", "2.20", "3.00"],
    ]
    figures = {"sam": (4.0, 0.03), "order_1": (4.5, 0.04), "order_2": (3.9, 0.04)}
    runs = [
        {
            **{"check": "moments", "optimizer": name, "observable": "loss"},
            **{"power": 2, "mean": mean, "error": error},
        }
        for name, (mean, error) in figures.items()
    ]
    # The error of a difference is 0.05.
    assert sde_tables.moments(runs) == [["E((loss)²)", "4 ± 0.03", "+10.0", "-2.0"]]
