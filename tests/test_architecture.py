"""The rules of the layout, read from the source: who may import whom, what must not exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "flame_composer").glob("**/*.py"))
SCRIPTS = sorted([*(ROOT / "recipes").glob("**/*.py"), *(ROOT / "convert").glob("**/*.py")])
TREES = {path: ast.parse(path.read_text()) for path in LIBRARY + SCRIPTS}
GROUND = {
    "flame_composer.batch",
    "flame_composer.errors",
    "flame_composer.fork_server",
    "flame_composer.lines",
    "flame_composer.processes",
    "flame_composer.quantities",
    "flame_composer.reference",
}
FORBIDDEN_NAMES = {"utils", "util", "common", "builders", "helpers", "misc", "registry"}
MAX_SCRIPT_LINES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 100, 400, 60
MAX_SHARE = 0.15  # of the library's lines in one package
# These look fields up by the names that dataclasses.fields gives or that are written out there.
FIELDS_BY_NAME = ("flame_composer/config/", "convert/to_mds.py", "convert/train_tokenizer.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, that_run: bool = False) -> Iterator[str]:
    """Yield the full dotted names of all that a file imports, wherever in it.

    Those in code in its strings, and those that only annotations need, too, unless `that_run`.
    """
    tree = TREES[path]
    left_out: set[ast.AST] = set()
    if that_run:
        for_types = [node for node in ast.walk(tree) if is_type_checking(node)]
        left_out = {each for node in for_types for each in ast.walk(node)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not that_run:
            yield from imports_in_code(node.value)


def imports_in_code(text: str) -> Iterator[str]:
    for module, names in re.findall(r"\bfrom (flame_composer[\w.]*) import ([\w, ]+)", text):
        yield from (f"{module}.{name.strip()}" for name in names.split(","))
    if re.fullmatch(r"flame_composer(\.\w+)+", text):  # preloaded by fork servers
        yield text


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call))


def test_there_is_something_to_read():
    assert {"flame_composer.config.cli", "flame_composer.lines", "flame_composer.cpu"} <= {
        module_of(path) for path in LIBRARY
    }
    assert {"train", "evaluate", "generate", "to_mds", "to_hf", "train_tokenizer"} <= {
        path.stem for path in SCRIPTS
    }


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_imports_point_one_way(path):
    tops = {name.partition(".")[0] for name in imports(path)}
    assert not tops & {
        "recipes",
        "convert",
        "tests",
    }, "scripts are leaves, and nothing needs the tests"
    assert not tops & {script.stem for script in SCRIPTS}, "no script imports another"


def test_the_library_has_no_import_cycles():
    modules = {module_of(path) for path in LIBRARY}
    graph: dict[str, set[str]] = {}
    for path in LIBRARY:
        found = (imported(name, modules) for name in imports(path, that_run=True))
        graph[module_of(path)] = {module for module in found if module}
    done: set[str] = set()
    while ready := {
        module for module, needed in graph.items() if module not in done and needed <= done
    }:
        done |= ready
    assert done == set(graph)


def imported(name: str, modules: set[str]) -> str | None:
    """Return the module of the library that an import of `name` runs, but for packages' doors;
    None if there is none.
    """
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name if name.count(".") > 1 or name in GROUND else None


# The plan in docs/architecture.md: a package imports from those in an earlier group.
GROUPS = (
    {"errors", "lines", "processes", "fork_server", "agree", "batch", "quantities", "cpu"},
    {"storage"},
    {"upstream"},
    {"text", "config"},
    {"cleaning", "dataset", "model"},
    {"loader", "checkpoint", "use"},
    {"export", "plan", "serve"},
    {"train"},
    {"bench", "sweep", "reference"},
)
FLOORS = {room: floor for floor, rooms in enumerate(GROUPS) for room in rooms}
LIGHT = ("config", "text", "dataset")  # a bad YAML fails in well under a second
HEAVY = {"torch", "composer", "streaming"}
# Those of `upstream` that light packages import
LIGHT_UPSTREAM = {"flame_composer.upstream.omegaconf", "flame_composer.upstream.tokenizers"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def rooms_of(path: Path) -> set[str]:
    modules = {module_of(each) for each in LIBRARY}
    named = {name for name in imports(path) if name.startswith("flame_composer.")}
    doors = {name for name in named if name in {f"flame_composer.{room}" for room in FLOORS}}
    found = {module for name in named if (module := imported(name, modules))} | doors
    return {room_of(module) for module in found}


INNER = [path for path in LIBRARY if path != ROOT / "flame_composer" / "__init__.py"]


@pytest.mark.parametrize("path", INNER, ids=name_of)
def test_packages_import_from_earlier_groups_only(path):
    room = room_of(module_of(path))
    for other in rooms_of(path) - {room}:
        is_ground = FLOORS[room] == FLOORS[other] == 0
        assert FLOORS[other] < FLOORS[room] or is_ground, f"{room} must not import {other}"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in INNER
        if room_of(module_of(path)) in LIGHT or module_of(path) in LIGHT_UPSTREAM
    ],
    ids=name_of,
)
def test_light_packages_import_nothing_heavy(path):
    for node in TREES[path].body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & HEAVY, f"line {node.lineno}"
        patches = {name for name in names if name.startswith("flame_composer.upstream")}
        assert patches <= LIGHT_UPSTREAM, f"line {node.lineno}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_modules_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, node.name


def test_no_package_is_most_of_the_house():
    lines: dict[str, int] = {}
    for path in INNER:
        room = room_of(module_of(path))
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    most = max(lines, key=lambda room: lines[room])
    assert lines[most] <= MAX_SHARE * sum(lines.values()), (most, lines)


def test_no_module_without_an_owner():
    modules = {path.stem for path in LIBRARY + SCRIPTS} | {
        path.parent.name for path in LIBRARY + SCRIPTS
    }
    assert not modules & FORBIDDEN_NAMES


def test_init_files_export_nothing():
    """But the door of `cpu`, which published model cards name."""
    for path in LIBRARY:
        if path.name == "__init__.py" and path.parent.name != "cpu":
            assert all(is_docstring(node) for node in TREES[path].body), name_of(path)


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.Assign,
    ast.AnnAssign,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_nothing_runs_at_import_time(path):
    """Except in a fork server, which runs no other code of ours than the modules it preloads."""
    if path.stem == "fork_server":
        return
    for node in TREES[path].body:
        assert isinstance(node, DEFINITIONS) or is_docstring(node) or is_type_checking(node), (
            f"line {node.lineno}"
        )


def ends_as_a_script(tree: ast.Module) -> bool:
    """Whether the last statement is `if __name__ == "__main__": sys.exit(...)`, and the only one
    of that kind.
    """
    last = tree.body[-1]
    return (
        isinstance(last, ast.If)
        and ast.unparse(last.test) == "__name__ == '__main__'"
        and not last.orelse
        and len(last.body) == 1
        and isinstance(last.body[0], ast.Expr)
        and isinstance(last.body[0].value, ast.Call)
        and ast.unparse(last.body[0].value.func) == "sys.exit"
        and len(last.body[0].value.args) == 1
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts(path):
    assert len(path.read_text().splitlines()) <= MAX_SCRIPT_LINES
    assert ast.get_docstring(TREES[path])
    assert ends_as_a_script(TREES[path])
    for node in TREES[path].body[:-1]:
        assert isinstance(node, DEFINITIONS) or is_docstring(node), (
            f"line {node.lineno} runs when the script is imported"
        )


def test_no_line_is_too_wide():
    """Ruff lets those pass that end in a comment for a tool, or are one word."""
    for path in [*LIBRARY, *SCRIPTS, *sorted((ROOT / "tests").glob("**/*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{name_of(path)}:{number}"


def test_a_conditional_expression_chooses_a_value_and_no_effect():
    for path in [*LIBRARY, *SCRIPTS, *sorted((ROOT / "tests").glob("**/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            is_for_effect = isinstance(node, ast.Expr) and isinstance(
                node.value, ast.IfExp | ast.BoolOp
            )
            assert not is_for_effect, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_no_bare_except(path):
    bare = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_no_code_of_others_is_run(path):
    for call in calls(path):
        for keyword in call.keywords:
            value = (
                keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
            )
            if keyword.arg == "trust_remote_code":
                assert value is False, f"line {call.lineno}"
            if keyword.arg == "weights_only":
                assert value is True, f"line {call.lineno}"
        function = ast.unparse(call.func)
        if function in ("torch.load", "load_checkpoint"):
            assert any(keyword.arg == "weights_only" for keyword in call.keywords), (
                f"line {call.lineno}"
            )
        assert function not in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "os.system",
        ), f"line {call.lineno}"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_configurations_are_read_by_attribute(path):
    """`cfg.get(key, default)` hides a typo and a second default."""
    for call in calls(path):
        function = ast.unparse(call.func)
        assert not (
            function.endswith(".get") and function.split(".")[-2] in ("cfg", "config", "conf")
        ), f"line {call.lineno}"
        if function == "getattr" and ast.unparse(call.args[0]) in ("cfg", "config"):
            assert name_of(path).startswith(FIELDS_BY_NAME), f"line {call.lineno}"
            assert len(call.args) == 2, f"line {call.lineno}: no default"


def test_no_base_class_with_one_child():
    classes = [
        node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    bases = [ast.unparse(base) for node in classes for base in node.bases]
    for node in classes:
        is_error = node.name.endswith("Error")
        # A script's configuration, to which that of plan.py adds keys
        is_its_own = node.name == "TrainConfig"
        assert is_error or is_its_own or bases.count(node.name) != 1, node.name
