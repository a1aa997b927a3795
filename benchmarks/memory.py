"""Memory of drawing at the released size, counted on any machine, and measured where there is a GPU:

    python benchmarks/memory.py
    python benchmarks/memory.py --limit 3.8

The first counts weights and the states that are alive at once, with torch's own tracker on real modules whose tensors have
no contents, next to what `--memory` counts by itself. The second also draws on the GPU, from random weights that it writes
into a folder (6.5 GiB, --folder), with this process held to so many GiB: two images in the prompt, a ControlNet and a LoRA,
512 x 512. It prints the plan, and for the plan and for each way by hand the peak and the seconds, or that memory ran out.
"""

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ControlNetModel
from parts.arguments import parse
from parts.measure import now, report
from parts.models import (
    PHOTOS,
    assemble,
    build_at_random,
    build_text_encoder,
    build_tiny,
    build_unet,
    build_vae,
)
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from kosmos_g_diffusers.generation import memory
from kosmos_g_diffusers.generation.generate import (
    draw_images,
    encode_first,
    load_pipeline,
    prompt_arguments,
    size_arguments,
)
from kosmos_g_diffusers.generation.settings import ControlInput, GenerationSettings, InputImage
from kosmos_g_diffusers.testing import build_random_controlnet

PROMPT = "<i> in the style of <i>"
DTYPE = torch.float16
WAYS = {  # of holding the model, by hand: (settings, when prompts are encoded)
    "everything at once": ({}, memory.TOGETHER),
    "prompts encoded first": ({}, memory.FIRST),
    "--offload model": ({"offload": "model"}, memory.TOGETHER),
    "prompts encoded first, layer by layer": ({}, memory.BY_LAYER),
    "--quantize int8 --offload model": ({"quantize": "int8", "offload": "model"}, memory.TOGETHER),
    "--quantize int4 --offload model": ({"quantize": "int4", "offload": "model"}, memory.TOGETHER),
    "--offload sequential": ({"offload": "sequential"}, memory.TOGETHER),
}


def states_of(build, call):
    """(bytes of the weights, bytes of states that are alive at once) of `call(model)`."""
    torch.set_default_dtype(DTYPE)
    try:
        with FakeTensorMode():
            model = build().eval()
            weights = sum(weight.nbytes for weight in model.parameters())
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                call(model)
            found = next(iter(tracker.get_tracker_snapshot("peak").values()))
    finally:
        torch.set_default_dtype(torch.float32)
    return weights, next(value for kind, value in found.items() if "Total" in str(kind)) - weights


def count_rows(side, tiny):
    """Rows of the counted table at `side` pixels, and their figures."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from parts.models import UNET, VAE

    latent, states = side // 8, torch.empty
    widths = {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8} if tiny else {}
    unet_inputs = (2, 4, latent, latent), 1, (2, 77, 768)
    parts = {
        "U-Net, with guidance": (
            lambda: UNet2DConditionModel(**{**UNET, **widths}),
            lambda model: model(states(unet_inputs[0]), unet_inputs[1], states(unet_inputs[2])),
            memory.UNET_STATES * (widths or UNET)["block_out_channels"][0] * latent**2 * 2 * 2,
        ),
        "ControlNet": (
            lambda: ControlNetModel(cross_attention_dim=768, **widths),
            lambda model: model(
                states(unet_inputs[0]), unet_inputs[1], states(unet_inputs[2]), states(2, 3, side, side)
            ),
            0,  # less than the U-Net behind it
        ),
        "VAE decoder": (
            lambda: AutoencoderKL(**{**VAE, **widths}),
            lambda model: model.decode(states(1, 4, latent, latent)),
            memory.VAE_STATES * (widths or VAE)["block_out_channels"][1] * side**2 * 2,
        ),
    }
    rows, figures = [], {}
    for name, (build, call, planned) in parts.items():
        weights, alive = states_of(build, call)
        figures[name] = {"weights": weights, "states": alive, "planned_states": planned}
        rows.append(
            [
                name,
                *(f"{value / memory.GIB:.2f}" for value in (weights, alive)),
                f"{planned / memory.GIB:.2f}",
            ]
        )
    return rows, figures


def write_model(folder, tiny):
    """Random weights in half precision: a pipeline, a ControlNet and a LoRA, unless they are there."""
    if not (folder / "lora.safetensors").exists():
        words = PROMPT.split()
        pipe = (
            build_tiny(DTYPE)
            if tiny
            else assemble(*(build(DTYPE) for build in (build_text_encoder, build_unet, build_vae)), words)
        )
        pipe.save_pretrained(folder)
        unet = pipe.unet
        controlnet = (
            build_random_controlnet(unet)
            if tiny
            else build_at_random(lambda: ControlNetModel(cross_attention_dim=768), DTYPE)
        )
        controlnet.to(DTYPE).save_pretrained(folder / "controlnet")
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        type(pipe).save_lora_weights(folder, get_peft_model_state_dict(unet), weight_name="lora.safetensors")


def draw(settings, encode, photos, device):
    """Draw as `kosmos-g generate` does; (peak of the device in bytes, seconds)."""
    gc.collect()
    on_gpu = torch.device(device).type != "cpu"
    if on_gpu:
        torch.accelerator.empty_cache()
        torch.get_device_module().reset_peak_memory_stats()
    start = now()
    arguments = {}
    if encode != memory.TOGETHER:
        arguments = encode_first(settings, photos, by_layer=encode == memory.BY_LAYER)
    pipe = load_pipeline(settings, bool(arguments))
    arguments = arguments or prompt_arguments(pipe, settings, photos)
    arguments |= size_arguments(pipe, settings, [PHOTOS[0]])
    for image, _ in draw_images(pipe, settings, arguments, callback_on_step_end=lambda *_: {}):
        assert image.size == (settings.width, settings.height)
    peak = torch.get_device_module().max_memory_reserved() if on_gpu else 0
    return peak, now() - start


def measure(folder, side, limit, steps, device):
    """Rows of the measured table, and their figures."""
    files = [InputImage.from_file(path) for path in PHOTOS]
    settings = GenerationSettings(
        PROMPT,
        images=tuple(files),
        controls=(ControlInput("canny", files[0], controlnet=str(folder / "controlnet")),),
        lora=str(folder / "lora.safetensors"),
        model=str(folder),
        height=side,
        width=side,
        steps=steps,
        dtype="float16",
        device=device,
    )
    budget = int(limit * memory.GIB)
    if device != "cpu":
        total = torch.get_device_module().get_device_properties(0).total_memory
        torch.get_device_module().set_per_process_memory_fraction(budget / total)
    plan = memory.plan_memory(settings, budget, encodes_first=True)
    print(plan, flush=True)
    ways = {"what --memory chose": (plan.applied_to(settings), plan.encode)}
    ways |= {
        name: (replace(settings, **changed), encode)
        for name, (changed, encode) in WAYS.items()
        if device != "cpu" or ("offload" not in changed and encode != memory.BY_LAYER)
    }
    photos, rows, figures = [Image.open(path) for path in PHOTOS], [], {}
    for name, (changed, encode) in ways.items():
        counted = memory.count(folder, changed, "float16", changed.quantize).peak(encode, changed.offload)
        try:
            peak, seconds = draw(changed, encode, photos, device)
            told = [f"{peak / memory.GIB:.2f}", f"{seconds:.1f}"]
        except (torch.OutOfMemoryError, ImportError) as error:
            peak, seconds, told = (
                None,
                None,
                ["out of memory" if isinstance(error, RuntimeError) else str(error), ""],
            )
        figures[name] = {"counted": counted, "peak": peak, "seconds": seconds}
        rows.append([name, f"{counted / memory.GIB:.2f}", *told])
        print(*rows[-1], sep=" | ", flush=True)
    return rows, figures


def main():
    parser = argparse.ArgumentParser(description="Memory of drawing at the released size.")
    parser.add_argument("--side", type=int, default=512, help="pixels of the image (default: 512)")
    parser.add_argument("--limit", type=float, help="draw on the GPU, held to so many GiB")
    parser.add_argument("--steps", type=int, default=10, help="of the image that is drawn (default: 10)")
    parser.add_argument("--folder", help="of the model that is drawn with (default: a temporary one)")
    arguments = parse(parser)
    side = 64 if arguments.tiny else arguments.side
    rows, figures = count_rows(side, arguments.tiny)
    title = f"{side} x {side}, half precision: GiB of the weights, of states alive at once, and of those as --memory counts them"
    report(title, ["part", "weights", "states", "as planned"], rows, {"counted": figures}, arguments.json)
    if arguments.limit is None:
        return
    device = "cpu" if arguments.tiny else torch.accelerator.current_accelerator().type
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        write_model(folder, arguments.tiny)
        with torch.enable_grad():
            rows, measured = measure(folder, side, arguments.limit, arguments.steps, device)
    title = f"GiB and seconds of a whole call on {device} held to {arguments.limit:g} GiB, loading included, {arguments.steps} steps"
    columns = ["way", "counted", "peak (reserved)", "seconds"]
    report(title, columns, rows, {"counted": figures, "measured": measured}, arguments.json)


if __name__ == "__main__":
    main()
