"""Training: the eigenvalue, the alignment and the loss, step by step."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eigensam_jax._info import StepInfo
from eigensam_jax._update import arguments
from eigensam_jax.plotting import _panels as panels

_STYLES = ("-", "--", ":", "-.")  # of the lines of one panel, in turn


def training(
    infos: list[StepInfo],
    axes: Sequence[Axes] | np.ndarray | None = None,
    *,
    losses: ArrayLike | None = None,
    steps: ArrayLike | None = None,
    label: str | None = None,
) -> np.ndarray:
    """Draws how λ, the alignment and ‖ε‖ or the loss go during training.

    λ is the tracker's estimate. λ, ‖ε‖ and the loss are on a logarithmic axis where
    they span two decades or more.

    Args:
      infos: what `eigensam_jax.info` returned at some steps of `eigen_sam`, a list.
      axes: three axes to draw on, such as this function returned for another run; None
        for a new figure.
      losses: the losses of these steps, drawn in place of ‖ε‖.
      steps: the numbers of these steps; by default 0, 1, 2 and so on.
      label: the name of the run, for the legend.

    Returns:
      The three axes, an array.

    Raises:
      ValueError: for no `infos`, those of `sam` and `asam`, which have no λ, values
        that are traced, and lengths that differ.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> from eigensam_jax import plotting
      >>> tx = optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1))
      >>> loss, w, infos = (lambda w: jnp.sum(w**4)), jnp.array([1.0, 2.0]), []
      >>> state = tx.init(w)
      >>> for step in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
      ...     infos.append(eigensam_jax.info(state))
      >>> [axis.get_ylabel() for axis in plotting.training(infos)]
      ['tracked eigenvalue λ', 'alignment of ε and v', 'length of ε']
    """
    if not (isinstance(infos, list) and {*map(type, infos)} == {StepInfo}):
        types = sorted({type(x).__name__ for x in infos}) or "nothing"
        raise ValueError(
            "infos must be a list of what eigensam_jax.info returned, got a "
            f"{type(infos).__name__} of {types}: after a step, append "
            "eigensam_jax.info(opt_state) to a list."
        )
    names = ["eigenvalue", "alignment", "perturbation_norm"]
    rows = [_of_infos(infos, name) for name in names]
    labels = ["tracked eigenvalue λ", "alignment of ε and v", "length of ε"]
    if losses is not None:
        rows[2], labels[2], names[2] = panels.values("losses", losses), "loss", "losses"
    numbers = np.arange(len(infos)) if steps is None else panels.values("steps", steps)
    for name, values in zip([*names, "steps"], [*rows, numbers], strict=True):
        what = f"({len(infos)},)"
        remedy = ": a number for each of infos"
        fits = values.shape == (len(infos),)
        arguments.require(fits, f"the shape of {name}", values.shape, what, remedy)
    if axes is None:
        figure = plt.figure(figsize=(6.4, 6.4), layout="constrained")
        axes = figure.subplots(3, sharex=True)
        axes[2].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.align_ylabels()
    drawn = np.ravel(np.asarray(axes, object))
    remedy = ": give what plotting.training returned, or leave it out"
    arguments.require(len(drawn) == 3, "len(axes)", len(drawn), "3", remedy)
    for panel, values, name in zip(drawn, rows, labels, strict=True):
        style = _STYLES[len(panel.lines) % len(_STYLES)]
        marker = "o" if len(infos) < 30 else ""
        panel.plot(numbers, values, style, marker=marker, markersize=3, label=label)
        panel.set_ylabel(name)
        every = [line.get_ydata() for line in panel.lines]  # of earlier calls too
        if panel is not drawn[1] and panels.spans_decades(np.concatenate(every)):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(panels.plain)
        else:
            panel.set_yscale("linear")
    drawn[1].set_ylim(-0.03, 1.03)
    drawn[2].set_xlabel("step")
    if label is not None:
        drawn[0].legend()
    return drawn


def _of_infos(infos: list[StepInfo], name: str) -> np.ndarray:
    values = [getattr(x, name) for x in infos]
    if any(x is None for x in values):
        raise ValueError(
            f"infos must be those of eigen_sam, got one without {name}: sam and asam "
            "track no eigenvector. Measure λ by eigensam_jax.sharpness."
        )
    return panels.values(f"the {name} of infos", values)
