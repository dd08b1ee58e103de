"""How a script's arguments become its configuration: `script.py [file.yaml] [key=value ...]`, checked, errors in one line."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import signal
import sys
import textwrap
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException
from omegaconf.resolvers import oc

from flame_composer.config import ConfigError, DataError, InvalidField, ScriptConfig, TrainingError, is_text

PASSWORD = r"(://[^/@:\s]*:)[^/@\s]+@"  # in an address; it would end up in logs
EXIT_CONFIG = 2
EXIT_DATA = 1
SECONDS_BEHIND = 20  # that a mistake is met by the other processes of a machine before its first one, at most
ANY_NAME = "NAME"  # stands in help for the name of a section that the user names
SECTIONS = "sections under names of your own"
EXIT_INTERRUPTED = 128 + signal.SIGINT

C = TypeVar("C", bound=ScriptConfig)


def load(cls: type[C], argv: list[str]) -> C:
    """The configuration that `[file.yaml] [key=value ...]` asks for, checked.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type, a key that must be
    set and is not, and whatever `validate()` of any section refuses.
    """
    sources: list[tuple[str, DictConfig]] = []
    if cls.positional:
        values = list(itertools.takewhile(lambda argument: "=" not in argument and not argument.startswith("-"), argv))
        file, overrides = None, _split(argv[len(values) :])[1]
        sources += [("command line", OmegaConf.create({cls.positional: values}))] if values else []
    else:
        file, overrides = _split(argv)
        if file is not None:
            sources.append((file, _read_yaml(file)))
    sources += [("command line", _read_override(cls, argument)) for argument in overrides]

    merged = OmegaConf.structured(cls)
    known = [key for key, _, _, _ in fields_of(cls)]
    origins: dict[str, tuple[str, Any]] = {}
    for origin, node in sources:
        content = OmegaConf.to_container(node, resolve=False)
        assert isinstance(content, dict)
        _check_keys(cls, content, origin, known, elsewhere=cls.elsewhere)
        for key, value in _leaves(cls, content):
            origins[key] = origin, value
            origins.update({inner: (origin, each) for inner, each in _inner(key, value)})
            if type(value) in (int, float) and value not in (0, 1) and _annotation(cls, key) == "bool":
                raise ConfigError(f"{origin}: {key}={show(value)}: must be bool")  # OmegaConf takes any number for true
            try:
                merged = OmegaConf.merge(merged, _nested(key, value))
            except (OmegaConfBaseException, TypeError) as error:
                raise ConfigError(f"{origin}: {key}={show(value)}: {_reason(cls, key, error)}") from None
    place = file or "command line"
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{place}: {key}: must be set ({_doc(cls, key)}); add it to the file or give {key}=...")
        config: Any = OmegaConf.to_object(merged)
        resolved_yaml = _without_environment(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(cls, merged, origins) or f"{place}: {_first_line(error)}") from None
    assert isinstance(config, cls)
    config.resolved_yaml, config.origins, config.place = resolved_yaml, origins, place
    for prefix, section in _sections(config):
        try:
            getattr(section, "validate", lambda: None)()
        except InvalidField as problem:
            raise ConfigError(_explain(config, InvalidField(prefix + problem.name, problem.rule))) from None
    return config


def run(main: Callable[[C], None], cls: type[C]) -> int:
    """Load the configuration from sys.argv and call `main` with it; returns the process's exit status."""
    return _run(main, cls, Path(sys.argv[0]).name, sys.argv[1:])


def run_one_of(mains: Mapping[str, tuple[Callable[[Any], None], type[ScriptConfig]]]) -> int:
    """As `run`, for a script that does several things: `script.py [name] [file.yaml] [key=value ...]`, the first by default."""
    script, argv = Path(sys.argv[0]).name, sys.argv[1:]
    first = argv[0] if argv else ""
    if first in mains:
        return _run(*mains[first], f"{script} {first}", argv[1:])
    if first in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print("\n\n".join(help_text(cls, f"{script} {name}") for name, (_, cls) in mains.items()))
        return 0
    if first and "=" not in first and not first.startswith("-") and not first.endswith((".yaml", ".yml")):
        names = list(mains)
        message = f"command line: {first}: must be one of {', '.join(names)}, or a YAML file{nearest(first, names)}"
        print(f"error: {message}", file=sys.stderr)
        return EXIT_CONFIG
    name = next(iter(mains))
    return _run(*mains[name], f"{script} {name}", argv)


def _run(main: Callable[[C], None], cls: type[C], script: str, argv: list[str]) -> int:
    if any(argument in ("-h", "--help") for argument in argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends quietly
        print(help_text(cls, script))
        return 0
    config = None
    _told.clear()
    signal.signal(signal.SIGTERM, _leave)
    try:
        config = load(cls, argv)
        try:
            main(config)
        except Exception:
            if _told:  # a library that was called from made another error of it: safetensors does
                sys.exit(_told[0])
            raise
    except (ConfigError, DataError, TrainingError) as error:
        message = _explain(config, error) if config is not None and isinstance(error, InvalidField) else str(error)
        # An error in a loader process arrives with that process's traceback before it.
        if message.startswith("Caught "):
            message = message.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        message = re.sub(PASSWORD, r"\1***@", " ".join(message.splitlines()))
        # Every rank meets the same mistake in the configuration, and one of them says it.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr, flush=True)
        if isinstance(error, DataError | TrainingError):
            return EXIT_DATA
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # A launcher ends the others when the first process fails, and reports what the lowest rank ended with: 2, if that
            # is let go first.
            time.sleep(SECONDS_BEHIND)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def listen_to_signals() -> None:
    """Take SIGTERM and Ctrl-C back from Composer, which sets handlers of its own when it is imported: theirs end a process in
    which ours would go on, or know why an error came."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


_told: list[int] = []  # the status to leave with, once a signal came


def _leave(number: int, _frame: FrameType | None) -> None:
    """Ends the process as an exception does, with whatever it has open closed; status 143 for SIGTERM."""
    _told.append(128 + number)
    sys.exit(_told[0])


def _explain(config: ScriptConfig, problem: InvalidField) -> str:
    """One line that says where the field was set, to what, and the rule it breaks."""
    parts = problem.name.split(".")
    above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]  # where it is missing, its section's place
    origin, value = next((config.origins[key] for key in above if key in config.origins), (config.place, None))
    if problem.name not in config.origins:
        value = config
        for part in problem.name.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    value = None if dataclasses.is_dataclass(value) else value
    return _masked(f"{origin}: {problem.name}{'' if value is None else f'={show(value)}'}: {problem.rule}", config.origins)


def _masked(text: str, origins: Mapping[str, tuple[str, Any]]) -> str:
    """A message with the names of the environment's variables in place of what they are set to."""
    for name in re.findall(r"oc\.env:([^,}$]+)", str(origins)):
        value = os.environ.get(name, "")
        # What is shorter is no secret, and would be found in words.
        text = text.replace(value, name) if len(value) > 3 else text
    return text


def nearest(name: str, allowed: list[str]) -> str:
    """'; did you mean X?' for the allowed name closest to `name`, or '' if none is close."""
    name, by_name = name.lower(), {key.lower(): key for key in reversed(allowed)}
    last = name.rsplit(".", 1)[-1]
    same_leaf = [key for key in allowed if key.lower().rsplit(".", 1)[-1] == last]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in by_name}
    close = same_leaf or [by_name[key] for key in difflib.get_close_matches(name, list(by_name), n=1)] or [
        by_name[by_leaf[leaf]] for leaf in difflib.get_close_matches(last, list(by_leaf), n=1)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def help_text(cls: type[ScriptConfig], script: str) -> str:
    """Usage, then every key with its type, default and one-line doc."""
    before = f"{cls.positional.upper()} ..." if cls.positional else "[file.yaml]"
    lines = [f"usage: {script} {before} [key=value ...]", "", inspect.cleandoc(cls.__doc__ or ""), "", "keys:"]
    for key, annotation, default, doc in fields_of(cls):
        lines.append(f"  {key}: {annotation}{'' if default is None else f' = {default}'}")
        lines += textwrap.wrap(doc, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    for argument in argv:
        if not is_text(argument):
            raise ConfigError(f"command line: {argument!a}: must be UTF-8")
    if argv and argv[0].startswith("-"):
        raise ConfigError(f"command line: {argv[0]}: unknown option; arguments are [file.yaml] [key=value ...], see --help")
    file = argv[0] if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for argument in overrides:
        if "=" not in argument:
            shown = argument or repr(argument)
            raise ConfigError(f"command line: {shown}: must be key=value (only the first argument can be a file)")
    return file, overrides


def _read_yaml(file: str) -> DictConfig:
    if os.path.isdir(file):
        raise ConfigError(f"{file}: is a folder; name a YAML file")
    if not os.path.isfile(file):
        folder = Path(file).parent
        beside = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
        close = difflib.get_close_matches(file, beside, n=1)
        raise ConfigError(f"{file}: no such file{f'; did you mean {close[0]}?' if close else ''}")
    not_a_mapping = "must hold keys and values (a YAML mapping)"
    try:
        node = OmegaConf.load(file)
    except OSError as error:  # OmegaConf raises one of its own, without a number, for a file that holds a single value
        raise ConfigError(f"{file}: {'cannot be read: ' + str(error.strerror) if error.errno else not_a_mapping}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split()).replace(f'in "{os.path.abspath(file)}", ', "at ")
        raise ConfigError(f"{file}: not valid YAML: {reason}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{file}: {not_a_mapping}")
    return node


def _read_override(cls: type, argument: str) -> DictConfig:
    key, _, text = argument.partition("=")
    annotation = _annotation(cls, key)
    quoted = text.startswith("[") and text.endswith("]") and bool(set(text) & set("\"'"))
    plain_list = annotation == "list[str]" and text != "null" and not quoted
    try:
        # As it stands: to YAML "def f(x):" is a mapping, and *.jsonl an alias.
        if plain_list and text.startswith("[") and text.endswith("]"):
            return OmegaConf.create(_nested(key, _split_list(text[1:-1])))
        if annotation == "str" or plain_list or (annotation == "str | None" and text != "null"):
            return OmegaConf.create(_nested(key, text))
        return OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, IndexError, RecursionError) as error:  # IndexError: '[=1'
        reason = _first_line(error) if isinstance(error, OmegaConfBaseException) else " ".join(str(error).split())
        raise ConfigError(f"command line: {argument}: cannot be read: {reason}") from None


def _dataclass_of(annotation: Any) -> type | None:
    """The dataclass in `X` or `X | None`, if there is one."""
    if get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def _named_sections(annotation: Any) -> type | None:
    """The dataclass in `dict[str, X]`, if there is one: sections under names of the user's own."""
    return _dataclass_of(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _check_keys(
    cls: type, content: dict[Any, Any], origin: str, known: list[str], prefix: str = "", *, elsewhere: Mapping[str, str]
) -> None:
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    for key, value in content.items():
        full = f"{prefix}{key}"
        if full in known and key not in names:
            above, _, leaf = full.rpartition(".")
            raise ConfigError(f"{origin}: {full}: unknown key; in a file write {leaf} on a line of its own under {above}")
        if key not in names:
            shown = (full if len(full) < 80 else f"{full[:77]}...") or repr(full)
            meant = elsewhere.get(full.rpartition(".")[2])
            close = f"; did you mean {meant}?" if meant else nearest(full, known)
            raise ConfigError(f"{origin}: {shown}: unknown key{close or '; see --help for all keys'}")
        section, each = _dataclass_of(hints[key]), _named_sections(hints[key])
        if section is not None and isinstance(value, dict):
            _check_keys(section, value, origin, known, f"{full}.", elsewhere=elsewhere)
        if each is None or not isinstance(value, dict):
            continue
        for name, content_of_name in value.items():
            if not isinstance(name, str) or "." in name:
                raise ConfigError(f"{origin}: {full}: {name!r} is no name; names are letters, digits, '_' and '-'")
            if not isinstance(content_of_name, dict):
                raise ConfigError(f"{origin}: {full}.{name}={show(content_of_name)}: must hold keys and values; its keys are "
                                  f"{', '.join(field.name for field in dataclasses.fields(each))}")
            known_here = [key.replace(f"{full}.{ANY_NAME}.", f"{full}.{name}.") for key in known]
            _check_keys(each, content_of_name, origin, known_here, f"{full}.{name}.", elsewhere=elsewhere)


def _leaves(cls: type, content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of `content` by full key; a single value given for a list becomes a list of one."""
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        section, each = _dataclass_of(hints[key]), _named_sections(hints[key])
        if section is not None and isinstance(value, dict) and value:
            yield from _leaves(section, value, f"{prefix}{key}.")
        elif each is not None and isinstance(value, dict) and value:
            for name, content_of_name in value.items():
                yield from _leaves(each, content_of_name, f"{prefix}{key}.{name}.")
        elif get_origin(hints[key]) in (list, tuple) and isinstance(value, str) and "${" not in value:
            yield f"{prefix}{key}", _split_list(value)
        elif get_origin(hints[key]) is list and isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", [value]
        else:
            yield f"{prefix}{key}", value


def _inner(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What lies within a value whose keys are a third party's, by full key."""
    for name, each in value.items() if isinstance(value, dict) else ():
        yield f"{key}.{name}", each
        yield from _inner(f"{key}.{name}", each)


def _split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _nested(key: str, value: Any) -> dict[Any, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str | None, str]]:
    """Full key, type, default (None where a section or a key that must be set) and doc of every field."""
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for f in dataclasses.fields(cls):
        section, each = _dataclass_of(hints[f.name]), _named_sections(hints[f.name])
        annotation = str(f.type).replace("Literal[", "one of [") if section is None else "section"
        annotation = annotation if each is None else SECTIONS
        if f.default is dataclasses.MISSING:
            assert f.default_factory is not dataclasses.MISSING
            default = None if section else show(f.default_factory())
        else:
            default = "(must be set)" if f.default == MISSING else show(f.default)
        yield f"{prefix}{f.name}", annotation, default, docs.get(f.name, "")
        if section is not None:
            yield from fields_of(section, f"{prefix}{f.name}.")
        if each is not None:
            yield from fields_of(each, f"{prefix}{f.name}.{ANY_NAME}.")


def _annotation(cls: type, key: str) -> str:
    """The type of a field as `--help` has it; '' for a key that is none."""
    def is_it(field: str) -> bool:
        parts, ours = field.split("."), key.split(".")
        return len(parts) == len(ours) and all(part in (our, ANY_NAME) for part, our in zip(parts, ours, strict=True))

    return next((annotation for name, annotation, _, _ in fields_of(cls) if is_it(name)), "")


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """The string literal under each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[ast.unparse(node.target)] = ast.literal_eval(following.value)
    return docs


def _doc(cls: type, key: str) -> str:
    return next((" ".join(doc.split()).rstrip(".") for name, _, _, doc in fields_of(cls) if name == key), "")


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every section under its key prefix, the innermost first: their own rules come before those across sections."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _sections(value, f"{prefix}{f.name}.")
        for name, each in value.items() if isinstance(value, dict) else ():
            if dataclasses.is_dataclass(each):
                yield from _sections(each, f"{prefix}{f.name}.{name}.")
    yield prefix, config


def _reason(cls: type, key: str, error: Exception | None) -> str:
    annotation = _annotation(cls, key)
    if annotation == SECTIONS:
        below = [name for name, _, _, _ in fields_of(cls) if name.startswith(f"{key}.{ANY_NAME}.")]
        return f"must hold {SECTIONS}; their keys are {', '.join(below)}"
    if annotation == "section":
        return f"must hold keys and values; its keys are {', '.join(_section_keys(cls, key))}"
    if annotation:
        return f"must be {annotation}"
    return "is of the wrong type" if error is None else _first_line(error)


def _section_keys(cls: type, key: str) -> list[str]:
    prefix = f"{key}."
    return [name for name, _, _, _ in fields_of(cls) if name.startswith(prefix) and "." not in name[len(prefix):]]


def _unresolved(cls: type, merged: DictConfig, origins: dict[str, tuple[str, Any]]) -> str | None:
    """What is wrong with the first key whose interpolation fails; never what an environment variable is set to."""
    for key, (origin, value) in sorted(origins.items(), key=lambda item: -len(item[0])):  # the innermost first
        if "${" not in str(value):
            continue
        try:
            node = OmegaConf.select(merged, key)
            if OmegaConf.is_config(node):
                OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            if isinstance(error, InterpolationValidationError):
                reason = _reason(cls, key, None)
            elif "GrammarParseError" in str(error):
                reason = "cannot be resolved"
            else:
                reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", _first_line(error)).strip('"')
            reason = _masked(reason, origins)
            if reason.startswith("Interpolation key"):
                reason += "; where '${' is meant as it stands, write '\\${'"
            return f"{origin}: {key}={show(value)}: {reason}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def show(value: Any) -> str:
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return ", ".join(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _without_environment(merged: DictConfig) -> str:
    """The configuration as YAML with every interpolation resolved but those of the environment, which may be secret."""
    untyped = OmegaConf.create(OmegaConf.to_container(merged, resolve=False))
    assert isinstance(untyped, DictConfig)

    def decode(text: str | None, _parent_: Any, _node_: Any) -> Any:
        return text if text is not None and "<environment variable" in text else oc.decode(text, _parent_, _node_)

    OmegaConf.register_resolver("oc.env", lambda *names: f"<environment variable {names[0]}>", replace=True)
    OmegaConf.register_resolver("oc.decode", decode, replace=True)
    try:
        OmegaConf.resolve(untyped)
        return OmegaConf.to_yaml(untyped)
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)
        OmegaConf.register_resolver("oc.decode", oc.decode, replace=True)
