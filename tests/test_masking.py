import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import eigen_sam, masking, sam

PARAMS = {"body": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "head": jnp.ones(4)}


@pytest.mark.parametrize(
    ("mask", "selected"),
    [
        (None, (True, True, True)),
        ({"body": True, "head": False}, (True, True, False)),
        ({"body": {"w": True, "b": False}, "head": False}, (False, True, False)),
        ({"body": np.bool_(False), "head": np.bool_(True)}, (False, False, True)),
        (lambda p: jax.tree.map(lambda x: x.ndim > 1, p), (False, True, False)),
        (lambda p: {"body": False, "head": True}, (False, False, True)),
    ],
)
def test_a_mask_is_a_prefix_or_a_function(mask, selected):
    masking.check(mask)
    assert masking.subspace(mask, PARAMS).selected == selected  # leaves b, w, head


def test_select_embed_and_merge():
    space = masking.subspace({"body": {"w": False, "b": True}, "head": True}, PARAMS)
    leaves = space.select(PARAMS)
    assert [x.shape for x in leaves] == [(3,), (4,)]
    twice = [2 * x for x in leaves]
    merged = space.merge(twice, PARAMS)
    np.testing.assert_array_equal(merged["body"]["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(merged["head"], np.full(4, 2))
    embedded = space.embed(twice, PARAMS)
    np.testing.assert_array_equal(embedded["body"]["w"], np.zeros((2, 3)))
    np.testing.assert_array_equal(embedded["body"]["b"], np.full(3, 2))


@pytest.mark.parametrize("factory", [sam, eigen_sam])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (True, "bare bool, got True"),
        ("head", "mask must be a bool, got 'head'"),
        ({"body": 1, "head": False}, r"mask\['body'\] must be a bool, got 1"),
    ],
)
def test_what_can_be_no_mask_is_refused_by_the_factory(factory, mask, message):
    with pytest.raises(ValueError, match=message):
        factory(mask=mask)


@pytest.mark.parametrize("factory", [sam, eigen_sam])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"tail": True},
            r"got {'tail': True} for \['body'\]\['b'\], \['body'\]\['w'\], \['head'\]",
        ),
        ({"body": {"w": True}, "head": False}, "not a prefix"),
        ({"body": False, "head": False}, "selects no parameter"),
        (lambda p: True, "bare bool, got True"),
        (lambda p: {"body": "yes", "head": True}, r"mask\['body'\] .* got 'yes'"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_init(factory, mask, message):
    with pytest.raises(ValueError, match=message):
        factory(mask=mask).init(PARAMS)
