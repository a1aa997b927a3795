"""Peak memory and time of each memory and speed setting on the full-size model, over those of the plain pipeline:

    python benchmarks/settings.py

Writes a folder of random weights into a temporary one (5.3 GiB in bf16) and draws from it once for every setting, each in a
process of its own. A C++ compiler is needed for the rows of torch.compile, torchao for the row of int8 weights.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import transformers
from parts.arguments import parse
from parts.measure import PeakMemory, gib, now, report, significant
from parts.models import DTYPES, PHOTOS, build_full_size, build_tiny
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline

PROMPT = "<i> in the style of <i>"
CPU = torch.device("cpu")


def encode_and_free(pipe, photos):
    """(states that the pipeline draws from once its encoder is gone, seconds of making them)."""
    for _ in range(2):  # the first reads the weights
        start = now()
        prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(PROMPT, images=photos)
        seconds = now() - start
    pipe.text_encoder = None
    gc.collect()
    return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}, seconds


def lay_channels_last(pipe):
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)


def offload_groups(pipe, folder=None):
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=folder)


def quantize():
    """int8 weights for encoder and U-Net, as an argument of `from_pretrained`."""
    from torchao.quantization import Int8WeightOnlyConfig

    int8 = Int8WeightOnlyConfig(version=2)
    mapping = {"text_encoder": transformers.TorchAoConfig(int8), "unet": diffusers.TorchAoConfig(int8)}
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def release_memory():
    """Return free memory to the system: glibc keeps gigabytes of it after a model was quantised."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Setting:
    apply: Callable | None = None  # takes the loaded pipeline
    plain: str = "plain"  # the row it is compared with
    size: int = 512  # pixels of a side
    steps: int | None = None  # of the denoising; None takes the command line's
    n_images: int = 1
    frees_encoder: bool = False
    quantizes: bool = False


def compiling(backend):
    return {
        "pipe.text_encoder.compile()": Setting(lambda pipe: pipe.text_encoder.compile(backend=backend)),
        "pipe.unet.compile_repeated_blocks()": Setting(
            lambda pipe: pipe.unet.compile_repeated_blocks(backend=backend)
        ),
        "pipe.unet.compile()": Setting(lambda pipe: pipe.unet.compile(backend=backend)),
    }


LARGE, PAIR = "plain, 768 x 768, one step", "plain, two images"
SETTINGS = {
    "plain": Setting(),
    "encoder freed, text_encoder=None": Setting(frees_encoder=True),
    "enable_attention_slicing()": Setting(lambda pipe: pipe.enable_attention_slicing()),
    "channels_last, U-Net and VAE": Setting(lay_channels_last),
    "int8 weights of encoder and U-Net (torchao)": Setting(quantizes=True),
    "enable_group_offload, leaves, CPU to CPU": Setting(offload_groups),
    "enable_group_offload, leaves, to disk": Setting(
        lambda pipe: offload_groups(pipe, os.path.join(tempfile.gettempdir(), "groups"))
    ),
    LARGE: Setting(plain=LARGE, size=768, steps=1),
    "vae.enable_tiling(), 768 x 768, one step": Setting(
        lambda pipe: pipe.vae.enable_tiling(), LARGE, size=768, steps=1
    ),
    PAIR: Setting(plain=PAIR, n_images=2),
    "vae.enable_slicing(), two images": Setting(lambda pipe: pipe.vae.enable_slicing(), PAIR, n_images=2),
    **compiling("inductor"),
}
NEEDS_ACCELERATOR = (
    "enable_model_cpu_offload()",
    "enable_sequential_cpu_offload()",
    "enable_group_offload to an accelerator",
    "int8 weights (bitsandbytes)",
)


def measure(folder, setting, steps, tiny):
    """Load the folder, apply the setting and draw twice the same; a dict of what it took."""
    photos = [Image.open(path) for path in PHOTOS]
    options = {"quantization_config": quantize()} if setting.quantizes else {}
    encode_seconds, calls = 0.0, []
    with PeakMemory() as loading:
        pipe = KosmosGPipeline.from_pretrained(folder, dtype=torch.bfloat16, **options)
        pipe.set_progress_bar_config(disable=True)
        if setting.apply is not None:
            setting.apply(pipe)
    release_memory()
    with PeakMemory() as drawing:
        prompt = {"prompt": PROMPT, "images": photos}
        if setting.frees_encoder:
            prompt, encode_seconds = encode_and_free(pipe, photos)
        for _ in range(2):  # the first call reads the weights, and compiles
            start, wall = now(), time.perf_counter()
            pipe(
                **prompt,
                height=None if tiny else setting.size,
                width=None if tiny else setting.size,
                num_images_per_prompt=setting.n_images,
                num_inference_steps=setting.steps or steps,
                guidance_scale=6.0,
                generator=torch.Generator().manual_seed(0),
            )
            calls.append((now() - start, time.perf_counter() - wall))
    (_, first), (seconds, _) = calls
    return {
        "first_seconds": first,  # of the clock on the wall, always: compilers are processes of their own
        "seconds": encode_seconds + seconds,
        "loading": loading.resident,
        "drawing": drawing.resident,
        "anonymous": max(loading.anonymous, drawing.anonymous),
    }


def measure_apart(name, folder, arguments):
    """What `measure` finds in a fresh process, or why it found nothing."""
    if SETTINGS[name].quantizes and importlib.util.find_spec("torchao") is None:
        return "needs torchao, which is not installed"
    command = [sys.executable, __file__, "--run", name, "--folder", folder, "--steps", str(arguments.steps)]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--cpu-time"] if arguments.cpu_time else []
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:  # nothing compiled earlier is found
        environment = {**os.environ, "TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": scratch}
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=arguments.limit
            )
        except subprocess.TimeoutExpired:
            return f"not done after {arguments.limit} s"
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description="Peak memory and time of each setting over the plain pipeline."
    )
    parser.add_argument("--steps", type=int, default=2, help="of the call that is timed (default: 2)")
    parser.add_argument(
        "--limit", type=int, default=600, help="seconds after which a setting is cancelled (default: 600)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="plain rows, and settings that contain a text"
    )
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    # the setting, in the fresh process
    parser.add_argument("--run", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parse(parser)
    if arguments.run is not None:
        settings = {**SETTINGS, **compiling("eager")} if arguments.tiny else SETTINGS
        found = measure(arguments.folder, settings[arguments.run], arguments.steps, arguments.tiny)
        return print(json.dumps(found))

    wanted = [name for name in SETTINGS if not arguments.only or any(text in name for text in arguments.only)]
    names = [
        name for name in SETTINGS if name in wanted or name in {SETTINGS[other].plain for other in wanted}
    ]
    figures, rows = {}, []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (build_tiny if arguments.tiny else build_full_size)(
            DTYPES["bfloat16"], PROMPT.split()
        ).save_pretrained(folder)
        for name in names:
            found = figures[name] = measure_apart(name, folder, arguments)
            plain = figures[SETTINGS[name].plain]
            if isinstance(found, str) or isinstance(plain, str):
                rows.append([name, found, "", "", "", "", "", ""])
            else:
                rows.append(
                    [
                        name,
                        gib(found["loading"]),
                        gib(found["drawing"]),
                        f"{found['drawing'] / plain['drawing']:.2f}",
                        gib(found["anonymous"]),
                        significant(found["seconds"]),
                        f"{found['seconds'] / plain['seconds']:.2f}",
                        significant(found["first_seconds"] - plain["first_seconds"]),
                    ]
                )
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    if not arguments.only:
        rows += [
            [name, "needs an accelerator, not measured", "", "", "", "", "", ""] for name in NEEDS_ACCELERATOR
        ]
    columns = [
        "setting",
        "peak, loading",
        "peak, drawing",
        "over plain",
        "anonymous",
        f"seconds, {arguments.steps} steps",
        "over plain",
        "first call, seconds more than plain",
    ]
    report("One image of 512 x 512 from two photos and text, in bf16", columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
