"""Schedulers by short name, for the command line and for settings that are stored with an image."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# name -> class of diffusers, and what must hold whatever scheduler the model carries: latents are never clipped, and
# Stable Diffusion's PNDM has no Runge-Kutta steps at the start
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {}),  # the official demo's default
    "dpm-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),  # for U-Nets or LoRAs distilled to few steps
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_scheduler(name: str, config: "dict[str, Any]") -> "SchedulerMixin":
    """The scheduler `name` with the noise schedule of `config`, another one's configuration. ValueError for an unknown name."""
    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {name!r}. Known: {', '.join(SCHEDULERS)}.")
    import diffusers

    class_name, changes = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **changes)
