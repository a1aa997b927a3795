"""Memory that loading a full-size pipeline takes, over the size of its weights:

    python benchmarks/loading.py

Writes a folder of random weights into a temporary one (5.3 GiB in half precision) and loads it in processes of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from parts.arguments import parse
from parts.measure import PeakMemory, gib, memory, now, report, significant
from parts.models import DTYPES, build_full_size, build_tiny

from kosmos_g_diffusers import KosmosGPipeline

FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon"}


def load(folder, dtype):
    """Load in this process, then read every weight once; print the figures as JSON."""
    before = {kind: memory(field) for kind, field in FIELDS.items()}
    start = now()
    with PeakMemory() as loading:
        pipe = KosmosGPipeline.from_pretrained(folder, dtype=dtype)
    seconds = now() - start
    weights = [w for part in (pipe.text_encoder, pipe.unet, pipe.vae) for w in part.parameters()]
    with PeakMemory() as reading:  # files that are mapped come into memory now
        for weight in weights:
            weight.max()
    peak = {kind: max(getattr(loading, kind), getattr(reading, kind)) for kind in FIELDS}
    figures = {
        "seconds": seconds,
        "weights": sum(weight.nbytes for weight in weights),
        "before": before,
        "after_from_pretrained": {kind: getattr(loading, kind) for kind in FIELDS},
        "peak": peak,
    }
    print(json.dumps(figures))


def main():
    parser = argparse.ArgumentParser(description="Peak memory of KosmosGPipeline.from_pretrained.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["bfloat16", "float16"],
        help="of the files; several are run one after another (default: bfloat16 float16)",
    )
    parser.add_argument(
        "--load-dtype", choices=DTYPES, help="of the loaded pipeline (default: that of the files)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the temporary folder is made (default: the system's)"
    )
    # the folder to load, in the fresh process
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parse(parser)
    if arguments.load is not None:
        return load(arguments.load, DTYPES[arguments.load_dtype])

    figures, rows = {}, []
    for dtype in arguments.dtype:
        load_dtype = arguments.load_dtype or dtype
        build = build_tiny if arguments.tiny else build_full_size
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            build(DTYPES[dtype]).save_pretrained(folder)  # freed before it is loaded
            command = [sys.executable, __file__, "--load", folder, "--load-dtype", load_dtype]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
        found = figures[f"{dtype} as {load_dtype}"] = json.loads(result.stdout)
        for kind in FIELDS:
            before, loaded, peak = (
                found[stage][kind] for stage in ("before", "after_from_pretrained", "peak")
            )
            rows.append(
                [
                    f"{dtype} as {load_dtype}, {significant(found['seconds'])} s",
                    kind,
                    gib(found["weights"]),
                    gib(before),
                    gib(loaded),
                    gib(peak),
                    f"{peak / found['weights']:.3f}",
                    f"{(peak - before) / found['weights']:.3f}",
                ]
            )
    columns = [
        "files as loaded",
        "memory",
        "weights",
        "imports",
        "peak of from_pretrained",
        "peak, every weight read",
    ]
    columns += ["over the weights", "without the imports"]
    report("Loading a folder with KosmosGPipeline.from_pretrained", columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
