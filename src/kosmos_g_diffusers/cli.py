"""The command `kosmos-g`. A subcommand is a module of `commands`: name it there and in COMMANDS.

Its parsers are built without torch: at its top, a module of `commands` imports light modules alone, the others in `run`.
"""

import argparse
import os
import sys
from contextlib import contextmanager

from .commands import app, caption, compare, control, convert, data, evaluate, generate, init, train
from .environment import VERBOSITIES, VERBOSITY, __version__, verbose

COMMANDS = (convert, init, generate, control, app, caption, data, train, evaluate, compare)


class Parser(argparse.ArgumentParser):
    """A parser whose subcommands, at any depth, know the flags that may stand before or after each of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        words = f"show what other libraries say as well, and tracebacks; as {VERBOSITY}={VERBOSITIES[-1]}"
        traceback = "show where an error came from, for a bug report"
        for names, text in ((("-v", "--verbose"), words), (("--traceback",), traceback)):
            self.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=text)


def build_parser():
    parser = Parser(
        prog="kosmos-g",
        description="Kosmos-G for diffusers: images from prompts of words and images.",
        epilog="kosmos-g COMMAND --help shows the flags of a command and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
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


def main(argv=None):
    """Run `kosmos-g`; returns the exit code: 0, 2 for a mistake that the message explains, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    with _verbosity(arguments.verbose):
        try:
            arguments.traceback |= verbose()
            arguments.run(arguments)
        except KeyboardInterrupt:
            return 130
        except (ValueError, TypeError, OSError, ImportError) as error:
            if arguments.traceback:
                raise
            print("kosmos-g: error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
    return 0


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
