"""SGD, SAM and Eigen-SAM with the paper's tracker in PyTorch, for comparison.

PyTorch is not a dependency of this package: functions that need it import it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import jax
import numpy as np

from eigensam_jax.experiments.bench.contenders import (
    ALPHA,
    LEARNING_RATE,
    MOMENTUM,
    RHO,
)
from eigensam_jax.experiments.bench.workloads import Batch
from eigensam_jax.tree_math import PyTree

METHODS = ("torch_sgd", "torch_sam", "torch_eigen_sam")
NETWORKS = ("wide_mlp", "strided_cnn")
NUM_ITERS = 5
UPDATE_INTERVAL = 100

Tensor = Any
Forward = Callable[[Sequence[Tensor], Tensor], Tensor]


class Method(NamedTuple):
    """An optimizer with its own weights.

    Attributes:
      step: takes a step.
      due: takes a step that refreshes the eigenvector; None if there is none.
      weights: the tensors that it trains.
    """

    step: Callable[[], None]
    due: Callable[[], None] | None
    weights: list[Tensor]


def is_installed() -> bool:
    """Whether PyTorch can be imported."""
    try:
        import_module("torch")
    except (ImportError, OSError):  # OSError: its libraries are incomplete
        return False
    return True


def start(threads: int) -> str:
    """Sets PyTorch's number of threads; returns its version."""
    import torch

    torch.set_num_threads(threads)
    return str(torch.__version__)


def make_method(
    name: str, network: str, params: PyTree, batch: Batch, eigenvector: PyTree
) -> Method:
    """One of `METHODS`, on one of `NETWORKS`, in PyTorch.

    Eigen-SAM perturbs by ε = ρ·(u + α·sign⟨g,v⟩·v⊥), and refreshes v by five power
    iterations, which differentiate the batch's gradient once more. Weights and v start
    from `params` and `eigenvector`, as Flax has them; every step is on `batch`.
    """
    import torch

    forward = _FORWARD[network]
    images = torch.tensor(np.asarray(batch.images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(np.asarray(batch.labels)).long()
    weights = [w.requires_grad_() for w in tensors(params)]
    vectors = tensors(eigenvector)
    descent = torch.optim.SGD(weights, lr=LEARNING_RATE, momentum=MOMENTUM)

    def gradient(create_graph: bool = False) -> Sequence[Tensor]:
        loss = torch.nn.functional.cross_entropy(forward(weights, images), labels)
        grads: Sequence[Tensor] = torch.autograd.grad(
            loss, weights, create_graph=create_graph
        )
        return grads

    def descend(grads: Sequence[Tensor]) -> None:
        for w, g in zip(weights, grads, strict=True):
            w.grad = g
        descent.step()

    def descend_at(epsilon: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_add_(weights, epsilon)
        grads = gradient()
        with torch.no_grad():
            torch._foreach_sub_(weights, epsilon)
        descend(grads)

    def sgd() -> None:
        descend(gradient())

    def sam() -> None:
        grads = gradient()
        descend_at(torch._foreach_mul(grads, RHO / norm(grads)))

    def eigen_sam() -> None:
        grads = gradient()
        length, along = norm(grads), dot(grads, vectors)
        # ρ(u + α·s·(v − ⟨u,v⟩u)), with u = g/‖g‖ and s = sign⟨g,v⟩
        on_v = RHO * ALPHA * torch.sign(along)
        on_g = (RHO - on_v * along / length) / length
        epsilon = torch._foreach_mul(grads, on_g)
        torch._foreach_add_(epsilon, torch._foreach_mul(vectors, on_v))
        descend_at(epsilon)

    def refreshing_eigen_sam() -> None:
        grads, v = gradient(create_graph=True), vectors
        for i in range(NUM_ITERS):
            v = torch.autograd.grad(grads, weights, v, retain_graph=i < NUM_ITERS - 1)
            v = torch._foreach_div(v, norm(v))
        vectors[:] = v
        eigen_sam()

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return sum(torch.sum(x * y) for x, y in zip(a, b, strict=True))

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

    step = {"torch_sgd": sgd, "torch_sam": sam, "torch_eigen_sam": eigen_sam}[name]
    due = refreshing_eigen_sam if name == "torch_eigen_sam" else None
    return Method(step, due, weights)


def tensors(params: PyTree) -> list[Tensor]:
    """Weights and biases, layer by layer, in PyTorch's order of axes."""
    import torch

    layers = jax.tree.map(np.asarray, params)
    order = {2: (1, 0), 4: (3, 2, 0, 1)}  # from (in, out) and (height, width, in, out)
    tensors = []
    for layer in sorted(layers):  # Conv_0, Conv_1, Dense_0, Dense_1, …
        kernel = layers[layer]["kernel"]
        tensors += [kernel.transpose(order[kernel.ndim]), layers[layer]["bias"]]
    return [torch.tensor(np.ascontiguousarray(x)) for x in tensors]


def _mlp(weights: Sequence[Tensor], images: Tensor) -> Tensor:
    from torch.nn import functional

    # Channels last, as Flax flattens.
    x = images.permute(0, 2, 3, 1).flatten(1)
    *hidden, last = zip(weights[::2], weights[1::2], strict=True)
    for kernel, bias in hidden:
        x = functional.relu(functional.linear(x, kernel, bias))
    return functional.linear(x, *last)


def _strided_cnn(weights: Sequence[Tensor], images: Tensor) -> Tensor:
    from torch.nn import functional

    x = images
    for kernel, bias in zip(weights[:4:2], weights[1:4:2], strict=True):
        # Flax's "SAME" for even sizes and stride 2: one row and column, at the end.
        x = functional.pad(x, (0, 1, 0, 1))
        x = functional.relu(functional.conv2d(x, kernel, bias, stride=2))
    return _mlp(weights[4:], x)


_FORWARD: dict[str, Forward] = {"wide_mlp": _mlp, "strided_cnn": _strided_cnn}
