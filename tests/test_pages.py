"""Every page: its code runs, its links lead somewhere, what it names exists."""

import ast
import functools
import importlib.util
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import eigensam_jax
from eigensam_jax.experiments import cli

ROOT = Path(__file__).parent.parent


def text_of(path):
    """Of a notebook, that of its Markdown cells."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join(
        "".join(x["source"]) for x in cells if x["cell_type"] == "markdown"
    )


PATHS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("notebooks/*.*")),
    *sorted(ROOT.glob("notebooks/results/**/*.md")),
]
PAGES = {str(path.relative_to(ROOT)): text_of(path) for path in PATHS}
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("name", PAGES)


def python_blocks(page):
    return [block for language, block in FENCED.findall(page) if language == "python"]


@pytest.mark.parametrize(
    "name", [x for x, page in PAGES.items() if python_blocks(page)]
)
def test_the_python_blocks_run(name):
    namespace = {}
    for block in python_blocks(PAGES[name]):
        exec(compile(block, name, "exec"), namespace)


def anchors(page):
    """Of a page's headings, as they are made of these on the web."""
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name].replace("\n", " ")):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            page = PAGES[str(target.resolve().relative_to(ROOT))]
            assert anchor in anchors(page), link


def test_every_plot_is_shown():
    plots = set(ROOT.glob("notebooks/results/**/*.png"))
    shown = {
        ((ROOT / name).parent / path).resolve()
        for name, page in PAGES.items()
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    }
    assert plots
    assert plots <= shown


def code_spans(page):
    """What stands between single backquotes, each in one line."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCED.sub("", page))
    return [" ".join(span.split()) for span in spans]


ROOTS = {
    "eigensam_jax": eigensam_jax,
    "jax": jax,
    "jnp": jnp,
    "nnx": nnx,  # of Flax, as everywhere on the pages
    "optax": optax,
}


def find(name):
    """What a dotted name of ours, of JAX or of optax stands for; None for others."""
    if not re.fullmatch(r"[\w.]+", name):
        return None
    first, *rest = name.split(".")
    if first in ROOTS:
        found = ROOTS[first]
    elif hasattr(eigensam_jax, first):
        found = getattr(eigensam_jax, first)
    elif importlib.util.find_spec(f"eigensam_jax.{first}"):
        found = importlib.import_module(f"eigensam_jax.{first}")
    else:
        return None
    return functools.reduce(getattr, rest, found)


def check_names(span):
    """Looks up dotted names, and keywords of our functions; returns how many."""
    try:
        nodes = list(ast.walk(ast.parse(f"_({span})", mode="eval")))  # keywords too
    except SyntaxError:  # a formula or a command
        return 0
    for node in nodes:
        if isinstance(node, ast.Call) and node.keywords:
            function = find(ast.unparse(node.func))
            if function and function.__module__.startswith("eigensam_jax"):
                inspect.signature(function).bind_partial(
                    **{x.arg: 0 for x in node.keywords}
                )
    dotted = [ast.unparse(x) for x in nodes if isinstance(x, ast.Attribute)]
    return sum(find(x) is not None for x in dotted)


def test_what_the_pages_name_exists():
    found = 0
    for name, page in PAGES.items():
        for span in code_spans(page):
            if "/" in span or span.endswith(".py"):  # a path
                continue
            try:
                found += check_names(span)
            except (AttributeError, TypeError) as error:
                raise AssertionError(f"{name} says `{span}`") from error
    assert found > 100


@every_page
def test_the_files_that_are_named_exist(name):
    for span in code_spans(PAGES[name]):
        if re.fullmatch(r"(eigensam_jax|tests|notebooks)/[\w./]*", span):
            assert (ROOT / span).exists(), span


def test_the_commands_take_the_options_that_the_pages_give_them(capsys):
    seen = 0
    for name, page in PAGES.items():
        lines = code_spans(page) + page.splitlines()
        for line in lines:
            command = re.match(r"(?:.*\.venv/bin/)?eigensam (\w+)((?: \S+)*)$", line)
            if command is None:
                continue
            with pytest.raises(SystemExit, match="0"):
                cli.main([command[1], "--help"])
            help_text = capsys.readouterr().out
            for option in re.findall(r"--[\w-]+", command[2]):
                seen += 1
                assert re.search(rf"{option}\b", help_text), (name, line)
    assert seen > 20
