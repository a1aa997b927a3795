import copy
import logging
import sys

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers

from kosmos_g_diffusers import SPRITES, KosmosGImg2ImgPipeline, KosmosGPipeline
from kosmos_g_diffusers.environment import VERBOSITY
from kosmos_g_diffusers.quiet import HELD_BACK, SECOND_LORA, SHORT, brief_bars, hold_back_notes

NOTES = [(name, words) for name, notes in HELD_BACK.items() for words in notes]


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def heard(monkeypatch):
    """Function from a logger's name to what reaches its handlers."""
    monkeypatch.delenv(VERBOSITY, raising=False)
    handlers = []

    def listen(name):
        handlers.append((logging.getLogger(name), Records()))
        logger, handler = handlers[-1]
        logger.addHandler(handler)
        return handler.texts

    yield listen
    for logger, handler in handlers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("name, words", NOTES)
def test_a_note_of_a_library_is_held_back_and_everything_else_of_it_comes_through(heard, name, words):
    texts = heard(name)
    logger = logging.getLogger(name)
    logger.warning("Something about %s", words)
    logger.warning("Something about %s", "weights that are missing")
    assert texts == ["Something about weights that are missing"]


def test_verbosity_brings_the_notes_back(heard, monkeypatch):
    name, words = NOTES[0]
    texts = heard(name)
    for value, count in (("verbose", 1), ("quiet", 1), ("", 1), ("loud", 1)):
        monkeypatch.setenv(VERBOSITY, value)
        logging.getLogger(name).warning(words)
        assert len(texts) == count


def test_notes_are_held_back_by_one_filter_however_often_it_is_installed():
    counts = [len(logging.getLogger(name).filters) for name in HELD_BACK]
    hold_back_notes()
    assert [len(logging.getLogger(name).filters) for name in HELD_BACK] == counts


def test_the_names_of_the_loggers_are_those_of_modules():
    import torch.onnx._internal.exporter._registration  # noqa: F401
    import torchao  # noqa: F401
    from diffusers.quantizers import torchao as quantizer  # noqa: F401

    names = set(HELD_BACK)
    try:
        import bitsandbytes.backends.cpu.ops  # noqa: F401
    except ImportError:  # there is none for some systems
        names -= {name for name in names if name.startswith("bitsandbytes")}
    assert names <= set(sys.modules)


# Bars --------------------------------------------------------------------------------------------------------------


def test_bars_of_loading_wait_and_are_as_before_afterwards(monkeypatch):
    monkeypatch.delenv(VERBOSITY, raising=False)
    bar = transformers.utils.logging.tqdm
    with pytest.raises(KeyError), brief_bars():
        assert bar(range(2), desc="Loading weights").delay == SHORT
        assert bar(range(2), delay=7).delay == 7
        assert not diffusers.utils.logging.is_progress_bar_enabled()
        raise KeyError
    assert diffusers.utils.logging.is_progress_bar_enabled()
    assert bar(range(2)).delay == 0


def test_a_user_who_has_switched_bars_off_has_none_afterwards(monkeypatch):
    monkeypatch.delenv(VERBOSITY, raising=False)
    diffusers.utils.logging.disable_progress_bar()
    try:
        with brief_bars():
            pass
        assert not diffusers.utils.logging.is_progress_bar_enabled()
    finally:
        diffusers.utils.logging.enable_progress_bar()


def test_loading_and_passing_on_a_pipeline_says_nothing(capfd, monkeypatch, recwarn):
    monkeypatch.delenv(VERBOSITY, raising=False)
    pipe = KosmosGPipeline.from_pretrained(SPRITES, dtype=torch.float32)
    KosmosGImg2ImgPipeline.from_pipe(pipe)
    KosmosGImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
    StableDiffusionPipeline.from_pipe(pipe, dtype=pipe.dtype)
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_verbosity_brings_the_bars_back(capfd, monkeypatch):
    monkeypatch.setenv(VERBOSITY, "verbose")
    KosmosGPipeline.from_pretrained(SPRITES)
    assert "Loading pipeline components" in capfd.readouterr().err


def test_the_old_name_of_dtype_means_the_same_and_says_nothing(capfd, recwarn):
    pipe = KosmosGPipeline.from_pretrained(SPRITES, torch_dtype=torch.float16)
    assert pipe.dtype == torch.float16
    cast = KosmosGImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert {cast.dtype, cast.text_encoder.dtype, cast.vae.dtype} == {torch.bfloat16}
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in recwarn if "torch_dtype" in str(warning.message)]
    with pytest.raises(ValueError, match="both `dtype` and `torch_dtype`"):
        KosmosGPipeline.from_pretrained(SPRITES, dtype=torch.float16, torch_dtype=torch.float16)


def test_a_second_lora_next_to_the_first_is_not_warned_of(pipe, recwarn):
    peft = pytest.importorskip("peft")
    lora = copy.deepcopy(pipe.unet)
    lora.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(lora))
    for name in ("one", "two"):
        pipe.load_lora_weights({f"unet.{key}": value for key, value in layers.items()}, adapter_name=name)
    assert set(pipe.get_list_adapters()["unet"]) == {"one", "two"}
    assert not [str(warning.message) for warning in recwarn if SECOND_LORA in str(warning.message)]
