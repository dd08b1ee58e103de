"""How a script is run: its configuration from the command line, its help, its errors in one line, its signals."""

from __future__ import annotations

import getpass
import inspect
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from flame_composer.config import ConfigError, DataError, InvalidField, ScriptConfig, TrainingError
from flame_composer.fields import fields_of, nearest
from flame_composer.loading import C, explain, load

PASSWORD = r"(://[^/@:\s]*:)[^/@\s]+@"  # in an address; it would end up in logs
EXIT_CONFIG = 2
EXIT_DATA = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
SECONDS_BEHIND = 20  # that a mistake is met by the other processes of a machine before its first one, at most


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
    _name_user()
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
        message = explain(config, error) if config is not None and isinstance(error, InvalidField) else str(error)
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


def _name_user() -> None:
    """Give a user id without a name one: Kubernetes and OpenShift run containers under such, and torch asks for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


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


def help_text(cls: type[ScriptConfig], script: str) -> str:
    """Usage, then every key with its type, default and one-line doc."""
    before = f"{cls.positional.upper()} ..." if cls.positional else "[file.yaml]"
    lines = [f"usage: {script} {before} [key=value ...]", "", inspect.cleandoc(cls.__doc__ or ""), "", "keys:"]
    for key, annotation, default, doc in fields_of(cls):
        lines.append(f"  {key}: {annotation}{'' if default is None else f' = {default}'}")
        lines += textwrap.wrap(doc, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
