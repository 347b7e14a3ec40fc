"""What is said of many runs: means, intervals and paired differences."""

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.study import plots as study_plots
from eigensam_jax.experiments.study import tables as study_tables

ROWS = ("sgd", "sam", "eigen_sam", "sam_matched")


def run(table, row, seed, accuracy, **more):
    figures = {"train_loss": 0.5, "lambda_max": 2.0 + seed, "alignment": 0.25}
    method = {"optimizer": row, "rho": 0.1, "alpha": 1.0}
    curves = {"step": [5, 10], "lambda_max": [1.0 + seed, 2.0], "alignment": [0.1, 0.2]}
    curves |= {"train_loss": [0.9, 0.5], "test_accuracy": [0.5, accuracy]}
    return {
        **{"table": table, "row": row, "seed": seed, "test_accuracy": accuracy},
        **{**method, "learning_rate": 0.05, "gradients": 2.0, "radius": 0.125},
        **{"curves": curves},
        **(figures | more),
    }


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return [
        run("main", row, seed, rng.uniform(0.8, 0.9))
        for seed in range(5)
        for row in ROWS
    ]


def test_differences_are_paired_by_seed_with_students_intervals(runs):
    shuffled = [runs[i] for i in np.random.default_rng(1).permutation(len(runs))]
    rows = {row[0]: row for row in study_tables.paired(shuffled, "main")}
    assert set(rows) == {"sam − sgd", "eigen_sam − sam_matched"}
    accuracies = {(x["row"], x["seed"]): 100 * x["test_accuracy"] for x in runs}
    differences = [
        accuracies["eigen_sam", s] - accuracies["sam_matched", s] for s in range(5)
    ]
    low, high = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    cell = rows["eigen_sam − sam_matched"][1]
    assert cell == f"{np.mean(differences):+.2f} ± {(high - low) / 2:.2f}"
    assert rows["eigen_sam − sam_matched"][3] == "+0.000 ± 0.000"  # the same seeds


def test_a_row_of_one_seed_has_no_interval(runs):
    (row, *_) = study_tables.summary(runs[:1], "main")
    assert row == ["sgd", "2.00", "0.125", row[3], "0.5000", "2.000", "0.250"]
    assert "±" not in row[3]


def test_an_ablation_is_paired_within_its_setting():
    rows = ("eigen_sam, α 1", "sam_matched, α 1", "sam_matched, α 2")
    runs = [run("alpha", row, 0, 0.5 + 0.1 * i) for i, row in enumerate(rows)]
    (found,) = study_tables.paired(runs, "alpha")
    assert found[:2] == ["eigen_sam, α 1 − sam_matched, α 1", "-10.00"]


def test_sam_is_paired_with_the_first_that_does_not_perturb():
    runs = [run("main", row, 0, 0.5) for row in ("adamw", "sgd", "sam")]
    (found,) = study_tables.paired(runs, "main")
    assert found[0] == "sam − adamw"


def test_where_nothing_is_matched_all_are_held_against_the_first():
    accuracies = {"sam": (0.5, 0.75), "secant": (0.75, 0.5), "ritz": (0.75, 1.0)}
    runs = [
        run("tracker", row, seed, accuracy)
        for row, of_seeds in accuracies.items()
        for seed, accuracy in enumerate(of_seeds)
    ]
    (secant, ritz) = study_tables.against(runs, "tracker")
    half = stats.t.ppf(0.975, 1) * 25  # deviation over the root of two seeds
    assert secant[:2] == ["secant − sam", f"+0.00 ± {half:.2f}"]
    assert ritz[:2] == ["ritz − sam", "+25.00 ± 0.00"]
    tables = study_tables.all_tables(runs, "digits")
    assert [table.title for table in tables] == ["tracker: digits", "differences"]
    (sam, secant) = study_tables.against(runs, "tracker, ritz")
    assert sam[:2] == ["sam − ritz", "-25.00 ± 0.00"]
    assert secant[0] == "secant − ritz"
    with pytest.raises(UserError, match="name a row of sam, secant, ritz"):
        study_tables.against(runs, "tracker, lanczos")
    for make in (study_tables.against, study_tables.summary, study_tables.paired):
        with pytest.raises(UserError, match="no table rho; name a table of tracker"):
            make(runs, "rho")


def test_the_best_of_each_method_is_marked():
    runs = [run("tuning", "sam", 0, x) for x in (0.5, 0.75)]
    runs.append(run("tuning", "sam", 0, 0.0, diverged="the training loss is nan"))
    cells = [row[-1] for row in study_tables.tuning(runs)]
    assert cells == ["50.00", "75.00 ←", "diverged"]


def test_of_equals_the_first_is_marked_as_it_was_chosen():
    runs = [run("tuning", "sam", 0, x) for x in (0.5, 0.75, 0.75)]
    cells = [row[-1] for row in study_tables.tuning(runs)]
    assert cells == ["50.00", "75.00 ←", "75.00"]


def test_a_figure_over_training_has_a_column_a_look(runs):
    rows = study_tables.over_training(runs, "lambda_max")
    assert rows[0] == ["sgd", "3.000 ± 1.581", "2.000 ± 0.000"]
    assert len(rows) == len(ROWS)


@pytest.mark.usefixtures("drawn")
def test_everything_is_shown_and_drawn(runs, tmp_path):
    runs += [run("tuning", "sgd", 9, 0.5), *(x | {"table": "when"} for x in runs)]
    console = Console(width=120, record=True)
    for table in study_tables.all_tables(runs, "digits"):
        console.print(table)
    text = console.export_text()
    assert all(name in text for name in ("tuning", "main", "when", "differences"))
    ablations = [x for x in runs if x["table"] == "when"]
    for name in ("compare", "accuracy", "ablate"):
        drawn = ablations if name == "ablate" else runs
        study_plots.DRAW[name](drawn, "digits", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_who_spends_sams_gradients_a_step_is_compared_at_equal_gradients_too(
    tmp_path, monkeypatch
):
    def study(table, spent, **more):
        return [
            run(table, name, seed, accuracy + 0.01 * seed, gradients=gradients, **more)
            for name, (gradients, accuracy) in spent.items()
            for seed in range(2)
        ]

    steps = {"sgd": (1.0, 0.5), "sam_every": (1.2, 0.6), "sam": (2.0, 0.75)}
    runs = study("steps", steps) + study("gradients", {"sgd": (1.0, 0.75)}, longer=2)
    found = study_tables.by_row(runs, "gradients")
    assert list(found) == ["sgd", "sam"]  # no run of sam_every has spent as much
    assert {x["test_accuracy"] for x in found["sgd"]} == {0.75, 0.76}
    assert found["sam"] == study_tables.by_row(runs, "steps")["sam"]
    at_steps, at_gradients = (
        study_tables.against(runs, table)[-1][:2] for table in ("steps", "gradients")
    )
    assert at_steps == ["sam − sgd", "+25.00 ± 0.00"]
    assert at_gradients == ["sam − sgd", "+0.00 ± 0.00"]
    drawn = []
    count = lambda figure, path: drawn.append([len(x.containers) for x in figure.axes])
    monkeypatch.setattr(images, "save", count)
    study_plots.DRAW["frontier"](runs, "it", tmp_path / "frontier.png")
    assert drawn == [[3, 3, 2, 2]]  # SAM's runs in both, in test accuracy and λ_max


@pytest.mark.usefixtures("drawn")
def test_the_frontier_says_what_was_spent_and_what_it_came_to(tmp_path):
    kinds = {"steps": (1.0, 0.75), "gradients": (1.25, 0.5)}
    names = {"sgd": 1.0, "sam_periodic": 1.2}
    times = {"sgd": (2.0, 3.0), "sam_periodic": (2.8, 9.0)}
    runs = [
        run(
            *(table, name, seed, accuracy),
            gradients=gradients,
            longer=longer,
            training_time_s=longer * times[name][seed],
        )
        for table, (longer, accuracy) in kinds.items()
        for name, gradients in names.items()
        for seed in range(2)
    ]
    _, periodic = study_tables.frontier(runs, "gradients")
    named, *found = periodic[:5]
    assert named == "SAM on every 5th step, reused"
    # 1.2 gradients for 1.25 of the steps; 1.25 · 2.8 / 2 of the time, by the fastest.
    assert found == ["1.50", "1.75", "0.1", "50.00 ± 0.00"]
    titles = [table.title for table in study_tables.all_tables(runs, "it")]
    assert titles == ["steps: it", "differences", "gradients: it", "differences"]
    eigen = [run("steps", name, 0, 0.5) for name in ("sgd", "sam", "eigen_sam")]
    timed = [x | {"training_time_s": 1.0} for x in eigen]
    console = Console(width=120, record=True)
    console.print(study_tables.all_tables(timed, "it")[1])
    text = console.export_text()
    assert text.count("sam − sgd") == 2  # with eigen_sam, whose ‖ε‖ no SAM has
    study_plots.DRAW["frontier"](runs, "it", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_what_was_not_measured_of_a_seed_has_no_mean():
    losses = {"sgd": (0.5, None), "sam": (0.25, 0.5), "asam": (0.5, 0.75)}
    runs = [
        run("main", name, seed, 0.5, train_loss=loss)
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    first, *_ = study_tables.summary(runs, "main")
    assert first[4] == "–"
    assert [row[2] for row in study_tables.against(runs, "main")] == ["–", "–"]
    of_asam = study_tables.against(runs, "main, sam")[-1]
    assert of_asam[:3] == ["asam − sam", "+0.00 ± 0.00", "+0.2500 ± 0.0000"]


def test_gains_are_bold_where_their_interval_does_not_hold_zero():
    pairs = {"sgd": (0.5, 0.6), "sam": (0.6, 0.7), "sam_every": (0.5, 0.7)}
    config = {"dataset": "digits", "model": "mlp", "epochs": 3, "out": "a/of_digits"}
    main, steps = (
        {
            "config": {**config, "augment": table == "steps"},
            "runs": [
                run(table, name, seed, x, lambda_max=seed + 2.0 - (name == "sam"))
                for name, values in pairs.items()
                for seed, x in enumerate(values)
            ],
        }
        for table in ("main", "steps")
    )
    what = "test, sam, sam_every, asam, sam_every − sam"
    first, second = study_tables.gains([main, steps], what)
    assert first[0] == "[digits, MLP, 3 epochs](of_digits/README.md)"
    assert second[0] == "[digits, MLP, augmented, 3 epochs](of_digits/README.md)"
    assert first[1:4] == ["**+10.00 ± 0.00**", "+5.00 ± 63.53", "–"]
    assert first[4] == second[4] == "-5.00 ± 63.53"
    ((_, cell),) = study_tables.gains([main], "λ_max, sam")
    assert cell == "**-1.000 ± 0.000**"
    for wrong in ("accuracy, sam", "λ_max, samm", "λ_max, sam − samm"):
        with pytest.raises(UserError, match="name one of test"):
            study_tables.gains([main], wrong)


def test_what_validation_chose_is_marked_at_the_ends_of_a_grid():
    trial = lambda row, accuracy, rho, alpha=0.0: run(
        "tuning", row, 1_000, accuracy, rho=rho, alpha=alpha, tuning=True
    )
    tried = [
        *(trial("sam", x, rho) for x, rho in ((0.8, 0.4), (0.9, 0.2), (0.7, 0.1))),
        *(trial("asam", x, rho) for x, rho in ((0.6, 2.0), (0.5, 4.0))),
        trial("sam_every", 0.0, 0.2) | {"diverged": "at step 1"},
        trial("sam_every", 0.1, 0.1),
        *(trial("eigen_sam", x, 0.2, alpha) for x, alpha in ((0.6, 1.0), (0.7, 3.0))),
        *(trial("eigen_sam_paper", 1 - rho, rho, 1.0) for rho in (0.1, 0.3, 0.2)),
    ]
    config = {"dataset": "digits", "model": "mlp", "epochs": 3, "out": "a/of_digits"}
    study = {"config": {**config, "augment": False}, "runs": tried}
    names = "sam, asam, sam_every, eigen_sam, eigen_sam_paper, sam_periodic"
    ((heading, *cells),) = study_tables.chosen([study], names)
    assert heading == "[digits, MLP, 3 epochs](of_digits/README.md)"
    assert cells == ["0.2", "≤ 2", "≤ 0.1", "0.2, α ≥ 3", "≤ 0.1, α 1", "–"]
    with pytest.raises(UserError, match="samm"):
        study_tables.chosen([study], "samm")


def test_of_forecasts_the_error_is_shown():
    runs = [
        run("steps", "sgd", seed, None, test_loss=error, training_time_s=1.0)
        for seed, error in enumerate((0.25, 0.5))
    ]
    assert study_tables.quality(runs) == ("test_loss", "test loss")
    (row,) = study_tables.frontier(runs, "steps")
    assert row[4].startswith("0.3750 ± ")
    trials = [x | {"table": "tuning", "row": "sgd"} for x in runs]
    assert [row[-1] for row in study_tables.tuning(trials)] == ["0.2500 ←", "0.5000"]
