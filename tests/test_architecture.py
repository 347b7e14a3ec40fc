"""The layers of the package: imports run one way, and the core needs no extras."""

import ast
import subprocess
import sys
from pathlib import Path

import eigensam_jax

ROOT = Path(eigensam_jax.__file__).parent
LAYERS = [
    {"tree_math"},
    {"devices"},
    {"hessian"},
    {"arguments"},
    {"krylov"},
    {"density", "thick_restart"},
    {"eigen", "masking", "perturbation", "rounding"},
    {"trackers"},
    {"sharpness_aware"},
    {"transform"},
    {"diagnostics", "linen", "nnx"},
    {"sde"},
    {"__init__"},
    {"experiments"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path):
    """Names of the package's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "eigensam_jax":
            for alias in node.names:
                yield alias.name if alias.name in LEVEL else "__init__"
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = node.module.split(".")
            if names[0] == "eigensam_jax":
                yield names[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "eigensam_jax":
                    yield "__init__"


def test_imports_run_one_way():
    seen = 0
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for imported in imported_modules(path):
            seen += 1
            inside = module == imported
            assert inside or LEVEL[imported] < LEVEL[module], (path, imported)
    assert seen > 20


def test_the_core_imports_nothing_but_jax_and_optax():
    code = (
        "import sys, jax, optax; before = set(sys.modules); import eigensam_jax; "
        "print(*{x.split('.')[0] for x in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    added = set(result.stdout.split()) - set(sys.stdlib_module_names)
    assert "eigensam_jax" in added
    assert added <= {"eigensam_jax", "jax", "jaxlib", "optax"}
