"""The way from `[file.yaml] [key=value ...]` to a checked configuration."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flame_composer.config.fields import (
    ANY_NAME,
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
from flame_composer.config.given import (
    Given,
    inner_values,
    layers_of,
    leaves,
    read_override,
    read_yaml,
    split_arguments,
)
from flame_composer.config.messages import explain, first_line, reason_of
from flame_composer.config.references import (
    decoded,
    from_environment,
    require_ends,
    unresolved,
    without_environment,
)
from flame_composer.config.rules import ScriptConfig, expand_path
from flame_composer.config.written import as_meant
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.upstream.omegaconf import resolved_by

C = TypeVar("C", bound=ScriptConfig)


def load(cls: type[C], argv: list[str]) -> C:
    """Return the configuration that `[file.yaml] [key=value ...]` gives, after checking it.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type, a
    key that must be set and is not, and anything that `validate()` of a section refuses.
    """
    sources: list[tuple[str, dict[Any, Any]]] = []
    if cls.positional:
        values = list(
            itertools.takewhile(
                lambda argument: "=" not in argument and not argument.startswith("-"), argv
            )
        )
        file, overrides = None, split_arguments(argv[len(values) :])[1]
        sources += [("command line", {cls.positional: values})] if values else []
    else:
        file, overrides = split_arguments(argv)
        if file is not None:
            sources.append((file, read_yaml(file)))
    sources += [("command line", read_override(cls, argument)) for argument in overrides]

    given = _given_by(cls, sources)
    merged = _merge(cls, given)
    require_ends(merged, file or "command line")
    origins: dict[str, tuple[str, Any]] = {}
    for origin, key, value in given:
        origins[key] = origin, value
        origins.update({inner: (origin, each) for inner, each in inner_values(key, value)})
    place = file or "command line"
    config, resolved_yaml = _resolved(cls, merged, place, origins)
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


def _given_by(cls: type[C], sources: Sequence[tuple[str, dict[Any, Any]]]) -> list[Given]:
    """Return the content of the file and the arguments, key by key, in their order."""
    known = [key for key, _, _, _ in fields_of(cls)]
    given: list[Given] = []
    try:
        for origin, written in sources:
            content = as_meant(cls, written, origin)
            _check_keys(cls, content, origin, known, elsewhere=cls.elsewhere)
            for key, value in leaves(cls, content):
                is_other_number = type(value) in (int, float) and value not in (0, 1)
                if is_other_number and hint_of(cls, key) is bool:  # true to OmegaConf
                    raise ConfigError(f"{origin}: {key}={show(value)}: must be bool")
                given.append(Given(origin, key, value))
    except ConfigError:
        _merge(cls, given)  # raises if an earlier value is wrong: the first mistake is reported
        raise
    return given


def _resolved(
    cls: type[C], merged: DictConfig, place: str, origins: Mapping[str, tuple[str, Any]]
) -> tuple[Any, str]:
    """Return the configuration with all references resolved, and its YAML without secrets."""
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(
                f"{place}: {key}: must be set ({doc_of(cls, key)}); add it to the file or give"
                f" {key}=..."
            )
        resolved_yaml = without_environment(merged)
        with resolved_by(from_environment, decoded):
            config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            unresolved(cls, merged, origins) or f"{place}: {first_line(error)}"
        ) from None
    return config, resolved_yaml


def _merge(cls: type, given: Sequence[Given]) -> DictConfig:
    """Return the configuration with all that was given; later values replace earlier ones.

    Raises ConfigError for the first value of the wrong type. All values are merged at once, and the
    one at fault is searched for only if that fails, because merging them one by one takes time that
    grows with the square of their number.
    """
    merged, error = _merge_all(cls, given)
    if error is None:
        return merged
    index = _first_wrong(cls, given, alone=True)
    _, its_own = _merge_all(cls, given[index : index + 1])
    if its_own is None:  # no value is wrong by itself, but one is wrong after earlier ones
        index = _first_wrong(cls, given, alone=False)
        _, its_own = _merge_all(cls, given[: index + 1])
    origin, key, value = given[index]
    raise ConfigError(f"{origin}: {key}={show(value)}: {reason_of(cls, key, its_own, value)}")


def _first_wrong(cls: type, given: Sequence[Given], *, alone: bool) -> int:
    """Return the index of the first value that cannot be merged, by bisection.

    Each value is merged by itself if `alone`, and otherwise after all values before it.
    """
    right, wrong = 0, len(given)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        _, error = _merge_all(cls, given[right if alone else 0 : middle])
        right, wrong = (middle, wrong) if error is None else (right, middle)
    return right


def _merge_all(cls: type, given: Sequence[Given]) -> tuple[DictConfig, Exception | None]:
    """Return the configuration with all that was given, and the error of the merge, if any."""
    merged = OmegaConf.structured(cls)
    try:
        for layer in layers_of(given):
            merged.merge_with(layer)
    except (OmegaConfBaseException, TypeError) as error:
        return merged, error
    assert isinstance(merged, DictConfig)
    return merged, None


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
    """Return the name to report for an unknown key, and the remedy.

    For an unknown section, the name is the section's own or that of the first key in it.
    """
    whole = full
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        whole += f".{name}"
    section, _, leaf = full.rpartition(".")
    ours = {key.rpartition(".")[2] for key in known}  # others may use these names differently
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


def _expand_paths(section: Any) -> None:
    for name in getattr(section, "paths", ()):
        value = getattr(section, name)
        if isinstance(value, list):
            setattr(section, name, [expand_path(path, name) for path in value])
        elif value is not None:
            setattr(section, name, expand_path(value, name))
