"""One kind of encoder in a process of its own, which nothing else is loaded into:

    python benchmarks/parts/encoding.py KIND FOLDER INPUTS.npz THREADS

It loads, encodes once, and prints a line of JSON: seconds of loading, resident bytes after it and at most, the file of the
condition. Then it encodes once for every line that it reads, and prints the seconds. KIND is a dtype of torch, "int8", "int4",
or "exported" for a folder of kosmos-g export, of which the runner is called and torch is not imported.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def load_torch(kind, folder, arrays, threads):
    """A function without arguments -> condition, by torch."""
    import torch

    from kosmos_g_diffusers import KosmosGTextEncoder

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    options = {"subfolder": "text_encoder"}
    if kind in ("int8", "int4"):
        from kosmos_g_diffusers.quantization import quantization_config

        config = quantization_config(kind, torch.bfloat16)
        options |= {"quantization_config": config.quant_mapping["text_encoder"], "dtype": torch.bfloat16}
    encoder = KosmosGTextEncoder.from_pretrained(folder, **options).eval()
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(encoder.dtype)
    if kind in ("int8", "int4"):
        encoder.save_pretrained(Path(folder) / f"text_encoder-{kind}")
    return lambda: encoder(**inputs).last_hidden_state.float().numpy()


def load_exported(folder, arrays, threads):
    """A function without arguments -> condition, by the runner that lies in an exported folder."""
    spec = importlib.util.spec_from_file_location("runner", Path(folder) / "kosmos_g_runner.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    encoder = runner.Encoder(folder, threads)
    masks = {"image_token_mask": arrays["image_token_mask"], "attention_mask": arrays["attention_mask"] > 0}

    def encode():
        states = encoder.vision(pixel_values=arrays["pixel_values"])
        return encoder.condition(input_ids=arrays["input_ids"], image_embeds=states, **masks)

    return encode


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main():
    kind, folder, inputs, threads = sys.argv[1:]
    arrays, threads, clock = dict(np.load(inputs)), int(threads), time.perf_counter
    if "CPU_TIME" in os.environ:
        clock = time.process_time
    start = clock()
    load = load_exported if kind == "exported" else lambda *rest: load_torch(kind, *rest)
    encode = load(folder, arrays, threads)
    seconds = clock() - start
    condition = f"{inputs}.{os.getpid()}.npy"
    np.save(condition, encode())
    resident = {"resident": memory("VmRSS"), "peak": memory("VmHWM")}
    print(json.dumps({"seconds": seconds, "condition": condition, **resident}), flush=True)
    for _ in sys.stdin:
        start = clock()
        encode()
        print(clock() - start, flush=True)


if __name__ == "__main__":
    main()
