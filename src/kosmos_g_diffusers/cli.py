"""The command `kosmos-g`. A subcommand is a module of `commands`: name it there and in COMMANDS."""

import argparse
import sys

from .commands import app, caption, compare, control, convert, data, evaluate, generate, init, train
from .environment import __version__

COMMANDS = (convert, init, generate, control, app, caption, data, train, evaluate, compare)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="kosmos-g",
        description="Kosmos-G for diffusers: images from prompts of words and images.",
        epilog="kosmos-g COMMAND --help shows the flags of a command and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    traceback = "show where an error came from, for a bug report"
    parser.add_argument("--traceback", action="store_true", help=traceback)
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
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        print("kosmos-g: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
