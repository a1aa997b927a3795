"""The model card of a saved folder."""

import pytest
from huggingface_hub import ModelCard

from kosmos_g_diffusers.model_card import write_model_card


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def read(folder):
    return ModelCard.load(folder / "README.md")


def test_card_tells_the_hub_what_the_folder_is(folder):
    data = read(folder).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert "kosmos-g" in data.tags and data.license


def test_card_lists_every_component_with_its_parameters(pipe, folder):
    text = read(folder).text
    for name, component in pipe.components.items():
        assert (f"| {name} |" in text) == (component is not None)
    assert f"{sum(parameter.numel() for parameter in pipe.unet.parameters()):,}" in text


def test_card_of_a_model_of_another_size_claims_no_famous_origin(folder):
    rows = [line for line in read(folder).text.splitlines() if line.startswith("| unet")]
    assert "not recorded" in rows[0] and "Stable Diffusion 1.5" not in rows[0]


def test_card_shows_usage_limits_and_that_there_is_no_safety_checker(folder):
    text = read(folder).text
    assert "from_pretrained" in text and "no safety checker" in text and "Do not use" in text


def test_card_names_image_words(pipe, photos, tmp_path):
    pipe.add_image_word("<card-dog>", photos[0])
    try:
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.remove_image_word("<card-dog>")
    assert "`<card-dog>`" in read(tmp_path).text


def test_card_that_a_person_wrote_stays(pipe, folder):
    (folder / "README.md").write_text("My own words.", encoding="utf-8")
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "My own words."


def test_provenance_and_results_stand_in_the_card_and_survive_saving_again(pipe, folder):
    results = "| FID | 10.99 |"
    write_model_card(pipe, folder, provenance={"unet": "my own training"}, results=results)
    pipe.save_pretrained(folder)
    text = read(folder).text
    assert "my own training" in text and results in text


def test_paths_of_this_machine_stay_out_of_the_card(pipe, folder, tmp_path):
    pipe.unet.register_to_config(_name_or_path=str(folder / "unet"))
    try:
        pipe.save_pretrained(tmp_path / "second")
    finally:
        pipe.unet.register_to_config(_name_or_path=None)
    assert str(tmp_path) not in read(tmp_path / "second").content
