"""Seconds, FLOPs and memory of parts of a model, and the table that they are printed as (Linux: memory is read from /proc)."""

import gc
import json
import math
import os
import platform
import statistics
import threading
import time
from collections import defaultdict
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_clock = time.perf_counter


def use_cpu_time():
    """Let `now` count the seconds that this process computes, which other processes do not stretch."""
    global _clock
    _clock = time.process_time


def now():
    """Seconds of the clock that everything here is timed with."""
    return _clock()


def time_in_turns(functions, rounds, warm_up=True):
    """Call every function once a round, so that a change in the machine's load meets all of them.

    Args:
        functions: name -> function without arguments.
        rounds: calls of each; every second round goes backwards.
        warm_up: call each once before the clock starts.

    Returns:
        name -> list of seconds.
    """
    for function in functions.values() if warm_up else ():
        function()
    seconds = {name: [] for name in functions}
    for number in range(rounds):
        for name in reversed(functions) if number % 2 else functions:
            gc.collect()  # else the garbage of one function is collected on another's time
            start = now()
            functions[name]()
            seconds[name].append(now() - start)
    return seconds


def ratio(seconds, other):
    """Median of the ratios round by round, with the lowest and the highest."""
    ratios = [one / two for one, two in zip(seconds, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(values, digits=2):
    """'median (lowest to highest)'."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def multiply_square(dtype, size, seconds=2.0):
    """A function that multiplies two square matrices for so many seconds and returns the FLOP/s it reached."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def multiply():
        left @ right  # warms up
        start, products = now(), 0
        while now() - start < seconds:
            left @ right
            products += 1
        return products * 2 * size**3 / (now() - start)

    return multiply


def _cpu_attention_flops(query, key, value, *args, is_causal=False, **kwargs):
    # the causal kernel leaves out what lies behind the diagonal
    causal = is_causal or (len(args) > 1 and args[1])
    return sdpa_flop_count(query, key, value) // (2 if causal else 1)


class StageClock:
    """Seconds and, on request, FLOPs of the stages of a forward pass, taken with hooks on the modules.

    Args:
        stages: name -> (module that a stage begins with, module that it ends with).
        count_flops: count the FLOPs of matrix products, convolutions and attention. Counting slows a pass down.
    """

    def __init__(self, stages, count_flops=False):
        self.stages = stages
        self.seconds = defaultdict(list)
        self.flops = defaultdict(int)
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._counter = (
            FlopCounterMode(display=False, custom_mapping={attention: _cpu_attention_flops})
            if count_flops
            else None
        )

    def __enter__(self):
        self._hooks = []
        if self._counter is not None:
            self._counter.__enter__()
        for name, (first, last) in self.stages.items():
            self._hooks.append(first.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
            self._hooks.append(last.register_forward_hook(lambda *_, name=name: self._end(name)))
        return self

    def _counted(self):
        return 0 if self._counter is None else self._counter.get_total_flops()

    def _begin(self, name):
        self._started = now(), self._counted()

    def _end(self, name):
        started, counted = self._started
        self.seconds[name].append(now() - started)
        self.flops[name] += self._counted() - counted

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        if self._counter is not None:
            self._counter.__exit__(*exception)


class PeakMemory:
    """Highest memory of this process inside the block, in bytes.

    `resident` is what the kernel counted (VmHWM), with the pages of files that are mapped; `anonymous` is without
    these, sampled every 5 ms.
    """

    def __enter__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark starts again from here
        self.resident = self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._done.wait(0.005):
            self.anonymous = max(self.anonymous, memory("RssAnon"))

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()
        self.anonymous = max(self.anonymous, memory("RssAnon"))
        self.resident = memory("VmHWM")


def memory(field):
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no field {field}.")


def gib(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB"


def significant(value, digits=3):
    """A number as text with so many significant digits, without an exponent for what a table holds."""
    if not value or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def describe_machine():
    """What the figures depend on, as a dict."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": torch.get_num_threads(),
        "seconds of": "CPU time" if _clock is time.process_time else "wall time",
        "load of the last minute": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def report(title, columns, rows, figures, path=None):
    """Print a Markdown table, and write the figures as JSON to `path` if there is one.

    Args:
        title: line over the table.
        columns: names of the columns.
        rows: a list of texts for each row.
        figures: dict of what the table says, unrounded.
        path: of the JSON file.
    """
    machine = describe_machine()
    print(f"\n{title}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}")
    if path is not None:
        Path(path).write_text(json.dumps({**figures, "environment": machine}, indent=2) + "\n")
