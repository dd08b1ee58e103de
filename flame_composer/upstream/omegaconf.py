"""OmegaConf 2.4.0: YAML that keeps scalars as they were written, and replaceable resolvers.

Every configuration is read through this module, so it imports no torch, composer or streaming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

PYTHONS_NONE = "None"  # written by people who mean null
_NOT_TEXT = ("int", "float", "bool", "null", "none", "value", "merge")
_TAG = "tag:yaml.org,2002"


def load_yaml(stream: Any, scalar: Callable[[str, Any], Any], max_nodes: int) -> Any:
    """Return the content of a YAML document, as OmegaConf reads it.

    Each unquoted scalar that YAML does not take for text becomes `scalar(text, value)`. A document
    of more than `max_nodes` nodes raises yaml.YAMLError.

    Upstream: omegaconf 2.4.0, `omegaconf._yaml.get_yaml_loader`; PyYAML 6.0, `yaml_constructors`.
    Mends: the text of a scalar is lost: 1.10 becomes the number 1.1, and no becomes false.
    """
    base = get_yaml_loader(max_yaml_expanded_nodes=max_nodes)

    class Loader(base):  # type: ignore[misc, valid-type]
        pass

    def constructor(kind: str) -> Callable[[Any, yaml.Node], Any]:
        construct = base.yaml_constructors.get(f"{_TAG}:{kind}")

        def written(loader: Any, node: yaml.Node) -> Any:
            if not isinstance(node, yaml.ScalarNode):
                return base.construct_undefined(loader, node)
            return scalar(node.value, construct(loader, node) if construct else node.value)

        return written

    Loader.add_implicit_resolver(f"{_TAG}:none", re.compile(f"^{PYTHONS_NONE}$"), ["N"])
    for kind in _NOT_TEXT:
        Loader.add_constructor(f"{_TAG}:{kind}", constructor(kind))
    return yaml.load(stream, Loader=Loader)


def dump_yaml(content: Any) -> str:
    """Return plain values as YAML that `load_yaml` and OmegaConf read as the same values.

    Upstream: omegaconf 2.4.0, `omegaconf._utils.get_omega_conf_dumper`, which quotes what
    OmegaConf would take for a number.
    Mends: `OmegaConf.to_yaml` writes a resolved text that has `${` in it as an interpolation.
    """

    class Dumper(get_omega_conf_dumper()):  # type: ignore[misc]
        pass

    def represent(dumper: Any, text: str) -> yaml.ScalarNode:
        if text == PYTHONS_NONE:
            return dumper.represent_scalar(f"{_TAG}:str", text, style="'")
        return get_omega_conf_dumper().str_representer(dumper, text)

    Dumper.add_representer(str, represent)
    return yaml.dump(
        _escaped(content),
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        Dumper=Dumper,
    )


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each) for each in value]
    if not isinstance(value, str):
        return value
    # OmegaConf reads two backslashes before an interpolation as one.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return f"\\{text}" if text == MISSING else text


@contextmanager
def resolved_by(env: Callable[..., Any], decode: Callable[..., Any]) -> Iterator[None]:
    """Make `env` and `decode` resolve ${oc.env:...} and ${oc.decode:...} in the body.

    Upstream: omegaconf 2.4.0, its own resolvers `oc.env` and `oc.decode`, which are global.
    Mends: a resolved value does not show that it came from the environment and may be secret.
    """
    OmegaConf.register_resolver("oc.env", env, replace=True)
    OmegaConf.register_resolver("oc.decode", decode, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)
        OmegaConf.register_resolver("oc.decode", oc.decode, replace=True)


def reason_of_failure(error: OmegaConfBaseException) -> str:
    """Return why an interpolation could not be resolved, in one line.

    Upstream: omegaconf 2.4.0, the message of InterpolationResolutionError.
    Mends: the message begins with the name of a Python class, and describes syntax errors in terms
    of its parser.
    """
    told = str(error).splitlines()[0]
    if "GrammarParseError" in str(error):
        return "cannot be resolved"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", told).strip('"')
