"""Which runs an experiment does, and what it chooses by their results."""

import pytest

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.study import ablations, plans
from eigensam_jax.experiments.study.plans import Grids
from eigensam_jax.experiments.training.methods import Setup, named

GRIDS = Grids((0.1, 0.3), (0.1, 0.2), (1.0, 2.0), (0.1, 0.2), (1.0, 3.0))


def followed(plan, accuracy, radius=0.5):
    """All entries of a plan, whose jobs come to what the functions say."""
    done, entries = {}, []
    for entry in plan(done):
        entries.append(entry)
        done[entry.job] = {
            "test_accuracy": accuracy(entry.job),
            "radius": radius + entry.job.seed,
        }
    return entries


def test_the_best_on_the_validation_split_is_trained_from_every_seed():
    def accuracy(job):
        method = job.method
        if method.optimizer == "sgd":
            return job.learning_rate
        assert job.learning_rate == 0.3 or not job.tuning
        return method.rho + (method.alpha == 3.0) + (method.alpha == 0.1)

    entries = followed(plans.accuracy(GRIDS, seeds=2), accuracy)
    tuning = [e for e in entries if e.table == "tuning"]
    main = [e for e in entries if e.table == "main"]
    assert len(tuning) == 2 + 2 + 2 + 2 + 2
    assert all(e.job.tuning and e.job.seed == plans.TUNING_SEED for e in tuning)
    assert not any(e.job.tuning for e in main)
    assert {e.job.learning_rate for e in main} == {0.3}
    assert [(e.row, e.job.method) for e in main if e.job.seed == 1] == [
        ("sgd", Setup("sgd")),
        ("sam", Setup("sam", 0.2)),
        ("asam", Setup("asam", 2.0)),
        ("eigen_sam_paper", named("eigen_sam_paper", 0.2, 0.1)),
        ("sam_matched_paper", Setup("sam", 1.5)),
        ("eigen_sam", named("eigen_sam", 0.2, 3.0)),
        ("sam_matched", Setup("sam", 1.5)),
    ]
    assert [e.job.seed for e in main] == 7 * [0] + 7 * [1]


def test_on_a_tie_the_first_is_chosen():
    entries = followed(plans.accuracy(GRIDS, seeds=1), lambda job: 0.5)
    (sam,) = (e for e in entries if e.table == "main" and e.row == "sam")
    assert sam.job == plans.Job(Setup("sam", 0.1), 0.1, 0)


def test_a_method_that_diverges_in_each_trial_ends_the_study():
    done = {}
    entries = plans.accuracy(GRIDS, seeds=1)(done)
    for _ in GRIDS.learning_rates:
        job = next(entries).job
        done[job] = {"test_accuracy": 0.0, "diverged": "the training loss is nan"}
    with pytest.raises(UserError, match=r"sgd: training diverged.*0\.1, 0\.3"):
        next(entries)


@pytest.mark.parametrize("table", ablations.ABLATIONS)
def test_an_ablation_changes_one_thing_from_every_seed(table):
    plan = ablations.ablations([table], 0.1, 1.0, 0.05, seeds=2)
    entries = followed(plan, lambda job: 0.5)
    by_seed = [[e for e in entries if e.job.seed == seed] for seed in (0, 1)]
    rows = [e.row for e in by_seed[0]]
    assert rows == [e.row for e in by_seed[1]]
    assert len(set(rows)) == len(rows) > 5
    assert {e.table for e in entries} == {table}
    methods = [e.job.method for e in by_seed[0] if "matched" not in e.row]
    assert len(set(methods)) == len(methods)
    matched = [e.job.method for e in by_seed[1] if "matched" in e.row]
    assert all(method == Setup("sam", 1.5) for method in matched)
    assert bool(matched) == (table in ablations.MATCHED)


def test_where_there_is_nothing_to_choose_nothing_is_tried():
    grids = GRIDS._replace(learning_rates=(0.3,), alphas=(3.0,))
    entries = followed(plans.accuracy(grids, seeds=1), lambda job: 0.5)
    tried = {e.row for e in entries if e.table == "tuning"}
    assert tried == {"sam", "asam", "eigen_sam_paper"}
    (ours,) = (e for e in entries if e.row == "eigen_sam")
    assert ours.job == plans.Job(named("eigen_sam", 0.1, 3.0), 0.3, 0)


def test_a_comparison_is_at_the_same_rho_and_alpha_from_every_seed():
    names = ("sam_matched", "eigen_sam", "eigen_sam_paper", "sam", "sgd")
    plan = plans.comparison(names, 0.2, 1.0, dict.fromkeys(names, 0.3), seeds=2)
    entries = followed(plan, lambda job: 0.5)
    assert {(e.table, e.job.learning_rate, e.job.tuning) for e in entries} == {
        ("main", 0.3, False)
    }
    assert [(e.row, e.job.method) for e in entries if e.job.seed == 1] == [
        ("eigen_sam", named("eigen_sam", 0.2, 1.0)),
        ("sam_matched", Setup("sam", 1.5)),
        ("eigen_sam_paper", named("eigen_sam_paper", 0.2, 1.0)),
        ("sam", Setup("sam", 0.2)),
        ("sgd", Setup("sgd")),
    ]
    assert [e.job.seed for e in entries] == 5 * [0] + 5 * [1]


def test_on_the_frontier_each_method_has_as_many_trials_and_sams_gradients():
    names = ("sam", "asam", "sam_periodic", "eigen_sam", "sam_matched")
    rates, rhos = (0.1, 0.3, 0.5), (0.1, 0.2, 0.4)
    plan = plans.frontier(names, rates, rhos, [2.0], seeds=2)
    entries = followed(plan, lambda job: job.learning_rate * (job.method.rho + 1))
    tuning = [e for e in entries if e.table == "tuning"]
    tried = ("sgd", "sam", "asam", "sam_periodic", "eigen_sam")
    assert [e.row for e in tuning] == [name for name in tried for _ in rates]
    assert {e.job.learning_rate for e in entries if e.row != "sgd"} == {0.5}
    asam = [e.job.method.rho for e in tuning if e.row == "asam"]
    assert asam == [1.0, 2.0, 4.0]  # ten times SAM's, as its usual ρ is
    own = plans.frontier(names, rates, rhos, [2.0], seeds=2, asam_rhos=(0.3, 0.6, 0.9))
    entries_own = followed(own, lambda job: job.learning_rate * (job.method.rho + 1))
    chosen = [e.job.method.rho for e in entries_own if e.row == "asam"]
    assert chosen == [0.3, 0.6, 0.9, 0.9, 0.9]
    assert [e for e in entries_own if e.row != "asam" and e.job.tuning] == [
        e for e in tuning if e.row != "asam"
    ]
    by_steps = [e for e in entries if e.table == "steps" and e.job.seed == 1]
    assert [(e.row, e.job.method, e.job.longer) for e in by_steps] == [
        ("sgd", Setup("sgd"), 1),
        ("sam", Setup("sam", 0.4), 1),
        ("asam", Setup("asam", 4.0), 1),
        ("sam_periodic", Setup("sam_periodic", 0.4, every=5, reuse=0.3), 1),
        ("eigen_sam", named("eigen_sam", 0.4, 2.0), 1),
        ("sam_matched", Setup("sam", 1.5), 1),
    ]
    at_cost = {
        e.row: round(e.job.longer * e.job.method.gradients(1_000), 2)
        for e in entries
        if e.table == "gradients"
    }
    assert at_cost == {"sgd": 2.0, "sam_periodic": 2.0}  # the others spend as much
    spent = {e.row: e.job.method.gradients(1_000) for e in by_steps}
    assert {row: x for row, x in spent.items() if row not in at_cost} == dict.fromkeys(
        ("sam", "asam", "eigen_sam", "sam_matched"), 2.0
    )


def test_each_alpha_is_tried_with_each_rho_of_eigen_sam_alone():
    names = ("sam", "eigen_sam_paper", "eigen_sam_periodic")
    plan = plans.frontier(names, (0.1, 0.3), (0.1, 0.2), (0.5, 3.0, 1.0), seeds=1)
    entries = followed(plan, lambda job: job.method.alpha - job.method.rho)
    tried = [
        (e.row, e.job.method.rho, e.job.method.alpha)
        for e in entries
        if e.table == "tuning" and e.row != "sgd"
    ]
    pairs = [(rho, alpha) for alpha in (0.5, 3.0, 1.0) for rho in (0.1, 0.2)]
    assert tried == [
        *(("sam", rho, 0.0) for rho in (0.1, 0.2)),
        *((name, *pair) for name in names[1:] for pair in pairs),
    ]
    ended = {e.row: e.job.method for e in entries if e.table == "steps"}
    assert ended.pop("sam") == Setup("sam", 0.1)
    assert ended.pop("sgd") == Setup("sgd")
    assert ended == {name: named(name, 0.1, 3.0) for name in names[1:]}


def test_where_every_rho_and_alpha_diverges_each_rho_is_named_once():
    done = {}
    plan = plans.frontier(("eigen_sam",), (0.3,), (0.1, 0.2), (1.0, 2.0), seeds=1)
    entries = plan(done)
    for _ in range(4):
        done[next(entries).job] = {"test_accuracy": 0.0, "diverged": "it"}
    with pytest.raises(UserError, match=r"eigen_sam: .* each trial, of 0\.1, 0\.2; "):
        next(entries)


def test_a_trial_is_judged_by_accuracy_or_by_its_loss():
    accurate, less = ({"test_accuracy": x, "test_loss": 0.1} for x in (0.9, 0.8))
    assert plans.score(accurate) > plans.score(less)
    near, far = ({"test_loss": x} for x in (0.1, 0.2))
    assert plans.score(near) > plans.score(far)
    assert plans.score(far) > plans.score({"test_accuracy": 0.0, "diverged": "it"})
