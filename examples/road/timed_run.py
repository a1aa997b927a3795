"""A run of the package with a clock at each step: `python -m examples.road.timed_run SETTINGS.json TIMES.jsonl`."""

import json
import sys
import time

from kosmos_g_diffusers.training import TrainConfig
from kosmos_g_diffusers.training.run import build_run


def main(settings, times):
    """Train as `kosmos-g train` does; a line of wall and CPU seconds of this process for each step that another one follows."""
    config = TrainConfig.load(settings)
    run, begun = build_run(config.stage, config), []
    with open(times, "a", encoding="utf-8") as file:

        def note(*_):
            now = (time.perf_counter(), time.process_time())
            if begun:
                wall, cpu = (one - other for one, other in zip(now, begun.pop(), strict=True))
                file.write(json.dumps({"seconds": wall, "cpu_seconds": cpu}) + "\n")
                file.flush()
            begun.append(now)

        run.stage.register_forward_pre_hook(note)  # a step has one pass
        run.train(progress_bar=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
