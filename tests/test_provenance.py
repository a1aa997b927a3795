import datetime
import json
import shutil
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pytest
from support.marks import COMPOSITE, DRAWN, TERMS, mark_of, term_of

from kosmos_g_diffusers import __version__, provenance
from kosmos_g_diffusers.cli import build_parser, main
from kosmos_g_diffusers.commands import app
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.provenance import (
    UNMARKED,
    Mark,
    Marker,
    describe_manifest,
    read_flags,
    read_mark,
    save_image,
    xmp_packet,
)

SOFTWARE = f"kosmos-g-diffusers {__version__}"
SUFFIXES = ("png", "jpg", "jpeg", "webp")
PNG_START = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def image():
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def text_chunk(packet, compressed=False):
    content = zlib.compress(packet) if compressed else packet
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes([compressed]) + b"\0\0\0" + content)


def png(before=b"", after=b"", size=(8, 8)):
    """Bytes of a PNG with chunks before and after its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(8 * (1 + 3 * 8)))
    return PNG_START + header + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def packet_of(description):
    return f"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
        xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
        xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">{description}</rdf:RDF></x:xmpmeta>
        <?xpacket end="w"?>""".encode()


def attributes(term="digitalCapture", software="a camera"):
    about = 'rdf:about="" '
    return f'<rdf:Description {about}Iptc4xmpExt:DigitalSourceType="{TERMS}{term}" xmp:CreatorTool="{software}"/>'


# Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("composite", "term"), [(False, DRAWN), (True, COMPOSITE)])
def test_image_is_saved_with_its_mark(tmp_path, image, suffix, composite, term):
    path, options = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    save_image(image, path, composite=composite, **options)
    assert mark_of(path) == (term, SOFTWARE)
    assert read_mark(path) == Mark(TERMS + term, SOFTWARE)
    with PIL.Image.open(path) as saved:
        assert saved.format == {"jpg": "JPEG"}.get(suffix, suffix.upper()) and saved.size == image.size
        if "jp" not in suffix:
            assert saved.tobytes() == image.tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("composite", "term"), [(False, DRAWN), (True, COMPOSITE)])
def test_mark_is_read_by_exiv2(tmp_path, image, suffix, composite, term):
    pyexiv2 = pytest.importorskip("pyexiv2")
    save_image(image, tmp_path / f"a.{suffix}", composite=composite)
    with pyexiv2.Image(str(tmp_path / f"a.{suffix}")) as opened:
        found = opened.read_xmp()
    assert found == {"Xmp.iptcExt.DigitalSourceType": TERMS + term, "Xmp.xmp.CreatorTool": SOFTWARE}


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_mark_is_read_and_found_valid_by_exiftool(tmp_path, image):
    for suffix in SUFFIXES:
        save_image(image, tmp_path / f"a.{suffix}")
    command = ["exiftool", "-json", "-G1", "-validate", "-warning", "-XMP:all", *tmp_path.iterdir()]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for entry in found:
        assert entry["XMP-iptcExt:DigitalSourceType"] == TERMS + DRAWN
        assert entry["XMP-xmp:CreatorTool"] == SOFTWARE
        assert entry["ExifTool:Validate"] == "OK"
    assert len(found) == len(SUFFIXES)


def test_packet_stands_where_xmp_says(tmp_path, image):
    for suffix in ("png", "jpg", "webp"):
        save_image(image, tmp_path / f"a.{suffix}")
    packet = xmp_packet().encode("utf-8")
    content = (tmp_path / "a.png").read_bytes()
    assert content.index(text_chunk(packet)) < content.index(b"IDAT")
    name = b"http://ns.adobe.com/xap/1.0/\0"
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(name) + len(packet)) + name + packet
    assert segment in (tmp_path / "a.jpg").read_bytes()
    assert b"XMP " + struct.pack("<I", len(packet)) + packet in (tmp_path / "a.webp").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_metadata_of_an_earlier_file_is_not_copied(tmp_path, image, kind, suffix):
    exif = PIL.Image.Exif()
    exif[0x010E] = "SECRET"
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("comment", "SECRET")
    text.add_itxt("XML:com.adobe.xmp", packet_of(attributes("digitalCapture", "SECRET")).decode())
    options = (
        {"pnginfo": text} if kind == "PNG" else {"xmp": packet_of(attributes("digitalCapture", "SECRET"))}
    )
    options |= {"comment": "SECRET"} if kind == "JPEG" else {}
    image.save(tmp_path / "input", format=kind, exif=exif, **options)
    assert (tmp_path / "input").read_bytes().count(b"SECRET") >= 2
    for marker, term in ((provenance.MARKED, DRAWN), (UNMARKED, None)):
        with PIL.Image.open(tmp_path / "input") as opened:
            marker.save(opened, tmp_path / f"a.{suffix}")
            assert opened.info  # the user's own object stays as it was
        assert b"SECRET" not in (tmp_path / f"a.{suffix}").read_bytes()
        assert term_of(tmp_path / f"a.{suffix}") == term


def test_what_the_pixels_mean_is_kept(tmp_path, image):
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = profile
    for suffix in ("png", "jpg", "webp"):
        save_image(image, tmp_path / f"a.{suffix}")
        assert PIL.Image.open(tmp_path / f"a.{suffix}").info["icc_profile"] == profile
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    save_image(palette, tmp_path / "palette.png")
    shown = (
        np.asarray(picture.convert("RGBA")) for picture in (palette, PIL.Image.open(tmp_path / "palette.png"))
    )
    assert np.array_equal(*shown)


def test_options_of_pillow_are_passed_on(tmp_path, image):
    for quality in (10, 95):
        save_image(image, tmp_path / f"{quality}.jpg", quality=quality)
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.bmp"])
def test_other_files_are_refused(tmp_path, image, name):
    with pytest.raises(ValueError, match=f"{name}' does not end in .png, .jpg, .jpeg, .webp"):
        save_image(image, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_settings_and_mark_stand_next_to_each_other(tmp_path, image):
    settings = GenerationSettings("a hat")
    write_png(image, tmp_path / "a.png", settings)
    write_png(image, tmp_path / "b.png", settings, marker=UNMARKED)
    assert read_settings(tmp_path / "a.png") == read_settings(tmp_path / "b.png") == settings
    assert term_of(tmp_path / "a.png") == DRAWN and mark_of(tmp_path / "b.png") is None
    assert read_mark(tmp_path / "b.png") is None


# Reading ---------------------------------------------------------------------------------------------------------


ELEMENTS = f"""<rdf:Description rdf:about=""><Iptc4xmpExt:DigitalSourceType> {TERMS}digitalCapture
    </Iptc4xmpExt:DigitalSourceType><xmp:CreatorTool>a camera</xmp:CreatorTool></rdf:Description>"""
RESOURCE = f"""<rdf:Description rdf:about="" xmp:CreatorTool="a camera"/><rdf:Description rdf:about="">
    <Iptc4xmpExt:DigitalSourceType rdf:resource="{TERMS}digitalCapture"/></rdf:Description>"""


@pytest.mark.parametrize("description", [attributes(), ELEMENTS, RESOURCE])
def test_mark_is_read_however_xmp_writes_it(tmp_path, description):
    packet, path = packet_of(description), tmp_path / "a.png"
    for content in (
        png(text_chunk(packet)),
        png(text_chunk(packet, compressed=True)),
        png(after=text_chunk(packet)),
        png(after=chunk(b"tEXt", b"a\0b") + text_chunk(packet, compressed=True)),
        png(text_chunk(packet.decode().encode("utf-8") + b"\0")),
    ):
        path.write_bytes(content)
        assert read_mark(path) == Mark(f"{TERMS}digitalCapture", "a camera")
    PIL.Image.open(path).save(tmp_path / "a.webp", xmp=packet)
    PIL.Image.open(path).save(tmp_path / "a.jpg", xmp=packet)
    for suffix in ("webp", "jpg"):
        assert read_mark(tmp_path / f"a.{suffix}") == Mark(f"{TERMS}digitalCapture", "a camera")


INGREDIENT = f"""<rdf:Description rdf:about=""><xmp:Ingredients><rdf:Bag><rdf:li>
    {attributes(DRAWN)}</rdf:li></rdf:Bag></xmp:Ingredients></rdf:Description>"""


@pytest.mark.parametrize("description", ["", '<rdf:Description xmp:CreatorTool="a camera"/>', INGREDIENT])
def test_xmp_that_says_nothing_of_the_source_is_no_mark(tmp_path, description):
    (tmp_path / "a.png").write_bytes(png(text_chunk(packet_of(description))))
    assert read_mark(tmp_path / "a.png") is None


def test_png_that_ends_early_is_read_as_far_as_it_goes(tmp_path):
    content = png(text_chunk(packet_of(attributes())))
    (tmp_path / "a.png").write_bytes(content[: content.index(b"IDAT") + 10])
    assert read_mark(tmp_path / "a.png").software == "a camera"
    for end in (b"", b"\0", b"\0\0\0\x10iTX", b"\xff\xff\xff\xffiTXt", chunk(b"iTXt", b"XML:com.adobe.xmp")):
        (tmp_path / "a.png").write_bytes(png(after=end + b"\0" * 5)[:-12])
        assert read_mark(tmp_path / "a.png") is None


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + b"".join(
    b'<!ENTITY %c "%s">' % (98 + level, b"&%c;" % (97 + level) * 10) for level in range(9)
)
FILE = b'<!DOCTYPE x [<!ENTITY j SYSTEM "file:///etc/hostname">'
PARAMETER = b'<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:9/"> %p;'
HOSTILE = {
    "entities": BOMB + b"]><x>&j;</x>",
    "entities in UTF-16": (BOMB + b"]><x>&j;</x>").decode().encode("utf-16"),
    "file": FILE + b"]><x>&j;</x>",
    "address": PARAMETER + b"]><x/>",
    "unknown entity": b"<x>&j;</x>",
    "cut": packet_of(attributes())[:-50],
    "no XML": b"\xff\xfe\0<",
    "UTF-16": packet_of(attributes()).decode().encode("utf-16"),
    "large": b"<x>" + b" " * 2**20 + b"</x>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_xmp_is_refused_in_one_line_at_once(tmp_path, capsys, name):
    packet, started = HOSTILE[name], time.process_time()
    image = PIL.Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.webp", xmp=packet)
    if len(packet) < 60_000:
        image.save(tmp_path / "a.jpg", xmp=packet)
    (tmp_path / "a.png").write_bytes(png(text_chunk(packet)))
    (tmp_path / "b.png").write_bytes(png(after=text_chunk(packet)))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name}' cannot be read") as caught:
            read_mark(path)
        assert main(["show", str(path)]) == 2
        assert capsys.readouterr().err == f"kosmos-g: error: {caught.value}\n"
    assert time.process_time() - started < 2


def test_deeply_nested_xmp_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(text_chunk(b"<x>" * 100_000 + b"</x>" * 100_000)))
    assert read_mark(tmp_path / "a.png") is None


def test_bombs_and_other_files_are_refused_in_one_line(tmp_path, capsys, recwarn):
    bomb = text_chunk(b"<x/>" + b" " * 2**24, compressed=True)
    files = {
        "pixels.png": png(size=(60_000, 60_000)),
        "text.png": png(bomb),
        "late.png": png(after=bomb),
        "empty.png": b"",
        "cut.png": png()[:20],
        "photo.gif": b"GIF89a" + bytes(100),
        "words.jpg": b"no image",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "missing.png", "."):
        assert main(["show", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("kosmos-g: error: ") and name in line
    (tmp_path / "large.png").write_bytes(png(text_chunk(packet_of(attributes())), size=(10_000, 10_000)))
    assert read_mark(tmp_path / "large.png").software == "a camera"
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


# kosmos-g show ---------------------------------------------------------------------------------------------------


def test_show_prints_prompt_mark_and_settings(tmp_path, image, capsys):
    write_png(image, tmp_path / "a.png", GenerationSettings("a hat, 雪"))
    assert main(["generate", "--from", str(tmp_path / "a.png"), "--show"]) == 0
    settings = capsys.readouterr().out
    assert json.loads(settings)["prompt"] == "a hat, 雪"
    assert main(["show", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert out == f"prompt: a hat, 雪\nmark: {DRAWN}, {SOFTWARE}\nsettings: {settings}"


def test_show_tells_of_files_without_settings_what_is_there(tmp_path, image, capsys):
    save_image(image, tmp_path / "marked.webp", composite=True)
    image.save(tmp_path / "plain.jpg")
    (tmp_path / "photo.png").write_bytes(png(text_chunk(packet_of(attributes()))))
    (tmp_path / "other.png").write_bytes(
        png(text_chunk(packet_of('<rdf:Description Iptc4xmpExt:DigitalSourceType="mine"/>')))
    )
    expected = {
        "marked.webp": f"mark: {COMPOSITE}, {SOFTWARE}",
        "plain.jpg": "mark: none",
        "photo.png": "mark: digitalCapture, a camera",
        "other.png": "mark: mine",
    }
    for name, line in expected.items():
        assert main(["show", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{line}\nsettings: none\n"


def test_show_steers_no_terminal(tmp_path, image, capsys):
    write_png(image, tmp_path / "a.png", GenerationSettings("a \x1b[2J\nmark: none \u202e"))
    evil = packet_of(attributes("\u202e", "a&#10;settings: none\u200b"))
    (tmp_path / "b.png").write_bytes(png(text_chunk(evil)))
    for name in ("a.png", "b.png"):
        assert main(["show", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in out)
        assert out.count("\nmark: ") + out.startswith("mark: ") == out.count("\nsettings: ") == 1


def test_show_refuses_settings_that_are_none(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(chunk(b"tEXt", b"kosmos_g\0[]")))
    assert main(["show", str(tmp_path / "a.png")]) == 2
    assert "a.png' cannot be used" in capsys.readouterr().err


# Signed manifests ------------------------------------------------------------------------------------------------


def without_c2pa(monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)


def test_missing_extra_is_named(tmp_path, image, monkeypatch):
    without_c2pa(monkeypatch)
    with pytest.raises(ImportError, match=r"pip install 'kosmos-g-diffusers\[c2pa\]'"):
        save_image(image, tmp_path / "a.png", certificate="cert.pem", key="key.pem")


def test_certificate_without_key_or_mark_is_refused(tmp_path, image):
    for given in ({"certificate": "cert.pem"}, {"key": "key.pem"}):
        with pytest.raises(ValueError, match="both a certificate and its key"):
            save_image(image, tmp_path / "a.png", **given)
    with pytest.raises(ValueError, match="without a mark"):
        Marker(False, "cert.pem", "key.pem")


KEYS = {
    "es256": lambda ec, rsa, ed25519: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda ec, rsa, ed25519: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda ec, rsa, ed25519: rsa.generate_private_key(65537, 2048),
    "ed25519": lambda ec, rsa, ed25519: ed25519.Ed25519PrivateKey.generate(),
}


def write_certificate(folder, kind="es256", days=30, usage="1.3.6.1.5.5.7.3.4", password=None):
    """A chain of a user's certificate and a root, and the user's key, as PEM files; returns their paths."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    now, pem = datetime.datetime.now(datetime.UTC), serialization.Encoding.PEM
    root_key, own_key = (KEYS[kind](ec, rsa, ed25519) for _ in range(2))

    def issue(name, key, for_others, usages):
        names = [
            x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, text)]) for text in (name, "Root")
        ]
        builder = x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(60))
        builder = builder.not_valid_after(now + datetime.timedelta(days))
        names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        allowed = dict.fromkeys([*names.split(), "encipher_only", "decipher_only"], False)
        allowed["key_cert_sign" if for_others else "digital_signature"] = True
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
        extensions = [x509.BasicConstraints(for_others, None), x509.KeyUsage(**allowed), identifier, *usages]
        for extension in extensions:
            critical = isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
            builder = builder.add_extension(extension, critical)
        signed = builder.sign(root_key, None if kind == "ed25519" else hashes.SHA256())
        return signed.public_bytes(pem)

    usages = [x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)])] if usage else []
    chain = issue("Ann's studio", own_key, False, usages) + issue("Root", root_key, True, [])
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(own_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def c2pa():
    return pytest.importorskip("c2pa")


def manifest_of(c2pa, path):
    with c2pa.Reader(str(path)) as reader:
        return reader.get_active_manifest(), reader.get_validation_state()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(("composite", "term"), [(False, DRAWN), (True, COMPOSITE)])
def test_signed_manifest_says_the_same_as_the_mark(tmp_path, image, c2pa, suffix, composite, term):
    certificate, key = write_certificate(tmp_path)
    path = tmp_path / f"a.{suffix}"
    save_image(image, path, composite=composite, certificate=certificate, key=key)
    manifest, state = manifest_of(c2pa, path)
    assert state == "Valid"
    assert manifest["signature_info"]["issuer"] == "Ann's studio"
    assert manifest["claim_generator_info"][0]["name"] == "kosmos-g-diffusers"
    (assertion,) = manifest["assertions"]  # no thumbnail, nothing of the machine
    (action,) = assertion["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", TERMS + term)
    assert mark_of(path) == (term, SOFTWARE)
    assert describe_manifest(path) == f"signed by Ann's studio, {term}; it fits the image"
    assert PIL.Image.open(path).size == image.size


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_kind_sign(tmp_path, image, c2pa, kind):
    certificate, key = write_certificate(tmp_path, kind)
    save_image(image, tmp_path / "a.png", certificate=certificate, key=key)
    manifest, state = manifest_of(c2pa, tmp_path / "a.png")
    assert (manifest["signature_info"]["alg"].lower(), state) == (kind, "Valid")


def test_image_that_was_changed_after_signing_is_told(tmp_path, image, c2pa):
    certificate, key = write_certificate(tmp_path)
    save_image(image, tmp_path / "a.jpg", certificate=certificate, key=key)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    content[-20] ^= 1
    (tmp_path / "a.jpg").write_bytes(content)
    assert describe_manifest(tmp_path / "a.jpg").endswith("it is not valid")


def test_manifest_that_is_broken_is_told(tmp_path, image, c2pa):
    certificate, key = write_certificate(tmp_path)
    save_image(image, tmp_path / "a.png", certificate=certificate, key=key)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"caBX")
    for place in range(start + 40, start + 400, 24):
        broken = content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :]
        (tmp_path / "b.png").write_bytes(broken)
        described = describe_manifest(tmp_path / "b.png")
        assert "cannot be read" in described or "is not valid" in described


def test_manifest_is_told_without_the_package(tmp_path, image, c2pa, monkeypatch):
    certificate, key = write_certificate(tmp_path)
    save_image(image, tmp_path / "a.png", certificate=certificate, key=key)
    save_image(image, tmp_path / "b.png")
    without_c2pa(monkeypatch)
    assert "pip install" in describe_manifest(tmp_path / "a.png")
    assert describe_manifest(tmp_path / "b.png") is None


def test_key_is_not_shown(tmp_path, c2pa):
    certificate, key = write_certificate(tmp_path)
    assert key not in repr(Marker(certificate=certificate, key=key))


BAD = {
    "was not valid at time of signing": {"days": -1},
    "certificate is invalid": {"usage": "1.3.6.1.5.5.7.3.1"},  # of servers
    "cert.pem' cannot sign images": {"usage": None},
    "key.pem' is encrypted": {"password": b"secret"},
}


@pytest.mark.parametrize("message", BAD)
def test_certificate_that_cannot_sign_is_told_before_anything_is_drawn(tmp_path, c2pa, message):
    certificate, key = write_certificate(tmp_path, **BAD[message])
    with pytest.raises(ValueError, match=message):
        Marker(certificate=certificate, key=key)


def test_files_that_hold_something_else_are_told(tmp_path, c2pa):
    (tmp_path / "other").mkdir()
    certificate, key = write_certificate(tmp_path)
    _, other = write_certificate(tmp_path / "other")
    (tmp_path / "text.pem").write_text("hello")
    cases = {
        "is not that of the first certificate": (certificate, other),
        "key.pem' holds no certificate": (key, certificate),
        "text.pem' holds no private key": (certificate, str(tmp_path / "text.pem")),
        "no.pem' cannot be read": (certificate, str(tmp_path / "no.pem")),
        f"{tmp_path.name}' cannot be read": (str(tmp_path), key),
    }
    for message, (given, its_key) in cases.items():
        with pytest.raises(ValueError, match=message):
            Marker(certificate=given, key=its_key)


# The command line ------------------------------------------------------------------------------------------------


def generate(*arguments):
    return main(
        [
            "generate",
            "a large red plain star on a white background",
            "--steps",
            "1",
            "--seed",
            "1",
            *arguments,
        ]
    )


def test_generated_images_their_grid_and_its_enlarged_copy_are_marked_unless_the_user_says_otherwise(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert generate("--num-images", "2") == 0
    for name in ("out_0.png", "out_1.png", "out.png", "out_enlarged.png"):
        assert mark_of(name) == (DRAWN, SOFTWARE)
    assert generate("--no-mark", "--output", "plain.png") == 0
    assert mark_of("plain.png") is None
    assert PIL.Image.open("plain.png").tobytes() == PIL.Image.open("out_0.png").tobytes()
    assert "mark" not in read_settings("plain.png").to_json()


@pytest.mark.parametrize(
    "command", [["generate", "a hat"], ["app"], ["evaluate", "sprites", "--output", "run"]]
)
def test_commands_that_draw_have_the_same_flags(command):
    assert read_flags(build_parser().parse_args(command)) == provenance.MARKED
    assert read_flags(build_parser().parse_args([*command, "--no-mark"])) == UNMARKED


def test_app_hands_its_flag_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="pip install 'kosmos-g-diffusers[app]'")

    def stop(models, store, capacity, marker):
        raise ValueError(f"{marker}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "Service", stop, raising=False)
    monkeypatch.setattr("kosmos_g_diffusers.serving.service.Service", stop)
    assert main(["app", "--no-mark", "--output", "made", "--device", "cpu"]) == 2
    assert str(UNMARKED) in capsys.readouterr().err


def test_generated_images_are_signed(tmp_path, monkeypatch, capsys, c2pa):
    monkeypatch.chdir(tmp_path)
    certificate, key = write_certificate(tmp_path)
    assert generate("--c2pa-cert", certificate, "--c2pa-key", key) == 0
    assert manifest_of(c2pa, "out.png")[1] == "Valid"
    assert read_settings("out.png").seed == 1
    capsys.readouterr()
    assert main(["show", "out.png"]) == 0
    assert f"\nmanifest: signed by Ann's studio, {DRAWN}; it fits the image\n" in capsys.readouterr().out
    for flags in (["--c2pa-cert", certificate], ["--no-mark", "--c2pa-cert", certificate, "--c2pa-key", key]):
        assert generate(*flags, "--output", "new.png") == 2
    assert not (tmp_path / "new.png").exists()
