"""The kinds of control, by name: what each shows, which ControlNet reads it, what makes its image. Plain data: nothing is loaded."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A setting of an annotator; its type is that of its default."""

    default: bool | int | float
    help: str
    keyword: str | None = None  # of the annotator's call; None is the parameter's own name
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Control:
    """A row of CONTROLS: how a control image is made, and who reads it."""

    description: str
    controlnet: str  # Hub id, for Stable Diffusion 1.5
    # "module.Class" of controlnet_aux, or a function of annotators.py; None is the image itself
    annotator: str | None = None
    weights: str | None = None  # Hub id of the annotator's weights; None: nothing to fetch
    files: tuple[str, ...] = ()  # those it reads of that repo; () is all
    parameters: dict[str, Parameter] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # of every call of the annotator
    needs_mask: bool = False


ANNOTATORS = "lllyasviel/Annotators"  # Hub id of the weights that controlnet_aux reads
RESOLUTION = Parameter(512, "shorter side of what the annotator looks at, in pixels", low=64, high=2048)
SAFE = Parameter(False, "quantise the edges, which blurs out fine detail")

# Annotators and defaults are those of the official demo (kosmos-g/controlnet/), where it has the control; its inpainting
# ControlNet control_v11e_sd15_inpaint is not on the Hub.
CONTROLS: dict[str, Control] = {
    "canny": Control(
        "hard edges",
        "lllyasviel/control_v11p_sd15_canny",
        "canny.CannyDetector",
        parameters={
            "low": Parameter(100, "gradient down to which an edge continues", "low_threshold", 0, 2000),
            "high": Parameter(200, "gradient from which an edge begins", "high_threshold", 0, 2000),
        },
    ),
    "depth": Control(
        "near is light, far is dark (DPT)",
        "lllyasviel/control_v11f1p_sd15_depth",
        "load_depth",
        "Intel/dpt-large",
    ),
    "hed": Control(
        "soft edges, rich in detail (HED)",
        "lllyasviel/control_v11p_sd15_softedge",
        "hed.HEDdetector",
        ANNOTATORS,
        ("ControlNetHED.pth",),
        {"resolution": RESOLUTION, "safe": SAFE},
    ),
    "softedge": Control(
        "soft edges (PidiNet)",
        "lllyasviel/control_v11p_sd15_softedge",
        "pidi.PidiNetDetector",
        ANNOTATORS,
        ("table5_pidinet.pth",),
        {"resolution": RESOLUTION, "safe": SAFE},
    ),
    "lineart": Control(
        "lines as an artist draws them",
        "lllyasviel/control_v11p_sd15_lineart",
        "lineart.LineartDetector",
        ANNOTATORS,
        ("sk_model.pth", "sk_model2.pth"),
        {"resolution": RESOLUTION, "coarse": Parameter(False, "fewer, rougher lines")},
    ),
    "lineart_standard": Control(
        "dark lines, found without a network",
        "lllyasviel/control_v11p_sd15_lineart",
        "load_lineart_standard",
        parameters={
            "sigma": Parameter(6.0, "blur that lines stand out from, in pixels", "guassian_sigma", 0.1, 100),
            "intensity": Parameter(8, "contrast that counts as a line", "intensity_threshold", 0, 255),
        },
    ),
    "lineart_anime": Control(
        "lines of an anime drawing",
        "lllyasviel/control_v11p_sd15s2_lineart_anime",
        "lineart_anime.LineartAnimeDetector",
        ANNOTATORS,
        ("netG.pth",),
        {"resolution": RESOLUTION},
    ),
    "mlsd": Control(
        "straight lines, of rooms and buildings",
        "lllyasviel/control_v11p_sd15_mlsd",
        "mlsd.MLSDdetector",
        ANNOTATORS,
        ("mlsd_large_512_fp32.pth",),
        {
            "resolution": RESOLUTION,
            "score": Parameter(0.1, "certainty from which a line counts", "thr_v", 0.01, 2),
            "distance": Parameter(0.1, "length from which a line counts", "thr_d", 0.01, 20),
        },
    ),
    "normal": Control(
        "directions of surfaces (NormalBae)",
        "lllyasviel/control_v11p_sd15_normalbae",
        "normalbae.NormalBaeDetector",
        ANNOTATORS,
        ("scannet.pt",),
        {"resolution": RESOLUTION},
    ),
    "openpose": Control(
        "poses of people (OpenPose: no commercial use)",
        "lllyasviel/control_v11p_sd15_openpose",
        "open_pose.OpenposeDetector",
        ANNOTATORS,
        ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"),
        {
            "resolution": RESOLUTION,
            "hands": Parameter(True, "draw hands", "include_hand"),
            "face": Parameter(True, "draw faces", "include_face"),
        },
    ),
    "scribble": Control(
        "rough strokes along the edges (HED)",
        "lllyasviel/control_v11p_sd15_scribble",
        "hed.HEDdetector",
        ANNOTATORS,
        ("ControlNetHED.pth",),
        {"resolution": RESOLUTION},
        {"scribble": True},
    ),
    "drawing": Control(
        "dark strokes that you drew on white",
        "lllyasviel/control_v11p_sd15_scribble",
        "load_drawing",
    ),
    "segmentation": Control(
        "kinds of things in the colours of ADE20K (UPerNet)",
        "lllyasviel/control_v11p_sd15_seg",
        "load_segmentation",
        "openmmlab/upernet-convnext-small",
    ),
    "shuffle": Control(
        "colours and textures, the shapes warped",
        "lllyasviel/control_v11e_sd15_shuffle",
        "load_shuffle",
        parameters={
            "seed": Parameter(0, "of the warp", low=0, high=2**32 - 1),
            "scale": Parameter(256, "size of the waves, in pixels", "f", 8, 4096),
        },
    ),
    "ip2p": Control("the image itself, changed as the prompt says", "lllyasviel/control_v11e_sd15_ip2p"),
    "tile": Control("the image itself, its details drawn anew", "lllyasviel/control_v11f1e_sd15_tile"),
    "inpaint": Control(
        "the image, filled where a mask is white", "lllyasviel/control_v11p_sd15_inpaint", needs_mask=True
    ),
}


def find_control(name: str) -> Control:
    """The row of CONTROLS; ValueError lists the known names."""
    if name not in CONTROLS:
        raise ValueError(f"There is no control {name!r}. Known: {', '.join(CONTROLS)}.")
    return CONTROLS[name]
