"""Kosmos-G for ComfyUI: prompts of words and images for Stable Diffusion 1.5. The nodes are in the package kosmos-g-diffusers."""

from kosmos_g_diffusers.comfyui.nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
