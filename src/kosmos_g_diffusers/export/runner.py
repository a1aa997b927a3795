"""Kosmos-G's text encoder without torch: a prompt of words and images -> its states, for whatever draws with them.

It needs numpy, pillow, tokenizers, and onnxruntime or openvino: python kosmos_g_runner.py states.npy "<i> in a hat" dog.png
    encoder = Encoder("folder")
    states = encoder("<i> in a hat", ["dog.png"])  # (77, 768) float32 for the released size; encoder("") is the null condition
"""

import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FORMAT_VERSION = 1
FORMATS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("xml", "openvino")}  # suffix, package that runs it
SIZES = "image_size latent_query_num language_width max_length pad_id image_id end_of_image_id".split()
BEGIN_ID, UNKNOWN_ID, N_SPECIAL, SLOT = 0, 3, 4, -1  # of every Kosmos-G tokenizer; of no token
MARK, WORD = "<i>", r"<[a-z][a-z0-9-]*>"  # of an image; what looks like an image word
TEXT = {MARK, "<s>", "<pad>", "<unk>", "<mask>", "<image>"}  # look so as well, and are text
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP
AGAIN = "Pass a folder of kosmos-g export, with its own runner."


class Encoder:
    """An exported folder. Raises ValueError for a wrong one, ImportError if the package that runs it is not installed."""

    def __init__(self, folder=Path(__file__).parent, threads=None):
        self.folder = Path(folder)
        self.settings = self._read_json("kosmos_g.json", 2**20)
        if (version := self.settings.get("format_version")) != FORMAT_VERSION:
            raise ValueError(f"{folder} has format version {version!r}, not {FORMAT_VERSION}. {AGAIN}")
        sizes = [self.settings.get(name) for name in SIZES]
        if self.settings.get("format") not in (*FORMATS,) or {int} != {type(size) for size in sizes}:
            raise ValueError(f"{folder} does not describe graphs of {' or '.join(FORMATS)}. {AGAIN}")
        self.size, self.slots, self.width, self.most, self.pad, self.image_id, self.end_id = sizes
        try:
            vocabulary = self._read_json("tokenizer.json", 2**26)["model"]["vocab"][N_SPECIAL:]
            self.scores = {piece: np.float32(score) for piece, score in vocabulary}
            self.longest = max(map(len, self.scores))
            self.unknown = min(self.scores.values()) - np.float32(10)
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises this class alone
            raise ValueError(f"{folder}/tokenizer.json is not a tokenizer of Kosmos-G. {AGAIN}") from error
        self.vision, self.condition = (self._load(name, threads) for name in ("vision", "condition"))

    def __call__(self, prompt, images=(), marks_are_text=False):  # one prompt -> (K, A), see encode
        return self.encode([prompt], [images], marks_are_text)[0]

    def encode(self, prompts, images=None, marks_are_text=False):
        """Prompts -> (B, K, A) float32, K states of width A each. ValueError for what does not match, before a graph runs.

        `images` has a list for each prompt, with one for each `<i>`: paths, PIL images, arrays (H, W, 3) of uint8.
        With `marks_are_text` a `<i>` is text, as in negative prompts without images.
        """
        images = [() if own is None else own for own in ([None] * len(prompts) if images is None else images)]
        if isinstance(prompts, str) or not prompts or len(images) != len(prompts):
            counts = f"{len(images)} lists of images were given for {len(prompts)} prompts"
            raise ValueError(f"{counts}. Pass one list for each prompt.")
        rows = [self._read(f"Prompt {n}", prompts[n], images[n], marks_are_text) for n in range(len(prompts))]
        shape = len(rows), max(2, *(len(ids) for ids, _ in rows))  # the graph takes two columns or more
        ids, mask = np.full(shape, self.pad, np.int64), np.zeros(shape, bool)
        for index, (row, _) in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, True
        pixels, slots = [image for _, own in rows for image in own], ids == SLOT
        none = np.zeros((0, self.slots, self.width), np.float32)
        states = self.vision(pixel_values=np.stack(pixels)) if pixels else none
        ids = np.where(slots, self.image_id, ids)
        return self.condition(input_ids=ids, image_embeds=states, image_token_mask=slots, attention_mask=mask)

    def _read(self, name, prompt, images, marks_are_text):
        """(ids, SLOT for each state of an image; (3, S, S) pixels of each image) of one prompt."""
        if not isinstance(prompt, str) or not isinstance(images, (list, tuple)):
            raise ValueError(f"{name} is not a string with a list of images. Pass both; the list may be [].")
        n_marks = 0 if marks_are_text else prompt.count(MARK)
        if n_marks != len(images):
            counts = f"{n_marks} '<i>' marks but {len(images)} images were given"
            raise ValueError(f"{name} has {counts}. Pass one image per '<i>', in reading order.")
        if unknown := sorted(set(re.findall(WORD, prompt)) - TEXT):
            raise ValueError(f"{name} uses {unknown[0]}; an exported encoder does not have image words.")
        ids, pixels = [BEGIN_ID], []
        for index, text in enumerate(prompt.split(MARK) if n_marks else [prompt]):
            if index:
                pixels.append(self._preprocess(images[index - 1], f"Image {index - 1} of {name.lower()}"))
                ids += [self.image_id] + [SLOT] * self.slots + [self.end_id]
            ids += self._tokenize(text)
        if len(ids) > self.most:
            length = f"{len(ids)} tokens long ({len(pixels)} images take {self.slots + 2} each)"
            raise ValueError(f"{name} is {length}; the model reads at most {self.most}. Shorten it.")
        return ids, pixels

    def _tokenize(self, text):
        """Ids of a text: the best path through it as SentencePiece finds it, whose sums are float32."""
        ids, text = [], self.tokenizer.normalizer.normalize_str(text)
        for part, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
            best, begins = [np.float32(0)] + [None] * len(part), [0] * (len(part) + 1)
            for begin in range(len(part)):
                for end in range(begin + 1, min(begin + self.longest, len(part)) + 1):
                    score = self.scores.get(part[begin:end], self.unknown if end == begin + 1 else None)
                    if score is not None and (best[end] is None or best[begin] + score > best[end]):
                        best[end], begins[end] = best[begin] + score, begin
            start, end = len(ids), len(part)
            while end:
                piece, end = part[begins[end] : end], begins[end]
                token = self.tokenizer.token_to_id(piece) if piece in self.scores else UNKNOWN_ID
                if token != UNKNOWN_ID or ids[start : start + 1] != [token]:  # unknown ones in a row are one
                    ids.insert(start, token)
        return ids

    def _preprocess(self, image, name):
        """(3, S, S) float32 pixels, normalised, the same as KosmosGProcessor.preprocess computes."""
        most, side = Image.MAX_IMAGE_PIXELS or np.inf, self.size
        try:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image = image if isinstance(image, Image.Image) else Image.open(image)
            area = max(image.width * image.height, side**2 * max(image.size) / min(image.size))  # resized too
            if image.format == "EPS" or image.mode == "F" or area > most:
                raise ValueError("it is a program, of floats, or has more pixels than Pillow's limit")
            image.load()
            with contextlib.suppress(Exception):  # of damaged EXIF
                image = ImageOps.exif_transpose(image)
            image = to_rgb(image)
        except Exception as error:  # damaged bytes make Pillow raise nearly anything
            raise ValueError(f"{name} cannot be read ({error!s:.99}). Pass an image that opens.") from error
        image = image.resize([int(side * n / min(image.size)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (round((length - side) / 2) for length in image.size)
        pixels = np.array(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1) / 255.0
        return ((pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))).astype(np.float32)

    def _path(self, name):
        path = self.folder / name
        if not path.is_file() or not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"There is no file {name} in {self.folder}, or it leads out of it. {AGAIN}")
        return path

    def _read_json(self, name, most):  # the object in a JSON file of at most `most` bytes
        path = self._path(name)
        with contextlib.suppress(ValueError, RecursionError), open(path, "rb") as file:
            if isinstance(values := json.loads(file.read(most)), dict):
                return values
        raise ValueError(f"{path} does not hold a JSON object of at most {most:,} bytes. {AGAIN}")

    def _load(self, name, threads):
        """A function of named arrays -> array, of a graph."""
        suffix, package = FORMATS[self.settings["format"]]
        weights = [path.name for path in self.folder.glob(f"{name}.*")]  # lie beside it
        path, *_ = map(self._path, [f"{name}.{suffix}", *weights])
        try:
            runtime = importlib.import_module(package)
            if package == "openvino":
                options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or 0}
                options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128  # states, where weights are int8
                model = runtime.Core().compile_model(path, "CPU", options)
                return lambda **arrays: model(arrays)[0]
            options = runtime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = threads or 0, 4
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return lambda **arrays: session.run(None, arrays)[0]
        except ImportError as error:
            raise ImportError(f"{self.folder} needs {package}. Run: pip install {package}") from error
        except Exception as error:  # a damaged file makes them raise what they like
            raise ValueError(f"{path} cannot be loaded ({str(error)[-200:]!r}). {AGAIN}") from error


def to_rgb(image):
    """Any image in the colours of sRGB, as its profile says where that is not next to sRGB's, over white where transparent."""
    if image.mode.startswith("I"):
        if (values := np.asarray(image)).min() < 0 or values.max() > 65535:
            raise ValueError("its values are not of 16 bits")
        return Image.fromarray((values / 257.0).round().astype(np.uint8)).convert("RGB")
    transform, mode = None, {"L": "L", "P": "RGB", "R": "RGB", "C": "CMYK"}.get(image.mode[0])
    with contextlib.suppress(Exception):  # of no profile, of one by anybody, or of a Pillow without them
        cms = importlib.import_module("PIL.ImageCms")
        profile = image.info["icc_profile"] if len(image.info["icc_profile"]) <= 2**22 else b""
        both = cms.ImageCmsProfile(io.BytesIO(profile)), cms.createProfile("sRGB")
        made = cms.buildTransform(*both, mode, "RGB", 1, flags=cms.Flags.BLACKPOINTCOMPENSATION)
        levels = np.mgrid[:256:15, :256:15, :256:15].astype(np.uint8).reshape(3, -1, 1).transpose(1, 2, 0)
        samples = Image.fromarray(levels).convert(mode)
        change = np.subtract(made.apply(samples), samples.convert("RGB"), dtype=int)
        transform = made if mode == "CMYK" or np.abs(change).max() > 2 else None
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha, white = image.getchannel("A"), Image.new("RGBA", image.size, "white")
        image = transform.apply(image.convert(mode)) if transform else image
        image.putalpha(alpha)
        return Image.alpha_composite(white, image).convert("RGB")
    return transform.apply(image.convert(mode)) if transform else image.convert("RGB")


if __name__ == "__main__":
    output, prompt, *images = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
    try:
        np.save(output, Encoder()(prompt, images))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
