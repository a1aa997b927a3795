"""FID-30k: the sample of captions, the distance, its resumable features, and a run from end to end."""

import json
import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch

from kosmos_g_diffusers.evaluation import fid
from kosmos_g_diffusers.evaluation.benchmarks import coco
from kosmos_g_diffusers.evaluation.run import evaluate
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.testing import build_tiny_pipeline

ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
)
CAPTIONS = [
    "a hat",
    "A hat on a suit.",
    "furniture made of <i>",
    "a painting with a <red-hat>",
    "the hat is in style",
]


class SmallNetwork(torch.nn.Module):
    """Features that depend on every pixel, in the place of Inception."""

    identity = {"scorer": "fid", "network": "small"}

    def __init__(self):
        super().__init__()
        self.calls = 0
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * 8 * 8, 5, generator=generator)

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, fid.SIZE, fid.SIZE)
        self.calls += 1
        small = torch.nn.functional.avg_pool2d(pixels / 255, fid.SIZE // 8)
        return small.flatten(1) @ self.weight


@pytest.fixture
def network():
    return SmallNetwork()


@pytest.fixture
def data(tmp_path):
    """Photographs and captions in the format of COCO."""
    folder = tmp_path / "val2014"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(7):
        name = f"COCO_val2014_{number:012}.jpg"
        colours = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        PIL.Image.fromarray(colours).resize((90 + number, 60)).save(folder / name)
        images.append({"id": 100 + number, "file_name": name})
    for number, text in enumerate(CAPTIONS):
        annotations.append({"id": number, "image_id": 100 + number, "caption": text})
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return SimpleNamespace(annotations=path, images=folder)


def scipy_distance(real, generated):
    """The formula with scipy's matrix square root."""
    real, generated = (np.asarray(features, dtype=np.float64) for features in (real, generated))
    root = scipy.linalg.sqrtm(np.cov(real, rowvar=False) @ np.cov(generated, rowvar=False))
    traces = np.trace(np.cov(real, rowvar=False)) + np.trace(np.cov(generated, rowvar=False))
    return ((real.mean(0) - generated.mean(0)) ** 2).sum() + traces - 2 * np.trace(root).real


def test_distance_agrees_with_scipy():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    real = torch.from_numpy(rng.normal(size=(400, 16)) @ mix).float()
    generated = torch.from_numpy(rng.normal(size=(300, 16)) @ rng.normal(size=(16, 16)) + 0.5).float()
    expected = scipy_distance(real, generated)
    assert expected > 10
    distance = fid.frechet_distance(real.split(90), generated.split(70))
    assert distance == pytest.approx(expected, abs=1e-3)
    assert fid.frechet_distance([real], [real]) == pytest.approx(0, abs=1e-3)


# Captions --------------------------------------------------------------------------------------------------------------


def test_seed_draws_the_official_sample():
    annotations = [{"id": number} for number in range(1000)]
    random.seed(0)
    assert coco.draw_captions(annotations, 300, 0) == random.sample(annotations, 300)
    assert coco.draw_captions(annotations, 300, 1) != coco.draw_captions(annotations, 300, 0)


def test_seed_of_an_image_belongs_to_its_caption():
    captions = [{"id": number, "caption": f"a hat {number}"} for number in range(20)]
    seeds = {task.text: task.seed for task in coco.build_tasks(captions, 0)}
    assert len(set(seeds.values())) == 20
    turned = {task.text: task.seed for task in coco.build_tasks(captions[::-1], 0)}
    assert turned == seeds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"annotations": []}', "KeyError: 'images'"),
        ('{"images": [], "annotations": []}', "holds no captions"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 2, "image_id": 1, "bbox": []}]}',
            "KeyError: 'caption'",
        ),
        ('{"images": [], "annotations": [{"id": 2, "image_id": 1, "caption": "a hat"}]}', "annotation 2"),
    ],
)
def test_annotations_of_another_format_are_refused(content, message, tmp_path):
    path = tmp_path / "instances_val2014.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        coco.read_annotations(path)
    assert "instances_val2014.json" in str(error.value)


def test_more_captions_than_there_are_and_missing_photographs_are_refused(
    data, network, monkeypatch, tmp_path
):
    with pytest.raises(ValueError, match="9 captions were asked for; expected 2 to 5"):
        run(data, tmp_path / "run", monkeypatch, network, count=9)
    for number in (2, 5):
        (data.images / f"COCO_val2014_{number:012}.jpg").unlink()
    with pytest.raises(ValueError, match="2 of 7 photographs are not in .*000002.jpg, .*000005.jpg"):
        run(data, tmp_path / "run", monkeypatch, network)
    with pytest.raises(ValueError, match="no annotations at"):
        coco.read_annotations(tmp_path / "nothing.json")


# Features --------------------------------------------------------------------------------------------------------------


def test_crop_takes_the_middle_of_the_shorter_side():
    array = np.zeros((60, 100, 3), dtype=np.uint8)
    array[:, 20:80] = 200  # the middle 60 x 60
    pixels = fid.crop(PIL.Image.fromarray(array), 30)
    assert pixels.shape == (3, 30, 30) and pixels.dtype == torch.uint8
    assert (pixels[:, :, 1:-1] == 200).all()
    assert fid.crop(PIL.Image.fromarray(array).rotate(90, expand=True), 30).shape == (3, 30, 30)
    same = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    assert np.array_equal(fid.crop(same, 30).permute(1, 2, 0), np.asarray(same))


@pytest.fixture
def images(data, monkeypatch):
    monkeypatch.setattr(fid, "SHARD", 3)
    monkeypatch.setattr(fid, "BATCH", 2)
    return sorted(data.images.iterdir())


def features_of(folder):
    return torch.cat(list(fid.read_features(folder)))


def test_features_are_those_of_the_images_in_order(images, network, tmp_path):
    fid.write_features(tmp_path / "features", images, network, ALONE)
    pixels = torch.stack([fid.crop(PIL.Image.open(path).convert("RGB")) for path in images])
    torch.testing.assert_close(features_of(tmp_path / "features"), network(pixels))


def test_features_that_are_there_are_kept(images, network, tmp_path):
    folder = tmp_path / "features"
    fid.write_features(folder, images, network, ALONE)
    expected, first = features_of(folder), network.calls
    fid.write_features(folder, images, network, ALONE)
    assert network.calls == first == 2 + 2 + 1
    # a part that a kill has left out, and one that it has left damaged
    (folder / "000001.safetensors").unlink()
    (folder / "000002.safetensors").write_bytes(b"half")
    fid.write_features(folder, images, network, ALONE)
    assert network.calls == first + 2 + 1 and torch.equal(features_of(folder), expected)


def test_features_of_other_images_or_another_network_are_not_mixed(images, network, tmp_path):
    folder = tmp_path / "features"
    fid.write_features(folder, images, network, ALONE)
    before, calls = features_of(folder), network.calls
    PIL.Image.new("RGB", (70, 60), "red").save(images[0])
    fid.write_features(folder, images, network, ALONE)
    assert network.calls == calls + 2
    changed = (features_of(folder) != before).any(1)
    assert changed.tolist() == [True] + [False] * 6
    network.identity = {"network": "another"}
    fid.write_features(folder, images, network, ALONE)
    assert network.calls == calls + 2 + 5
    fid.write_features(folder, images[:3], network, ALONE)
    assert len(features_of(folder)) == 3


def test_processes_share_the_features(images, network, tmp_path):
    fid.write_features(tmp_path / "alone", images, network, ALONE)
    for index in (1, 0):
        state = SimpleNamespace(**{**vars(ALONE), "num_processes": 2, "process_index": index})
        fid.write_features(tmp_path / "two", images, network, state)
    assert torch.equal(features_of(tmp_path / "two"), features_of(tmp_path / "alone"))


# Runs ------------------------------------------------------------------------------------------------------------------


def run(data, output, monkeypatch, network, *, count=4, steps=2, generated=None, **options):
    monkeypatch.setattr(fid, "load_inception", lambda weights: network)
    settings = {**coco.SETTINGS, "steps": steps, "height": 32, "width": 32, "dtype": "float32", "seed": 0}
    settings = settings if generated is None else {}
    options = {"model": None, "settings": settings, "device": "cpu", "batch_size": 3, **options}
    asked = SimpleNamespace(**vars(data), count=count, seed=0, inception=None, generated=generated)
    return evaluate(coco.plan(asked), output, **options)


@pytest.fixture
def finished(data, network, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra eval)")
    return run(data, tmp_path / "run", monkeypatch, network), tmp_path / "run"


def test_report_holds_the_distance_of_images_and_photographs(finished, data, network):
    report, folder = finished
    paths = sorted(folder.glob("images/000/*.png"))
    assert len(paths) == 4
    generated, real = (
        network(torch.stack([fid.crop(PIL.Image.open(path).convert("RGB")) for path in group]))
        for group in (paths, sorted(data.images.iterdir()))
    )
    expected = scipy_distance(real, generated)
    assert report["metrics"]["fid"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert report == json.loads((folder / "report.json").read_text())
    assert report["settings"]["steps"] == 2 and report["settings"]["guidance"] == 3.0
    text = (folder / "report.md").read_text()
    for part in ("10.990", "4 images against 7 photographs", "these two do not compare", "seed"):
        assert part in text


def test_images_of_another_model_have_the_same_distance(finished, data, network, monkeypatch, tmp_path):
    report, folder = finished
    (tmp_path / "others").mkdir()
    for number in range(4):  # named as the official script names them
        image = PIL.Image.open(folder / "images" / "000" / f"{number:06}.png")
        image.save(tmp_path / "others" / f"{number:05}.png")
    generated = {"generated": tmp_path / "others"}
    other = run(data, tmp_path / "scored", monkeypatch, network, **generated)
    assert other["metrics"]["fid"] == report["metrics"]["fid"]
    text = (tmp_path / "scored" / "report.md").read_text()
    assert "read from a folder as of Kosmos-G's COCO script" in text and "4 images against 7" in text
    (tmp_path / "others" / "00002.png").unlink()
    with pytest.raises(ValueError, match="1 of 4 images are not in .*: 00002"):
        run(data, tmp_path / "incomplete", monkeypatch, network, **generated)


def test_images_are_those_of_the_captions(finished):
    _, folder = finished
    captions = json.loads((folder / "captions.json").read_text())
    assert captions == random.Random(0).sample(
        [{"id": n, "image_id": 100 + n, "caption": text} for n, text in enumerate(CAPTIONS)], 4
    )
    path = folder / "images" / "000" / "000002.png"
    settings = read_settings(path)
    # what would be a mark or an image word is text, to the tokenizer the same
    assert settings.prompt.replace("＜", "<").replace("＞", ">") == captions[2]["caption"]
    assert settings.scheduler == "ddim" and settings.images == ()
    tokenizer = build_tiny_pipeline().tokenizer
    assert tokenizer(settings.prompt)["input_ids"] == tokenizer(captions[2]["caption"])["input_ids"]


def test_finished_run_is_resumed_without_work_and_says_the_same(finished, data, network, monkeypatch):
    report, folder = finished
    files = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}
    texts = [(folder / name).read_bytes() for name in ("report.json", "report.md")]
    calls = network.calls
    assert run(data, folder, monkeypatch, network) == report
    assert {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")} == files
    assert [(folder / name).read_bytes() for name in ("report.json", "report.md")] == texts
    assert network.calls == calls


def test_lost_image_is_made_again_as_it_was(finished, data, network, monkeypatch):
    report, folder = finished
    path = folder / "images" / "000" / "000001.png"
    before = path.read_bytes()
    path.unlink()
    assert run(data, folder, monkeypatch, network) == report
    assert path.read_bytes() == before


def test_run_of_other_settings_is_refused(finished, data, network, monkeypatch):
    _, folder = finished
    with pytest.raises(ValueError, match="settings.steps: 2 there, 3 now"):
        run(data, folder, monkeypatch, network, steps=3)


# Inception -------------------------------------------------------------------------------------------------------------


def test_without_torch_fidelity_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torchmetrics torch-fidelity torchvision"):
        fid.load_inception(None)


@pytest.fixture
def inception_weights(monkeypatch, tmp_path):
    """A file of random weights of the real network."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed", exc_type=ImportError)
    from torch_fidelity import feature_extractor_inceptionv3 as module
    from torchmetrics.image.fid import NoTrainInceptionV3

    def offline(*args, **kwargs):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        torch.save(
            NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict(), tmp_path / "inception.pth"
        )
    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    return tmp_path / "inception.pth"


def test_network_is_torchmetrics_own(inception_weights, data):
    from torchmetrics.image.fid import FrechetInceptionDistance

    pixels = torch.stack([fid.crop(PIL.Image.open(path), 64) for path in sorted(data.images.iterdir())])
    extractor = fid.load_inception(inception_weights)
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception_weights))
    metric.update(pixels[:4], real=True)
    metric.update(pixels[4:], real=False)
    features = extractor(pixels)
    assert features.shape == (7, 2048) and len(extractor.identity["sha256"]) == 64
    distance = fid.frechet_distance([features[:2], features[2:4]], [features[4:]])
    assert distance == pytest.approx(float(metric.compute()), rel=1e-4)


def test_weights_that_cannot_be_had_name_the_way_out(inception_weights, tmp_path):
    with pytest.raises(OSError, match="no network.*pass --inception FILE"):
        fid.load_inception(None)
    with pytest.raises(OSError, match="no weights of the Inception network at"):
        fid.load_inception(tmp_path / "missing.pth")


def test_weights_that_would_run_code_are_refused(inception_weights, tmp_path):
    torch.save({"weight": pytest.raises}, tmp_path / "code.pth")
    with pytest.raises(OSError, match="cannot be loaded"):
        fid.load_inception(tmp_path / "code.pth")
