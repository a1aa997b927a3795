"""`kosmos-g env`: what it says, what it never says, and that broken packages and hostile folders do not end it."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from kosmos_g_diffusers import SPRITES, environment
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.commands import env

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"


@pytest.fixture(autouse=True)
def no_process(monkeypatch, request):
    """Devices are asked in this process, in which torch is there already."""
    if "asks" not in request.node.name:
        monkeypatch.setattr(env, "_devices", environment.describe_devices)


def report(capsys, *flags):
    capsys.readouterr()
    assert main(["env", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def line_of(text, name):
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"- {name}: "))
    return line.partition(": ")[2]


def test_versions_are_those_of_the_packages(capsys):
    text = report(capsys)
    assert line_of(text, "kosmos-g-diffusers").startswith(environment.__version__)
    assert line_of(text, "torch").startswith(torch.__version__.partition("+")[0])
    assert line_of(text, "diffusers").startswith(diffusers.__version__)
    assert line_of(text, "Python").startswith(".".join(map(str, sys.version_info[:3])))
    assert "GiB of memory" in line_of(text, "System")
    assert line_of(text, "Device").startswith(environment.default_device())


def test_core_packages_are_those_of_the_installation():
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = declared["options"]["install_requires"].split()
    assert list(env.CORE) == [re.match(r"[\w.-]+", line).group() for line in lines]


def test_model_is_told_without_loading_it(capsys, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    text = report(capsys)
    assert line_of(text, "Model") == "the small model that ships"
    assert line_of(text, "pipeline").startswith("KosmosGPipeline, written by diffusers ")
    for name in ("text_encoder", "unet", "vae"):
        (path,) = (Path(SPRITES) / name).glob("*.safetensors")
        count = sum(tensor.numel() for tensor in load_file(path).values())
        assert f", {count:,} parameters of F16" in line_of(text, name)
    assert "license: mit" in line_of(text, "card")
    assert line_of(text, "code in the folder") == "none"


def test_code_and_sources_of_a_saved_folder_are_told(capsys, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    text = report(capsys, "--model", str(tmp_path / "saved"))
    assert line_of(text, "code in the folder") == "as in this package"
    assert line_of(text, "unet").endswith(", from not recorded")
    module = tmp_path / "saved" / "text_encoder" / "modeling_kosmos_g.py"
    module.write_text(module.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    text = report(capsys, "--model", str(tmp_path / "saved"))
    assert line_of(text, "code in the folder").endswith("this package's: text_encoder/modeling_kosmos_g.py")


def test_neither_tokens_nor_personal_paths_are_shown(capsys, monkeypatch, tmp_path):
    home = tmp_path / "home" / "anna"
    shutil.copytree(SPRITES, home / "models" / "kosmos-g", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY", "HF_ENDPOINT", "OMP_NUM_THREADS_OF_ANNA"):
        monkeypatch.setenv(name, "https://anna:secret@example.org")
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = report(capsys, "--model", str(home / "models" / "kosmos-g"))
    assert line_of(text, "Model") == f"~{os.sep}models{os.sep}kosmos-g"
    assert line_of(text, "Environment") == "OMP_NUM_THREADS=3"
    for secret in ("anna", "secret", str(tmp_path), sys.prefix):
        assert secret not in text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("OSError: /mnt/anna/lib/libcudart.so.12: cannot open", "OSError: .../libcudart.so.12: cannot open"),
        (r"D:\data\anna\torch\c10.dll is missing", ".../c10.dll is missing"),
        ("'/data/anna/a.py' and https://example.org/a/b", "'.../a.py' and https://example.org/a/b"),
        ("\x1b[2J red", " [2J red"),
        (f"{sys.prefix}/lib/python/torch", "[python]/lib/python/torch"),
    ],
)
def test_folders_and_control_characters_are_cut_out_of_what_libraries_say(said, shown):
    assert env._shown(said) == shown


def test_packages_that_are_missing_or_damaged_are_told(capsys, monkeypatch):
    version = metadata.version

    def broken(name):
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        if name == "pillow":
            raise KeyError("Version")
        return version(name)

    monkeypatch.setattr(metadata, "version", broken)
    text = report(capsys)
    assert line_of(text, "torch").startswith("not installed")
    assert line_of(text, "pillow").startswith("unknown, its metadata cannot be read")


def test_commit_of_an_installation_is_told_without_its_address(capsys, monkeypatch):
    origin = {
        "url": "https://anna:secret@example.org/x.git",
        "vcs_info": {"vcs": "git", "commit_id": "c0ffee"},
    }
    distribution = SimpleNamespace(read_text=lambda name: json.dumps(origin))
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)
    assert line_of(report(capsys), "kosmos-g-diffusers") == f"{environment.__version__}, commit c0ffee"


def test_hostile_folder_is_told_in_short_printable_lines(capsys, tmp_path):
    index = {f"part{number}": ["diffusers", "\x1b[31m" + "long " * 1000] for number in range(100)}
    index |= {"../../outside": ["a", "b"], "_class_name": {"a": 1}, "none": [None, None], "number": 3}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "part0").mkdir()
    (tmp_path / "part0" / "model.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    text = report(capsys, "--model", str(tmp_path))
    assert "weights cannot be read" in line_of(text, "part0")
    assert len(text) < 10_000 and "outside" not in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_folder_of_another_kind_and_no_folder(capsys, tmp_path):
    text = report(capsys, "--model", str(tmp_path))
    assert line_of(text, "pipeline").startswith("unknown, there is no model_index.json")
    assert line_of(text, "card") == "none"
    assert main(["env", "--model", str(tmp_path / "missing")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_accelerators_are_told_with_their_memory(monkeypatch):
    module = SimpleNamespace(
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(name=f"Chip {index}", total_memory=8 * 2**30),
        mem_get_info=lambda index: (2**30, 8 * 2**30),
    )
    monkeypatch.setattr(environment, "default_device", lambda: "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    told = environment.describe_devices()
    assert "cuda:1 Chip 1, 8.0 GiB, 1.0 GiB of it free" in told
    apple = SimpleNamespace(recommended_max_memory=lambda: 12 * 2**30)
    monkeypatch.setattr(environment, "default_device", lambda: "mps")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: apple)
    assert environment.describe_devices() == "mps, up to 12.0 GiB"


BROKEN = {
    "raises": "raise OSError('/home/anna/torch/lib/libtorch.so: cannot open shared object file')",
    "ends its process": "import os; os._exit(132)",
}


def run_env(folder, python=sys.executable, **variables):
    """`kosmos-g env` in a process of its own."""
    command = [str(python), "-m", "kosmos_g_diffusers", "env"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_core_packages_do_not_end_the_report(how, tmp_path):
    packages = tmp_path / "packages"
    for name in ("torch", "diffusers", "transformers", "PIL", "safetensors", "huggingface_hub", "numpy"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(BROKEN[how] if name == "torch" else "raise OSError")
    result = run_env(tmp_path, PYTHONPATH=f"{packages}{os.pathsep}{SOURCE}")
    assert (result.returncode, result.stderr) == (0, "")
    said = ".../libtorch.so: cannot open" if how == "raises" else "exit code 132"
    device = line_of(result.stdout, "Device")
    assert device.startswith("unknown, torch does not start: ") and said in device
    assert line_of(result.stdout, "torch").startswith(torch.__version__.partition("+")[0])
    assert "weights cannot be read" in line_of(result.stdout, "unet")


def test_report_is_made_where_nothing_is_installed(tmp_path):
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    builder.create(tmp_path / "empty")
    python = builder.ensure_directories(tmp_path / "empty").env_exe
    result = run_env(tmp_path, python, PYTHONPATH=str(SOURCE))
    assert (result.returncode, result.stderr) == (0, "")
    # an editable installation leaves what is needed next to the package
    assert line_of(result.stdout, "torch").partition(" (")[0] == "not installed"
    assert "torch does not start: ModuleNotFoundError" in line_of(result.stdout, "Device")
