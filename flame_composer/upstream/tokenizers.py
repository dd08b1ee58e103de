"""Fast tokenizers of transformers 4 and 5, read in the same way from the same files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NAME = "PreTrainedTokenizerFast"
_FLAGS = ("add_bos_token", "add_eos_token")


def read_fast(folder: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder, as its tokenizer.json has it.

    Upstream: transformers 5.24, `AutoTokenizer.from_pretrained`, `TokenizersBackend`.
    Mends: for Llama, Gemma and others it takes vocabulary and merges only, and puts a normalizer,
        a pre-tokenizer and a decoder of its own in place of those in the file, so that texts may
        get other tokens than in transformers 4; it gives those without a template an empty one,
        and saves how it was loaded, and a class that transformers 4 does not know.
    """
    import transformers
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        return AutoTokenizer.from_pretrained(folder, **options)
    backend = getattr(transformers, "TokenizersBackend", None)
    if backend is None:
        if _settings(folder).get("tokenizer_class") != "TokenizersBackend":
            return AutoTokenizer.from_pretrained(folder, **options)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
    tokenizer: PreTrainedTokenizerFast = _kind(backend).from_pretrained(folder, **options)
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    is_plain = json.loads(file.read_bytes()).get("post_processor") is None
    if is_plain and not any(tokenizer.init_kwargs.get(flag) for flag in _FLAGS):
        tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def rebuilds_its_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer makes its template anew from flags when it is loaded.

    Upstream: transformers 4.57.6, `LlamaTokenizerFast.update_post_processor` and its like.
    Mends: there is no public sign of it. In transformers 5 all tokenizers do so that have the flags
        in their settings, from which this takes them.
    """
    import transformers

    if not hasattr(transformers, "TokenizersBackend"):
        return hasattr(tokenizer, "update_post_processor")
    for flag in _FLAGS:
        tokenizer.init_kwargs.pop(flag, None)
    return False


@functools.cache
def _kind(backend: Any) -> Any:
    """Return a class whose name, which is saved, both versions of transformers know."""
    return type(_NAME, (backend,), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Let pickle find the class, which is made when transformers is there."""
    if name != _NAME:
        raise AttributeError(name)
    import transformers

    return _kind(getattr(transformers, "TokenizersBackend"))  # noqa: B009


def _settings(folder: str) -> dict[str, Any]:
    file = Path(folder, "tokenizer_config.json")
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
