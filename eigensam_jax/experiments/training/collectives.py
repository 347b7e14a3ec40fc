"""Collectives, counted in the text of a compiled program."""

import math
import re
from typing import NamedTuple

LARGE = 1024  # bytes: above it is a gradient or a part of one, below it scalars

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
# Of an asynchronous pair it is the end whose type is the result's, and only that.
_INSTRUCTION = re.compile(rf"^.*? = (\(.*?\)|\S+) (?:{_KINDS})(?:-done)?\(", re.M)
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")


class Collectives(NamedTuple):
    """What devices exchange in one run of a program.

    Attributes:
      number: how many instructions, scalars too; of several arrays in one, one.
      large: how many of them with results of more than `LARGE` bytes.
      num_bytes: the size of all results on one device.
    """

    number: int
    large: int
    num_bytes: int


def count(text: str) -> Collectives:
    """Counts the instructions of an optimized HLO module.

    Those that reduce, gather, scatter, permute or exchange: each as often as it is
    written, so that a loop's body counts once and of a conditional both branches.

    Args:
      text: of the module, `compiled.as_text()`.

    Example:
      >>> from eigensam_jax.experiments.training import collectives
      >>> collectives.count("  %x = (f32[], bf16[8,256]{1,0}) all-reduce(%a, %b)")
      Collectives(number=1, large=1, num_bytes=4100)
    """
    found = sizes(text)
    return Collectives(len(found), sum(size > LARGE for size in found), sum(found))


def sizes(text: str) -> list[int]:
    """The bytes of the result of each instruction that `count` counts, in order."""
    return [_num_bytes(match[1]) for match in _INSTRUCTION.finditer(text)]


def _num_bytes(shape: str) -> int:
    """Of one array, or of a tuple of them."""
    total = 0
    for name, bits, dimensions in _ARRAY.findall(shape):
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        total += size if name == "pred" else math.ceil(size * int(bits or 0) / 8)
    return total
