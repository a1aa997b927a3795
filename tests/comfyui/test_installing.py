"""The folder in custom_nodes: written once, brought up to date, taken out; nothing of the user's is lost."""

import json
import re

import pytest
from safetensors.torch import load_file

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.comfyui import installing
from kosmos_g_diffusers.comfyui.installing import MANIFEST, SOURCE, TESTED, export_sprites, install, uninstall
from kosmos_g_diffusers.environment import __version__

WORKFLOWS = ("two_pictures", "controlnet", "lora", "image_to_image")


@pytest.fixture
def comfyui(tmp_path):
    root = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes", "models/loras", "input"):
        (root / folder).mkdir(parents=True)
    for file in ("main.py", "nodes.py"):
        (root / file).touch()
    (root / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    return root


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_installing_writes_one_folder_of_the_registrys_layout(comfyui):
    outcome = install(comfyui)
    folder = comfyui / "custom_nodes" / "kosmos_g"
    assert (outcome.folder, outcome.changed, outcome.kept) == (folder, True, ())
    assert [path.name for path in (comfyui / "custom_nodes").iterdir()] == ["kosmos_g"]
    written = contents(folder)
    for name in ("__init__.py", "README.md", "pyproject.toml", "requirements.txt", "web/kosmos_g.js"):
        assert written[name] == (SOURCE / name).read_bytes()
    for name in WORKFLOWS:
        for prefix in ("", "sprites_"):
            assert f"example_workflows/{prefix}{name}.json" in written
            assert f"api_workflows/{prefix}{name}.json" in written


def test_installing_twice_changes_nothing(comfyui):
    install(comfyui)
    before = contents(comfyui)
    assert not install(comfyui).changed
    assert contents(comfyui) == before


def test_uninstalling_leaves_what_was_there_before(comfyui):
    (comfyui / "custom_nodes" / "other").mkdir()
    (comfyui / "custom_nodes" / "other" / "__init__.py").write_text("other")
    before = contents(comfyui)
    install(comfyui)
    (comfyui / "custom_nodes" / "kosmos_g" / "__pycache__").mkdir()
    (comfyui / "custom_nodes" / "kosmos_g" / "__pycache__" / "x.pyc").touch()
    assert uninstall(comfyui).kept == ()
    assert contents(comfyui) == before
    assert not (comfyui / "custom_nodes" / "kosmos_g").exists()
    with pytest.raises(ValueError, match="The nodes are not installed there"):
        uninstall(comfyui)


def test_files_of_an_earlier_version_are_replaced_and_removed(comfyui):
    folder = install(comfyui).folder
    wanted = contents(folder)
    written = json.loads((folder / MANIFEST).read_text())
    for name in ("web/kosmos_g.js", "web/old.js"):
        (folder / name).write_text("old")
        written[name] = installing.hash_bytes(b"old")
    (folder / MANIFEST).write_text(json.dumps(written))
    assert install(comfyui).changed
    assert contents(folder) == wanted


def test_what_the_user_changed_or_added_stays(comfyui):
    folder = install(comfyui).folder
    (folder / "__init__.py").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        assert install(comfyui).kept == ("__init__.py",)
    assert uninstall(comfyui).kept == ("__init__.py", "notes.txt")
    assert contents(folder) == {"__init__.py": b"mine", "notes.txt": b"mine"}


def test_after_uninstalling_notes_of_the_user_are_no_reason_to_refuse(comfyui):
    folder = install(comfyui).folder
    (folder / "notes.txt").write_text("mine")
    uninstall(comfyui)
    assert install(comfyui).changed
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "__init__.py").is_file()


@pytest.mark.parametrize("act", [install, uninstall])
def test_folder_of_somebody_else_is_left_alone(comfyui, act):
    folder = comfyui / "custom_nodes" / "kosmos_g"
    folder.mkdir()
    (folder / "__init__.py").write_text("theirs")
    with pytest.raises(ValueError, match="was not written by kosmos-g comfyui install, and stays as it is"):
        act(comfyui)
    assert contents(folder) == {"__init__.py": b"theirs"}


@pytest.mark.parametrize("act", [install, uninstall])
def test_link_is_not_followed(comfyui, tmp_path, act):
    elsewhere = tmp_path / "clone"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("{}")
    (comfyui / "custom_nodes" / "kosmos_g").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="stays as it is"):
        act(comfyui)
    assert contents(elsewhere) == {MANIFEST: b"{}"}


@pytest.mark.parametrize("manifest", ["[]", "{", '{"../../main.py": ""}', '{"/etc/passwd": ""}', '{"a": 1}'])
def test_damaged_list_of_files_removes_nothing(comfyui, manifest):
    folder = install(comfyui).folder
    (folder / MANIFEST).write_text(manifest)
    before = contents(comfyui)
    with pytest.raises(ValueError, match="stays as it is"):
        uninstall(comfyui)
    assert contents(comfyui) == before


def test_what_is_no_comfyui_is_refused_and_one_inside_is_named(comfyui, tmp_path):
    for act in (install, uninstall, export_sprites):
        with pytest.raises(ValueError, match=r"is not a ComfyUI: expected .*Did you mean '.*/ComfyUI'\?"):
            act(tmp_path)
        with pytest.raises(ValueError, match="is not a ComfyUI"):
            act(tmp_path / "nothing")
    assert contents(comfyui).keys() == {"main.py", "nodes.py", "comfyui_version.py"}


def test_sprites_bring_their_images_and_a_lora_that_fits(comfyui):
    files = export_sprites(comfyui)
    assert [path.relative_to(comfyui).as_posix() for path in files] == [
        "input/kosmos_g_star.png",
        "input/kosmos_g_heart.png",
        "models/loras/kosmos_g_sprites.safetensors",
    ]
    unet = load_file(f"{SPRITES}/unet/diffusion_pytorch_model.safetensors")
    named = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": value for name, value in unet.items()
    }
    lora = load_file(files[2])
    ups = [name for name in lora if name.endswith(".lora_up.weight")]
    assert ups
    for name in ups:
        module = name.removesuffix(".lora_up.weight")
        change = lora[name].float() @ lora[f"{module}.lora_down.weight"].float()
        assert change.shape == named[module].shape
        # the best that a low rank can do: what is left of the half is orthogonal to it
        rest = -0.5 * named[module].float() - change
        assert (rest * change).sum().abs() < 1e-2 * change.square().sum()
    before = contents(comfyui)
    export_sprites(comfyui)
    assert contents(comfyui) == before


def test_image_of_the_user_of_that_name_is_left_alone(comfyui):
    (comfyui / "input" / "kosmos_g_heart.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there already and is another file"):
        export_sprites(comfyui)
    assert (comfyui / "input" / "kosmos_g_heart.png").read_bytes() == b"mine"
    assert not (comfyui / "input" / "kosmos_g_star.png").exists()


def test_command_says_what_it_did_and_what_comes_next(comfyui, capsys):
    assert main(["comfyui", "install", str(comfyui)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Installed into {comfyui / 'custom_nodes' / 'kosmos_g'}.\n")
    assert f"Tried on ComfyUI {', '.join(TESTED)}; this one is 0.3.64." in said
    assert (
        "pip install" in said and str(comfyui / "models" / "kosmos_g") in said and "Restart ComfyUI" in said
    )
    assert main(["comfyui", "install", str(comfyui)]) == 0
    assert capsys.readouterr().out.startswith("Installed already, nothing to do")
    assert main(["comfyui", "export-sprites", str(comfyui)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(comfyui / "input" / "kosmos_g_star.png")
    assert main(["comfyui", "uninstall", str(comfyui)]) == 0
    assert capsys.readouterr().out.startswith("Taken out of ")
    assert main(["comfyui", "uninstall", str(comfyui)]) == 2
    assert main(["comfyui", "install", str(comfyui / "comfy")]) == 2
    assert capsys.readouterr().err.count("kosmos-g: error:") == 2


def test_folder_for_the_registry_has_this_version():
    text = (SOURCE / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"$', text, re.M)[1] == __version__
    assert "[tool.comfy]" in text
    said = (SOURCE / "README.md").read_text(encoding="utf-8")
    assert f"Tried on ComfyUI {', '.join(TESTED)}." in said


@pytest.mark.parametrize("name", [f"{prefix}{name}" for name in WORKFLOWS for prefix in ("", "sprites_")])
def test_both_forms_of_a_workflow_are_the_same_graph(name):
    api, page = (
        json.loads((SOURCE / folder / f"{name}.json").read_text())
        for folder in ("api_workflows", "example_workflows")
    )
    nodes = {str(node["id"]): node for node in page["nodes"]}
    assert {number: node["type"] for number, node in nodes.items()} == {
        number: node["class_type"] for number, node in api.items()
    }
    origins = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    for number, node in nodes.items():
        links = {
            one["name"]: origins[one["link"]] for one in node.get("inputs", ()) if one.get("link") is not None
        }
        assert links == {
            name: value for name, value in api[number]["inputs"].items() if isinstance(value, list)
        }
    assert any(node["type"] == "KosmosGPrompt" for node in nodes.values())
