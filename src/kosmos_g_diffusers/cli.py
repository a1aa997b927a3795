"""The command `kosmos-g`. A subcommand is a module of `commands`: name it there and in COMMANDS.

Its parsers are built without torch: at its top, a module of `commands` imports light modules alone, the others in `run`.
"""

import argparse
import errno
import os
import re
import select
import sys
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, NoReturn

from .commands import (
    app,
    caption,
    comfyui,
    compare,
    control,
    convert,
    data,
    env,
    evaluate,
    export,
    generate,
    init,
    serve,
    show,
    train,
)
from .environment import VERBOSITIES, VERBOSITY, __version__, verbose
from .files import is_full_disk

COMMANDS: tuple[ModuleType, ...] = (
    convert,
    init,
    generate,
    show,
    control,
    app,
    serve,
    caption,
    data,
    train,
    evaluate,
    compare,
    comfyui,
    export,
    env,
)
EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
)  # what mistakes raise, with a message that explains them
REPORT = (
    "kosmos-g does not expect this error; please report it with the output of kosmos-g env and of the same command with "
    "--traceback"
)
LONGEST = 1000  # characters of an error
LONGEST_VALUE = 100  # of what was given, where argparse repeats it
SHELLS = ("bash", "zsh")  # that completion is made for
FILES = ("FILE", "IMAGE", "MODEL", "SHARDS")  # metavars of what is completed to a file or folder
FOLDERS = ("DIR", "FOLDER", "RUN_A", "RUN_B")


class Parser(argparse.ArgumentParser):
    """A parser whose subcommands, at any depth, know the flags that may stand before or after each of them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        words = f"show what other libraries say as well, and tracebacks; as {VERBOSITY}={VERBOSITIES[-1]}"
        traceback = "show where an error came from, for a bug report"
        for names, text in ((("-v", "--verbose"), words), (("--traceback",), traceback)):
            self.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> NoReturn:
        """As argparse's, but what it repeats of what was given is cut."""
        head, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown:
            message = head + unknown + _shortened(rest, LONGEST_VALUE)
        quoted = rf"""(['"])((?:(?!\1).){{{LONGEST_VALUE}}})(?:(?!\1).)+\1"""
        message = re.sub(quoted, r"\1\2...\1", message)
        message = re.sub(rf"(\S{{{LONGEST_VALUE}}})\S+", r"\1...", message)
        super().error(_shortened(message, LONGEST))


class PrintCompletion(argparse.Action):
    """A flag that prints the completion of a shell and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            install = "pip install 'kosmos-g-diffusers[completion]'"
            parser.error(f"{option_string} needs shtab, which is not installed. Run: {install}")
        for action in _actions_of(parser):
            if action.metavar in (*FILES, *FOLDERS):
                action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY
        print(shtab.complete(parser, shell=values))
        parser.exit()


def build_parser() -> Parser:
    parser = Parser(
        prog="kosmos-g",
        description="Kosmos-G for diffusers: images from prompts of words and images.",
        epilog="kosmos-g COMMAND --help shows the flags of a command and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    completion = 'print tab completion for a shell; in bash: eval "$(kosmos-g --print-completion bash)"'
    parser.add_argument("--print-completion", action=PrintCompletion, choices=SHELLS, help=completion)
    parser.set_defaults(verbose=False, traceback=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        title, description, examples = module.__doc__.split("\n\n", 2)
        command = subparsers.add_parser(
            module.__name__.rpartition(".")[2],
            help=title,
            description=f"{title}\n\n{description}",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kosmos-g`.

    Returns:
        The exit code: 0; 2 for a mistake that the message explains; 1 for an error that nobody expects; 130 after Ctrl-C;
        141 where whoever read the output has gone, as in `kosmos-g ... | head -1`.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, closed, or one of another kind
            stream.reconfigure(
                errors="backslashreplace"
            )  # a path or name that it cannot write must not end a run
    try:
        return _run(build_parser().parse_args(argv))
    finally:
        if _nobody_reads():  # or Python says so when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments):
    with _verbosity(arguments.verbose):
        try:
            arguments.traceback |= verbose()
            arguments.run(arguments)
            print(end="", flush=True)  # what cannot be written is an error, too
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return 141
            if arguments.traceback:
                raise
            print("kosmos-g: error:", _as_line(error), file=sys.stderr)
            return 2 if isinstance(error, EXPECTED) or is_full_disk(error) else 1
    return 0


def _as_line(error):
    """What is said of an error, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not _takes_output():
        text = f"What the command prints cannot be written ({error.strerror})."
    elif is_full_disk(error):
        if os.strerror(errno.ENOSPC) not in text:
            text = f"{os.strerror(errno.ENOSPC)}: {text}"
    elif not isinstance(error, EXPECTED):
        kind = type(error).__name__
        return f"{_shortened(f'{kind}: {text}' if text else kind, LONGEST)} ({REPORT})"
    return _shortened(text, LONGEST)


def _takes_output():
    try:
        print(end="", flush=True)
    except OSError:
        return False
    return True


def _nobody_reads():
    """Whether stdout is a pipe whose other end is closed."""
    # no stdout, one without a file, or a system without poll
    with suppress(AttributeError, OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _shortened(text, length):
    return text if len(text) <= length else f"{text[:length]}..."


def _actions_of(parser):
    """The flags and arguments of a parser and of its subcommands, at any depth."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions_of(command)


@contextmanager
def _verbosity(is_verbose):
    """With the flag -v, the environment variable says so as long as the command runs."""
    before = os.environ.get(VERBOSITY)
    if is_verbose:
        os.environ[VERBOSITY] = VERBOSITIES[-1]
    try:
        yield
    finally:
        if before is not None:
            os.environ[VERBOSITY] = before
        else:
            os.environ.pop(VERBOSITY, None)
