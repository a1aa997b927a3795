"""Run by test_saving.py in a process of its own, in which kosmos_g_diffusers cannot be imported: what a saved folder does
with nothing but diffusers and transformers. Each function `step_...` is one check; the outcomes are written as JSON.

    python -I tests/support/without_package.py FOLDER WORK     (FOLDER: saved pipelines and expected results, WORK: an empty folder)
"""

import fnmatch
import json
import shutil
import sys
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_hub(repository, cache):
    """A Hub with one repository, "someone/kosmos-g", whose files are those of the folder `repository`.

    Files appear in `cache` only when diffusers asks for them, and only those that its filters let through.
    """
    from diffusers.pipelines import pipeline_utils
    from diffusers.utils import dynamic_modules_utils
    from transformers.utils import hub

    files = sorted(
        str(path.relative_to(repository)) for path in Path(repository).rglob("*") if path.is_file()
    )
    siblings = [SimpleNamespace(rfilename=name) for name in files]

    def fetch(name, place=cache):
        target = Path(place) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(repository) / name, target)
        return str(target)

    def check(repo_id):
        assert repo_id == "someone/kosmos-g", repo_id

    def hf_hub_download(repo_id, filename, *args, subfolder=None, **kwargs):
        check(repo_id)
        return fetch(f"{subfolder}/{filename}" if subfolder else filename)

    def snapshot_download(repo_id, *args, allow_patterns=None, ignore_patterns=None, **kwargs):
        check(repo_id)

        def matches(name, patterns):
            return any(
                fnmatch.fnmatch(name, pattern + "*" if pattern.endswith("/") else pattern)
                for pattern in patterns
            )

        for name in files:
            if allow_patterns is not None and not matches(name, allow_patterns):
                continue
            if ignore_patterns is not None and matches(name, ignore_patterns):
                continue
            fetch(name)
        return str(cache)

    def model_info(repo_id, *args, **kwargs):
        check(repo_id)
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    fakes = {
        "hf_hub_download": hf_hub_download,
        "snapshot_download": snapshot_download,
        "model_info": model_info,
        "_resolve_revision": lambda name, *, revision=None, **kwargs: revision,
    }

    def cached_files(path_or_repo_id, filenames, **kwargs):
        if Path(path_or_repo_id).exists():
            return original(path_or_repo_id, filenames, **kwargs)
        check(path_or_repo_id)
        subfolder = kwargs.get("subfolder")
        names = [f"{subfolder}/{name}" if subfolder else name for name in filenames]
        # transformers reads the commit from the path
        place = Path(cache) / "snapshots" / COMMIT
        found = [fetch(name, place) for name in names if name in files]
        missing_is_told = kwargs.get("_raise_exceptions_for_missing_entries", True)
        if (
            len(found) < len(names) and missing_is_told and list(filenames) != ["config.json"]
        ):  # as transformers
            raise OSError(f"{path_or_repo_id} has no {names}")
        return found or None

    original = hub.cached_files
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hub, "cached_files", cached_files))
        for module in (pipeline_utils, dynamic_modules_utils):
            for name, fake in fakes.items():
                if hasattr(module, name):  # not every release has all of them
                    stack.enter_context(mock.patch.object(module, name, fake))
        yield


def results(pipe):
    """What a pipeline makes of fixed input: conditions, and an image."""
    import numpy as np
    import PIL.Image
    import torch

    pipe.set_progress_bar_config(disable=True)
    picture = PIL.Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
    with torch.no_grad():
        condition, negative = pipe.encode_prompt(
            ["<i> in a hat", "<dog> <pair>"], images=[[picture], []], negative_prompt=["", "furniture"]
        )
        settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        drawn = pipe("<i> in a hat by <dog>", images=[picture], generator=generator, **settings).images
    return {"condition": condition.float().numpy(), "negative": negative.float().numpy(), "drawn": drawn}


def assert_same(pipe, expected, tolerance=0.0):
    import numpy as np

    for name, value in results(pipe).items():
        assert value.shape == expected[name].shape and np.abs(value - expected[name]).max() <= tolerance, name


def assert_no_package():
    assert not [name for name in sys.modules if name.split(".")[0] == "kosmos_g_diffusers"]


# Steps ---------------------------------------------------------------------------------------------------------------


def step_folder_is_refused_without_trust(folder, work, expected):
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.from_pretrained(folder / "saved")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("the folder's code was run without trust")
    assert not [name for name in sys.modules if name.startswith("diffusers_modules.")]


def step_folder_loads_with_diffusers_alone(folder, work, expected):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / "saved", trust_remote_code=True)
    assert type(pipe).__name__ == "KosmosGPipeline" and type(pipe).__module__.startswith("diffusers_modules.")
    assert pipe.image_words == ["<dog>", "<pair>"]
    assert_same(pipe, expected)
    assert_no_package()


def step_loaded_pipeline_saves_and_loads_again(folder, work, expected):
    from diffusers import DiffusionPipeline

    first = work / "again"
    DiffusionPipeline.from_pretrained(folder / "saved", trust_remote_code=True).save_pretrained(first)
    pipe = DiffusionPipeline.from_pretrained(first, trust_remote_code=True)
    assert_same(pipe, expected)
    pipe.save_pretrained(first)  # onto the folder that it came from
    assert_same(DiffusionPipeline.from_pretrained(first, trust_remote_code=True), expected)

    def content(root):
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.suffix in (".py", ".safetensors") or path.name in ("tokenizer.json", "model_index.json")
        }

    given, original = content(first), content(folder / "saved")
    assert given.keys() == original.keys()
    for name in original:
        if not name.endswith("model_index.json"):
            assert given[name] == original[name], name
    indices = [json.loads(index["model_index.json"]) for index in (given, original)]
    for index in indices:
        index.pop("_name_or_path", None)
    assert indices[0] == indices[1]
    assert_no_package()


def step_loaded_pipeline_has_image_words_and_siblings(folder, work, expected):
    import numpy as np
    import PIL.Image
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / "saved", trust_remote_code=True)
    pipe.add_image_word("<new>", PIL.Image.new("RGB", (9, 9), "red"))
    pipe.save_image_words(work / "words.safetensors", ["<new>"])
    pipe.remove_image_word("<new>")
    pipe.load_image_words(work / "words.safetensors")
    assert pipe.image_words == ["<dog>", "<pair>", "<new>"]
    siblings = sys.modules[type(pipe).__module__]
    sibling = siblings.KosmosGImg2ImgPipeline.from_pipe(pipe)
    back = type(pipe).from_pipe(sibling)
    assert back.unet is pipe.unet and back.text_encoder is pipe.text_encoder
    stock = StableDiffusionPipeline.from_pipe(pipe, dtype=pipe.dtype)
    drawn = []
    for drawer in (pipe, stock):
        drawer.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(
            drawer(
                "<new> hat", num_inference_steps=1, height=16, width=16, output_type="np", generator=generator
            )
        )
    assert np.array_equal(drawn[0].images, drawn[1].images)
    loaded = siblings.KosmosGPipeline.from_pretrained(
        folder / "saved"
    )  # the class is there: no code needs to be run
    assert_same(loaded, expected)
    assert_no_package()


def step_variant_dtype_and_parts_are_taken(folder, work, expected):
    import torch
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "saved" / "unet")
    pipe = DiffusionPipeline.from_pretrained(folder / "saved", trust_remote_code=True, unet=unet)
    assert pipe.unet is unet
    assert_same(pipe, expected)
    half = DiffusionPipeline.from_pretrained(
        folder / "half", trust_remote_code=True, variant="fp16", dtype=torch.float16
    )
    assert {half.text_encoder.dtype, half.unet.dtype, half.vae.dtype} == {torch.float16}
    assert half.encode_prompt("<dog> in a hat")[0].isfinite().all()
    assert_no_package()


def step_hub_repository_loads_with_trust(folder, work, expected):
    from diffusers import DiffusionPipeline

    with fake_hub(folder / "saved", work / "cache"):
        pipe = DiffusionPipeline.from_pretrained("someone/kosmos-g", trust_remote_code=True)
        assert type(pipe).__name__ == "KosmosGPipeline" and type(pipe).__module__.startswith(
            "diffusers_modules."
        )
        assert_same(pipe, expected)
        pipe.save_pretrained(work / "from_hub")
    assert_same(DiffusionPipeline.from_pretrained(work / "from_hub", trust_remote_code=True), expected)
    assert_no_package()


def step_hub_repository_is_refused_without_trust(folder, work, expected):
    from diffusers import DiffusionPipeline

    with fake_hub(folder / "saved", work / "untrusted"):
        try:
            DiffusionPipeline.from_pretrained("someone/kosmos-g")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        else:
            raise AssertionError("the repository's code was run without trust")


def step_parts_load_with_transformers_alone(folder, work, expected):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "saved" / "tokenizer", trust_remote_code=True)
    encoder = AutoModel.from_pretrained(folder / "saved" / "text_encoder", trust_remote_code=True)
    with torch.no_grad():
        condition = encoder(tokenizer("<dog> <pair>", return_tensors="pt").input_ids)[0]
    assert (condition[0].numpy() - expected["condition"][1]).max() < 1e-4
    assert_no_package()


def step_parts_of_a_hub_repository_load_from_their_subfolders(folder, work, expected):
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with fake_hub(folder / "saved", work / "cache"):
        arguments = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained("someone/kosmos-g", subfolder="text_encoder", **arguments)
        encoder = AutoModel.from_pretrained("someone/kosmos-g", subfolder="text_encoder", **arguments)
        tokenizer = AutoTokenizer.from_pretrained("someone/kosmos-g", subfolder="tokenizer", **arguments)
    assert type(encoder).__name__ == "KosmosGTextEncoder" and config.hidden_size == encoder.config.hidden_size
    with torch.no_grad():
        condition = encoder(tokenizer("<dog> <pair>", return_tensors="pt").input_ids)[0]
    assert abs(condition[0].numpy() - expected["condition"][1]).max() < 1e-4
    assert_no_package()


def step_repository_is_a_custom_pipeline_for_another_base(folder, work, expected):
    from diffusers import DiffusionPipeline
    from transformers import AutoModel, AutoTokenizer

    base = work / "base"  # U-Net, VAE and scheduler of a Stable Diffusion
    base.mkdir()
    index = json.loads((folder / "saved" / "model_index.json").read_text())
    index = index | {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(folder / "saved" / part, base / part)
    with fake_hub(folder / "saved", work / "cache"):
        parts = {
            "text_encoder": AutoModel.from_pretrained(
                "someone/kosmos-g", subfolder="text_encoder", trust_remote_code=True
            ),
            "tokenizer": AutoTokenizer.from_pretrained(
                "someone/kosmos-g", subfolder="tokenizer", trust_remote_code=True
            ),
        }
        pipe = DiffusionPipeline.from_pretrained(
            base, custom_pipeline="someone/kosmos-g", trust_remote_code=True, **parts
        )
    assert type(pipe).__name__ == "KosmosGPipeline"
    assert_same(pipe, expected, 1e-5)
    assert_no_package()


def step_every_pipeline_class_loads_by_its_own_name(folder, work, expected):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / "controlnet", trust_remote_code=True)
    assert (
        type(pipe).__name__ == "KosmosGControlNetPipeline"
        and type(pipe.controlnet).__name__ == "ControlNetModel"
    )
    assert_no_package()


STEPS = [name for name in globals() if name.startswith("step_")]


class NoPackage:
    """Makes `import kosmos_g_diffusers` fail, even where it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "kosmos_g_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r} (kept away by the test)", name=name)


def main(folder, work):
    import numpy as np
    import torch

    torch.set_num_threads(1)
    expected = dict(np.load(folder / "expected.npz"))
    outcomes = {}
    for name in STEPS:
        try:
            place = work / name
            place.mkdir()
            globals()[name](folder, place, expected)
            outcomes[name] = "ok"
        except Exception:
            outcomes[name] = traceback.format_exc()
    (work / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
