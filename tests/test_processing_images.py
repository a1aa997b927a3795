"""Images as they come: damaged EXIF, bytes, data: URLs, chat content of chat APIs, servers that refuse or never end, masks."""

import base64
import gzip
import http.server
import io
import itertools
import threading
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from packaging.version import Version
from support.profiles import DISPLAY_P3_TO_XYZ, EXCHANGED_TO_XYZ, GAMMA, SRGB_TO_XYZ, make_profile

from kosmos_g_diffusers import processing_kosmos_g
from kosmos_g_diffusers.data.sample import decode_image
from kosmos_g_diffusers.processing_kosmos_g import KosmosGProcessor, open_image, open_mask

TURNED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> PIL.Image.Transpose


@pytest.fixture(scope="module")
def photo():
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


@pytest.fixture
def processor(pipe):
    return KosmosGProcessor(pipe.tokenizer, image_size=28)


def content(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def equal(first, second):
    return first.mode == second.mode and first.size == second.size and first.tobytes() == second.tobytes()


def exif(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# Orientation --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0not a TIFF file at all",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        exif(6)[:6] + b"XX" + exif(6)[8:],
    ],
)
def test_image_with_damaged_exif_is_read_as_it_is_stored(photo, tmp_path, fmt, damaged):
    stored = content(photo, fmt) if fmt == "TIFF" else content(photo, fmt, exif=damaged)
    (tmp_path / "photo").write_bytes(stored)
    expected = PIL.Image.open(io.BytesIO(stored)).convert("RGB")
    for image in (tmp_path / "photo", stored, PIL.Image.open(tmp_path / "photo")):
        assert equal(open_image(image, "It"), expected)
    assert equal(decode_image(stored, "0"), expected)  # as training reads it


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_orientation_of_exif_that_is_cut_short_behind_it_counts(photo):
    whole = PIL.Image.Exif()
    whole[0x0112] = 6
    whole[0x9003] = "2027:01:31 23:59:59"
    stored = content(photo, exif=whole.tobytes()[:-20])
    assert equal(open_image(stored, "It"), photo.transpose(PIL.Image.Transpose.ROTATE_270))


@pytest.mark.skipif(
    Version(PIL.__version__) < Version("11.2"), reason="Pillow reads XMP of WebP from 11.2 on"
)
def test_orientation_is_that_of_xmp_where_exif_is_damaged(photo):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    stored = content(photo, "WEBP", lossless=True, exif=b"Exif\0\0nothing", xmp=xmp)
    assert equal(open_image(stored, "It"), photo.transpose(PIL.Image.Transpose.ROTATE_180))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_that_there_is_not_turns_nothing(photo, value):
    assert equal(open_image(content(photo, exif=exif(value)), "It"), photo)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_turned_alike_and_once(photo, fmt, orientation):
    options = {"lossless": True} if fmt == "WEBP" else {}
    stored = content(photo, fmt, exif=exif(orientation), **options)
    upright = photo.transpose(TURNED[orientation]) if orientation in TURNED else photo
    opened = open_image(stored, "It")
    assert equal(opened, upright) and equal(open_image(opened, "It"), upright)
    assert equal(open_mask(stored, "It"), upright.convert("L"))


# Bytes, data: URLs, chat content -------------------------------------------------------------------------------------


def test_bytes_open_files_and_data_urls_are_images(photo, processor, tmp_path):
    stored = content(photo)
    text = base64.b64encode(stored).decode()
    (tmp_path / "photo.png").write_bytes(stored)
    with open(tmp_path / "photo.png", "rb") as file:
        for image in (
            stored,
            bytearray(stored),
            memoryview(stored),
            io.BytesIO(stored),
            file,
            f"data:image/png;base64,{text}",
            f"DATA:image/png;charset=x;BASE64,{text}",
            f"data:;base64,{text.rstrip('=')}",
            "data:image/png;base64," + base64.encodebytes(stored).decode(),
            "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F"),
            "data:image/png," + "".join(f"%{byte:02x}" for byte in stored),
        ):
            assert equal(open_image(image, "It"), photo)
    expected = processor("<i>", [photo])["pixel_values"]
    assert torch.equal(processor("<i>", stored)["pixel_values"], expected)
    assert torch.equal(processor("<i>", [stored])["pixel_values"], expected)
    assert torch.equal(processor([stored, "a hat"])["pixel_values"], expected)


def parts(stored, path):
    text = base64.b64encode(stored).decode()
    url = f"data:image/png;base64,{text}"
    yield {"type": "image_url", "image_url": {"url": url}}
    yield {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    yield {"type": "image_url", "image_url": url}
    yield {"type": "image_url", "image_url": str(path)}
    yield {"type": "input_image", "image_url": url}
    yield {"type": "image", "url": url}
    yield {"type": "image", "path": str(path)}
    yield {"type": "image", "path": path}
    yield {"type": "image", "base64": text}
    yield {"type": "image", "base64": base64.encodebytes(stored)}
    yield {"type": "image", "base64": url}
    yield {"type": "image", "image": stored}
    yield {"type": "image", "image": url}
    yield {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}}
    yield {"type": "image", "source": {"type": "url", "url": url}}


def test_chat_content_of_every_api_is_read(photo, processor, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    expected = processor(["a", photo, "in a hat"])
    for part in parts(path.read_bytes(), path):
        chat = [{"type": "text", "text": "a"}, part, {"type": "input_text", "text": "in a hat"}]
        for prompt in (chat, [{"role": "user", "content": chat}]):
            read = processor(prompt)
            assert torch.equal(read["input_ids"], expected["input_ids"])
            assert torch.equal(read["pixel_values"], expected["pixel_values"])


def test_base64_without_its_key_is_a_path(photo, processor):
    text = base64.b64encode(content(photo)).decode()
    for part in ({"type": "image", "image": text}, {"type": "image", "url": text}):
        with pytest.raises(ValueError, match="no such file"):
            processor([part])
    with pytest.raises(ValueError, match="no such file"):
        processor("<i>", [text])


@pytest.mark.parametrize(
    "given",
    [
        "x" * 300_000,
        "https:/" + "x" * 300_000,
        "http://127.0.0.1:1/" + "x" * 300_000,
        "http://" + "x" * 300_000 + "/",
        "data:image/png;base64," + "A" * 300_000,
        "data:image/png;base64," + "?" * 300_000,
        "data:" + "x" * 300_000,
        b"x" * 300_000,
        {"type": "image", "base64": "A" * 300_000},
        {"type": "image", "base64": "x" * 299_999 + "?"},
        {"type": "image", "base64": 3},
        {"type": "image_url", "image_url": {"url": "x" * 300_000}},
        {"type": "image_url", "image_url": {"address": "x" * 300_000}},
        {"type": "x" * 300_000},
        {"type": "image", "x" * 300_000: 1},
        {"type": "image", "source": {"type": "x" * 300_000}},
    ],
    ids=range(16),
)
def test_error_repeats_a_hundred_characters_of_what_was_given_and_no_more(processor, given):
    with pytest.raises((ValueError, TypeError)) as caught:
        processor([given] if isinstance(given, dict) else "<i>", None if isinstance(given, dict) else [given])
    message = str(caught.value)
    assert len(message) < 500 and "\n" not in message
    longest = max(len(list(run)) for _, run in itertools.groupby(message))
    assert longest <= 100


def test_long_image_word_that_there_is_not_is_not_repeated(processor):
    with pytest.raises(ValueError, match="names no image word") as caught:
        processor("<" + "a" * 300_000 + ">")
    assert len(str(caught.value)) < 500


def test_program_that_looks_like_an_image_is_not_run():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="EPS"):
        open_image(program, "It")


def test_base64_above_the_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(processing_kosmos_g, "MOST_IMAGE_BYTES", 2**20)
    for image in ("data:;base64," + "A" * 2**21, io.BytesIO(bytes(2**21))):
        with pytest.raises(ValueError, match="larger than 1 MB"):
            open_image(image, "It")


# Downloads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(photo):
    """Function from what a server on this machine is to do with a request, called with its handler, to a URL."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                answers[self.path](self)
            except OSError:  # the client has gone
                pass

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.daemon_threads, served.block_on_close = True, False
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()

        def put(answer):
            path = f"/{len(answers)}.png"
            answers[path] = answer
            return f"http://127.0.0.1:{served.server_port}{path}"

        yield put
        served.shutdown()


def answer(body, status=200, **headers):
    def send(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", len(body))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def test_download_is_read_packed_or_not_and_through_a_redirect(server, photo):
    stored = content(photo)
    bare = zlib.compressobj(wbits=-15)
    bare = bare.compress(stored) + bare.flush()
    for send in (
        answer(stored),
        answer(gzip.compress(stored), Content_Encoding="gzip"),
        answer(zlib.compress(stored), Content_Encoding="deflate"),
        answer(bare, Content_Encoding="deflate"),
    ):
        url = server(send)
        assert equal(open_image(url, "It"), photo)
        relative = "/" + url.rpartition("/")[2]
        assert equal(open_image(server(answer(b"", 302, Location=relative)), "It"), photo)


@pytest.mark.parametrize("status", [403, 404, 410, 500, 204])
def test_status_of_a_refusal_is_told_and_its_picture_is_not_taken(server, photo, status):
    for body in (b"", content(photo)):
        with pytest.raises(ValueError, match=rf"It cannot be read from .* answers {status}"):
            open_image(server(answer(b"" if status == 204 else body, status)), "It")


def test_redirects_end(server):
    url = server(lambda handler: answer(b"", 302, Location=handler.path)(handler))
    with pytest.raises(ValueError, match="redirects more than"):
        open_image(url, "It")
    for target in ("file:///etc/passwd", "data:,x"):
        with pytest.raises(ValueError, match="InvalidSchema"):
            open_image(server(answer(b"", 302, Location=target)), "It")


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**16))


def test_body_above_the_limit_is_refused_packed_or_not(server, monkeypatch):
    monkeypatch.setattr(processing_kosmos_g, "MOST_IMAGE_BYTES", 2**20)
    bomb = answer(gzip.compress(bytes(2**25)), Content_Encoding="gzip")
    for send in (endless, bomb, answer(bytes(2**21))):
        with pytest.raises(ValueError, match="larger than 1 MB"):
            open_image(server(send), "It")
    with pytest.raises(ValueError, match="gzip or deflate"):
        open_image(server(answer(b"x", Content_Encoding="gzip, gzip")), "It")
    with pytest.raises(ValueError, match="end is missing"):
        open_image(server(answer(gzip.compress(bytes(2**10))[:-9], Content_Encoding="gzip")), "It")


@pytest.mark.parametrize("where", ["head", "body"])
def test_server_that_sends_a_byte_now_and_then_is_given_up(server, monkeypatch, where):
    gone = threading.Event()

    def drip(handler):
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        while not gone.wait(0.02):
            handler.wfile.write(b"x")

    monkeypatch.setattr(processing_kosmos_g, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"did not arrive within 0\.3 seconds"):
        open_image(server(drip), "It")
    gone.set()


def test_redirect_is_followed_without_its_body(server, photo):
    target = server(answer(content(photo)))

    def send(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(2**16))

    assert equal(open_image(server(send), "It"), photo)


# Masks ---------------------------------------------------------------------------------------------------------------

MARKED = np.zeros((6, 9), dtype=bool)
MARKED[1:4, 2:7] = True


def painted(colour, hidden=(0, 0, 0)):
    """Strokes of a colour on transparent pixels, under which a paint program keeps whatever colour."""
    image = PIL.Image.new("RGBA", (9, 6), (*hidden, 0))
    image.paste((*colour, 255), mask=PIL.Image.fromarray(MARKED))
    return image


def palette(values, colours):
    image = PIL.Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putdata(values.astype(np.uint8).ravel().tolist())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


ONES = MARKED.astype(np.uint8)
MASKS = {
    "1": PIL.Image.fromarray(MARKED),
    "L": PIL.Image.fromarray(ONES * 255),
    "L of 0 and 1": PIL.Image.fromarray(ONES),
    "RGB": PIL.Image.fromarray(ONES * 255).convert("RGB"),
    "RGB of 0 and 1": PIL.Image.fromarray(np.repeat(ONES[..., None], 3, -1)),
    "RGBA without transparency": PIL.Image.fromarray(ONES * 255).convert("RGBA"),
    "LA": painted((255, 255, 255)).convert("LA"),
    "white on transparent": painted((255, 255, 255)),
    "white on transparent white": painted((255, 255, 255), hidden=(255, 255, 255)),
    "black on transparent": painted((0, 0, 0)),
    "black on transparent white": painted((0, 0, 0), hidden=(255, 255, 255)),
    "red on transparent": painted((200, 0, 0)),
    "P": palette(ONES, [(0, 0, 0), (255, 255, 255)]),
    "P the other way": palette(1 - ONES, [(255, 255, 255), (0, 0, 0)]),
    "P of 0 and 1": palette(ONES, [(0, 0, 0), (1, 1, 1)]),
    "I;16": PIL.Image.fromarray(MARKED.astype(np.uint16) * 65535),
    "I;16 of 0 and 1": PIL.Image.fromarray(MARKED.astype(np.uint16)),
    "F": PIL.Image.fromarray(MARKED.astype(np.float32)),
    "CMYK": PIL.Image.fromarray(ONES * 255).convert("RGB").convert("CMYK"),
    "bool array": MARKED,
    "bool array (H, W, 1)": MARKED[..., None],
    "array of 0 and 1": ONES,
    "array of 0 and 255": ONES * 255,
    "int64 array of 0 and 1": MARKED.astype(np.int64),
    "float array": MARKED.astype(np.float64),
    "RGB array": np.repeat(ONES[..., None] * 255, 3, -1),
    "RGBA array": np.asarray(painted((255, 255, 255))),
    "bool tensor": torch.from_numpy(MARKED),
    "float tensor": torch.from_numpy(MARKED)[None].float(),
    "uint8 tensor": torch.from_numpy(ONES)[None],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_mask_marks_what_its_painter_meant(mask):
    light = open_mask(mask, "The mask")
    assert light.mode == "L" and (np.asarray(light) == MARKED * 255).all()


def test_grey_mask_keeps_its_values():
    grey = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert equal(open_mask(grey, "It"), grey) and equal(open_mask(grey.convert("RGB"), "It"), grey)


EMPTY = {
    "L": PIL.Image.new("L", (9, 6)),
    "1": PIL.Image.new("1", (9, 6)),
    "RGBA": PIL.Image.new("RGBA", (9, 6), (0, 0, 0, 255)),
    "transparent white": PIL.Image.new("RGBA", (9, 6), (255, 255, 255, 0)),
    "bool": np.zeros((6, 9), bool),
    "uint8": np.zeros((6, 9), np.uint8),
    "tensor": torch.zeros(1, 6, 9),
}


@pytest.mark.parametrize("mask", EMPTY.values(), ids=EMPTY)
def test_mask_that_marks_nothing_is_refused(mask):
    with pytest.raises(ValueError, match="The mask marks nothing"):
        open_mask(mask, "The mask")


# Colour profiles -------------------------------------------------------------------------------------------------------


def expected_srgb(pixels, to_xyz):
    """What the colours of a profile are in sRGB, computed from its matrix: uint8 as levels in floats."""
    xyz = (np.asarray(pixels, dtype=float) / 255) ** GAMMA @ np.asarray(to_xyz).T
    linear = np.clip(xyz @ np.linalg.inv(SRGB_TO_XYZ).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.fixture
def colours():
    """(8, 64, 3) uint8, none near black, where gamma and sRGB's curve differ most."""
    return np.random.default_rng(0).integers(40, 256, (8, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("to_xyz", [DISPLAY_P3_TO_XYZ, EXCHANGED_TO_XYZ], ids=["Display P3", "exchanged"])
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_image_is_converted_to_srgb_by_its_profile(colours, to_xyz, fmt, tmp_path):
    path = tmp_path / f"a.{fmt.lower()}"
    options = {"lossless": True} if fmt == "WEBP" else {}
    PIL.Image.fromarray(colours).save(path, icc_profile=make_profile(to_xyz), **options)
    image = open_image(path, "it")
    assert np.abs(np.asarray(image) - expected_srgb(colours, to_xyz)).max() <= 2
    assert image.mode == "RGB" and "icc_profile" not in image.info
    assert np.array_equal(open_image(image, "it"), image)  # once
    assert np.array_equal(open_image(path, "it", in_srgb=False), colours)


def test_transparency_palettes_and_greys_have_profiles_too(colours):
    exchanged = {"icc_profile": make_profile(EXCHANGED_TO_XYZ)}
    opaque = PIL.Image.fromarray(colours)
    opaque.info = dict(exchanged)
    half = opaque.copy()
    half.putalpha(128)
    over_white = expected_srgb(colours, EXCHANGED_TO_XYZ) * 128 / 255 + 127
    assert np.abs(np.asarray(open_image(half, "it")) - over_white).max() <= 3
    palette = opaque.quantize(16)
    palette.info = dict(exchanged)
    plain = np.asarray(palette.convert("RGB"))
    assert np.abs(np.asarray(open_image(palette, "it")) - expected_srgb(plain, EXCHANGED_TO_XYZ)).max() <= 2
    grey = PIL.Image.fromarray(colours[..., 0])
    grey.info = {"icc_profile": make_profile(None, b"GRAY")}
    wanted = expected_srgb(np.repeat(colours[..., :1], 3, -1), SRGB_TO_XYZ)
    assert np.abs(np.asarray(open_image(grey, "it")) - wanted).max() <= 2


def test_photo_of_four_inks_is_read_by_its_profile_where_it_can_be(colours):
    inks = PIL.Image.fromarray(colours).convert("CMYK")
    inks.info = {"icc_profile": make_profile(SRGB_TO_XYZ)}  # of other colours than the image's
    assert np.array_equal(open_image(inks, "it"), inks.convert("RGB"))


@pytest.mark.parametrize(
    "profile",
    [
        PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes(),
        b"",
        b"no profile",
        make_profile(DISPLAY_P3_TO_XYZ)[:200],
        make_profile(None, b"GRAY"),
        make_profile(DISPLAY_P3_TO_XYZ) + bytes(5 * 1024**2),
        "text",
        PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("LAB")).tobytes(),
    ],
    ids=["sRGB", "empty", "broken", "cut off", "grey", "huge", "text", "Lab"],
)
def test_image_with_a_profile_of_srgb_or_that_cannot_be_used_stays_as_it_is(colours, profile):
    image = PIL.Image.fromarray(colours)
    image.info["icc_profile"] = profile
    assert np.array_equal(open_image(image, "it"), colours)


def test_training_images_are_converted(colours):
    file = io.BytesIO()
    PIL.Image.fromarray(colours).save(file, "PNG", icc_profile=make_profile(DISPLAY_P3_TO_XYZ))
    pixels = np.asarray(decode_image(file.getvalue(), "it"))
    assert np.abs(pixels - expected_srgb(colours, DISPLAY_P3_TO_XYZ)).max() <= 2
