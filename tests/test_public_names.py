"""The names that users import, and the modules that saved files and other programs name."""

import importlib

import pytest

NAMES = {
    "kosmos_g_diffusers": (
        "KosmosGControlNetImg2ImgPipeline KosmosGControlNetInpaintPipeline KosmosGControlNetPipeline "
        "KosmosGImg2ImgPipeline KosmosGInpaintPipeline KosmosGPipeline KosmosGProcessor KosmosGTextEncoder "
        "KosmosGTextEncoderConfig KosmosGTokenizer SPRITES VisionCache __version__ convert_checkpoint"
    ),
    "kosmos_g_diffusers.conversion": "convert_checkpoint",
    "kosmos_g_diffusers.export": "export_encoder trace",
    "kosmos_g_diffusers.control": "CONTROLS control_image control_preview load_annotator load_controlnet",
    "kosmos_g_diffusers.training": (
        "AlignStage AlignerNetN InstructStage PretrainStage TrainConfig TrainingStopped build_run load_adapter load_target "
        "merge_adapter push_adapter remove_adapter run_stage train"
    ),
    "kosmos_g_diffusers.modular": (
        "KosmosGAutoBlocks KosmosGModularPipeline KosmosGSequentialBlocks KosmosGTextEncoderStep"
    ),
    "kosmos_g_diffusers.modeling_kosmos_g": "KosmosGTextEncoder KosmosGTextEncoderConfig",
    "kosmos_g_diffusers.processing_kosmos_g": "KosmosGProcessor KosmosGTokenizer",
    "kosmos_g_diffusers.pipeline_kosmos_g": "KosmosGPipeline",
    "kosmos_g_diffusers.cli": "main",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_there(module):
    imported = importlib.import_module(module)
    for name in NAMES[module].split():
        assert getattr(imported, name) is not None
