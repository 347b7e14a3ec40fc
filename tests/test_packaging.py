"""What a user installs: the wheel alone, without the extras."""

import email
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import typed

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-q", "-w", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [x for x in names if x.endswith("/METADATA")]
        requirements = email.message_from_bytes(archive.read(metadata)).get_all(
            "Requires-Dist"
        )
    modules = {str(x.relative_to(ROOT)) for x in (ROOT / "eigensam_jax").rglob("*.py")}
    package = {x for x in names if ".dist-info/" not in x}
    assert package == modules | {"eigensam_jax/py.typed"}
    required = {x for x in requirements if "extra ==" not in x}
    assert {x.split(">")[0] for x in required} == {"jax", "optax"}
    assert wheel.stat().st_size < 300_000


def test_the_program_for_the_type_checker_runs():
    assert typed.main() > 1 - 1e-4  # Hv is along the top eigenvector


PROGRAM = """
import jax.numpy as jnp, optax, eigensam_jax
tx = optax.chain(eigensam_jax.eigen_sam(0.05, 0.2), optax.sgd(0.1))
loss = lambda w: jnp.sum(w**2)
w = jnp.ones(3)
updates, state = tx.update(2 * w, tx.init(w), w, value_fn=loss)
assert abs(optax.tree.get(state, "perturbation_norm") - 0.05) < 1e-6
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    run = lambda *command: subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run(scripts / "pip", "install", "-q", wheel).returncode == 0
    done = run(scripts / "python", "-W", "error", "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    version = run(scripts / "eigensam", "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "eigensam_jax")
    compare = run(scripts / "eigensam", "compare")
    assert compare.returncode == 2
    assert compare.stderr.count("\n") == 1
    assert "pip install" in compare.stderr
