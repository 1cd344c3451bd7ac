"""The house rules, read from the syntax trees: layers, cycles, surroundings, printing, docstrings, budgets, imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"tokenizer", "matching", "matching_native", "vocabulary", "config", "state", "files", "checks", "ops"}
    | {"native", "backends"},
    {"models"},
    {"checkpoint", "loading", "formats", "chat", "data"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"", "cli", "__main__"},
]  # "" is the public face, roost/__init__.py
OPTIONAL = {"huggingface_hub", "transformers", "rich", "matplotlib", "triton", "pyarrow", "zstandard", "orjson"}

TREES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted((ROOT / "src/roost").rglob("*.py"))
}
MODULES = sorted(TREES)
EDGES = {module for module in MODULES if module.split(".")[1:2] in (["cli"], ["__main__"])}
FILES = sorted(
    path
    for place in ("src", "tests", "benchmarks", "recipes", "examples", "tools")
    for path in (ROOT / place).rglob("*.py")
)
NATIVE = sorted(path for path in (ROOT / "src/native").iterdir() if path.suffix in (".cpp", ".h", ".inl"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def layer(module: str) -> int:
    """The layer of a module by its first name under roost."""
    name = module.removeprefix("roost").removeprefix(".").split(".")[0]
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} belongs to no layer: add it to LAYERS and to CONTRIBUTING.md"
    return found[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere in the tree; of roost, the modules and never the names inside them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: import by the full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in TREES else node.module


def top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run on import: everything outside functions and `if TYPE_CHECKING`."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, (*FUNCTION, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))


def public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Classes, functions and methods whose names, and whose owners' names, do not begin with an underscore.

    `forward` is left out: the docstring of a torch module is that of its call.
    """
    for child in node.body:
        if isinstance(child, (*FUNCTION, ast.ClassDef)) and not child.name.startswith("_") and child.name != "forward":
            if not any("overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in child.decorator_list):
                yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}.{child.name}")


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str) -> None:
    tree = TREES[module]
    for name in imports(tree):
        if name.split(".")[0] == "roost":
            assert layer(name) <= layer(module), (
                f"{module} (layer {layer(module)}) imports {name} (layer {layer(name)})"
            )
    if module not in EDGES:
        text = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.ImportFrom))}
        surroundings = [
            t for t in text if any(w in t for w in ("os.environ", "os.getenv", "import environ", "import getenv"))
        ]
        assert not surroundings, f"{module} reads the environment: {surroundings}"
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
        assert not calls, f"{module} prints in line {calls[0].lineno}"
        eager = {
            name.split(".")[0]
            for node in top_level(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in imports(node)
        }
        assert not eager & OPTIONAL, f"{module} imports {eager & OPTIONAL} before they are needed"
    if tree.body:
        assert ast.get_docstring(tree), f"{module} has no docstring"
    bare = [name for name, node in public(tree, module) if not ast.get_docstring(node)]  # pyright: ignore[reportArgumentType]
    assert not bare, f"without docstring: {bare}"


def test_no_cycles() -> None:
    graph = {module: {n for n in imports(tree) if n in TREES and n != module} for module, tree in TREES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    text = path.read_text()
    budget = 500 if "ops" in path.parts else 350
    assert len(text.splitlines()) <= budget, f"{path.name} has more than {budget} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTION):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{node.name} in {path.name} has {lines} lines; the budget is 60"


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_budgets_of_the_native_library(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("// "), f"{path.name} does not say what it does"
    assert len(lines) <= 500, f"{path.name} has more than 500 lines"


def test_public_face() -> None:
    import roost

    assert len(set(roost.__all__)) == len(roost.__all__) <= 40
    for name in roost.__all__:
        assert hasattr(roost, name), f"roost.{name} is announced and missing"


IMPORT = """
import sys, threading, torch
flags = torch.get_num_threads, torch.are_deterministic_algorithms_enabled, torch.get_default_dtype, torch.initial_seed
before, loaded = [flag() for flag in flags], set(sys.modules)
import roost
assert [flag() for flag in flags] == before and threading.active_count() == 1
print(*sorted({name.split(".")[0] for name in set(sys.modules) - loaded}))
"""


def test_import_is_silent_and_light() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    names, *rest = done.stdout.splitlines()
    assert not rest and "roost" in names.split() and not set(names.split()) & OPTIONAL
