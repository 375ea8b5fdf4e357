"""How the package is built, counted from its own source: rooms, lines, imports that point upwards, circles, names.

python tests/structure.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "d2l_lib"
# What each room may import, besides itself (flat files are the room ""). Studies and views are for programs and pages.
MAY_IMPORT = {
    "": {"formats"},
    "formats": {""},
    "tasks": {"", "formats"},
    "training": {"", "formats", "tasks"},
    "analysis": {"", "formats", "tasks"},
    "studies": {"", "formats", "tasks", "training", "analysis"},
    "views": {"", "formats", "tasks", "analysis"},
}


def modules(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """{dotted name below the package: its syntax tree}."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name or "__init__"] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(module: str) -> str:
    """The folder that a module lies in, "" for a flat file."""
    return module.partition(".")[0] if "." in module or (PACKAGE / module).is_dir() else ""


def imports(trees: dict[str, ast.Module]) -> dict[str, dict[str, set[str]]]:
    """{module: {module that it imports, at any depth but not for types alone: the names that it takes}}."""
    graph: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in trees}
    for name, tree in trees.items():
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
                continue
            source = node.module or ""
            if source != "d2l_lib" and not source.startswith("d2l_lib."):
                continue
            inner = source.removeprefix("d2l_lib").lstrip(".")
            for alias in node.names:
                whole = f"{inner}.{alias.name}".lstrip(".")
                if whole in trees:
                    graph[name][whole].add("")
                else:
                    graph[name][inner or "__init__"].add(alias.name)
    return graph


def circles(graph: dict[str, dict[str, set[str]]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""
    order, low, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph.get(name, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def public_names(tree: ast.Module) -> dict[str, ast.AST]:
    """{name: its node} of a module's own functions, classes and constants without an underscore."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def functions(trees: dict[str, ast.Module]) -> list[tuple[str, ast.FunctionDef]]:
    """Every function and method with its place."""
    return [
        (f"{module}.{node.name}", node)
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def mentions(paths: list[Path]) -> set[str]:
    """All words of these files."""
    return {word for path in paths for word in re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8"))}


def n_parameters(function: ast.FunctionDef) -> int:
    """How many parameters it has, `self` and what a star takes aside."""
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return len([argument for argument in every if argument.arg not in ("self", "cls")])


def count() -> dict[str, object]:
    """The figures, by name."""
    trees = modules()
    graph = imports(trees)
    rooms = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    upwards = [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if module not in ("__init__", "__main__")
        and room_of(other) != room_of(module)
        and room_of(other) not in MAY_IMPORT[room_of(module)]
    ]
    outside = mentions([*ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "README.md"])
    words = {
        name: mentions([PACKAGE / (name.replace(".", "/") + ".py")])
        for name in trees
        if name and (PACKAGE / (name.replace(".", "/") + ".py")).is_file()
    }
    public, alone = 0, []
    for module, tree in trees.items():
        for name in public_names(tree):
            public += 1
            users = [other for other, found in words.items() if other != module and name in found]
            if not users and name not in outside and module not in ("__main__",):
                alone.append(f"{module}.{name}")
    every = functions(trees)
    lengths = sorted(((node.end_lineno - node.lineno + 1, place) for place, node in every), reverse=True)
    many = [place for place, node in every if n_parameters(node) > 6]
    return {
        "rooms": len(rooms),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")),
        "imports between modules": sum(len(others) for others in graph.values()),
        "imports upwards": upwards,
        "circles": circles(graph),
        "public names": public,
        "public names used by their own module alone": alone,
        "longest functions": lengths[:5],
        "functions with more than six parameters": many,
    }


if __name__ == "__main__":
    for what, figure in count().items():
        if isinstance(figure, list) and what != "longest functions":
            figure = f"{len(figure)}: {figure}" if "-v" in sys.argv else len(figure)
        print(f"{what}: {figure}")
