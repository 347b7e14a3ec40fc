"""Training steps of one network, compiled from shapes alone."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from eigensam_jax import hessian
from eigensam_jax.eigen._krylov import written_out
from eigensam_jax.experiments.bench import contenders, placement, workloads
from eigensam_jax.experiments.bench.contenders import Contender
from eigensam_jax.experiments.bench.placement import Placement
from eigensam_jax.experiments.bench.workloads import Batch, Loss, Workload
from eigensam_jax.experiments.training import programs
from eigensam_jax.experiments.training.programs import Program
from eigensam_jax.tree_math import PyTree

Record = dict[str, Any]


class Task(NamedTuple):
    """One network, and all that its steps are compiled for.

    Attributes:
      name, workload: of the network.
      loss: of its parameters, other variables and a batch.
      params, others, batch: shapes of these.
      placement: of all of these.
    """

    name: str
    workload: Workload
    loss: Loss
    params: PyTree
    others: PyTree
    batch: Batch
    placement: Placement

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(x.size for x in jax.tree.leaves(self.params))


class Steps(NamedTuple):
    """The compiled steps of one optimizer; one program if all are the same.

    Attributes:
      default: whether a step is due is decided in the program.
      plain, due: a step that is not due, and one that is.
      interval: steps from one due step to the next.
    """

    default: Program
    plain: Program
    due: Program
    interval: int


def make_task(
    name: str,
    workload: Workload,
    batch_size: int,
    dtype: DTypeLike,
    placed: Placement,
) -> Task:
    """The `Task` of a network, without making any array."""
    shapes = jax.eval_shape(lambda: workloads.init(workload))
    batch = jax.eval_shape(lambda: workloads.make_batch(workload, batch_size))
    return Task(
        name=name,
        workload=workload,
        loss=workloads.make_loss(workload, dtype),
        params=placement.shapes(shapes[0], placed.replicated),
        others=placement.shapes(shapes[1], placed.replicated),
        batch=placement.shapes(batch, placed.split),
        placement=placed,
    )


def compile_steps(task: Task, contender: Contender) -> Steps:
    """The programs of one optimizer, from shapes alone."""
    default = compile_step(task, contender, None)
    if contender.interval == 1:
        return Steps(default, default, default, 1)
    plain = compile_step(task, contender, False)
    with written_out():
        due = compile_step(task, contender, True)
    return Steps(default, plain, due, contender.interval)


def compile_step(task: Task, contender: Contender, is_due: bool | None) -> Program:
    """One program, which donates parameters and state."""
    placed = task.placement
    state = jax.eval_shape(contender.tx.init, task.params)
    return programs.compile_program(
        contenders.make_step(contender, task.loss, is_due),
        task.params,
        placement.shapes(state, placed.replicated),
        task.others,
        task.batch,
        donate=(0, 1),
        out_shardings=placed.replicated,
    )


def compile_units(task: Task) -> dict[str, Program]:
    """The parts of steps: one gradient, and one Hessian-vector product."""

    def gradient(params: PyTree, others: PyTree, batch: Batch) -> Any:
        return jax.value_and_grad(task.loss)(params, others, batch)

    def product(params: PyTree, vector: PyTree, others: PyTree, batch: Batch) -> PyTree:
        return hessian.hvp(lambda p: task.loss(p, others, batch), params, vector)

    rest, params = (task.others, task.batch), task.params
    compiled = partial(
        programs.compile_program, out_shardings=task.placement.replicated
    )
    return {
        "gradient": compiled(gradient, params, *rest),
        "hvp": compiled(product, params, params, *rest),
    }


def figures(steps: Steps) -> Record:
    """The compiler's figures of an optimizer's programs, for the results file."""
    costs = programs.weigh(steps.plain.costs, steps.due.costs, steps.interval)
    result: Record = {
        **costs._asdict(),
        "temp_bytes": steps.default.temp_bytes,
        "compile_s": steps.default.compile_s,
        "interval": steps.interval,
    }
    if steps.interval > 1:
        for kind in ("plain", "due"):
            of_kind = getattr(steps, kind).figures()
            result |= {f"{kind}_{key}": x for key, x in of_kind.items()}
    return result
