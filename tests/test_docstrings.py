"""What docstrings list is what there is: fields of states, arguments of functions."""

import importlib
import inspect
import pkgutil
import re

import pytest

import eigensam_jax

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(eigensam_jax.__path__, "eigensam_jax.")
    if not module.name.endswith("__main__")
]
OBJECTS = {
    f"{module.__name__}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if getattr(value, "__module__", None) == module.__name__
}
TUPLES = {
    name: x
    for name, x in OBJECTS.items()
    if hasattr(x, "_fields") and x.__name__ != "Config"  # a command's --help does that
}
FUNCTIONS = {
    name: x
    for name, x in OBJECTS.items()
    if inspect.isfunction(x) and not x.__name__.startswith("_")
}


def listed(docstring, section):
    """The names that a section of a docstring explains, in their order."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    if f"{section}:" not in lines:
        return None
    names = []
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if entry := re.match(r"  (\*{0,2}\w+(?:, \*{0,2}\w+)*):", line):
            names += entry[1].replace("*", "").split(", ")
    return names


@pytest.mark.parametrize("name", TUPLES)
def test_attributes_are_the_fields(name):
    fields = list(TUPLES[name]._fields)
    assert listed(TUPLES[name].__doc__, "Attributes") == fields


@pytest.mark.parametrize("name", FUNCTIONS)
def test_args_are_the_parameters(name):
    args = listed(FUNCTIONS[name].__doc__, "Args")
    if args is not None:
        assert args == list(inspect.signature(FUNCTIONS[name]).parameters)


def test_public_functions_explain_their_arguments():
    public = [getattr(eigensam_jax, name) for name in eigensam_jax.__all__]
    functions = {x for x in public if inspect.isfunction(x)}
    modules = {*filter(inspect.ismodule, public), eigensam_jax.plotting}
    for module in modules - {eigensam_jax.tree_math}:
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("eigensam_jax")
            if inspect.isfunction(value) and ours and not name.startswith("_"):
                functions.add(value)
    assert len(functions) > 20
    for function in functions:
        assert listed(function.__doc__, "Args"), function
