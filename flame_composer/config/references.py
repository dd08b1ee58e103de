"""References in a configuration: ${...} for another key or an environment variable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException
from omegaconf.resolvers import oc

from flame_composer.config.fields import show
from flame_composer.config.messages import masked, reason_of
from flame_composer.errors import ConfigError, hide, without_secrets
from flame_composer.upstream.omegaconf import dump_yaml, reason_of_failure, resolved_by

# The most characters of all values together, once every ${key} is filled in.
MOST_FILLED_IN = 1 << 24

_REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?(\.*)([A-Za-z_][\w.-]*)[^:{}]*\}")


def require_ends(merged: DictConfig, place: str) -> None:
    """Raise ConfigError for texts whose references to one another would expand enormously.

    Ten texts, each with ten references to the next one, expand to billions of characters. A text
    that refers back to itself is reported later, when it is filled in.
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


def unresolved(cls: type, merged: DictConfig, origins: Mapping[str, tuple[str, Any]]) -> str | None:
    """Return the message for the innermost key whose interpolation fails, or None if none does.

    The message never contains the value of an environment variable.
    """
    for key, (origin, value) in sorted(origins.items(), key=lambda item: -len(item[0])):
        if "${" not in str(value):
            continue
        try:
            node = OmegaConf.select(merged, key)
            if OmegaConf.is_config(node):
                OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            if isinstance(error, InterpolationValidationError):
                reason = reason_of(cls, key, None)
            else:
                reason = reason_of_failure(error)
            reason = masked(reason, origins)
            if reason.startswith("Interpolation key"):
                reason += "; where '${' is meant as it stands, write '\\${'"
            return f"{origin}: {key}={show(value)}: {reason}"
    return None


def without_environment(merged: DictConfig) -> str:
    """Return the configuration as YAML, resolved except for environment variables, and masked.

    The variables stay ${oc.env:...} because they may be secret. Masking removes other secrets, such
    as passwords in addresses.
    """
    untyped = OmegaConf.create(OmegaConf.to_container(merged, resolve=False))
    assert isinstance(untyped, DictConfig)

    def decode(text: str | None, _parent_: Any, _node_: Any) -> Any:
        return (
            text
            if text is not None and "<environment variable" in text
            else oc.decode(text, _parent_, _node_)
        )

    with resolved_by(lambda *names: f"<environment variable {names[0]}>", decode):
        content = OmegaConf.to_container(untyped, resolve=True)
    return dump_yaml(without_secrets(content))


def from_environment(name: str, *default: Any) -> Any:
    """Return the value of an environment variable, and hide it in all output from now on."""
    if name in os.environ:
        hide(os.environ[name], name)
    return oc.env(name, *default)


def decoded(text: str | None, _parent_: Any, _node_: Any) -> Any:
    """Return the decoded `text`; hide each text in the result if it comes from the environment."""
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
