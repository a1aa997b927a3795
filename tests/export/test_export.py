"""The exported encoder next to torch's, its runner in a process without torch, and folders that are wrong or hostile."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from support.profiles import DISPLAY_P3_TO_XYZ, SRGB_TO_XYZ, make_profile
from torch import nn

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.export import export_encoder, runner, trace
from kosmos_g_diffusers.export import folder as export_folder
from kosmos_g_diffusers.export.folder import SAMPLES, Exported, images_of_samples
from kosmos_g_diffusers.export.formats import write
from kosmos_g_diffusers.export.int8 import Int8Embedding, Int8Linear, to_int8
from kosmos_g_diffusers.generation.generate import load_model
from kosmos_g_diffusers.processing_kosmos_g import KosmosGProcessor
from kosmos_g_diffusers.quantization import LIBRARIES, has_library

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
MODULES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "pt2": (),
}
CASES = [case["name"] for case in json.loads((REFERENCE / "cases.json").read_text(encoding="utf-8"))]
BATCHES = ((0, 0), (1,), (4, 0, 2), (0, 3, 4, 1))
# imports of torch, transformers, diffusers and this package fail
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers", "kosmos_g_diffusers", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv.pop(1))
"""


@pytest.fixture(scope="module")
def small(build_pipe, tmp_path_factory):
    """(pipeline whose encoder has one layer of each kind, its saved folder)."""
    pipe = build_pipe()
    encoder = pipe.text_encoder
    for part in (encoder.language_model.model, encoder.vision_model.model.encoder):
        part.layers = part.layers[:1]
    encoder.aligner.encoder_layers = encoder.aligner.encoder_layers[:1]
    encoder.aligner.query_layers = encoder.aligner.query_layers[:1]
    encoder.config.text_config.layers = encoder.config.vision_config.num_hidden_layers = 1
    encoder.config.aligner_layers = 1
    folder = tmp_path_factory.mktemp("export") / "model"
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="module")
def by_command(small, tmp_path_factory):
    """(process of `kosmos-g export --dtype float16` that ended, the folder that it was to write)."""
    for module in MODULES["onnx"]:
        pytest.importorskip(module, reason="it needs the extra `onnx`")
    folder = tmp_path_factory.mktemp("command") / "new" / "out"
    command = [sys.executable, "-m", "kosmos_g_diffusers", "export", small[1], "--output", folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command += ["--format", "onnx", "--dtype", "float16"]
    return subprocess.run(command, env=environment, capture_output=True, text=True), folder


@pytest.fixture(scope="module")
def exported(small, request, tmp_path_factory):
    """Function from format and dtype to a folder; each is written once, of graphs that are traced and translated once."""
    done, graphs, translated = {}, {}, {}
    translate = torch.onnx.export

    def exported(format, dtype="float32"):
        for module in MODULES[format]:
            pytest.importorskip(module, reason=f"it needs the extra `{format}`")
        key = (
            "float32" if (format, dtype) == ("openvino", "float16") else dtype
        )  # it halves the weights itself

        def trace_once(encoder):
            if key not in graphs:
                graphs[key] = trace(encoder)
            return graphs[key]

        def translate_once(program, output_names, **options):
            name = key, *output_names
            if name not in translated:
                translated[name] = translate(program, output_names=output_names, **options)
            return translated[name]

        if (format, dtype) == ("onnx", "float16"):
            ended, folder = request.getfixturevalue("by_command")
            return Exported(folder, 0, float(ended.stdout.split()[5]))
        if (format, dtype) not in done:
            output = tmp_path_factory.mktemp("exported") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export_folder, "trace", trace_once)
                patch.setattr(torch.onnx, "export", translate_once)
                done[format, dtype] = export_encoder(small[1], output, format, dtype)
        return done[format, dtype]

    return exported


def batch_of(counts, photos):
    prompts = ["a hat " * index + "<i> " * n for index, n in enumerate(counts)]
    return prompts, [photos[:n] for n in counts]


@torch.no_grad()
def encode(pipe, counts, photos, encoder=None):
    encoder = pipe.text_encoder if encoder is None else encoder
    return encoder(**pipe.get_processor()(*batch_of(counts, photos)))[0].numpy()


def rms(given, expected):
    assert given.shape == expected.shape and given.dtype == np.float32
    return np.sqrt(np.square(given - expected).mean() / np.square(expected).mean())


def of_dtype(encoder, dtype):
    """The encoder as torch computes it with the weights that a folder holds."""
    encoder = copy.deepcopy(encoder)
    if dtype == "int8":
        to_int8(encoder)
    return encoder.half().float() if dtype == "float16" else encoder


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_ragged_batches_of_any_length_are_those_of_torch(small, exported, photos, format, dtype):
    done = exported(format, dtype)
    encoder, same = runner.Encoder(done.folder, threads=1), of_dtype(small[0].text_encoder, dtype)
    # ONNX computes in half precision, OpenVINO rounds states to int8 where it has int8 products
    most = {("onnx", "float16"): 1e-2, ("openvino", "int8"): 1e-1}.get((format, dtype), 1e-5)
    for counts in BATCHES:
        assert rms(encoder.encode(*batch_of(counts, photos)), encode(small[0], counts, photos, same)) < most
    with torch.no_grad():
        null = same(torch.tensor([[0]]))[0].numpy()
    assert rms(encoder("")[None], null) < most
    with torch.no_grad():
        inputs = small[0].get_processor()(list(SAMPLES), images_of_samples(small[0].get_processor()))
        expected = rms(same(**inputs)[0].numpy(), small[0].text_encoder(**inputs)[0].numpy())
    assert abs(done.error - expected) < max(most, 1e-3 * expected)


def test_golden_cases_are_those_of_torch(golden_encoder, load_case, tmp_path, monkeypatch):
    for module in {*MODULES["onnx"], *MODULES["openvino"]}:
        pytest.importorskip(module, reason="it needs the extras `onnx` and `openvino`")
    graphs = trace(golden_encoder)
    translate = functools.cache(torch.onnx.export)
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: translate(program))
    for format in ("onnx", "openvino"):
        write(format, graphs, tmp_path)
        compare_with_golden_cases(golden_encoder, load_case, tmp_path, format)


def compare_with_golden_cases(golden_encoder, load_case, folder, format):
    encoder = runner.Encoder.__new__(runner.Encoder)
    encoder.folder, encoder.settings = folder, {"format": format}
    vision, condition = (encoder._load(name, 1) for name in ("vision", "condition"))
    config = golden_encoder.config
    for name in CASES:
        case = load_case(name)
        ids, slots = case.tensors["input_ids"], case.tensors["image_mask"].bool()
        states = np.zeros((0, config.latent_query_num, config.text_config.embed_dim), np.float32)
        if case.pixel_values is not None:
            states = vision(pixel_values=case.pixel_values.numpy())
        masks = {"image_token_mask": slots.numpy(), "attention_mask": ids.ne(1).numpy()}
        given = torch.from_numpy(condition(input_ids=ids.numpy(), image_embeds=states, **masks))
        with torch.no_grad():
            torch.testing.assert_close(given, golden_encoder(**case.inputs)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(given, case.tensors["condition"], atol=5e-5, rtol=0)


def test_graphs_of_torch_are_those_of_torch_and_each_holds_its_own_weights(small, exported, photos):
    folder = exported("pt2").folder
    vision, condition = (torch.export.load(folder / f"{name}.pt2") for name in ("vision", "condition"))
    expected = {name for name, _ in small[0].text_encoder.named_parameters()}
    held = [{name.removeprefix("encoder.") for name in graph.state_dict} for graph in (vision, condition)]
    assert not held[0] & held[1] and expected <= held[0] | held[1]
    for counts in BATCHES:
        inputs = small[0].get_processor()(*batch_of(counts, photos))
        states = torch.zeros(0, 4, 32)
        with torch.no_grad():
            if "pixel_values" in inputs:
                states = vision.module()(inputs["pixel_values"])
            masks = inputs["image_token_mask"], inputs["attention_mask"].bool()
            given = condition.module()(inputs["input_ids"], states, *masks).numpy()
        assert np.abs(given - encode(small[0], counts, photos)).max() < 2e-4
    null = torch.tensor([[0, 1]])  # <s> and padding, the shortest batch
    with torch.no_grad():
        given, expected = (
            condition.module()(null, states[:0], null > 1, null < 1),
            small[0].text_encoder(null),
        )
    torch.testing.assert_close(given, expected[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="does not describe graphs of onnx or openvino"):
        runner.Encoder(folder)


def test_int8_rows_are_within_half_a_step():
    torch.manual_seed(0)
    linear, table = nn.Linear(5, 7), nn.Embedding(6, 5)
    linear.weight.data[3] = 0
    states, ids = torch.randn(2, 3, 5), torch.arange(6).reshape(2, 3)
    for given, module, kept in ((Int8Linear(linear), linear, states), (Int8Embedding(table), table, ids)):
        step = module.weight.abs().amax(1, keepdim=True) / 127
        assert ((given.weight * given.scale - module.weight).abs() <= 0.51 * step).all()
        assert given.weight.dtype == torch.int8 and given(kept).shape == module(kept).shape
    expected = nn.functional.linear(states, Int8Linear(linear).weight * Int8Linear(linear).scale, linear.bias)
    torch.testing.assert_close(Int8Linear(linear)(states), expected)


def test_smaller_dtypes_have_fewer_bytes_of_weights(exported):
    float32, float16, int8 = (
        sum(path.stat().st_size for path in exported("openvino", dtype).folder.glob("*.bin"))
        for dtype in ("float32", "float16", "int8")
    )
    assert float16 < 0.6 * float32 and int8 < 0.8 * float32  # of a toy, half of what int8 takes is no weight


# The runner ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(exported, tmp_path_factory):
    """Function that copies the exported folder, to be changed."""

    def copied(format="onnx"):
        return shutil.copytree(exported(format).folder, tmp_path_factory.mktemp("copied") / "folder")

    return copied


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_runner_works_where_nothing_of_torch_can_be_imported(small, exported, photos, tmp_path, format):
    folder = exported(format).folder
    photos[0].save(tmp_path / "dog.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = f"{WITHOUT}import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", program, folder, folder / "kosmos_g_runner.py", tmp_path / "states.npy"]
    command += ["<i> in a hat", tmp_path / "dog.png"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    expected = small[0].encode_prompt("<i> in a hat", images=photos[:1])[0][0].detach().numpy()
    assert np.abs(np.load(tmp_path / "states.npy") - expected).max() < 2e-4
    ended = subprocess.run(command[:-1], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(
        "kosmos_g_runner.py: error: Prompt 0 has 1 '<i>'"
    )


def test_runner_is_a_file_of_at_most_200_lines():
    with open(runner.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 200


@pytest.fixture
def encoder(exported):
    return runner.Encoder(exported("onnx").folder, threads=1)


PROFILES = (
    make_profile(DISPLAY_P3_TO_XYZ),
    make_profile(SRGB_TO_XYZ),
    make_profile(None, b"GRAY"),
    make_profile(DISPLAY_P3_TO_XYZ) + bytes(5 * 1024**2),
    b"no profile",
    PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes(),
)


def with_profile(image, profile):
    image = (PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image).copy()
    image.info["icc_profile"] = profile
    return image


def test_runner_reads_images_as_the_processor_does(small, encoder, photos, tmp_path):
    processor = small[0].get_processor()
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, (61, 47, 4), np.uint8)
    kinds = [
        PIL.Image.fromarray(noise).convert(mode) for mode in ("RGBA", "LA", "L", "1", "P", "CMYK", "RGB")
    ]
    kinds.append(PIL.Image.fromarray(random.integers(0, 65536, (40, 90), np.uint16)))
    kinds += [noise[..., :3], *photos, photos[0].resize((7, 90)), photos[0].resize((91, 8))]
    turned, exif = tmp_path / "turned.jpg", PIL.Image.Exif()
    exif[0x0112] = 6
    kinds[6].save(turned, exif=exif)
    kinds += [with_profile(image, profile) for image in kinds[:9] for profile in PROFILES]
    damaged = PIL.Image.fromarray(noise[..., :3])
    damaged.info["exif"] = b"Exif\0\0" + bytes(40)
    for image in [*kinds, turned, str(turned), damaged]:
        assert np.array_equal(encoder._preprocess(image, "It"), processor.preprocess(image))
    for value in (-1, 65536):
        wide = PIL.Image.fromarray(np.full((8, 8), value, np.int32))
        for read in (processor.preprocess, lambda image: encoder._preprocess(image, "It")):
            with pytest.raises(ValueError, match="16 bit"):
                read(wide)


@pytest.mark.parametrize("which", ["small", "real"])
def test_runner_reads_texts_as_the_tokenizer_does(small, encoder, request, which, tmp_path, monkeypatch):
    tokenizer = small[0].tokenizer
    if which == "real":
        tokenizer = request.getfixturevalue("real_tokenizer")
        folder = shutil.copytree(encoder.folder, tmp_path / "real")
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        encoder = runner.Encoder(folder, threads=1)
    random = np.random.default_rng(0)
    letters = list("aaabcdehinst   !!!..,'<i>/☃漢字éＡ①\t𓀀𓀁") + [
        "hat",
        " suit",
        "<image>",
        "</s>",
        "<unk>",
        "xyxyx",
    ]
    texts = ["".join(random.choice(letters, size)) for size in random.integers(0, 30, 150)]
    for text in [*texts, "", " ", "an image of a dog, !!!!!! in the suit of a knight", "ha" * 20]:
        assert encoder._tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_errors_of_prompts_are_those_of_the_processor(small, encoder, photos):
    processor = KosmosGProcessor(small[0].tokenizer)
    for prompts, images in (
        (["a hat", "<i> <i>"], [[], photos[:1]]),
        (["a hat"], [photos[:1]]),
        (["z" * 300], [[]]),
        (["<dog> in a hat"], [[]]),
        (["<i>"], [["nothing.png"]]),
    ):
        with pytest.raises(ValueError) as expected:
            processor(prompts, images)
        with pytest.raises(ValueError) as given:
            encoder.encode(prompts, images)
        assert str(given.value)[:19] == str(expected.value)[:19]
    for prompts, images in (
        (["<i>"], None),
        (["<i>"], [None]),
        (["a", "a"], [[], photos[:1]]),
        (["<i> <i>"], [photos[:1]]),
        (["a", "b"], [[]]),
    ):
        with pytest.raises(ValueError) as expected:
            processor(prompts, images)
        with pytest.raises(ValueError) as given:
            encoder.encode(prompts, images)
        assert str(given.value) == str(expected.value)
    for prompts, images in (("a hat", None), (["<i>"], ["dog.png"]), ([b"a"], [[]])):
        with pytest.raises(ValueError, match="lists of images|is not a string with a list of images"):
            encoder.encode(prompts, images)
    assert encoder("<i>", marks_are_text=True).shape == encoder("a").shape


# Wrong and hostile folders ------------------------------------------------------------------------------------------


def change(folder, **values):
    path = folder / "kosmos_g.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: change(folder, format_version=2), "has format version 2, not 1"),
        (lambda folder: change(folder, format="../other"), "does not describe graphs"),
        (lambda folder: change(folder, format=["onnx"]), "does not describe graphs"),
        (lambda folder: change(folder, image_size="32"), "does not describe graphs"),
        (lambda folder: (folder / "kosmos_g.json").write_text("[1]"), "does not hold a JSON object"),
        (lambda folder: (folder / "kosmos_g.json").write_text("[" * 10**5), "does not hold a JSON object"),
        (
            lambda folder: (folder / "kosmos_g.json").write_text(" " * (2**20 + 1)),
            "does not hold a JSON object of at most",
        ),
        (lambda folder: (folder / "kosmos_g.json").unlink(), "There is no file kosmos_g.json"),
        (lambda folder: os.truncate(folder / "tokenizer.json", 2**26 + 1), "is not a tokenizer of Kosmos-G"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer of Kosmos-G"),
        (lambda folder: (folder / "vision.onnx").write_bytes(b"no graph"), "vision.onnx cannot be loaded"),
        (lambda folder: (folder / "vision.onnx").unlink(), "There is no file vision.onnx"),
    ],
)
def test_wrong_folder_is_refused_in_one_line(copied, spoil, words):
    folder = copied()
    spoil(folder)
    with pytest.raises(ValueError, match=words) as error:
        runner.Encoder(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("format", "name"),
    [
        *(("onnx", name) for name in ("kosmos_g.json", "tokenizer.json", "vision.onnx", "vision.onnx.data")),
        ("openvino", "vision.bin"),
    ],
)
def test_nothing_outside_the_folder_is_read(copied, format, name):
    folder = copied(format)
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(ValueError, match=r"leads out of it|is not a tokenizer"):
        runner.Encoder(folder)


def test_weights_outside_the_folder_are_not_read(copied):
    onnx, folder = pytest.importorskip("onnx"), copied()
    model = onnx.load(folder / "condition.onnx", load_external_data=False)
    places = [place for weight in model.graph.initializer for place in weight.external_data]
    for place in places:
        if place.key == "location":
            place.value = "../condition.onnx.data"
    (folder / "condition.onnx.data").rename(folder.parent / "condition.onnx.data")
    (folder / "condition.onnx").write_bytes(model.SerializeToString())
    assert places
    with pytest.raises(ValueError, match=r"condition\.onnx cannot be loaded"):
        runner.Encoder(folder)


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_runner_names_the_package_that_is_missing(copied, monkeypatch, format, package):
    folder = copied(format)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}. Run: pip install {package}"):
        runner.Encoder(folder)


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_command_names_the_extra_that_is_missing(small, tmp_path, monkeypatch, capsys, format):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    arguments = ["export", str(small[1]), "--format", format, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert (
        f"needs onnxscript, which is not installed. Run: pip install 'kosmos-g-diffusers[{format}]'" in said
    )


def test_command_refuses_what_it_cannot_write_or_read(small, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for model, output, words in (
        (small[1], tmp_path / "full", "a folder that is not empty"),
        (tmp_path / "none", tmp_path / "out", "is not there|There is no folder|cannot be loaded"),
    ):
        assert main(["export", str(model), "--format", "pt2", "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert any(one in said for one in words.split("|")), said


def test_full_disk_is_an_error_that_leaves_nothing(small, exported, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="the system cannot limit the size of files")
    graphs = {"vision": torch.export.load(exported("pt2").folder / "vision.pt2")}
    monkeypatch.setattr(export_folder, "trace", lambda encoder: graphs)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"The graphs cannot be written to .*out \(.*more room"):
            export_encoder(small[1], tmp_path / "out", "pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


def test_model_with_image_words_is_refused(build_pipe, photos, tmp_path):
    pipe = build_pipe()
    pipe.add_image_word("<dog>", photos[0])
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has the image words <dog>, which an exported folder cannot hold"):
        export_encoder(tmp_path / "model", tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantize", LIBRARIES)
def test_model_with_quantised_weights_is_refused(quantize, tmp_path):
    if not has_library(quantize):
        pytest.skip(f"{LIBRARIES[quantize]} is not installed, or too old")
    load_model(SPRITES, "float32", quantize).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="was saved with quantised weights, which an exported folder cannot"):
        export_encoder(tmp_path / "model", tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


def test_command_says_nothing_but_its_line(by_command):
    ended, folder = by_command
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(
        rf"{re.escape(str(folder))}: [\d.]+ MiB, RMS error [\d.e-]+ of torch's float32\n", ended.stdout
    )
