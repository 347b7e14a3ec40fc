"""A small language model of plain dicts: tied weights, dropout, norms, an adapter."""

import jax
import jax.numpy as jnp
import optax

VOCABULARY, WIDTH, LENGTH, RANK = 11, 8, 6, 2
TOKENS = jax.random.randint(jax.random.key(7), (5, 4, LENGTH + 1), 0, VOCABULARY)


def parameters(seed=0):
    normal = lambda key, *shape: jax.random.normal(key, shape) / jnp.sqrt(shape[0])
    keys = jax.random.split(jax.random.key(seed), 7)
    norm = lambda: {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    return {
        "embedding": normal(keys[0], VOCABULARY, WIDTH),
        "block": {
            "norm_1": norm(),
            "attention": normal(keys[1], WIDTH, 3 * WIDTH),
            "lora": {
                "a": normal(keys[2], WIDTH, RANK),
                "b": 0.1 * normal(keys[3], RANK, 3 * WIDTH),
            },
            "norm_2": norm(),
            "mlp": {
                "in": normal(keys[4], WIDTH, 2 * WIDTH),
                "bias": jnp.zeros(2 * WIDTH),
                "out": normal(keys[5], 2 * WIDTH, WIDTH),
            },
        },
        "norm": norm(),
    }


def loss(params, index, key=None):
    """Cross-entropy of the next token on batch `index`; with dropout if there is a key.

    The embedding is also the output layer.
    """
    tokens = TOKENS[index]
    block = params["block"]
    x = params["embedding"][tokens[:, :-1]]
    h = _normalised(block["norm_1"], x)
    adapted = block["attention"] + block["lora"]["a"] @ block["lora"]["b"]
    query, key_, value = jnp.split(h @ adapted, 3, axis=-1)
    scores = query @ key_.mT / jnp.sqrt(WIDTH)
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    x += jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ value
    h = _normalised(block["norm_2"], x) @ block["mlp"]["in"] + block["mlp"]["bias"]
    h = jax.nn.gelu(h)
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0)
    x = _normalised(params["norm"], x + h @ block["mlp"]["out"])
    logits = x @ params["embedding"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def _normalised(norm, x):
    return jax.nn.standardize(x) * norm["scale"] + norm["bias"]
