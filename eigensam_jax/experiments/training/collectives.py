"""Collectives, counted in the text of a compiled program."""

import math
import re
from typing import NamedTuple

LARGE = 1024  # bytes: gradients and parts of them are above, scalars below

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
# Of an asynchronous pair it counts the end, whose type is the result's.
_INSTRUCTION = re.compile(rf"^.*? = (\(.*?\)|\S+) (?:{_KINDS})(?:-done)?\(", re.M)
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")


class Collectives(NamedTuple):
    """What devices exchange in one run of a program.

    Attributes:
      number: of instructions, including scalars'; one with several arrays counts once.
      large: how many of them have results above `LARGE` bytes.
      num_bytes: the size of all results on one device.
    """

    number: int
    large: int
    num_bytes: int


def count(text: str) -> Collectives:
    """Counts the collectives of an optimized HLO module, `compiled.as_text()`.

    Each counts as often as it is written: once in a loop's body, and in both branches
    of a conditional.

    Example:
      >>> from eigensam_jax.experiments.training import collectives
      >>> collectives.count("  %x = (f32[], bf16[8,256]{1,0}) all-reduce(%a, %b)")
      Collectives(number=1, large=1, num_bytes=4100)
    """
    found = sizes(text)
    return Collectives(len(found), sum(size > LARGE for size in found), sum(found))


def sizes(text: str) -> list[int]:
    """The bytes of the result of each collective, in order."""
    return [_num_bytes(match[1]) for match in _INSTRUCTION.finditer(text)]


def _num_bytes(shape: str) -> int:
    """The bytes of one array or of a tuple of them."""
    total = 0
    for name, bits, dimensions in _ARRAY.findall(shape):
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        total += size if name == "pred" else math.ceil(size * int(bits or 0) / 8)
    return total
