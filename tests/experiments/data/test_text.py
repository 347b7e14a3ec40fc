"""Windows of a text: what follows each character, and what is told from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import results
from eigensam_jax.experiments.training import losses

LENGTH = 64


@pytest.fixture
def folder(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(3600)) + "€" * 400
    (tmp_path / "book.txt").write_text(text, "utf-8")
    return tmp_path


def test_each_character_is_followed_by_its_label(folder):
    found = registry.dataset("text", folder)
    text = (folder / "book.txt").read_text("utf-8")
    used = [i for i in range(3200) if i // LENGTH * LENGTH + LENGTH < 3200]
    known = sorted({text[i + 1] for i in used})  # what follows in whole windows
    numbers = [known.index(x) if x in known else 0 for x in text]
    ends = {"train": (0, 3200), "held": (3200, 3600), "test": (3600, 4000)}
    for name, (first, last) in ends.items():
        images, labels = (getattr(found, f"{name}_{x}") for x in ("images", "labels"))
        count = (last - first - 1) // LENGTH
        assert images.shape == labels.shape == (count, LENGTH)
        assert images.dtype == labels.dtype == np.int32
        read = numbers[first : first + count * LENGTH + 1]
        windows = [np.reshape(x, (count, LENGTH)) for x in (read[:-1], read[1:])]
        rows, expected = np.hstack([images, labels]), np.hstack(windows)
        if name == "train":
            assert (rows != expected).any()
            rows, expected = (sorted(x.tolist()) for x in (rows, expected))
        np.testing.assert_array_equal(rows, expected)
    assert found.num_classes == len(known)


@pytest.mark.parametrize("place", [0, 3198], ids=["byte order mark", "cut off"])
def test_a_character_that_no_training_label_has_is_no_class(place, tmp_path):
    text = [*"ab"] * 2000
    text[place] = text[-2] = "\ufeff"  # the last one is a test label
    (tmp_path / "book.txt").write_text("".join(text), "utf-8")
    found = registry.dataset("text", tmp_path)
    assert found.num_classes == 2
    for part in found:
        assert part.max() < 2


def test_no_logit_depends_on_a_later_character():
    model, characters = registry.model("gpt", 7), jnp.arange(12)[None] % 7
    params = model.init(jax.random.key(0), characters)
    logits = model.apply(params, characters)
    assert logits.shape == (1, 12, 7)
    for changed in (3, 11):
        other = model.apply(params, characters.at[0, changed].set(6))
        same = np.all(np.isclose(logits, other, atol=1e-6), axis=-1)[0]
        assert same[:changed].all()
        assert not same[changed:].any()


def test_the_loss_is_the_mean_over_all_characters():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    labels = jnp.array([[0, 4, 2], [1, 1, 3]])
    shares = jax.nn.softmax(logits)
    picked = [[shares[i, j, labels[i, j]] for j in range(3)] for i in range(2)]
    expected = -np.log(picked).mean(1)
    np.testing.assert_allclose(losses.each(logits, labels), expected, rtol=1e-6)


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold one \.txt file, not 0"):
        registry.dataset("text", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="not a text in UTF-8"):
        registry.dataset("text", tmp_path)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="5 characters; at least 1280"):
        registry.dataset("text", tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_frontier_is_trained_on_it(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = f"frontier --smoke --dataset text --data-dir {folder} --model gpt"
    command += f" --optimizers sam --batch-size 8 --curvature-examples 8 --out {out}"
    assert cli.main(command.split()) == 0
    document = results.read(out / "results.json")
    tests = [run for run in document["runs"] if not run.get("tuning")]
    assert {run["row"] for run in tests} == {"sgd", "sam"}
    for run in tests:
        assert "test_accuracy" not in run  # a text has a loss alone
        assert 0 < run["test_loss"] < 6
        assert run["lambda_max"] > 0
