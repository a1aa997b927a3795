"""Make what ComfyUI shows of this package: the example workflows in both forms, and the screenshot in comfyui.md.

make comfyui-figures COMFYUI=path/to/ComfyUI    (needs Chromium and playwright, as tests/app does)

The workflows are written here in ComfyUI's API form, one function each; a real ComfyUI lays them out and says what the other
form looks like. Each is there twice: for Stable Diffusion 1.5, and for the small model that ships.
"""

import argparse
import json
import tempfile
from pathlib import Path

from support.app import chromium
from support.comfyui import Server

from kosmos_g_diffusers.comfyui.installing import SOURCE, export_sprites, install

EXAMPLES, API = SOURCE / "example_workflows", SOURCE / "api_workflows"
SCREENSHOT = Path(__file__).with_name("comfyui.png")
DEMO = "sprites (demo, only with its own U-Net)"
WIDTH, GAP = 290, 50  # pixels of a node and between two
# columns from the left; a node of another kind stands in the last but one
COLUMNS = (
    ("KosmosGLoader", "KosmosGSprites", "CheckpointLoaderSimple", "ControlNetLoader", "EmptyLatentImage"),
    ("LoadImage", "LoraLoader", "LoraLoaderModelOnly", "Canny"),
    ("KosmosGPrompt", "KosmosGNegative", "CLIPTextEncode"),
    (),
    ("VAEDecode", "SaveImage"),
)
HEIGHTS = {"LoadImage": 320, "SaveImage": 340, "KSampler": 270, "KosmosGPrompt": 240, "KosmosGNegative": 200}
HEIGHT = 130  # of others
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
SETTINGS |= {"LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1, "Comfy.Graph.CanvasInfo": False}
READY = "() => window.app?.graph && window.app.canvas"
LOAD = "(api) => { app.loadApiJson(api, 'kosmos-g'); }"
# the seed stays when a workflow is run again
ARRANGE = """(places) => {
  for (const node of app.graph.nodes) {
    [node.pos, node.size] = [places[node.id].slice(0, 2), places[node.id].slice(2)];
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
  }
  app.canvas.setDirty(true, true);
  return JSON.parse(JSON.stringify(app.graph.serialize()));
}"""
REOPEN = """async (graph) => {
  await app.loadGraphData(graph);
  await new Promise((done) => setTimeout(done, 300));
  return (await app.graphToPrompt()).output;
}"""
FIT = """() => {
  const [left, top] = [0, 1].map((side) => Math.min(...app.graph.nodes.map((node) => node.pos[side])));
  const [right, bottom] = [0, 1].map((side) => Math.max(...app.graph.nodes.map((node) => node.pos[side] + node.size[side])));
  const { ds, canvas } = app.canvas;
  ds.scale = Math.min(1, 0.94 * Math.min(canvas.clientWidth / (right - left), canvas.clientHeight / (bottom - top + 60)));
  ds.offset = [30 / ds.scale - left, 70 / ds.scale - top];
  app.canvas.setDirty(true, true);
}"""


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def basis(small, text, images):
    """Nodes of every workflow: models, images, prompt and negative, sampler, decoder; links name them."""
    files = ("kosmos_g_star.png", "kosmos_g_heart.png") if small else ("example.png", "example.png")
    sizes = {"width": 128, "height": 128} if small else {"width": 512, "height": 512}
    sampling = {"steps": 12, "cfg": 5.0} if small else {"steps": 25, "cfg": 7.5}
    nodes = {
        "1": node("KosmosGLoader", model_name=DEMO if small else "kosmos-g", hub_id="", dtype="auto"),
        "2": node("KosmosGSprites")
        if small
        else node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"),
        "5": node("KosmosGPrompt", text=text, kosmos_g=["1", 0], model=["2", 0]),
        "6": node("KosmosGNegative", text="", kosmos_g=["1", 0], model=["2", 0]),
        "7": node("EmptyLatentImage", **sizes, batch_size=1),
        "8": node(
            "KSampler",
            **{"seed": 0, **sampling, "sampler_name": "euler", "scheduler": "sgm_uniform", "denoise": 1.0},
            **{"model": ["2", 0], "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["7", 0]},
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["2", 1 if small else 2]),
        "10": node("SaveImage", filename_prefix="kosmos-g", images=["9", 0]),
    }
    for number in range(images):
        nodes[str(3 + number)] = node("LoadImage", image=files[number])
        nodes["5"]["inputs"][f"image{number + 1}"] = [str(3 + number), 0]
    return nodes


def two_pictures(small):
    return basis(small, "<i> and <i> on a white background" if small else "<i> wearing the hat of <i>", 2)


def controlnet(small):
    nodes = basis(small, "<i> on a lavender background" if small else "<i> as an oil painting", 1)
    nodes["4"] = node("LoadImage", image="kosmos_g_heart.png" if small else "example.png")
    nodes["11"] = node("Canny", low_threshold=0.2, high_threshold=0.4, image=["4", 0])
    if not small:
        nodes["12"] = node("ControlNetLoader", control_net_name="control_v11p_sd15_canny_fp16.safetensors")
    nodes["13"] = node(
        "ControlNetApplyAdvanced",
        **{"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "image": ["11", 0]},
        **{"positive": ["5", 0], "negative": ["6", 0], "control_net": ["2", 2] if small else ["12", 0]},
    )
    nodes["8"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    return nodes


def lora(small):
    nodes = basis(small, "<i> on a mint background" if small else "<i> in a forest", 1)
    if small:
        name = "kosmos_g_sprites.safetensors"
        nodes["11"] = node("LoraLoaderModelOnly", lora_name=name, strength_model=1.0, model=["2", 0])
        # the small model has no CLIP: its own words stand for the trigger words
        nodes["12"] = node("KosmosGPrompt", text="striped", kosmos_g=["1", 0])
    else:
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        name = "your_lora.safetensors"
        nodes["11"] = node("LoraLoader", lora_name=name, **strengths, model=["2", 0], clip=["2", 1])
        nodes["12"] = node("CLIPTextEncode", text="trigger words of the LoRA", clip=["11", 1])
    nodes["13"] = node("ConditioningConcat", conditioning_to=["5", 0], conditioning_from=["12", 0])
    nodes["8"]["inputs"] |= {"model": ["11", 0], "positive": ["13", 0]}
    return nodes


def image_to_image(small):
    nodes = basis(small, "<i> on a grey background" if small else "<i> in the snow", 1)
    nodes["4"] = node("LoadImage", image="kosmos_g_heart.png" if small else "example.png")
    nodes["7"] = node("VAEEncode", pixels=["4", 0], vae=["2", 1 if small else 2])
    nodes["8"]["inputs"]["denoise"] = 0.8
    return nodes


WORKFLOWS = (two_pictures, controlnet, lora, image_to_image)


def places(nodes):
    """Position and size of each node, in columns."""
    found, tops = {}, [0] * len(COLUMNS)
    for name in sorted(nodes, key=int):
        kind = nodes[name]["class_type"]
        column = next((number for number, kinds in enumerate(COLUMNS) if kind in kinds), len(COLUMNS) - 2)
        height = HEIGHTS.get(kind, HEIGHT)
        found[name] = [column * (WIDTH + GAP), tops[column], WIDTH, height]
        tops[column] += height + GAP
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comfyui", metavar="FOLDER", help="of a ComfyUI")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.comfyui, folder)
        install(server.root)
        export_sprites(server.root)
        write(server.root / "user" / "default" / "comfy.settings.json", SETTINGS)
        with server, chromium() as browser:
            page = open_page(browser, server)
            for small in (False, True):
                for workflow in WORKFLOWS:
                    name, nodes = f"{'sprites_' if small else ''}{workflow.__name__}", workflow(small)
                    graph = {**lay_out(page, nodes), "extra": {}}
                    again = page.evaluate(REOPEN, graph)
                    for number, one in again.items():
                        assert one["inputs"] == nodes[number]["inputs"], (name, one, nodes[number])
                    write(API / f"{name}.json", nodes)
                    write(EXAMPLES / f"{name}.json", graph)
            page = open_page(browser, server)
            lay_out(page, two_pictures(small=True))
            page.evaluate(FIT)
            page.evaluate("() => { app.queuePrompt(0); }")
            page.wait_for_function(
                "() => app.graph.nodes.find((node) => node.type === 'SaveImage').imgs?.length",
                timeout=120_000,
            )
            page.wait_for_timeout(1500)
            page.screenshot(path=SCREENSHOT)


def open_page(browser, server):
    page = browser.new_page(viewport={"width": 1440, "height": 810})
    page.goto(server.url)
    page.wait_for_function(READY)
    page.wait_for_timeout(3000)  # it opens a workflow of its own
    return page


def lay_out(page, nodes):
    """The workflow as the page shows and saves it."""
    page.evaluate(LOAD, nodes)
    page.wait_for_timeout(500)
    return page.evaluate(ARRANGE, places(nodes))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
