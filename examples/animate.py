"""Animate what an image shows, with diffusers' own AnimateDiff pipeline:

    python examples/animate.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/animate.py --model ./kosmos-g
"""

import torch
from common import circling_noise, parse_arguments, resting_adapter, save, subjects
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from kosmos_g_diffusers import KosmosGPipeline

NUM_FRAMES = 16

arguments = parse_arguments(__doc__, sprites="<my-own> on a mint background", photos="<my-own> running")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, _ = subjects(arguments)
pipe.add_image_word("<my-own>", first)  # a word that this stock pipeline understands as well

if arguments.small:
    adapter, latents = resting_adapter(pipe.unet), circling_noise(pipe.unet, NUM_FRAMES)
    print(
        "No motion was learned for the small model. Its frames are alike since the noise that they begin with is."
    )
else:
    latents = None  # noise of its own for each frame: the adapter joins them
    adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2", dtype=arguments.dtype)
    # the noise schedule that the motion adapter was trained with
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", timestep_spacing="linspace", clip_sample=False
    )
animate = AnimateDiffPipeline.from_pipe(pipe, motion_adapter=adapter, dtype=pipe.dtype)
animate.to(arguments.device)

frames = animate(
    arguments.prompt,
    num_frames=NUM_FRAMES,
    latents=latents,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).frames[0]

save(frames, "animate.gif", arguments)
