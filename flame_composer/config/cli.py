"""The frame that every script runs in: command line, help, one-line errors, signals."""

from __future__ import annotations

import errno
import getpass
import inspect
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from flame_composer import processes
from flame_composer.config.fields import fields_of, nearest
from flame_composer.config.load import C, load
from flame_composer.config.messages import explain
from flame_composer.config.rules import ScriptConfig
from flame_composer.errors import (
    GOES_ON,
    ConfigError,
    DataError,
    InvalidField,
    TrainingError,
    masked,
)
from flame_composer.lines import clean_streams, flush_streams

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
LONGEST = 1500  # characters of an error; a longer one loses its middle, as its end has the remedy
EXIT_CONFIG = 2
EXIT_DATA = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
# The longest time by which other processes of a machine find a mistake before the first one does.
SECONDS_BEHIND = 20


def run(
    main: Callable[[C], None],
    cls: type[C],
    read: Callable[[type[C], list[str]], C] | None = None,
) -> int:
    """Call `main` with the configuration that sys.argv gives, and return the exit status.

    `read` makes the configuration of the arguments, as `load` does if none is given.
    """
    return _run(main, cls, Path(sys.argv[0]).name, sys.argv[1:], read)


def run_one_of(mains: Mapping[str, tuple[Callable[[Any], None], type[ScriptConfig]]]) -> int:
    """Run one of several mains, which the first argument names, and return the exit status.

    The arguments are `[name] [file.yaml] [key=value ...]`. Without a name, the first main is run.
    """
    script, argv = Path(sys.argv[0]).name, sys.argv[1:]
    clean_streams()
    first = argv[0] if argv else ""
    if first in mains:
        return _run(*mains[first], f"{script} {first}", argv[1:])
    if first in ("-h", "--help"):
        print("\n\n".join(help_text(cls, f"{script} {name}") for name, (_, cls) in mains.items()))
        flush_streams()
        return 0
    is_argument = "=" in first or first.startswith("-") or first.endswith((".yaml", ".yml"))
    if first and not is_argument:
        names = list(mains)
        known = f"{', '.join(names)}, or a YAML file{nearest(first, names)}"
        _say(f"command line: {first}: must be one of {known}")
        return EXIT_CONFIG
    name = next(iter(mains))
    return _run(*mains[name], f"{script} {name}", argv)


def _run(
    main: Callable[[C], None],
    cls: type[C],
    script: str,
    argv: list[str],
    read: Callable[[type[C], list[str]], C] | None = None,
) -> int:
    clean_streams()
    _told.clear()
    status = _answer(main, cls, script, argv, read)
    if (lost := flush_streams()) is None or status:
        return status
    _say(
        f"stdout: cannot be written to: {lost.strerror}; the work is done, but not all of its lines"
        " were shown"
    )
    return EXIT_DATA


def _say(message: str) -> None:
    """Print an error in one line, without secrets, to stderr."""
    message = masked(" ".join(message.splitlines()))
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
    print(f"error: {message}", file=sys.stderr, flush=True)


def _answer(
    main: Callable[[C], None],
    cls: type[C],
    script: str,
    argv: list[str],
    read: Callable[[type[C], list[str]], C] | None,
) -> int:
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(cls, script))
        return 0
    config = None
    _name_user()
    listen_to_signals()
    processes.end_with_launcher()
    try:
        config = (read or load)(cls, argv)
        try:
            main(config)
        except Exception as error:
            if _told:  # SystemExit, which a library (such as safetensors) turned into another error
                raise SystemExit(_told[0]) from None
            if (outside := _from_outside(error)) is not None:
                again = GOES_ON if cls.goes_on else "run the same command again"
                raise TrainingError(f"{outside}; {again}") from None
            raise
    except (ConfigError, DataError, TrainingError) as error:
        message = (
            explain(config, error)
            if config is not None and isinstance(error, InvalidField)
            else str(error)
        )
        # An error in a loader process begins with that process's traceback.
        if message.startswith("Caught "):
            message = (
                message.strip()
                .splitlines()[-1]
                .removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            )
        # Every rank meets the same mistake in the configuration, but only one reports it.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            _say(message)
        if isinstance(error, DataError | TrainingError):
            return EXIT_DATA
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # A launcher ends all processes when one fails, and reports the status of the lowest
            # rank. That is 2 only if the lowest rank is the first to end.
            time.sleep(SECONDS_BEHIND)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        kept = (
            "; what was finished is kept, and the same command goes on from there"
            if cls.goes_on
            else ""
        )
        print(f"interrupted{kept}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    finally:
        # The exit status is settled: SIGTERM must not change it while Python shuts down.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


def _from_outside(error: Exception) -> str | None:
    """Return one line for an error that the machine caused, or None if the program did.

    Such causes are a full disk or a killed process. The error itself may only be the consequence of
    another one, as errors within `torch.save` are, so its causes are searched, too.
    """
    if isinstance(error, ConfigError | DataError | TrainingError):
        return None
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in DISK_ERRORS:
            file = f"{found.filename}: " if found.filename else ""
            return f"{file}a disk cannot be written: {found.strerror}"
        if "PytorchStreamWriter failed writing file" in str(found):
            return "a checkpoint cannot be written; is the disk full?"
        if (loss := processes.lost_process(found)) is not None:
            return loss
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _name_user() -> None:
    """Set LOGNAME if the user id has no name, because torch asks for the user's name.

    Kubernetes and OpenShift run containers under such ids.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def listen_to_signals() -> None:
    """Install this module's handlers of SIGTERM and Ctrl-C.

    Call it again after importing Composer, which installs its own. Those end the process at once,
    although it may have work to finish, or an error to report.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


_told: list[int] = []  # exit statuses for the signals that have come; the first one counts


def _leave(number: int, _frame: FrameType | None) -> None:
    """End the process by an exception, so that everything open is closed.

    The exit status is 143 for SIGTERM and 130 for Ctrl-C. Further signals are ignored, because a
    launcher and a cluster may each send some; but a second Ctrl-C ends the process at once.
    """
    _told.append(128 + number)
    if _told.count(EXIT_INTERRUPTED) > 1:
        os._exit(_told[0])
    if len(_told) == 1:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(_told[0])


def help_text(cls: type[ScriptConfig], script: str) -> str:
    """Return what `--help` prints: usage, then every key with its type, default and doc."""
    before = f"{cls.positional.upper()} ..." if cls.positional else "[file.yaml]"
    lines = [
        f"usage: {script} {before} [key=value ...]",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        "keys:",
    ]
    for key, annotation, default, doc in fields_of(cls):
        lines.append(f"  {key}: {annotation}{'' if default is None else f' = {default}'}")
        lines += textwrap.wrap(doc, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
