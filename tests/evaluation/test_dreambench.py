import pytest
from support.evaluating import SUBJECTS as MINI
from support.evaluating import make_dreambench

from kosmos_g_diffusers.evaluation.benchmarks.dreambench import N_PROMPTS, SUBJECTS, build_tasks, prompts_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dreambench(tmp_path_factory.mktemp("dreambench"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with every subject, its image an empty file."""
    folder = tmp_path_factory.mktemp("whole")
    for name, subject in SUBJECTS.items():
        (folder / name).mkdir()
        (folder / name / subject.image).touch()
    return folder


def test_table_is_that_of_the_benchmark():
    assert len(SUBJECTS) == 30 and sum(subject.live for subject in SUBJECTS.values()) == 9
    assert {name for name, subject in SUBJECTS.items() if subject.live} == {
        name for name, subject in SUBJECTS.items() if subject.class_word in ("cat", "dog")
    }
    for name in SUBJECTS:
        prompts = prompts_of(name)
        assert len(prompts) == len(set(prompts)) == N_PROMPTS == 25


def test_prompts_drop_the_article_and_texts_name_the_class():
    prompts = prompts_of("bear_plushie")
    assert prompts[0] == ("<i> in the jungle", "a stuffed animal in the jungle")
    assert prompts[20] == ("<i>, red", "a red stuffed animal")
    assert prompts[24] == ("<i>, cube shaped", "a cube shaped stuffed animal")
    assert ("<i> in a chef outfit", "a dog in a chef outfit") in prompts_of("dog8")
    assert not any("outfit" in prompt for prompt, _ in prompts)


def test_whole_run_has_three_thousand_images(whole):
    tasks = build_tasks(whole, "paper")
    assert len(tasks) == len({task.id for task in tasks}) == 3000
    assert {task.pictures for task in tasks if task.unit == "teapot"} == {("teapot/04.jpg",)}


def test_protocols_differ_in_references_alone(data):
    paper = build_tasks(data, "paper", MINI, [0, 20])
    standard = build_tasks(data, "standard", MINI, [0, 20])
    assert {task.references for task in paper if task.unit == "cat"} == {(("cat/04.jpg",),)}
    assert {task.references for task in standard if task.unit == "cat"} == {
        (("cat/00.jpg", "cat/01.jpg", "cat/04.jpg"),)
    }
    for one, other in zip(paper, standard, strict=True):
        assert (one.id, one.prompt, one.pictures, one.seed) == (
            other.id,
            other.prompt,
            other.pictures,
            other.seed,
        )


def test_seeds_do_not_depend_on_what_else_is_run(data):
    seeds = {task.id: task.seed for task in build_tasks(data, "paper", MINI)}
    assert len(set(seeds.values())) == 300
    for task in build_tasks(data, "paper", ["cat"], [20, 3], images_per_prompt=2):
        assert task.seed == seeds[task.id]
    assert build_tasks(data, "paper", ["cat"], [0], seed=1)[0].seed != seeds["cat/00_0"]


def test_all_missing_folders_and_images_are_named_at_once(data, tmp_path):
    folder = make_dreambench(tmp_path / "data")
    (folder / "cat" / "04.jpg").unlink()
    with pytest.raises(ValueError, match="28 folders or images") as error:
        build_tasks(folder, "paper")
    for name in set(SUBJECTS) - set(MINI):
        assert f"{name}/" in str(error.value)
    assert "cat/04.jpg" in str(error.value) and "can/" not in str(error.value)


@pytest.mark.parametrize("subjects", [None, ["my_dog"]])
def test_subject_whose_class_is_not_in_the_table_is_refused(subjects, tmp_path):
    folder = make_dreambench(tmp_path / "data")
    (folder / "my_dog").mkdir()
    with pytest.raises(ValueError, match="class of my_dog is not in DreamBench's table.*wolf_plushie"):
        build_tasks(folder, "paper", subjects)


def test_folder_above_the_data_is_recognised(tmp_path):
    make_dreambench(tmp_path / "dataset")
    with pytest.raises(ValueError, match="in its folder `dataset`"):
        build_tasks(tmp_path, "paper")


def test_other_mistakes_are_explained(data, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        build_tasks(tmp_path / "nowhere", "paper")
    with pytest.raises(ValueError, match="no protocol 'both'"):
        build_tasks(data, "both", MINI)
    with pytest.raises(ValueError, match=r"no prompts \[25\]"):
        build_tasks(data, "paper", MINI, [0, 25])
    with pytest.raises(ValueError, match="0 images per prompt"):
        build_tasks(data, "paper", MINI, images_per_prompt=0)
