"""CPU time of what starts without torch, compared with `import torch` in the same run:

    python benchmarks/startup.py

Each start is a process of its own, its threads and children counted; all take turns.
"""

import argparse
import os
import subprocess
import sys

from parts.arguments import parse
from parts.measure import ratio, report, spread

TORCH = "import torch"
AIM = "<= 0.5"
PROGRAMS = (TORCH, "pass", "import kosmos_g_diffusers")
COMMANDS = (
    "--help",
    "--version",
    "generate --help",
    "train align --help",
    "evaluate dreambench --help",
    "--hlp",
)
MISTYPED = 2  # exit code


def cpu_seconds(arguments):
    """CPU seconds, user and system, of a Python with these arguments."""
    before = os.times()
    result = subprocess.run([sys.executable, *arguments], capture_output=True)
    if result.returncode not in (0, MISTYPED):
        sys.exit(f"{arguments} ended with {result.returncode}: {result.stderr.decode()}")
    after = os.times()
    return sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))


def main():
    parser = argparse.ArgumentParser(description="CPU time of what starts without torch.")
    parser.add_argument("--rounds", type=int, default=15, help="starts of each (default: 15)")
    arguments = parse(parser)
    starts = {program: ["-c", program] for program in PROGRAMS}
    starts |= {f"kosmos-g {words}": ["-m", "kosmos_g_diffusers", *words.split()] for words in COMMANDS}
    seconds = {name: [] for name in starts}
    for number in range(1 + (2 if arguments.tiny else arguments.rounds)):
        for name in reversed(starts) if number % 2 else starts:
            found = cpu_seconds(starts[name])
            if number:  # the first start reads files that are not in memory yet
                seconds[name].append(found)
    rows = []
    for name, found in seconds.items():
        median, lowest, highest = ratio(found, seconds[TORCH])
        aim = AIM if "kosmos" in name else ""
        rows.append([f"`{name}`", spread(found), f"{median:.2f} ({lowest:.2f} to {highest:.2f})", aim])
    columns = ["start", "CPU seconds", "of `import torch`", "aim"]
    report("CPU time of a start", columns, rows, {"seconds": seconds}, arguments.json)


if __name__ == "__main__":
    main()
