"""What an image word saves, what the pipeline costs over diffusers' own, and what padding costs:

    python benchmarks/encode.py

Every figure is the median of ratios of two ways to do the same, timed in turns in one run.
"""

import argparse
import statistics

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from parts.arguments import parse
from parts.measure import StageClock, now, ratio, report, significant, spread, time_in_turns
from parts.models import DTYPES, PHOTOS, UNET, VAE, assemble, build_at_random, build_text_encoder, build_tiny
from PIL import Image

from kosmos_g_diffusers import VisionCache

# as DreamBench writes them, with the image in the place of the subject
PROMPTS = [
    "{}, red",
    "{}, purple",
    "{}, shiny",
    "{}, wet",
    "{}, cube shaped",
    *(
        f"{{}} {rest}"
        for rest in (
            "in the jungle",
            "in the snow",
            "on the beach",
            "on a cobblestone street",
            "on top of pink fabric",
            "on top of a wooden floor",
            "with a city in the background",
            "with a mountain in the background",
            "with a blue house in the background",
            "on top of a purple rug in a forest",
            "with a wheat field in the background",
            "with a tree and autumn leaves in the background",
            "with the Eiffel Tower in the background",
            "floating on top of water",
            "floating in an ocean of milk",
            "on top of green grass with sunflowers around it",
            "on top of a mirror",
            "on top of the sidewalk in a crowded street",
            "on top of a dirt road",
            "on top of a white rug",
        )
    ),
]
WORDS = {word for prompt in PROMPTS for word in prompt.split() if "{" not in word}
# SD 1.5's parts at about a fifth of their width: a step short enough that the pipeline's own time could be seen
MEDIUM_UNET = {**UNET, "block_out_channels": (64, 128, 256, 256), "sample_size": 32}
MEDIUM_VAE = {**VAE, "block_out_channels": (32, 64, 128, 128), "sample_size": 256}


def build(dtype, tiny):
    if tiny:
        return build_tiny(dtype)
    return assemble(
        build_text_encoder(dtype),
        build_at_random(lambda: UNet2DConditionModel(**MEDIUM_UNET), dtype),
        build_at_random(lambda: AutoencoderKL(**MEDIUM_VAE), dtype),
        WORDS,
    )


def compare_image_word(pipe, photo, prompts, rounds):
    """One subject in many prompts: the photo passed each time, or made a word once (the making is timed as well)."""

    def encode(prompt, images=None):
        pipe.encode_prompt(prompt, do_classifier_free_guidance=False, images=images)

    def with_photo():
        for prompt in prompts:
            encode(prompt.format("<i>"), [photo])

    def with_word():
        pipe.add_image_word("<subject>", photo)
        for prompt in prompts:
            encode(prompt.format("<subject>"))
        pipe.remove_image_word("<subject>")

    def with_cache():
        pipe.vision_cache = VisionCache(2**26)
        with_photo()
        pipe.vision_cache = None

    def batch_with_cache():
        pipe.vision_cache = VisionCache(2**26)
        batch_with_photo()
        pipe.vision_cache = None

    def batch_with_photo():
        encode([prompt.format("<i>") for prompt in prompts], [[photo]] * len(prompts))

    def batch_with_word():
        pipe.add_image_word("<subject>", photo)
        encode([prompt.format("<subject>") for prompt in prompts])
        pipe.remove_image_word("<subject>")

    encode(prompts[0].format("<i>"), [photo])  # warms up
    one_by_one, batches = (
        (with_photo, with_word, with_cache),
        (batch_with_photo, batch_with_word, batch_with_cache),
    )
    functions = {f.__name__: f for f in (*one_by_one, *batches)}
    return time_in_turns(functions, rounds, warm_up=False)


def compare_pipelines(pipe, photos, steps, rounds):
    """One image: ours with ready embeddings, ours from photos and text, diffusers' own with ready embeddings."""
    pipe.set_progress_bar_config(disable=True)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    prompt = {"prompt": "<i> in the style of <i>", "images": photos}
    ready = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(**prompt), strict=True))

    def call(pipeline, **kwargs):
        return pipeline(
            **kwargs,
            num_inference_steps=steps,
            guidance_scale=6.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    assert torch.equal(call(pipe, **ready), call(stock, **ready))
    stages = {
        "text encoder": (pipe.text_encoder, pipe.text_encoder),
        "U-Net": (pipe.unet, pipe.unet),
        "VAE": (pipe.vae.post_quant_conv, pipe.vae.decoder),
    }
    calls = {
        "stock, ready embeddings": lambda: call(stock, **ready),
        "ours, ready embeddings": lambda: call(pipe, **ready),
        "ours, photos and text": lambda: call(pipe, **prompt),
    }
    outside = {name: [] for name in calls}  # seconds of a call that no model takes

    def with_clock(name):
        with StageClock(stages) as clock:
            start = now()
            calls[name]()
            outside[name].append(now() - start - sum(map(sum, clock.seconds.values())))

    whole = time_in_turns({name: lambda name=name: with_clock(name) for name in calls}, rounds)
    return whole, {name: seconds[1:] for name, seconds in outside.items()}  # without the call that warms up


def compare_padding(pipe, prompts, rounds):
    """A batch of short prompts as it is and padded to the tokenizer's longest."""
    texts = [prompt.format("a dog") for prompt in prompts]
    short = pipe.tokenizer(texts, padding=True, return_tensors="pt")
    long = pipe.tokenizer(texts, padding="max_length", return_tensors="pt")
    one, other = (pipe.text_encoder(**inputs).last_hidden_state for inputs in (short, long))
    assert torch.equal(one, other)
    lengths = short["input_ids"].shape[1], long["input_ids"].shape[1]
    functions = {
        "unpadded": lambda: pipe.text_encoder(**short),
        "padded": lambda: pipe.text_encoder(**long),
    }
    return lengths, time_in_turns(functions, rounds)


def main():
    parser = argparse.ArgumentParser(description="Ratios of encoding times, full-size text encoder.")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the image word; four times as many of the rest"
    )
    parser.add_argument("--prompts", type=int, default=25, help="on one subject (default and most: 25)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, medium U-Net (default: 50)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)"
    )
    arguments = parse(parser)
    if arguments.tiny:
        arguments.rounds, arguments.prompts, arguments.steps = 1, min(arguments.prompts, 3), 2
    pipe = build(DTYPES[arguments.dtype], arguments.tiny)
    photos = [Image.open(path) for path in PHOTOS]
    for photo in photos:
        photo.load()
    prompts, rounds = PROMPTS[: arguments.prompts], arguments.rounds

    rows, figures = [], {}

    def compare(name, aim, seconds, one, other):
        median, lowest, highest = ratio(seconds[one], seconds[other])
        figures[name] = {"ratio": median, "seconds": {key: seconds[key] for key in (one, other)}}
        rows.append(
            [
                name,
                spread(seconds[one]),
                spread(seconds[other]),
                f"{median:.3f} ({lowest:.3f} to {highest:.3f})",
                aim,
            ]
        )

    n = len(prompts)
    seconds = compare_image_word(pipe, photos[0], prompts, rounds)
    compare(f"{n} prompts one by one: image word / photo", "<= 0.75", seconds, "with_word", "with_photo")
    compare(f"{n} prompts one by one: VisionCache / photo", "<= 0.6", seconds, "with_cache", "with_photo")
    for name, aim, way in (
        ("image word", "<= 0.75", "batch_with_word"),
        ("VisionCache", "<= 0.6", "batch_with_cache"),
    ):
        compare(f"{n} prompts in a batch: {name} / photo", aim, seconds, way, "batch_with_photo")
    whole, outside = compare_pipelines(pipe, photos, arguments.steps, 4 * rounds)
    stock = "stock, ready embeddings"
    for name in ("ours, ready embeddings", "ours, photos and text"):
        compare(f"whole call: {name} / {stock}", "<= 1.02" if "ready" in name else "", whole, name, stock)
    for name in ("ours, ready embeddings", "ours, photos and text"):
        # the models' own time is the same in all and changes more than what is looked for
        own = [ours - theirs for ours, theirs in zip(outside[name], outside[stock], strict=True)]
        sums = [theirs + extra for theirs, extra in zip(whole[stock], own, strict=True)]
        title = f"whole call, models' time that of stock: {name}, encoder left out / {stock}"
        compare(title, "<= 1.02", {name: sums, stock: whole[stock]}, name, stock)
        figures[title]["own_milliseconds"] = milliseconds = 1000 * statistics.median(own)
    lengths, seconds = compare_padding(pipe, prompts[:8], 4 * rounds)
    compare(
        f"8 short prompts: padded to {lengths[1]} / {lengths[0]} tokens",
        "<= 1.05",
        seconds,
        "padded",
        "unpadded",
    )
    title = (
        f"Median (lowest to highest), {arguments.dtype}. What our pipeline does to two photos and text outside "
        f"the models, more than stock with ready embeddings: {significant(milliseconds)} ms a call."
    )
    columns = ["compared", "seconds, first", "seconds, second", "ratio", "aim"]
    report(title, columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
