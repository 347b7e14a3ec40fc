"""Programs compiled ahead of time, and their costs as the compiler counts them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from eigensam_jax.experiments.training import collectives


class Costs(NamedTuple):
    """The costs of one run of a program, on one device.

    Attributes:
      operations: floating-point operations; a multiply-add is two.
      bytes_accessed: read and written by all instructions of the compiled program.
      collectives: exchanges between devices of more than `collectives.LARGE` bytes.
      collective_bytes: the size of the results of all exchanges.
    """

    operations: float
    bytes_accessed: float
    collectives: float
    collective_bytes: float


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      call: runs it.
      costs: of one run.
      temp_bytes: memory beside arguments and results, on one device.
      compile_s: seconds of tracing, lowering and compilation.
    """

    call: Callable[..., Any]
    costs: Costs
    temp_bytes: int
    compile_s: float

    def figures(self) -> dict[str, float]:
        """The figures for a results file."""
        return {
            **self.costs._asdict(),
            "temp_bytes": self.temp_bytes,
            "compile_s": self.compile_s,
        }


def compile_program(
    function: Callable[..., Any],
    *args: Any,
    donate: tuple[int, ...] = (),
    out_shardings: Any = None,
) -> Program:
    """Compiles `function` for arguments like `args`, arrays or their shapes.

    The compiler counts a loop's body once, and both branches of a conditional. Programs
    whose costs are compared should have neither. Pass a new `function` each time, if
    the time of a first compilation matters.
    """
    start = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    counted: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    exchanged = collectives.count(compiled.as_text() or "")
    costs = Costs(
        operations=counted.get("flops", 0.0),
        bytes_accessed=counted.get("bytes accessed", 0.0),
        collectives=exchanged.large,
        collective_bytes=exchanged.num_bytes,
    )
    return Program(compiled, costs, memory.temp_size_in_bytes, seconds)


def weigh(plain: Costs, due: Costs, interval: int) -> Costs:
    """The mean over steps of which every `interval`-th is `due` and the rest `plain`.

    Example:
      >>> from eigensam_jax.experiments.training import programs
      >>> plain, due = programs.Costs(10, 2, 1, 4), programs.Costs(60, 12, 6, 24)
      >>> programs.weigh(plain, due, 100).operations
      10.5
    """
    pairs = zip(plain, due, strict=True)
    return Costs(*(a + (b - a) / interval for a, b in pairs))
