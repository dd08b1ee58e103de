"""The pages of docs/ that are made from the code: configuration.md and upstream.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from flame_composer.config.extensions import OFFERED, REFUSED
from flame_composer.config.fields import fields_of, show
from flame_composer.config.rules import ScriptConfig
from flame_composer.config.train import TrainConfig
from flame_composer.train.extensions import arguments_of, find_class, in_words

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"
UPSTREAM_PAGE = ROOT / "docs" / "upstream.md"

INTRODUCTION = """# Configuration

Every script is run as `script.py [file.yaml] [key=value ...]`: defaults, then the file, then the
arguments. A key that does not exist, a value of the wrong type or one that breaks a rule ends the
script with status 2 and one line that names it. `${key}` stands for another key's value and
`${oc.env:NAME}` for an environment variable. A text is taken as it is written: `run_name: 1.10` and
`no` need no quotes. `null` means no value; in a file, quote the word if you mean a text. `~` at the
beginning of a path is the home folder; `$NAME` is not filled in. `script.py --help` shows the same
as this page, which is made from the code by `make docs`.
"""

UPSTREAM = """# Patches of other packages

Made from the code by `make docs`. Each patch has a test in `tests/upstream` that fails when the
patch is no longer needed. Patches are in `flame_composer/upstream/`, except subclasses, which are
where they are used. What makes fla run on a CPU is in `flame_composer/cpu/enable.py`.
"""

EXTENSIONS = """### algorithms, callbacks, loggers

Each is a section of names with their arguments: `callbacks.speed_monitor.window_size=20`, or in a
file

```yaml
algorithms:
  ema: {half_life: 500ba}
callbacks:
  lr_monitor:            # with its defaults
  speed_monitor: false   # left out, e.g. by an argument that overrides the file
loggers:
  file_logger: {}
```

Arguments are compared with the class's signature before anything starts. A run with any of these
goes on bit for bit when it is killed and started again. Arguments that are a fraction of the run
(`0.5dur`, `freeze_start`, a warmup's `duration`) follow `max_duration`. If that is changed so that
a step already taken would have been another one, the run is refused (`allow_schedule_change`). All
of these can be combined with one another, with `activation_checkpointing`, `compile`, `varlen` and
any number of devices and microbatches. `ema`, `swa`, `layer_freezing`, `generate` and `hf_export`
are refused with `parallelism.fsdp`. `memory_monitor`, the GPU metrics of `system_metrics_monitor`
and `speed_monitor`, and `microbatch_size: auto` have not been run on a GPU yet.
"""


def scripts() -> Iterator[tuple[str, type[ScriptConfig]]]:
    """Yield the command of each script, and the class of its configuration.

    Both are read from the line that ends the script.
    """
    for path in sorted([*(ROOT / "recipes").glob("*.py"), *(ROOT / "convert").glob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in imports
            for alias in node.names
        }
        name = str(path.relative_to(ROOT))
        for call in ast.walk(tree.body[-1]):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if call.func.id == "run":
                yield name, _class(call.args[1], names)
            if call.func.id == "run_one_of":
                given = typing.cast(ast.Dict, call.args[0])
                for key, value in zip(given.keys, given.values, strict=True):
                    yield (
                        f"{name} {ast.literal_eval(typing.cast(ast.Constant, key))}",
                        _class(typing.cast(ast.Tuple, value).elts[1], names),
                    )


def _class(node: ast.expr, names: dict[str, str]) -> type[ScriptConfig]:
    # The script imports either the class or the module that defines it.
    module, _, name = ast.unparse(node).rpartition(".")
    place = f"{names[module]}.{name}" if module else names[name]
    module, _, name = place.rpartition(".")
    return vars(importlib.import_module(module))[name]


def page() -> str:
    """Return the whole of docs/configuration.md."""
    parts = [INTRODUCTION]
    # The longest section comes first, since it is looked up most.
    for name, cls in sorted(scripts(), key=lambda item: item[1] is not TrainConfig):
        rows = [
            (f"`{key}`", _code(kind), "" if default is None else _code(default), doc)
            for key, kind, default, doc in fields_of(cls)
        ]
        parts += [
            f"## {name}\n\n{inspect.cleandoc(cls.__doc__ or '')}\n",
            _table(("key", "type", "default", "meaning"), rows),
        ]
        if cls is TrainConfig:
            parts += [EXTENSIONS, *_extensions()]
    return "\n".join(parts)


def _extensions() -> Iterator[str]:
    for section, names in OFFERED.items():
        rows = []
        for name, doc in names.items():
            arguments = arguments_of(find_class(section, name))
            rows.append(
                (
                    f"`{section}.{name}`",
                    doc,
                    "<br>".join(_argument(*each) for each in arguments.items()),
                )
            )
        yield _table(("name", "what it does", "arguments"), rows)
    yield "What else Composer has is refused, with the reason:\n"
    refused = [
        (f"`{section}.{name}`", reason)
        for section, names in REFUSED.items()
        for name, reason in names.items()
    ]
    yield _table(("name", "reason"), refused)


def _argument(name: str, parameter: inspect.Parameter) -> str:
    default = (
        "(must be set)"
        if parameter.default is inspect.Parameter.empty
        else f"= {show(parameter.default)}"
    )
    return _code(f"{name}: {in_words(parameter.annotation)} {default}")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [
        head,
        ("---",) * len(head),
        *(tuple(" ".join(cell.split()) for cell in row) for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def patches() -> Iterator[tuple[str, str, str]]:
    """Yield the name, Upstream text and Mends text of each function or class that has them.

    In their docstrings, `Upstream:` names the package, its version and what is patched, and
    `Mends:` says why.
    """
    for path in sorted((ROOT / "flame_composer").glob("*/*.py")):
        room = ".".join(path.relative_to(ROOT / "flame_composer").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            doc = ast.get_docstring(node) or ""
            if "Upstream: " in doc:
                what, _, mends = doc.partition("Upstream: ")[2].partition("Mends: ")
                yield f"{room}.{node.name}", " ".join(what.split()), " ".join(mends.split())


def upstream_page() -> str:
    """Return the whole of docs/upstream.md."""
    rows = sorted((f"`{name}`", what, mends) for name, what, mends in patches())
    return f"{UPSTREAM}\n" + _table(("what", "upstream", "mends"), rows)


def write() -> None:
    """Write the pages that are made from the code."""
    PAGE.write_text(page(), encoding="utf-8")
    UPSTREAM_PAGE.write_text(upstream_page(), encoding="utf-8")
