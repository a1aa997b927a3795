"""The nodes in a real ComfyUI: `make test-comfyui COMFYUI=path` starts its server on the CPU, with folders of its own.

Stable Diffusion 1.5 is one of its family with few layers and random weights, which ComfyUI detects as it does any checkpoint; the
encoder for it is a tiny one whose states are 77 of 768.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from support.comfyui import Server, python_of

from kosmos_g_diffusers import SPRITES, KosmosGPipeline, KosmosGTextEncoder
from kosmos_g_diffusers.comfyui.installing import SOURCE, export_sprites, install
from kosmos_g_diffusers.sprites import HEART, STAR
from kosmos_g_diffusers.testing import build_tiny_pipeline

COMFYUI = os.environ.get("COMFYUI", "")
WORKFLOWS = ("two_pictures", "controlnet", "lora", "image_to_image")
DEMO = "sprites (demo, only with its own U-Net)"
SEED, GUIDANCE = 3, 5.0
STEPS = 10  # from 999 to 0 by 111: ComfyUI rounds time steps that are not whole, diffusers does not
STAR_NODE = {"class_type": "LoadImage", "inputs": {"image": "kosmos_g_star.png"}}
HEART_NODE = {"class_type": "LoadImage", "inputs": {"image": "kosmos_g_heart.png"}}
# reads what ComfyUI computes on the way, and the noise of its samplers
PROBE = """
import os, comfy.sample, folder_paths, torch
from safetensors.torch import save_file


class Dump:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}, "optional": {"condition": ("CONDITIONING",), "latent": ("LATENT",)}}

    def run(self, name, condition=None, latent=None):
        tensor = condition[0][0] if latent is None else latent["samples"]
        save_file({"tensor": tensor.contiguous()}, os.path.join(folder_paths.get_output_directory(), name))
        return {}


class Noise:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "seed": ("INT", {})}}

    def run(self, latent, seed):
        return ({"samples": comfy.sample.prepare_noise(latent["samples"], seed)},)


class CacheCount:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def run(self):
        from kosmos_g_diffusers.comfyui.encoder import VISION_CACHE

        return ({"samples": torch.tensor([VISION_CACHE.hits, VISION_CACHE.misses])},)


NODE_CLASS_MAPPINGS = {"Dump": Dump, "Noise": Noise, "CacheCount": CacheCount}
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMFYUI, reason="COMFYUI names no ComfyUI")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(COMFYUI, tmp_path_factory.mktemp("ComfyUI"))
    install(server.root)
    export_sprites(server.root)
    (server.root / "custom_nodes" / "probe.py").write_text(PROBE, encoding="utf-8")
    models = Path(__file__).parents[1] / "support" / "comfyui_models.py"
    subprocess.run([python_of(Path(COMFYUI)), str(models), str(server.root)], cwd=COMFYUI, check=True)
    wide_pipeline().save_pretrained(server.root / "models" / "kosmos_g" / "kosmos-g")
    (server.root / "models" / "kosmos_g" / "empty").mkdir()
    with server:
        yield server


def wide_pipeline():
    """A tiny encoder with the states of the released one, (77, 768)."""
    pipe = build_tiny_pipeline()
    config = copy.deepcopy(pipe.text_encoder.config)
    config.aligner_hidden_size, config.num_queries = 768, 77
    torch.manual_seed(0)
    pipe.register_modules(text_encoder=KosmosGTextEncoder(config).eval())
    return pipe


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow(name):
    return json.loads((SOURCE / "api_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def probe(server, link, kind="condition", **nodes):
    """The tensor of a link of a graph."""
    graph = {**nodes, "dump": node("Dump", name="dump.safetensors", **{kind: link})}
    path = server.root / "output" / "dump.safetensors"
    path.unlink(missing_ok=True)
    history = server.run(graph)
    assert history["status"]["status_str"] == "success", history["status"]
    return load_file(path)["tensor"]


def problem(server, graph):
    """(type of the node, message) of a graph that fails, before or while it runs."""
    answer = server.post(graph)
    if "prompt_id" not in answer:
        ((number, found),) = answer["node_errors"].items()
        return graph[number]["class_type"], found["errors"][0]["details"]
    history = server.wait_for(answer["prompt_id"])
    (error,) = [told for kind, told in history["status"]["messages"] if kind == "execution_error"]
    return error["node_type"], error["exception_message"].strip()


# The workflows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_of_the_small_model_draws(server, name):
    (path,) = server.images(workflow(f"sprites_{name}"))
    image = np.asarray(PIL.Image.open(path))
    assert image.shape == (64, 64, 3)
    assert 5 < image.std() < 120  # neither empty nor noise of all colours


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_of_stable_diffusion_runs(server, name):
    graph = workflow(name)
    for one in graph.values():
        if one["class_type"] == "EmptyLatentImage":
            one["inputs"] |= {"width": 64, "height": 64}
        if one["class_type"] == "KSampler":
            one["inputs"]["steps"] = 2
        if one["class_type"] == "LoadImage":
            one["inputs"]["image"] = "kosmos_g_star.png"
    (path,) = server.images(graph)
    assert PIL.Image.open(path).size == (64, 64)


def test_lora_and_controlnet_change_the_image(server):
    def draw(change):
        graph = workflow("sprites_lora")
        change(graph)
        (path,) = server.images(graph)
        return np.asarray(PIL.Image.open(path)).astype(int)

    with_lora = draw(lambda graph: None)
    without = draw(lambda graph: graph["11"]["inputs"].update(strength_model=0.0))
    assert np.abs(with_lora - without).max() > 5


# Against the pipeline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [DEMO, "kosmos-g"])
def test_condition_is_that_of_encode_prompt_to_the_bit(server, model):
    pipe = KosmosGPipeline.from_pretrained(SPRITES, dtype=torch.float32) if model == DEMO else wide_pipeline()
    text = "<i> and <i> on a white background" if model == DEMO else "<i> in the suit of <i>"
    nodes = {
        "load": node("KosmosGLoader", model_name=model),
        **{"star": STAR_NODE, "heart": HEART_NODE},
        "prompt": node(
            "KosmosGPrompt", kosmos_g=["load", 0], text=text, image1=["star", 0], image2=["heart", 0]
        ),
        "negative": node("KosmosGNegative", kosmos_g=["load", 0], text=""),
    }
    # of as many threads as the server has
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(text, images=[STAR, HEART])
    torch.set_num_threads(threads)
    assert torch.equal(probe(server, ["prompt", 0], **nodes), positive)
    assert torch.equal(probe(server, ["negative", 0], **nodes), negative)


@torch.no_grad()
def euler(unet, positive, negative, noise, **settings):
    """diffusers' Euler from the noise that ComfyUI starts with: scaled by sqrt(1 + sigma^2), where diffusers takes sigma."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        **settings,
    )
    scheduler.set_timesteps(STEPS)
    latents = noise * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        without, with_prompt = unet(scaled, timestep, torch.cat([negative, positive])).sample.chunk(2)
        latents = scheduler.step(without + GUIDANCE * (with_prompt - without), timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("small", [True, False])
def test_ksampler_draws_what_diffusers_draws(server, small):
    pipe = KosmosGPipeline.from_pretrained(SPRITES, dtype=torch.float32)
    nodes = {
        "load": node("KosmosGLoader", model_name=DEMO if small else "kosmos-g"),
        "model": node("KosmosGSprites")
        if small
        else node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"),
        "star": STAR_NODE,
        "prompt": node(
            "KosmosGPrompt", kosmos_g=["load", 0], text="<i>", image1=["star", 0], model=["model", 0]
        ),
        "negative": node("KosmosGNegative", kosmos_g=["load", 0], text="", model=["model", 0]),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "noise": node("Noise", latent=["empty", 0], seed=SEED),
        "sampler": node(
            "KSampler",
            **{"seed": SEED, "steps": STEPS, "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": "normal"},
            **{"denoise": 1.0, "model": ["model", 0], "positive": ["prompt", 0], "negative": ["negative", 0]},
            latent_image=["empty", 0],
        ),
    }
    positive, negative = (probe(server, [name, 0], **nodes) for name in ("prompt", "negative"))
    noise, given = (probe(server, [name, 0], "latent", **nodes) for name in ("noise", "sampler"))
    if small:
        unet, scale, kind = pipe.unet, pipe.vae.config.scaling_factor, pipe.scheduler.config.prediction_type
    else:
        unet, scale, kind = (
            UNet2DConditionModel.from_pretrained(server.root / "unet").eval(),
            0.18215,
            "epsilon",
        )
    wanted = euler(unet, positive, negative, noise, prediction_type=kind)
    difference = (given * scale - wanted).abs().max().item()
    print(f"latents up to {wanted.abs().max():.3g}, differ by at most {difference:.2g}")
    assert wanted.std() > 0.1
    assert difference <= 1e-3


# Mistakes, and what is not computed twice -------------------------------------------------------------------------------


def test_mistakes_are_errors_of_their_node_and_the_server_lives_on(server):
    graph = workflow("sprites_two_pictures")

    def changed(number, **inputs):
        other = copy.deepcopy(graph)
        other[number]["inputs"].update(inputs)
        return {**other, "10": graph["10"]}

    kind, message = problem(server, changed("5", text="<i>"))
    assert kind == "KosmosGPrompt" and "The text has 1 <i> marks, and 2 images are connected." in message
    kind, message = problem(server, changed("5", text="<i>, <i> and <dog>"))
    assert kind == "KosmosGPrompt" and "<dog>, which names no image word" in message
    kind, message = problem(server, changed("1", model_name="empty"))
    assert kind == "KosmosGLoader" and "is not a Kosmos-G model that can be loaded" in message
    kind, message = problem(server, changed("1", model_name="kosmos-g"))
    assert "This encoder gives 768-wide states, this model takes" in message
    stable = workflow("two_pictures")
    stable["1"]["inputs"]["model_name"] = DEMO
    for number in ("3", "4"):
        stable[number]["inputs"]["image"] = "kosmos_g_star.png"
    kind, message = problem(server, stable)
    assert kind in ("KosmosGPrompt", "KosmosGNegative") and "wide states, this model takes 768" in message
    assert server.images(graph)


def test_two_queued_prompts_on_one_image_compute_its_states_once(server):
    def hits():
        return [
            int(part) for part in probe(server, ["count", 0], "latent", count=node("CacheCount")).flatten()
        ]

    image = PIL.Image.fromarray(np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(server.root / "input" / "new.png")
    before = hits()
    numbers = []
    for text in ("<i> on a mint background", "<i> on a grey background"):
        nodes = {
            "load": node("KosmosGLoader", model_name=DEMO),
            "image": node("LoadImage", image="new.png"),
            "prompt": node("KosmosGPrompt", kosmos_g=["load", 0], text=text, image1=["image", 0]),
            "dump": node("Dump", name=f"{len(numbers)}.safetensors", condition=["prompt", 0]),
        }
        numbers.append(server.post(nodes)["prompt_id"])
    for number in numbers:
        assert server.wait_for(number)["status"]["status_str"] == "success"
    after = hits()
    assert [after[0] - before[0], after[1] - before[1]] == [1, 1]  # hits, misses


def test_encoder_can_be_offloaded_and_runs_again(server):
    def free():
        server.send("/free", {"unload_models": True, "free_memory": False})

    def condition(text):
        nodes = {
            "load": node("KosmosGLoader", model_name=DEMO),
            "prompt": node("KosmosGPrompt", kosmos_g=["load", 0], text=text),
        }
        return probe(server, ["prompt", 0], **nodes)

    first = condition("a red star")
    free()
    condition("a blue star")
    free()
    assert torch.equal(condition("a red star"), first)


def test_words_are_saved_loaded_and_read(server):
    word = {
        "load": node("KosmosGLoader", model_name=DEMO),
        "star": STAR_NODE,
        "word": node(
            "KosmosGImageWord", kosmos_g=["load", 0], name="<star>", images=["star", 0], strength=1.0
        ),
        "save": node("KosmosGSaveImageWords", kosmos_g=["word", 0], filename_prefix="kosmos_g_words/star"),
        "again": node("KosmosGLoadImageWords", kosmos_g=["load", 0], words_name="star_00001_.safetensors"),
    }
    graph = {name: word[name] for name in ("load", "star", "word", "save")}
    assert server.run(graph)["status"]["status_str"] == "success"
    text = "<star> on a mint background"
    given = [
        probe(server, ["prompt", 0], **word, prompt=node("KosmosGPrompt", kosmos_g=[origin, 0], text=text))
        for origin in ("word", "again")
    ]
    assert torch.equal(*given)


def test_core_nodes_take_the_conditioning(server):
    base = {
        "load": node("KosmosGLoader", model_name=DEMO),
        "a": node("KosmosGPrompt", kosmos_g=["load", 0], text="a red star"),
        "b": node("KosmosGPrompt", kosmos_g=["load", 0], text="a blue heart"),
        "blend": node("KosmosGBlend", weights="3, 1", conditioning1=["a", 0], conditioning2=["b", 0]),
        "average": node(
            "ConditioningAverage",
            conditioning_to=["a", 0],
            conditioning_from=["b", 0],
            conditioning_to_strength=0.75,
        ),
        "concat": node("ConditioningConcat", conditioning_to=["a", 0], conditioning_from=["b", 0]),
        "zero": node("ConditioningZeroOut", conditioning=["a", 0]),
    }
    a, b, blend, average, concat, zero = (
        probe(server, [name, 0], **base) for name in ("a", "b", "blend", "average", "concat", "zero")
    )
    torch.testing.assert_close(blend, average, atol=1e-6, rtol=0)
    assert torch.equal(concat, torch.cat([a, b], dim=1)) and not zero.any()


def test_page_finds_templates_help_and_script(server):
    assert set(server.get("/workflow_templates")["kosmos_g"]) == {
        f"{prefix}{name}" for prefix in ("", "sprites_") for name in WORKFLOWS
    }
    for path in ("/extensions/kosmos_g/kosmos_g.js", "/extensions/kosmos_g/docs/KosmosGPrompt.md"):
        assert server.fetch(path)
    shown = server.get("/object_info")
    assert {name for name in shown if name.startswith("KosmosG")} == {
        *("KosmosGLoader", "KosmosGPrompt", "KosmosGNegative", "KosmosGImageWord", "KosmosGLoadImageWords"),
        *("KosmosGSaveImageWords", "KosmosGBlend", "KosmosGSprites"),
    }
