"""The options that all benchmarks have."""

import torch

from .measure import use_cpu_time


def parse(parser):
    """Add `--tiny`, `--json`, `--threads` and `--cpu-time`, parse, and set torch up for measuring."""
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on one thread, to see in seconds that all runs"
    )
    parser.add_argument("--json", help="file for the unrounded figures")
    parser.add_argument("--threads", type=int, help="of torch (default: as many as there are cores)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and seconds of CPU time in the place of wall time: for a machine that is busy with other work",
    )
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.cpu_time:
        use_cpu_time()
    threads = 1 if arguments.tiny or arguments.cpu_time else arguments.threads
    if threads is not None:
        torch.set_num_threads(threads)
    return arguments
