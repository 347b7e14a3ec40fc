import io
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import assert_refused
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from eigensam_jax import trackers
from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.bench import (
    contenders,
    growth,
    placement,
    steps,
    timing,
    torch_reference,
    workloads,
)
from eigensam_jax.experiments.bench import plots as bench_plots
from eigensam_jax.experiments.bench import run as bench
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.models import resnet, vit
from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records import results as records
from eigensam_jax.experiments.training import collectives, programs

NAMES = ("sgd", "sam", "power_iteration", "secant")
FLOAT32 = 4  # bytes


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    assert cli.main(["bench", "--smoke", "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_operations_are_those_of_the_gradients_and_products_in_a_step(smoke):
    out, results = smoke
    assert sorted(p.name for p in out.iterdir()) == ["bench.png", "results.json"]
    assert results["complete"] is True
    assert results["commands"] == [f"eigensam bench --smoke --out {out}"]
    units, optimizers = bench_tables.named(results["runs"])
    run = optimizers["sgd"]
    assert (run["model"], run["batch_size"]) == ("wide_mlp", 128)
    # 784·1024 + 1024 + 1024² + 1024 + 10·1024 + 10
    assert run["parameters"] == 1_863_690
    assert tuple(optimizers) == NAMES

    gradient, hvp = (units[name]["operations"] for name in ("gradient", "hvp"))
    # Two operations for each weight and example, forwards and for the gradient by the
    # weights; and for that by the activations, of which images need none.
    weights = 784 * 1024 + 1024**2 + 10 * 1024
    expected = 2 * 128 * (3 * weights - 784 * 1024)
    np.testing.assert_allclose(gradient, expected, rtol=0.01)
    operations = {n: x["operations"] for n, x in optimizers.items()}
    assert gradient < operations["sgd"] < 1.02 * gradient
    # Ten operations for each parameter, one of them in a norm right over the range.
    assert 1.9 * gradient < operations["sam"]
    assert operations["sam"] < 2 * gradient + 10.5 * run["parameters"]
    assert operations["sam"] < operations["secant"] < 1.03 * operations["sam"]
    whole = operations["sam"] + 5 * hvp / 100
    assert 0.99 * whole < operations["power_iteration"] < 1.01 * whole

    power = optimizers["power_iteration"]
    for key in ("operations", "bytes_accessed"):
        plain, due = power[f"plain_{key}"], power[f"due_{key}"]
        assert power[key] == records.rounded(0.99 * plain + 0.01 * due)
    # Five products, which may share what does not depend on the vector.
    products = power["due_operations"] - power["plain_operations"]
    assert 4 * hvp < products < 5.05 * hvp


def test_memory_and_times_are_of_whole_steps(smoke):
    _, results = smoke
    _, optimizers = bench_tables.named(results["runs"])
    parameters = FLOAT32 * optimizers["sgd"]["parameters"]
    for name, figures in optimizers.items():
        # The new gradient is somewhere, the parameters and the state in their place.
        assert 0.9 * parameters < figures["temp_bytes"] < 9 * parameters, name
        assert figures["collectives"] == figures["collective_bytes"] == 0
        assert figures["compile_s"] > 0
        low, middle, high = figures["time_s"]
        assert 0 < low <= middle <= high
        for base in bench.BASELINES:
            low, middle, high = figures[f"time_to_{base}"]
            assert 0 < low <= middle <= high
    assert optimizers["sgd"]["time_to_sgd"] == [1, 1, 1]
    assert optimizers["power_iteration"]["due_time_s"] > 0
    assert optimizers["secant"]["due_time_s"] is None


def test_the_tables_fit_a_terminal(smoke):
    _, results = smoke
    runs = results["runs"]
    rows = bench_tables.summary(runs)
    assert [row[0] for row in rows] == list(NAMES)
    # Several devices, and PyTorch, of whose programs nothing is known.
    (sgd,) = (run for run in runs if run["optimizer"] == "sgd")
    exchanging = {**sgd, "collectives": 2, "collective_bytes": 1.5e7}
    torch = {k: x for k, x in sgd.items() if "time" in k or k == "model"}
    torch["optimizer"] = "torch_eigen_sam"
    wider = [exchanging if run is sgd else run for run in runs] + [torch]
    wider[0] = {**wider[0], "devices": 8}
    console = Console(width=80, file=io.StringIO())
    for table in bench_tables.network_tables(wider):
        console.print(table)
    printed = [" ".join(x.split()) for x in console.file.getvalue().splitlines()]
    for row in (*bench_tables.summary(wider), *bench_tables.exchanges(wider)):
        assert " ".join(row) in printed  # none is broken
    assert bench_tables.summary(wider)[-1][:5] == ["torch_eigen_sam", *["–"] * 4]
    assert bench_tables.exchanges(wider)[0] == ["sgd", "2", "15"]


def test_each_bar_of_memory_stands_by_its_name(smoke, tmp_path, monkeypatch):
    """Also where PyTorch's figures, without memory, come before others."""
    runs = smoke[1]["runs"]
    (sgd,) = records.select(runs, optimizer="sgd")
    torch = {k: x for k, x in sgd.items() if k not in ("operations", "temp_bytes")}
    at = runs.index(sgd) + 1
    runs = [*runs[:at], torch | {"optimizer": "torch_sgd"}, *runs[at:]]
    drawn = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    bench_plots.bench(runs, tmp_path / "bench.png")
    _, below = drawn[0].axes
    labels = dict(zip(below.get_yticks(), below.get_yticklabels(), strict=True))
    sizes = {registry.look(x)["label"]: x for x in NAMES}
    assert len(below.patches) == len(sizes)
    for bar in below.patches:
        name = sizes.pop(labels[bar.get_y() + bar.get_height() / 2].get_text())
        (run,) = records.select(runs, optimizer=name)
        assert bar.get_width() == run["temp_bytes"] / 2**20


def test_figures_of_other_networks_are_kept(smoke, tmp_path, monkeypatch, capsys):
    out, results = smoke
    (tmp_path / "results.json").write_text((out / "results.json").read_text())

    def measured(chosen, model, names, placed, console):
        other = {"model": model, "rounds": chosen.steps}
        return [{**run, **other} for run in results["runs"]]

    monkeypatch.setattr(bench, "measure", measured)
    for models, rounds in (("vit resnet18", "3"), ("wide_mlp", "4")):
        asked = ["bench", "--models", *models.split(), "--steps", rounds]
        assert cli.main([*asked, "--out", str(tmp_path)]) == 0
    new = json.loads((tmp_path / "results.json").read_text())
    networks = bench_tables.networks(new["runs"])
    assert [(name, x[0]["rounds"]) for name, x in networks.items()] == [
        ("wide_mlp", 4),
        ("resnet18", 3),
        ("vit", 3),
    ]
    assert len(new["commands"]) == 3

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    capsys.readouterr()
    assert cli.main(["bench", "--out", str(tmp_path)]) == 130
    said = "".join(capsys.readouterr().out.split())
    assert "results.jsonholdswide_mlp,resnet18,vit." in said

    monkeypatch.setattr(bench, "measure", None)
    assert cli.main(["bench", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 2
    assert "dtype float32, now bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--models vgg", "'vgg'", "'resnet18'"),
        ("--optimizers adam", "'adam'", "'power_iteration'"),
        ("--optimizers own_batch", "'own_batch'", "'power_iteration'"),
        ("--dtype float16", "'float16'", "'bfloat16'"),
        ("--steps 0", "'0'", "whole number above 0"),
        ("--batch-size 30 --devices 4", "30 of wide_mlp", "use a multiple"),
        ("--devices 64 --models wide_mlp", "64", "use at most 8"),
        ("--optimizers torch_sam --models vit", "torch_sam", "wide_mlp"),
        ("--optimizers torch_sam --models wide_mlp --devices 2", "torch_sam", "one"),
        ("--growth --models vit", "--models", "leave --models out"),
        ("--growth --batch-size 12", "12", "use a multiple"),
        ("--out pyproject.toml", "pyproject.toml", "name another folder"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    jax.devices()  # a CPU that is in use can't be divided any further
    monkeypatch.setattr(programs, "compile_program", None)  # work would fail
    assert_refused("bench", options, wrong, right, capsys, monkeypatch, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pyproject.toml"]


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch_reference, "is_installed", lambda: False)
    asked = ["--models", "wide_mlp", "--optimizers", "torch_sgd"]
    assert cli.main(["bench", *asked]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_help_imports_nothing_large():
    code = (
        "import sys; from eigensam_jax.experiments import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: print({'flax', 'rich', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"


def test_the_options_name_what_exists():
    assert tuple(contenders.make_contenders()) == contenders.NAMES
    assert set(torch_reference.NETWORKS) <= set(workloads.WORKLOADS)


def test_a_command_divides_the_cpu():
    code = (
        "from eigensam_jax.experiments.bench import placement\n"
        "print(len(placement.claim(3)), len(placement.claim(2)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["3", "2"]


def test_collectives_are_counted_in_compiled_programs():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, axis = PartitionSpec("data"), "data"

    def exchange(x):  # of 8 rows and 512 columns, on each device
        return (
            jax.lax.psum(x, axis),
            jax.lax.psum(x[0, 0], axis),
            jax.lax.all_gather(x, axis),
            jax.lax.ppermute(x, axis, [(i, (i + 1) % 8) for i in range(8)]),
            jax.lax.psum_scatter(2 * x, axis, tiled=True),
            jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
        )

    specs = (PartitionSpec(), PartitionSpec(), *[split] * 4)
    exchange = jax.shard_map(
        exchange, mesh=mesh, in_specs=split, out_specs=specs, check_vma=False
    )
    compiled = jax.jit(exchange).lower(jnp.zeros((64, 512))).compile()
    rows = 8 + 8 * 8 + 8 + 1 + 8  # all but the scalar
    found = collectives.count(compiled.as_text())
    assert found.num_bytes == FLOAT32 * (512 * rows + 1)
    assert found.number - found.large <= 1  # the scalar, if alone
    assert found.large in (4, 5)  # sums may share an instruction


def test_an_asynchronous_pair_counts_once():
    text = """
      %s = (f32[4,512]{1,0}, f32[8,512]{1,0}) all-gather-start(%a), dimensions={0}
      %d = f32[8,512]{1,0:T(8,128)} all-gather-done(%s)
      %r = (bf16[512]{0}, /*index=1*/pred[], s4[6]{0}) all-reduce(%b, %c, %d), to=%sum
      ROOT %p = u32[] collective-permute(%e), source_target_pairs={{0,1}}
      %f = f32[9999]{0} fusion(%p), metadata={op_name="all-reduce"}
      %g = f32[512]{0} get-tuple-element(%r), index=0
    """
    sizes = [8 * 512 * 4, 512 * 2 + 1 + 3, 4]
    assert collectives.count(text) == (3, 2, sum(sizes))


def test_data_parallel_steps_exchange_each_gradient_once():
    task = steps.make_task(
        "mlp",
        workloads.mlp(32),
        64,
        "float32",
        placement.data_parallel(placement.claim(8)),
    )
    weights = 784 * 32 + 32**2 + 32 * 10
    assert task.parameters == weights + 32 + 32 + 10
    size = FLOAT32 * task.parameters
    units = {name: unit.costs for name, unit in steps.compile_units(task).items()}
    expected = 2 * 64 / 8 * (3 * weights - 784 * 32)  # for an eighth of the examples
    np.testing.assert_allclose(units["gradient"].operations, expected, rtol=0.1)
    assert size <= units["gradient"].collective_bytes < size + 64
    # A product is a sum of two for weights whose inputs depend on weights, and each of
    # these is exchanged.
    assert size <= units["hvp"].collective_bytes < 2 * size
    sam = steps.compile_step(task, contenders.make_contenders()["sam"], None)
    assert 2 * size <= sam.costs.collective_bytes < 2 * size + 64


def test_a_due_step_weighs_its_share():
    plain, due = programs.Costs(10, 20, 1, 4), programs.Costs(110, 420, 6, 24)
    expected = programs.Costs(11, 24, 1.05, 4.2)
    np.testing.assert_allclose(programs.weigh(plain, due, 100), expected)
    one, other = (programs.Program(None, costs, 0, 0.0) for costs in (due, plain))
    same = steps.figures(steps.Steps(one, one, one, 1))
    assert {key: same[key] for key in due._fields} == due._asdict()
    weighed = steps.figures(steps.Steps(one, other, one, 2))
    np.testing.assert_allclose(weighed["operations"], 60)
    assert (weighed["plain_operations"], weighed["due_operations"]) == (10, 110)


def test_turns_are_weighed_and_warm_up_is_left_out(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def taking(name, seconds):
        def step():
            calls.append(name)
            # Rounds get slower; compilation and caches make the first ones slow.
            slow = 100 if calls.count(name) <= 1 else 1
            clock[0] += slow * seconds * (1 if "due" in name else calls.count(name))

        return step

    turns = {
        "a": timing.Turn(taking("a", 1.0)),
        "b": timing.Turn(taking("b", 2.0), taking("b due", 50.0), 100),
        "c": timing.Turn(taking("c", 2.0), taking("c due", 6.0), 5),
    }
    times = timing.in_turns(turns, 10, lambda: None)
    rounds = np.arange(3.0, 13.0)  # after two rounds of warm-up
    np.testing.assert_allclose(times["a"].rounds, rounds)
    np.testing.assert_allclose(times["b"].rounds, 0.99 * 2 * rounds + 0.5)
    np.testing.assert_allclose(times["c"].rounds, 0.8 * 2 * rounds + 1.2)
    assert (times["a"].due, times["b"].due, times["c"].due) == (None, 50.0, 6.0)
    assert calls[:5] == ["a", "b", "b due", "c", "c due"]
    assert calls.count("b due") == 1 + 2  # warm-up, and every fifth round
    assert timing.quartiles(np.array([4.0, 1.0, 2.0, 3.0, 5.0])) == [2, 3, 4]


def test_optax_sam_is_the_same_mathematics():
    def loss(params, others, batch):
        return jnp.mean((batch.images @ params["w"]) ** 4) + jnp.sum(params["b"] ** 2)

    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (5,)), "b": jnp.array([1.0, -2.0])}
    batch = workloads.Batch(jax.random.normal(keys[1], (8, 5)), jnp.zeros(8))
    every, ends = contenders.make_contenders(), {}
    for name in ("sgd", "sam", "optax_sam"):
        step = jax.jit(contenders.make_step(every[name], loss))
        state = params, every[name].tx.init(params)
        for _ in range(3):
            *state, _ = step(*state, {}, batch)
        ends[name] = state[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        ends["sam"],
        ends["optax_sam"],
    )
    assert not np.allclose(ends["sam"]["w"], ends["sgd"]["w"], rtol=1e-3)


@pytest.mark.usefixtures("drawn")
def test_growth_counts_passes_and_exchanges(tmp_path, monkeypatch, capsys):
    """Also when it is interrupted, and goes on."""
    monkeypatch.setattr(growth, "OPTIMIZERS", ("sam", "secant"))
    monkeypatch.setattr(growth, "WIDTHS", (64,))
    monkeypatch.setattr(growth, "DEVICES", (4,))
    monkeypatch.setattr(growth, "DEVICES_WIDTH", 16)
    asked = ["bench", "--growth", "--batch-size", "64", "--out", str(tmp_path)]
    compile_steps, compiled = steps.compile_steps, []

    def interrupted(task, contender):
        compiled.append(task.parameters)
        if len(compiled) in (1, 5):
            raise KeyboardInterrupt
        return compile_steps(task, contender)

    monkeypatch.setattr(steps, "compile_steps", interrupted)
    assert cli.main(asked) == 130
    assert "No run was finished." in capsys.readouterr().out
    assert cli.main(asked) == 130
    said = "".join(capsys.readouterr().out.split())
    assert "2finishedrunsarein" in said
    assert "thesamecommandgoesonfromthere." in said
    assert cli.main(asked) == 0
    assert len(compiled) == 1 + 2 + 2 + 2
    printed = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    for row in (
        *bench_tables.growth_summary(runs),
        *bench_tables.devices_summary(runs),
    ):
        assert " ".join(row) in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["growth.png", "results.json"]
    sizes = [784 * n + n + n * n + n + 10 * n + 10 for n in (64, 16)]
    assert [run["parameters"] for run in runs] == [n for n in sizes for _ in range(2)]
    assert [run["devices"] for run in runs] == [1, 1, 4, 4]
    sam, secant = runs[:2]
    assert sam["passes_over_sam"] == 0
    assert 4 < secant["passes_over_sam"] < 14
    difference = secant["bytes_accessed"] - sam["bytes_accessed"]
    passes = difference / (FLOAT32 * sizes[0])
    assert secant["passes_over_sam"] == records.rounded(passes)
    for run in runs[2:]:
        assert 2 * FLOAT32 * sizes[1] <= run["collective_bytes"] < 9 * sizes[1]


@pytest.mark.parametrize("width", growth.WIDTHS)
def test_growth_is_by_powers_of_ten(width):
    shapes, _ = jax.eval_shape(lambda: workloads.init(workloads.mlp(width)))
    power = np.log10(sum(x.size for x in jax.tree.leaves(shapes)))
    assert abs(power - round(power)) < 0.03


def test_resnet18_has_its_shapes():
    model, images = resnet.ResNet18(10), jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))
    # A 3×3 convolution has 9 weights for each pair of channels, a normalisation 2 for
    # each channel. Blocks at a change of channels have a 1×1 convolution more.
    parameters = 9 * 3 * 64 + 2 * 64 + 4 * 9 * 64**2 + 4 * 2 * 64
    for c in (128, 256, 512):
        parameters += 9 * c * c // 2 + 3 * 9 * c * c + c * c // 2 + 5 * 2 * c
    parameters += 512 * 10 + 10
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters
    assert parameters == 11_173_962
    statistics = sum(x.size for x in jax.tree.leaves(variables["batch_stats"]))
    assert statistics == 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
    maps = jax.eval_shape(
        lambda v: model.apply(v, images, False, capture_intermediates=True), variables
    )
    outputs, captured = maps
    assert outputs.shape == (2, 10)
    blocks = {
        name: x["__call__"][0].shape
        for name, x in captured["intermediates"].items()
        if name.startswith("BasicBlock")
    }
    assert blocks["BasicBlock_1"] == (2, 32, 32, 64)
    assert blocks["BasicBlock_2"] == blocks["BasicBlock_3"] == (2, 16, 16, 128)
    assert blocks["BasicBlock_7"] == (2, 4, 4, 512)


@pytest.mark.parametrize("seed", range(3))
def test_resnet18_starts_by_he(seed):
    make = resnet._convolution(256).init
    kernel = make(jax.random.key(seed), jnp.zeros((1, 8, 8, 128)))["params"]["kernel"]
    expected = np.sqrt(2 / (9 * 128))
    np.testing.assert_allclose(jnp.std(kernel), expected, rtol=0.02)
    assert abs(float(jnp.mean(kernel))) < 0.02 * expected


def test_the_vision_transformer_has_its_shapes():
    model, images = vit.ViT(10), jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    assert set(variables) == {"params"}
    w, tokens = 192, 64
    attention = 4 * (w * w + w)  # queries, keys, values, and what they become
    layers = 4 * w * w + 4 * w + 4 * w * w + w
    block = attention + layers + 2 * 2 * w  # with two normalisations
    parameters = 16 * 3 * w + w + tokens * w + 6 * block + 2 * w + 10 * w + 10
    assert sum(x.size for x in jax.tree.leaves(variables)) == parameters
    assert parameters == 2_693_194
    logits = jax.eval_shape(lambda v: model.apply(v, images), variables)
    assert logits.shape == (2, 10)
    for side in (28, 32):  # whose quarters are the patches of the small one
        small, images = registry.model("vit_small", 10), jnp.zeros((2, side, side, 1))
        variables = jax.eval_shape(small.init, jax.random.key(0), images)
        assert variables["params"]["position"].shape == (1, 16, 64)


def test_tokens_see_each_other_and_where_they_are():
    model = vit.ViT(3, patch=2, width=8, depth=1, heads=2)
    images = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))

    @jax.jit
    def logits(images):
        params = model.init(jax.random.key(1), images)["params"]
        lost = {**params, "position": jnp.zeros((1, 4, 8))}
        swapped = jnp.concatenate([images[:, 2:], images[:, :2]], axis=1)
        last_changed = images.at[:, 2:, 2:].add(1.0)
        every = jnp.concatenate([images, swapped, last_changed])
        return [model.apply({"params": p}, every) for p in (params, lost)]

    (plain, swapped, changed), (without, swapped_without, _) = logits(images)
    assert not np.allclose(plain, swapped, rtol=1e-3)
    assert not np.allclose(plain, changed, rtol=1e-3)
    # Without positions it is a set of patches.
    np.testing.assert_allclose(without, swapped_without, rtol=1e-4, atol=1e-5)


def test_the_loss_leaves_running_statistics_alone(monkeypatch):
    monkeypatch.setattr(resnet, "_STAGES", ((8, 2),))  # soon compiled
    monkeypatch.setattr(resnet, "_BLOCKS", 1)
    workload = workloads.WORKLOADS["resnet18"]._replace(image_shape=(8, 8, 3))
    model, loss = workload.make(10), workloads.make_loss(workload, "float32")

    def by_hand(params, others, batch, train):
        logits, moved = model.apply(
            {"params": params, **others},
            batch.images,
            train,
            mutable=["batch_stats"],
        )
        picked = jnp.take_along_axis(logits, batch.labels[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, 1) - picked), moved

    @jax.jit
    def run():
        params, others = workloads.init(workload)
        batch = workloads.make_batch(workload, 4)
        trained = by_hand(params, others, batch, True)
        in_evaluation = by_hand(params, others, batch, False)
        values = [loss(params, x, batch) for x in (others, trained[1])]
        return values, others, trained, in_evaluation

    values, others, (expected, moved), (evaluated, same) = run()
    assert values[0].shape == ()
    assert values[0].dtype == jnp.float32
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    # The statistics of the batch are what counts, whatever the running ones.
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    assert abs(evaluated - values[0]) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, same, others)
    pairs = zip(jax.tree.leaves(others), jax.tree.leaves(moved), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_bfloat16_is_of_the_computation_alone():
    workload = workloads.mlp(16)
    params, others = jax.jit(lambda: workloads.init(workload))()
    batch = workloads.make_batch(workload, 8)
    losses = [workloads.make_loss(workload, x) for x in ("float32", "bfloat16")]
    exact, rounded = (jax.jit(loss)(params, others, batch) for loss in losses)
    assert exact.dtype == rounded.dtype == jnp.float32
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.02)
    grads = jax.eval_shape(jax.grad(losses[1]), params, others, batch)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(losses[1])(params, others, batch))
    assert program.count("dot_general") == 3
    assert "bf16[8,10] = dot_general" in program


@pytest.mark.parametrize("network", torch_reference.NETWORKS)
def test_pytorch_takes_the_same_steps(network):
    pytest.importorskip("torch")
    workload = workloads.WORKLOADS[network]
    if network == "wide_mlp":
        workload = workloads.mlp(32)
    params, others = jax.jit(lambda: workloads.init(workload))()
    batch = workloads.make_batch(workload, 16)
    loss = workloads.make_loss(workload, "float32")
    every = contenders.make_contenders()
    start = trackers.power_iteration().init(params).eigenvector
    for name, ours in {
        "torch_sgd": "sgd",
        "torch_sam": "sam",
        "torch_eigen_sam": "power_iteration",
    }.items():
        method = torch_reference.make_method(name, network, params, batch, start)
        state = params, every[ours].tx.init(params)
        for refresh in (True, False):
            theirs = method.due if refresh and method.due else method.step
            fixed = None if every[ours].interval == 1 else refresh
            step = jax.jit(contenders.make_step(every[ours], loss, fixed))
            *state, _ = step(*state, others, batch)
            theirs()
            expected = torch_reference.tensors(state[0])
            for a, b in zip(method.weights, expected, strict=True):
                np.testing.assert_allclose(a.detach(), b, atol=1e-5)
        assert optax.tree.get(state[1], "eigenvalue", 1.0) > 0  # else ours leaves v out
