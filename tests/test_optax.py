"""The contract with optax: each wrapped run is a loop written by hand, to 1e-6.

By hand, the link is called by itself and what optax does around it is written out. One
row of the table in notebooks/composing.md stands on each of these.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from links import LINKS
from problems import flatten, network, quadratic, symmetric

from eigensam_jax import periodic, sam, tree_math

PARAMS, LOSS = network()
each_link = pytest.mark.parametrize("name", LINKS)
each_link_or_slow = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x in ("sam", "secant") else pytest.mark.slow)
        for x in LINKS
    ],
)
STEPS = 6


class Gradients(NamedTuple):
    """What the loops by hand are made of, all of them jitted.

    `value_and_clean(w, index)` is the loss and its gradient, `sharp(w, state, index)`
    the gradient of the link and its next state.
    """

    init: Any
    value_and_clean: Any
    sharp: Any


@functools.cache
def gradients(name):
    link = LINKS[name]()
    value_and_clean = jax.jit(jax.value_and_grad(LOSS))

    @jax.jit
    def sharp(w, state, index):
        value_fn = lambda p: LOSS(p, index)
        return link.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)

    return Gradients(link.init, value_and_clean, sharp)


def train(tx, loss=LOSS, steps=STEPS, traces=1):
    """The run as a user writes it, in one trace; with what line searches ask for."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=traces)
    def step(params, state, index):
        value_fn = lambda p: loss(p, index)
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grads, state, params, value_fn=value_fn, value=value, grad=grads
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        params, state = step(params, state, jnp.int32(i % 5))
    return params, state


def assert_same_run(run, by_hand):
    """Parameters and the link's state, wherever it is in the chain's, to 1e-6."""
    (params, state), (w, link_state) = run, by_hand
    chex.assert_trees_all_equal_shapes_and_dtypes(params, w)
    chex.assert_trees_all_close(params, w, rtol=0, atol=1e-6)
    assert max(float(jnp.abs(x - y).max()) for x, y in leaves(w, PARAMS)) > 1e-3
    for field in ("perturbation_norm", "eigenvector", "eigenvalue", "residual"):
        expected = optax.tree.get(link_state, field)
        if expected is not None:
            actual = optax.tree.get(state, field)
            chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def leaves(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def minus(w, factor, g):
    return tree_math.add_scaled(w, -factor, g)


# --- what works: the chain, and the run by hand ---------------------------------------


def descend(links, rate=lambda step: 0.1, change=lambda g: g):
    w, state = PARAMS, links.init(PARAMS)
    for i in range(STEPS):
        g, state = links.sharp(w, state, i % 5)
        w = minus(w, rate(i), change(g))
    return w, state


def clipped(g):
    return tree_math.scale(jnp.minimum(1, 0.3 / tree_math.norm(g)), g)


def heavy_ball(links):
    w, state = PARAMS, links.init(PARAMS)
    momentum = tree_math.zeros_like(w)
    for i in range(STEPS):
        g, state = links.sharp(w, state, i % 5)
        momentum = tree_math.add_scaled(g, 0.9, momentum)
        w = minus(w, 0.1, momentum)
    return w, state


def adam_with_decoupled_decay(links):
    w, state = PARAMS, links.init(PARAMS)
    m = v = tree_math.zeros_like(w)
    for i in range(STEPS):
        g, state = links.sharp(w, state, i % 5)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        w = jax.tree.map(
            lambda w, m, v, i=i: (
                w
                - 0.01
                * (
                    m
                    / (1 - 0.9 ** (i + 1))
                    / (jnp.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
                    + 0.1 * w
                )
            ),
            *(w, m, v),
        )
    return w, state


def only_when(is_due):
    def by_hand(links):
        w, state = PARAMS, links.init(PARAMS)
        for i in range(STEPS):
            if is_due(i):
                g, state = links.sharp(w, state, i % 5)
            else:
                _, g = links.value_and_clean(w, i % 5)
            w = minus(w, 0.1, g)
        return w, state

    return by_hand


def schedule_free(links):
    """With γ constant: z ← z − γg(y), x ← the mean of the zs, y = (1 − β)z + βx."""
    x = y = z = PARAMS
    state = links.init(PARAMS)
    for i in range(STEPS):
        g, state = links.sharp(y, state, i % 5)
        z = minus(z, 0.1, g)
        x = tree_math.add_scaled(tree_math.scale(i / (i + 1), x), 1 / (i + 1), z)
        y = tree_math.add_scaled(tree_math.scale(0.9, x), 0.1, z)
    return y, state


def mean_of_three(links):
    w, state = PARAMS, links.init(PARAMS)
    for first in range(0, STEPS, 3):
        total = tree_math.zeros_like(w)
        for i in range(first, first + 3):
            g, state = links.sharp(w, state, i % 5)
            total = tree_math.add_scaled(total, 1 / 3, g)
        w = minus(w, 0.1, total)
    return w, state


def two_rates(out_rate):
    def by_hand(links):
        w, state = PARAMS, links.init(PARAMS)
        for i in range(STEPS):
            g, state = links.sharp(w, state, i % 5)
            rates = {"hidden": {"w": 0.1, "b": 0.1}, "out": {"w": out_rate}}
            w = jax.tree.map(lambda w, r, g: w - r * g, w, rates, g)
        return w, state

    return by_hand


def plateau(links):
    """The rate is halved where the loss is not a thousandth below the best so far."""
    w, state = PARAMS, links.init(PARAMS)
    best, scale = np.inf, 1.0
    for i in range(STEPS):
        value, _ = links.value_and_clean(w, i % 5)
        g, state = links.sharp(w, state, i % 5)
        if value < 0.999 * best:
            best = value
        else:
            scale /= 2
        w = minus(w, 0.1 * scale, g)
    return w, state


def backtracking(links):
    """Halved until L(w + tu) ≤ L(w) + 0.8t⟨u, ∇L(w)⟩; the next starts at 1.5 t."""
    w, state = PARAMS, links.init(PARAMS)
    rate = 1.0
    for i in range(STEPS):
        value, clean = links.value_and_clean(w, i % 5)
        g, state = links.sharp(w, state, i % 5)
        slope = -0.1 * tree_math.vdot(clean, g)
        rate = min(1.5 * rate, 8.0)
        for _ in range(15):
            new, _ = links.value_and_clean(minus(w, 0.1 * rate, g), i % 5)
            if new <= value + 0.8 * rate * slope:
                break
            rate /= 2
        w = minus(w, 0.1 * rate, g)
    return w, state


SGD = optax.sgd(0.1)
WORKS = {
    "first in a chain": (lambda link: optax.chain(link, SGD), descend),
    "nested chain": (lambda link: optax.chain(optax.chain(link), SGD), descend),
    "named chain": (
        lambda link: optax.named_chain(("sharp", link), ("sgd", SGD)),
        descend,
    ),
    "momentum after": (
        lambda link: optax.chain(link, optax.sgd(0.1, momentum=0.9)),
        heavy_ball,
    ),
    "clipping after": (
        lambda link: optax.chain(link, optax.clip_by_global_norm(0.3), SGD),
        functools.partial(descend, change=clipped),
    ),
    "adamw after": (
        lambda link: optax.chain(link, optax.adamw(0.01, weight_decay=0.1)),
        adam_with_decoupled_decay,
    ),
    "learning-rate schedule": (
        lambda link: optax.chain(link, optax.sgd(optax.linear_schedule(0.1, 0.0, 10))),
        functools.partial(descend, rate=lambda step: 0.1 * (1 - step / 10)),
    ),
    "every second step": (
        lambda link: optax.chain(
            optax.conditionally_transform(link, lambda step: step % 2 == 0), SGD
        ),
        only_when(lambda step: step % 2 == 0),
    ),
    "late in training": (
        lambda link: optax.chain(
            optax.conditionally_transform(link, lambda step: step >= 3), SGD
        ),
        only_when(lambda step: step >= 3),
    ),
    "schedule_free around": (
        lambda link: optax.contrib.schedule_free(optax.chain(link, SGD), 0.1),
        schedule_free,
    ),
    "MultiSteps inside": (
        lambda link: optax.chain(
            link, optax.MultiSteps(SGD, 3).gradient_transformation()
        ),
        mean_of_three,
    ),
    "partition after": (
        lambda link: optax.chain(
            link,
            optax.partition(
                {"fast": SGD, "slow": optax.sgd(0.01)},
                {"hidden": "fast", "out": "slow"},
            ),
        ),
        two_rates(0.01),
    ),
    "freezing after": (
        lambda link: optax.chain(
            link, optax.freeze({"hidden": False, "out": True}), SGD
        ),
        two_rates(0.0),
    ),
    "reduce_on_plateau after": (
        lambda link: optax.chain(
            link, SGD, optax.contrib.reduce_on_plateau(0.5, patience=1, rtol=1e-3)
        ),
        plateau,
    ),
    "backtracking line search after": (
        lambda link: optax.chain(
            link,
            SGD,
            optax.scale_by_backtracking_linesearch(
                15,
                slope_rtol=0.8,
                decrease_factor=0.5,
                increase_factor=1.5,
                rtol=0.0,
                max_learning_rate=8.0,
            ),
        ),
        backtracking,
    ),
}


# With the secant's link, whose state has vectors. A condition around the link has to
# keep the types of each kind of state; others call it as a chain does, of which more is
# in `test_a_positive_factor_before_it_is_lost_and_does_no_harm`.
KINDS = {"every second step": ("sam", "power_iteration", "ritz")}
CASES = [
    pytest.param(
        *(wrapping, name),
        marks=[] if name in ("secant", *KINDS.get(wrapping, ())) else pytest.mark.slow,
    )
    for wrapping in WORKS
    for name in LINKS
]


@pytest.mark.parametrize(("wrapping", "name"), CASES)
def test_the_wrapped_run_is_the_loop_by_hand(wrapping, name):
    wrap, by_hand = WORKS[wrapping]
    # The state of optax's line search is of other types after the first step.
    run = train(wrap(LINKS[name]()), traces=1 + ("line search" in wrapping))
    assert_same_run(run, by_hand(gradients(name)))


def test_every_wrapping_is_a_row_of_the_page():
    page = Path(__file__).parent.parent / "notebooks" / "composing.md"
    rows = [row for row in page.read_text().splitlines() if row.startswith("| ")]
    for wrapping in WORKS:
        assert any(wrapping in row.split("|")[1] for row in rows), wrapping


@each_link_or_slow
def test_apply_if_finite_leaves_out_the_step_of_a_bad_batch(name):
    bad_loss = lambda p, index: LOSS(p, index) * jnp.where(index == 2, jnp.nan, 1)
    tx = optax.apply_if_finite(optax.chain(LINKS[name](), SGD), 3)
    run = train(tx, bad_loss)
    links = gradients(name)
    w, state = PARAMS, links.init(PARAMS)
    for i in range(STEPS):
        if i % 5 != 2:
            g, state = links.sharp(w, state, i % 5)
            w = minus(w, 0.1, g)
    assert_same_run(run, (w, state))
    assert int(run[1].total_notfinite) == 1


def test_inject_hyperparams_needs_to_be_told_what_is_static():
    make = optax.inject_hyperparams(periodic)
    with pytest.raises(ValueError, match="name interval in static_args"):
        make(link=sam(0.1), interval=5).init(jnp.ones(2))
    static = optax.inject_hyperparams(periodic, static_args="interval")
    static(link=sam(0.1), interval=5).init(jnp.ones(2))


@pytest.mark.parametrize(
    "name",
    ["sam", "asam", "secant", pytest.param("power_iteration", marks=pytest.mark.slow)],
)
def test_inject_hyperparams_follows_its_schedule(name):
    radius = lambda count: 0.2 / (1 + count)
    make = LINKS[name].func
    tracker = LINKS[name].keywords | dict(
        zip(("alpha", "tracker"), LINKS[name].args[1:], strict=False)
    )
    injected = optax.inject_hyperparams(make)(rho=radius, **tracker)
    run = train(optax.chain(injected, SGD))
    by_schedule = train(optax.chain(make(rho=radius, **tracker), SGD))
    assert_same_run(run, by_schedule)
    np.testing.assert_allclose(
        float(optax.tree.get(run[1], "hyperparams")["rho"]), 0.2 / STEPS, rtol=1e-6
    )


# --- what jax does with a step --------------------------------------------------------


def one_step(tx):
    def step(params, state, index):
        value_fn = lambda p: LOSS(p, index)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return step


@each_link_or_slow
def test_scan_and_donation_are_the_loop(name):
    tx = optax.chain(LINKS[name](), SGD)
    step = one_step(tx)
    expected = descend(gradients(name))
    body = lambda carry, index: (step(*carry, index), None)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS) % 5))(
        (PARAMS, tx.init(PARAMS))
    )
    assert_same_run(scanned, expected)
    donating = jax.jit(step, donate_argnums=(0, 1))
    run = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    for i in range(STEPS):
        given = jax.tree.leaves(run[0])
        run = donating(*run, i % 5)
        assert all(x.is_deleted() for x in given)
    assert_same_run(run, expected)


@each_link_or_slow
def test_vmap_over_seeds_is_each_seed_by_itself(name):
    tx = optax.chain(LINKS[name](), SGD)
    step = one_step(tx)
    each = [network(seed)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)

    def trained(params):
        body = lambda carry, index: (step(*carry, index), None)
        run, _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(STEPS) % 5)
        return run

    together = jax.jit(jax.vmap(trained))(stacked)
    alone = jax.jit(trained)
    for i, params in enumerate(each):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_same_run(one, alone(params))


@each_link
def test_map_params_finds_the_vectors_and_nothing_else(name):
    tx = optax.chain(LINKS[name](), SGD)
    state = jax.tree.map(jnp.ones_like, tx.init(PARAMS))
    mapped = optax.tree.map_params(tx, lambda x: x + 7, state)
    vectors = {"ritz": 2, "sam": 0, "asam": 0}.get(name, 1)
    moved = [jnp.size(x) for x, y in leaves(mapped, state) if jnp.all(x == y + 7)]
    same = [x for x, y in leaves(mapped, state) if jnp.all(x == y)]
    assert sum(moved) == vectors * sum(x.size for x in jax.tree.leaves(PARAMS))
    assert len(moved) + len(same) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["sam", "secant", "power_iteration"])
def test_the_second_gradient_does_not_run_on_a_step_that_is_left_out(name):
    """Counted at run time: one gradient on every step, a second on every other."""
    calls = []

    def counted(params, index):
        jax.debug.callback(lambda: calls.append(1))
        return LOSS(params, index)

    due = lambda step: step % 2 == 0
    tx = optax.chain(optax.conditionally_transform(LINKS[name](), due), SGD)

    @jax.jit
    def step(params, state):
        value_fn = lambda p: counted(p, 0)
        updates, state = tx.update(
            jax.grad(value_fn)(params), state, params, value_fn=value_fn, refresh=False
        )
        return optax.apply_updates(params, updates), state

    run = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        run = step(*run)
    jax.effects_barrier()
    assert len(calls) == 4 + 2


# --- what stands before the link ------------------------------------------------------


@pytest.mark.parametrize("name", ["sam", "asam", "power_iteration", "lanczos"])
def test_a_positive_factor_before_it_is_lost_and_does_no_harm(name):
    tx = optax.chain(optax.scale(3.0), LINKS[name](), SGD)
    assert_same_run(train(tx), descend(gradients(name)))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_a_factor_before_it_spoils_the_secant(factor):
    """∇L(w + ε) − c∇L(w) = Hε + (1 − c)g is no difference of gradients."""
    matrix, _ = symmetric([0.5, 1.0, 2.0, 4.0, 10.0], seed=0)
    value_fn, to_tree = quadratic(matrix, jnp.float32)
    w = np.arange(1.0, 6.0)
    g = matrix @ w
    params = to_tree(w)
    tx = optax.chain(optax.scale(factor), LINKS["secant"]())
    _, state = tx.update(
        jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn
    )
    v = flatten(optax.tree.get(state, "eigenvector"))
    seen = 0.1 * matrix @ g / np.linalg.norm(g) + (1 - factor) * g
    np.testing.assert_allclose(v, seen / np.linalg.norm(seen), atol=1e-4)


# --- what is refused, and what to do instead ------------------------------------------


@each_link_or_slow
def test_flatten_around_it_is_said_to_be_the_cause(name):
    tx = optax.flatten(optax.chain(LINKS[name](), SGD))
    with pytest.raises(Exception, match=r".") as error:
        train(tx)
    assert "optax.flatten" in "".join(error.value.__notes__)


@pytest.mark.parametrize("name", ["sam", "asam", "secant"])
def test_what_hands_over_a_part_of_the_parameters_is_refused(name):
    is_out = {"hidden": {"w": False, "b": False}, "out": {"w": True}}
    chain = optax.chain(LINKS[name](), SGD)
    for tx in (
        optax.selective_transform(chain, freeze_mask=is_out),
        optax.masked(chain, is_out),
        optax.partition({"a": chain, "b": SGD}, {"hidden": "a", "out": "b"}),
    ):
        with pytest.raises(
            ValueError, match=r"params have holes .*mask=\.\.\. instead"
        ):
            train(tx)


@pytest.mark.parametrize("name", ["sam", "secant"])
def test_multi_steps_around_it_sees_the_last_mini_batch_alone(name):
    """As the page warns: ε of the mean gradient, the gradient of one mini-batch."""
    wrapped = optax.MultiSteps(optax.chain(LINKS[name](), SGD), 2)
    run = train(wrapped.gradient_transformation())
    link, links = LINKS[name](), gradients(name)
    last = lambda index: lambda p: LOSS(p, index)
    of_mean = jax.jit(lambda w, s, g, i: link.update(g, s, w, value_fn=last(i)))
    w, state = PARAMS, link.init(PARAMS)
    for i in range(0, STEPS, 2):
        both = [links.value_and_clean(w, j % 5)[1] for j in (i, i + 1)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *both)
        g, state = of_mean(w, state, mean, (i + 1) % 5)
        w = minus(w, 0.1, g)
    assert_same_run(run, (w, state))


def test_a_loss_that_wants_more_than_the_parameters_is_told_how():
    tx = sam()
    with pytest.raises(TypeError, match="missing 1 required") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=lambda p, batch: 0.0)
    assert "value_fn=lambda p: loss(p, batch)" in "".join(error.value.__notes__)
    with pytest.raises(TypeError, match="missing 1 required") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p, _: p)
    assert "grad_fn=lambda p: jax.grad(loss)(p, batch)" in "".join(
        error.value.__notes__
    )


@each_link_or_slow
def test_lookahead_drops_the_extra_argument_and_goes_after_the_link(name):
    """The recipe: the link by itself on the fast weights, its gradient to lookahead."""
    link, fast = LINKS[name](), optax.sgd(0.1)
    lookahead = optax.lookahead(fast, sync_period=3, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    inside = optax.lookahead(optax.chain(link, fast), 3, 0.5)
    with pytest.raises(ValueError, match="value_fn or grad_fn, got neither"):
        inside.update(PARAMS, inside.init(pair), pair)

    @jax.jit
    def step(pair, states, index):
        value_fn = lambda p: LOSS(p, index)
        grads = jax.grad(value_fn)(pair.fast)
        sharp, sharp_state = link.update(grads, states[0], pair.fast, value_fn=value_fn)
        updates, state = lookahead.update(sharp, states[1], pair)
        return optax.apply_updates(pair, updates), (sharp_state, state)

    states = link.init(PARAMS), lookahead.init(pair)
    for i in range(STEPS):
        pair, states = step(pair, states, i % 5)

    links = gradients(name)
    w = slow = PARAMS
    state = links.init(PARAMS)
    for i in range(STEPS):
        g, state = links.sharp(w, state, i % 5)
        w = minus(w, 0.1, g)
        if i % 3 == 2:
            slow = w = tree_math.scale(0.5, tree_math.add_scaled(slow, 1, w))
    assert_same_run((pair.fast, states[0]), (w, state))
    chex.assert_trees_all_close(pair.slow, slow, atol=1e-6)
