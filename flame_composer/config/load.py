"""How `[file.yaml] [key=value ...]` become a checked configuration."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException
from omegaconf.resolvers import oc

from flame_composer.config.fields import (
    ANY_NAME,
    SECTIONS,
    annotation_of,
    dataclass_of,
    doc_of,
    fields_of,
    hint_of,
    hints_of,
    named_sections,
    nearest,
    sections_of,
    show,
)
from flame_composer.config.rules import ScriptConfig, expand_path, is_text
from flame_composer.config.written import (
    as_it_stands,
    as_meant,
    parse_yaml,
    plain,
    require_shallow,
    takes_text,
    to_yaml,
)
from flame_composer.errors import ConfigError, InvalidField, hide, without_secrets

# Characters of all values together, when each ${key} stands for what it leads to
MOST_FILLED_IN = 1 << 24
_REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?(\.*)([A-Za-z_][\w.-]*)[^:{}]*\}")
MOST_SHOWN = 200  # letters of a value in an error
C = TypeVar("C", bound=ScriptConfig)
# What PyYAML raises for `!!int` without a number, `!!bool maybe` and `!!timestamp soon`.
BAD_TAGS = (IndexError, KeyError, AttributeError)


def load(cls: type[C], argv: list[str]) -> C:
    """The configuration that `[file.yaml] [key=value ...]` asks for, checked.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type, a
    key that must be set and is not, and whatever `validate()` of any section refuses.
    """
    sources: list[tuple[str, dict[Any, Any]]] = []
    if cls.positional:
        values = list(
            itertools.takewhile(
                lambda argument: "=" not in argument and not argument.startswith("-"), argv
            )
        )
        file, overrides = None, _split(argv[len(values) :])[1]
        sources += [("command line", {cls.positional: values})] if values else []
    else:
        file, overrides = _split(argv)
        if file is not None:
            sources.append((file, _read_yaml(file)))
    sources += [("command line", _read_override(cls, argument)) for argument in overrides]

    known = [key for key, _, _, _ in fields_of(cls)]
    given: list[Given] = []
    try:
        for origin, written in sources:
            content = as_meant(cls, written, origin)
            _check_keys(cls, content, origin, known, elsewhere=cls.elsewhere)
            for key, value in _leaves(cls, content):
                if (
                    type(value) in (int, float)
                    and value not in (0, 1)
                    and hint_of(cls, key) is bool
                ):
                    # OmegaConf takes any number for true
                    raise ConfigError(f"{origin}: {key}={show(value)}: must be bool")
                given.append(Given(origin, key, value))
    except ConfigError:
        _merge(cls, given)  # of two mistakes, the first is told
        raise
    merged = _merge(cls, given)
    _require_ends(merged, file or "command line")
    origins: dict[str, tuple[str, Any]] = {}
    for origin, key, value in given:
        origins[key] = origin, value
        origins.update({inner: (origin, each) for inner, each in _inner(key, value)})
    place = file or "command line"
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(
                f"{place}: {key}: must be set ({doc_of(cls, key)}); add it to the file or give"
                f" {key}=..."
            )
        resolved_yaml = _without_environment(merged)
        with _resolvers(_from_environment, _decoded):
            config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            _unresolved(cls, merged, origins) or f"{place}: {_first_line(error)}"
        ) from None
    assert isinstance(config, cls)
    config.resolved_yaml, config.origins, config.place = resolved_yaml, origins, place
    for prefix, section in sections_of(config):
        try:
            _expand_paths(section)
            getattr(section, "validate", lambda: None)()
        except InvalidField as problem:
            raise ConfigError(
                explain(config, InvalidField(prefix + problem.name, problem.rule))
            ) from None
    return config


def _require_ends(merged: DictConfig, place: str) -> None:
    """Raise ConfigError for texts that name one another over and over: ten, each of which has
    the next one in it ten times, take longer than anybody waits. One that leads back to itself
    is told of when it is filled in.
    """
    content = OmegaConf.to_container(merged, resolve=False)
    known: dict[tuple[str, ...], int] = {}

    def size(value: Any, path: tuple[str, ...]) -> int:
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            return 1 + sum(size(each, (*path, str(name))) for name, each in pairs)
        if not isinstance(value, str) or "${" not in value:
            return len(value) if isinstance(value, str) else 1
        if path not in known:
            known[path] = 0
            known[path] = len(value) + sum(
                named((path[: -len(dots)] if dots else ()) + tuple(name.split(".")))
                for dots, name in _REFERENCE.findall(value)
            )
        return known[path]

    def named(path: tuple[str, ...]) -> int:
        value: Any = content
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return size(value, path)

    if size(content, ()) > MOST_FILLED_IN:
        raise ConfigError(
            f"{place}: its values name one another (${{...}}) so often that together they have more"
            f" than {MOST_FILLED_IN:,} characters; write them out"
        )


class Given(NamedTuple):
    """A value that was given, its full key, and where."""

    origin: str
    key: str
    value: Any


def _merge(cls: type, given: Sequence[Given]) -> DictConfig:
    """Return the configuration with what was given, the later over the earlier.

    Raises ConfigError for the first value that is of the wrong type. All are merged at once, and
    only where that fails is the first at fault looked for: merging one by one takes time that grows
    with the square of their number.
    """
    merged, error = _merge_all(cls, given)
    if error is None:
        return merged
    index = _first_wrong(cls, given, alone=True)
    _, its_own = _merge_all(cls, given[index : index + 1])
    if its_own is None:  # no value is wrong by itself, but one is after those before it
        index = _first_wrong(cls, given, alone=False)
        _, its_own = _merge_all(cls, given[: index + 1])
    origin, key, value = given[index]
    raise ConfigError(f"{origin}: {key}={show(value)}: {_reason(cls, key, its_own)}")


def _first_wrong(cls: type, given: Sequence[Given], *, alone: bool) -> int:
    """Return the number of the first value that cannot be merged, by itself or after those
    before it, found by halves.
    """
    right, wrong = 0, len(given)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        _, error = _merge_all(cls, given[right if alone else 0 : middle])
        right, wrong = (middle, wrong) if error is None else (right, middle)
    return right


def _merge_all(cls: type, given: Sequence[Given]) -> tuple[DictConfig, Exception | None]:
    """Return the configuration with all that was given, or an error of OmegaConf's."""
    merged = OmegaConf.structured(cls)
    try:
        for layer in _layers(given):
            merged.merge_with(layer)
    except (OmegaConfBaseException, TypeError) as error:
        return merged, error
    assert isinstance(merged, DictConfig)
    return merged, None


def _layers(given: Sequence[Given]) -> list[dict[Any, Any]]:
    """Return what was given as nested dicts, in each of which no value lies at or within another
    one's place.
    """
    layers: list[dict[Any, Any]] = []
    within: dict[tuple[Any, ...], int] = {}  # the last layer that has a value at or within a place
    at: dict[tuple[Any, ...], int] = {}  # and the last that has one right there
    for _, key, value in given:
        for place, each in _places((*key.split("."),), value):
            above = [place[:length] for length in range(1, len(place) + 1)]
            number = max(within.get(place, -1), *(at.get(part, -1) for part in above)) + 1
            if number == len(layers):
                layers.append({})
            section = layers[number]
            for part in place[:-1]:
                section = section.setdefault(part, {})
            section[place[-1]] = each
            at[place] = number
            within.update({part: max(number, within.get(part, -1)) for part in above})
    return layers


def _places(place: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values within a dict at `place`, with theirs; one that is none, or empty, is there
    itself.
    """
    if not isinstance(value, dict) or not value:
        yield place, value
        return
    for name, each in value.items():
        yield from _places((*place, name), each)


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    for argument in argv:
        if not is_text(argument):
            raise ConfigError(f"command line: {argument!a}: must be UTF-8")
    if argv and argv[0].startswith("-"):
        raise ConfigError(
            f"command line: {argv[0]}: unknown option; arguments are [file.yaml] [key=value ...],"
            " see --help"
        )
    file = argv[0] if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for argument in overrides:
        if "=" not in argument:
            shown = argument or repr(argument)
            raise ConfigError(
                f"command line: {shown}: must be key=value (only the first argument can be a file)"
            )
    return file, overrides


def _read_yaml(file: str) -> dict[Any, Any]:
    if os.path.isdir(file):
        raise ConfigError(f"{file}: is a folder; name a YAML file")
    if not os.path.isfile(file):
        folder = Path(file).parent
        beside = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
        close = difflib.get_close_matches(file, beside, n=1)
        raise ConfigError(f"{file}: no such file{f'; did you mean {close[0]}?' if close else ''}")
    try:
        with Path(os.path.abspath(file)).open(encoding="utf-8") as stream:
            written = parse_yaml(stream)
        content = (
            {}
            if plain(written) is None
            else {written: None}
            if isinstance(written, str)
            else written
        )
        if isinstance(content, dict):
            OmegaConf.create(plain(content))  # which knows what an interpolation is
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException, *BAD_TAGS) as error:
        reason = _told(error).replace(f'in "{os.path.abspath(file)}", ', "at ")
        raise ConfigError(f"{file}: not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold keys and values (a YAML mapping)")
    return content


def _read_override(cls: type, argument: str) -> dict[Any, Any]:
    key, _, text = argument.partition("=")
    hint = hint_of(cls, key)
    quoted = text.startswith("[") and text.endswith("]") and bool(set(text) & set("\"'"))
    # As it stands: to YAML "def f(x):" is a mapping, and *.jsonl an alias.
    stands = (
        takes_text(hint)
        and (hint is str or str in get_args(hint))
        and not (get_origin(hint) is list and quoted)
    )
    is_list = get_origin(hint) is list and text.startswith("[") and text.endswith("]")
    try:
        if stands:
            parts = _split_list(text[1:-1]) if is_list else [text]
            OmegaConf.create(_nested(key, parts))
            return _nested(key, list(map(as_it_stands, parts)) if is_list else as_it_stands(text))
        require_shallow(text)
        if "\\" in key:  # which has a meaning of its own in OmegaConf; no key of ours has one
            unknown = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
            assert isinstance(unknown, dict)
            return unknown
        value = parse_yaml(text)
        nested = OmegaConf.from_dotlist([f"{key}=0"])  # which knows what '[0]' in a key is
        content = _with_leaf(OmegaConf.to_container(nested), value)
        OmegaConf.create(plain(content))
        return content
    # IndexError: '[=1'
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, *BAD_TAGS) as error:
        reason = _first_line(error) if isinstance(error, OmegaConfBaseException) else _told(error)
        raise ConfigError(f"command line: {argument}: cannot be read: {reason}") from None


def _told(error: Exception) -> str:
    told = " ".join(str(error).split())
    return (
        f"a tag does not fit its value ({told})"
        if isinstance(error, KeyError | AttributeError)
        else told
    )


def _with_leaf(nested: Any, leaf: Any) -> Any:
    """Return nested dicts of one key each with another innermost value."""
    return (
        {key: _with_leaf(inner, leaf) for key, inner in nested.items()}
        if isinstance(nested, dict)
        else leaf
    )


def _check_keys(
    cls: type,
    content: dict[Any, Any],
    origin: str,
    known: list[str],
    prefix: str = "",
    *,
    elsewhere: Mapping[str, str],
) -> None:
    hints = hints_of(cls)
    for key, value in content.items():
        full = f"{prefix}{key}"
        if full in known and key not in hints:
            above, _, leaf = full.rpartition(".")
            raise ConfigError(
                f"{origin}: {full}: unknown key; in a file write {leaf} on a line of its own under"
                f" {above}"
            )
        if key not in hints:
            shown, remedy = _unknown(full, value, known, elsewhere)
            shown = (shown if len(shown) < 80 else f"{shown[:77]}...") or repr(shown)
            raise ConfigError(f"{origin}: {shown}: unknown key{remedy}")
        section, each = dataclass_of(hints[key]), named_sections(hints[key])
        if section is not None and isinstance(value, dict):
            _check_keys(section, value, origin, known, f"{full}.", elsewhere=elsewhere)
        if each is None or not isinstance(value, dict):
            continue
        for name, content_of_name in value.items():
            if not isinstance(name, str) or "." in name:
                raise ConfigError(
                    f"{origin}: {full}: {name!r} is no name; names are letters, digits, '_' and '-'"
                )
            if not isinstance(content_of_name, dict):
                raise ConfigError(
                    f"{origin}: {full}.{name}={show(content_of_name)}: must hold keys and values;"
                    f" its keys are {', '.join(field.name for field in dataclasses.fields(each))}"
                )
            known_here = [key.replace(f"{full}.{ANY_NAME}.", f"{full}.{name}.") for key in known]
            _check_keys(
                each, content_of_name, origin, known_here, f"{full}.{name}.", elsewhere=elsewhere
            )


def _unknown(
    full: str, value: Any, known: list[str], elsewhere: Mapping[str, str]
) -> tuple[str, str]:
    """Of a key that there is none of, or of the first one in a section that there is none of:
    its name, and the remedy.
    """
    whole = full
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        whole += f".{name}"
    section, _, leaf = full.rpartition(".")
    ours = {key.rpartition(".")[2] for key in known}  # these are meant where others use them too
    for name, theirs in ((whole, whole), (whole, whole.rpartition(".")[2]), (full, leaf)):
        if theirs in elsewhere and (theirs == name or theirs not in ours):
            return name, f"; {elsewhere[theirs]}"
    for name in (full, whole):
        if close := nearest(name, known):
            return name, close
    beside = [key for key in known if key.rpartition(".")[0] == section]
    return (
        full,
        (
            f"; the keys of {section} are {', '.join(beside)}"
            if section and beside
            else "; see --help for all keys"
        ),
    )


def _leaves(cls: type, content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of `content` by full key; a single value given for a list becomes a list of
    one.
    """
    hints = hints_of(cls)
    for key, value in content.items():
        section, each = dataclass_of(hints[key]), named_sections(hints[key])
        if section is not None and isinstance(value, dict) and value:
            yield from _leaves(section, value, f"{prefix}{key}.")
        elif each is not None and isinstance(value, dict) and value:
            for name, content_of_name in value.items():
                yield from _leaves(each, content_of_name, f"{prefix}{key}.{name}.")
        elif (
            get_origin(hints[key]) in (list, tuple) and isinstance(value, str) and "${" not in value
        ):
            yield f"{prefix}{key}", _split_list(value)
        elif (
            get_origin(hints[key]) is list
            and isinstance(value, int)
            and not isinstance(value, bool)
        ):
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


def _reason(cls: type, key: str, error: Exception | None) -> str:
    annotation = annotation_of(cls, key)
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
    return [
        name
        for name, _, _, _ in fields_of(cls)
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    ]


def _unresolved(cls: type, merged: DictConfig, origins: dict[str, tuple[str, Any]]) -> str | None:
    """What is wrong with the first key whose interpolation fails; never what an environment
    variable is set to.
    """
    # The innermost first
    for key, (origin, value) in sorted(origins.items(), key=lambda item: -len(item[0])):
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
                reason = re.sub(
                    r"^\w+ raised while resolving interpolation: ", "", _first_line(error)
                ).strip('"')
            reason = _masked(reason, origins)
            if reason.startswith("Interpolation key"):
                reason += "; where '${' is meant as it stands, write '\\${'"
            return f"{origin}: {key}={show(value)}: {reason}"
    return None


def _without_environment(merged: DictConfig) -> str:
    """Return the configuration as YAML, with every interpolation resolved but those of the
    environment, which may be secret, and without passwords in addresses and the like.
    """
    untyped = OmegaConf.create(OmegaConf.to_container(merged, resolve=False))
    assert isinstance(untyped, DictConfig)

    def decode(text: str | None, _parent_: Any, _node_: Any) -> Any:
        return (
            text
            if text is not None and "<environment variable" in text
            else oc.decode(text, _parent_, _node_)
        )

    with _resolvers(lambda *names: f"<environment variable {names[0]}>", decode):
        content = OmegaConf.to_container(untyped, resolve=True)
    return to_yaml(without_secrets(content))


@contextmanager
def _resolvers(env: Callable[..., Any], decode: Callable[..., Any]) -> Iterator[None]:
    """Others in place of OmegaConf's for a while."""
    OmegaConf.register_resolver("oc.env", env, replace=True)
    OmegaConf.register_resolver("oc.decode", decode, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)
        OmegaConf.register_resolver("oc.decode", oc.decode, replace=True)


def _from_environment(name: str, *default: Any) -> Any:
    """What a variable is set to, which no line that leaves this process shows from now on."""
    if name in os.environ:
        hide(os.environ[name], name)
    return oc.env(name, *default)


def _decoded(text: str | None, _parent_: Any, _node_: Any) -> Any:
    """What is made of a variable is hidden part by part."""
    value = oc.decode(text, _parent_, _node_)
    for name in (name for name in os.environ if os.environ[name] == text):
        for part in _texts(value):
            hide(part, name)
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _expand_paths(section: Any) -> None:
    for name in getattr(section, "paths", ()):
        value = getattr(section, name)
        if isinstance(value, list):
            setattr(section, name, [expand_path(path, name) for path in value])
        elif value is not None:
            setattr(section, name, expand_path(value, name))


def explain(config: ScriptConfig, problem: InvalidField) -> str:
    """One line that says where the field was set, to what, and the rule it breaks."""
    parts = problem.name.split(".")
    # Where it is missing, its section's place
    above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    origin, value = next(
        (config.origins[key] for key in above if key in config.origins), (config.place, None)
    )
    if problem.name not in config.origins:
        value = config
        for part in problem.name.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    value = None if dataclasses.is_dataclass(value) else value
    shown = "" if value is None else f"={_short(_masked(show(value), config.origins))}"
    return _masked(f"{origin}: {problem.name}{shown}: {problem.rule}", config.origins)


def _masked(text: str, origins: Mapping[str, tuple[str, Any]]) -> str:
    """A message with the names of the environment's variables in place of what they are set to."""
    for name in re.findall(r"oc\.env:([^,}$]+)", str(origins)):
        value = os.environ.get(name, "")
        # What is shorter is no secret, and would be found in words.
        text = text.replace(value, f"${{{name}}}") if len(value) > 3 else text
    return text


def _short(shown: str) -> str:
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
