"""The layers of the package: imports run one way, and the core needs no extras."""

import ast
import subprocess
import sys
from pathlib import Path

import eigensam_jax

ROOT = Path(eigensam_jax.__file__).parent
LAYERS = [  # the modules of `_update` have floors of their own
    {"programs", "scalars"},
    {"tree_math"},
    {"devices"},
    {"arguments"},
    {"functions"},
    {"hessian"},
    {"eigen", "masking", "perturbation", "rounding"},
    {"trackers"},
    {"tracking"},
    {"update"},
    {"_periodic", "transform"},
    {"_info", "diagnostics", "linen", "nnx"},
    {"plotting", "sde"},
    {"__init__"},
    {"experiments"},
    {"__main__"},
]


EXPERIMENTS = [  # the floors of the rooms around it
    {"errors"},
    {"data", "records"},
    {"models", "entries", "ceilings"},
    {"registry"},
    {"training"},
    {"options"},
    # none of which imports another
    {"study", "track", "spectrum", "sde", "bench", "after_training"},
    {"wings"},
    {"report"},
    {"cli"},
]
MOST_MODULES, MOST_LINES = 14, 300  # of a folder, of a module


def imported_modules(path):
    """The full names of what a file imports of the package, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (f"{alias.name}.__init__" for alias in node.names)


def room_of(parts):
    return parts[1] if parts[0] == "_update" and len(parts) > 1 else parts[0]


def imports(folder, name, floors):
    """Every import in a folder of another room there: file, room, other, floors."""
    level = {room: i for i, rooms in enumerate(floors) for room in rooms}
    for path in folder.rglob("*.py"):
        room = room_of(path.relative_to(folder).with_suffix("").parts)
        for imported in imported_modules(path):
            if imported.startswith(f"{name}."):
                other = room_of(imported.removeprefix(f"{name}.").split("."))
                other = other if other in level else "__init__"
                if other != room and room in level:
                    yield path, room, other, level


def test_imports_run_one_way():
    for floors, folder, name in (
        (LAYERS, ROOT, "eigensam_jax"),
        (EXPERIMENTS, ROOT / "experiments", "eigensam_jax.experiments"),
    ):
        found = list(imports(folder, name, floors))
        for path, room, other, level in found:
            assert level[other] < level[room], (path, other)
        assert len(found) > 20


def test_every_module_has_a_floor():
    folder = ROOT / "experiments"
    rooms = {path.stem for path in folder.iterdir()} - {"__pycache__", "__init__"}
    assert rooms == set().union(*EXPERIMENTS)


def test_folders_and_modules_are_small():
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        modules = list(folder.glob("*.py"))
        assert len(modules) <= MOST_MODULES, folder
        for path in modules:
            assert len(path.read_text().splitlines()) <= MOST_LINES, path


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
