"""Marks of generated images: what an image file says about where the image comes from, for machines to read.

The mark is an XMP packet with two properties: `Iptc4xmpExt:DigitalSourceType` of the IPTC Photo Metadata Standard, a term of
http://cv.iptc.org/newscodes/digitalsourcetype, and `xmp:CreatorTool`, the software. Whoever holds a certificate can have a
C2PA manifest as well, which says the same and is signed (the extra `c2pa`).

    save_image(image, "out.png")   # instead of image.save("out.png")

`kosmos-g generate`, the app and `kosmos-g evaluate` write every drawn image so. Files may come from anywhere: reading one
decodes no pixels, expands no entities and fetches nothing.
"""

import argparse
import contextlib
import io
import mmap
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .environment import __version__
from .files import first_line, written_atomically

if TYPE_CHECKING:
    import PIL.Image

SOFTWARE = "kosmos-g-diffusers"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = f"{TERMS}trainedAlgorithmicMedia"  # by a model alone
COMPOSITE = f"{TERMS}compositeWithTrainedAlgorithmicMedia"  # with parts or the look of another image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # those that carry marks
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_XMP = "XML:com.adobe.xmp"  # keyword of the text chunk
MOST_XMP_BYTES = 2**20
C2PA_INSTALL = "pip install 'kosmos-g-diffusers[c2pa]'"
C2PA_BOX = b"jumdc2pa\x00\x11\x00\x10"  # how a manifest begins, in files of every format

NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
# "r": a program that writes into the packet alone would spoil a PNG's check sum
PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="{x}">
 <rdf:RDF xmlns:rdf="{rdf}">
  <rdf:Description rdf:about="" xmlns:xmp="{xmp}" xmlns:Iptc4xmpExt="{Iptc4xmpExt}">
   <xmp:CreatorTool>{software}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


# Writing ---------------------------------------------------------------------------------------------------------


def xmp_packet(composite: bool = False) -> str:
    """The XMP packet of a drawn image, as text; `composite`: parts or the look of another image are in it."""
    source_type = COMPOSITE if composite else DRAWN
    return PACKET.format(software=f"{SOFTWARE} {__version__}", source_type=source_type, **NAMESPACES)


def save_image(
    image: "PIL.Image.Image",
    path: str | Path,
    *,
    composite: bool = False,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    **options: Any,
) -> None:
    """Write an image that a model drew, marked as such, atomically. EXIF and XMP that it came with are left out.

    Args:
        image: PIL image.
        path: ends in .png, .jpg, .jpeg or .webp.
        composite: it was made from another image by image-to-image or inpainting, or shows one.
        certificate: PEM file of the user's certificate chain, his own certificate first: the image gets a signed C2PA manifest.
        key: PEM file of the certificate's private key.
        options: Pillow's for the format, such as `quality`.

    Raises:
        ValueError: `path` ends otherwise; certificate or key cannot be used.
        ImportError: there is a certificate, and c2pa-python is not installed.
    """
    Marker(certificate=certificate, key=key).save(image, path, composite, **options)


@dataclass(frozen=True)
class Marker:
    """How the images of a run are marked that are written or returned. A certificate and its key are tried out at once.

    Raises:
        ValueError: certificate or key cannot be used.
        ImportError: there is a certificate, and c2pa-python is not installed.
    """

    is_on: bool = True
    certificate: str | None = None  # PEM file of a chain
    key: str | None = field(default=None, repr=False)  # PEM file

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("A signed manifest needs both a certificate and its key, and one was given.")
        if self.certificate is None:
            return
        if not self.is_on:
            raise ValueError("A certificate was given for images without a mark. Leave one of the two out.")
        import PIL.Image

        self.encode(PIL.Image.new("RGB", (8, 8)), "PNG")

    def save(
        self,
        image: "PIL.Image.Image",
        path: str | Path,
        composite: bool = False,
        text: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Write a PIL image atomically, as `save_image` does; `text`: text chunks of a PNG, keyword -> ASCII text."""
        kind = FORMATS.get(Path(path).suffix.lower())
        if kind is None:
            raise ValueError(
                f"{str(path)!r} does not end in {', '.join(FORMATS)}: other files carry no mark."
            )
        content = self.encode(image, kind, composite, text, **options)
        with written_atomically(path) as file:
            file.write(content)

    def encode(
        self,
        image: "PIL.Image.Image",
        kind: str,
        composite: bool = False,
        text: Mapping[str, str] | None = None,
        **options: Any,
    ) -> bytes:
        """A PIL image as the bytes of a file, `kind` "PNG", "JPEG" or "WEBP"; the rest is as in `save`."""
        from PIL.PngImagePlugin import PngInfo

        plain = image.copy()
        # what its pixels mean is kept; the rest of `info` is that of an earlier file
        plain.info = {name: value for name, value in image.info.items() if name == "transparency"}
        options.setdefault("icc_profile", image.info.get("icc_profile"))
        packet = xmp_packet(composite) if self.is_on else None
        if kind == "PNG":
            chunks = PngInfo()
            for keyword, value in (text or {}).items():
                chunks.add_text(keyword, value)
            if packet:
                chunks.add_itxt(PNG_XMP, packet)
            options["pnginfo"] = chunks
        elif packet:
            options["xmp"] = packet.encode("utf-8")
        file = io.BytesIO()
        plain.save(file, format=kind, **options)
        if self.certificate is None:
            return file.getvalue()
        return self._signer.sign(file.getvalue(), kind, COMPOSITE if composite else DRAWN)

    @cached_property
    def _signer(self):
        return Signer(self.certificate, self.key)


MARKED, UNMARKED = Marker(), Marker(is_on=False)


def add_flags(add: Callable[..., Any]) -> None:
    """Give a command that draws the flags of its marks; `add` is an argparse parser's `add_argument`."""
    text = "leave out the mark in each image that says that a model drew it"
    add("--no-mark", dest="mark", action="store_false", default=True, help=text)
    text = "PEM file of your certificate chain: each image gets a signed C2PA manifest"
    add("--c2pa-cert", metavar="FILE", default=None, help=text)
    add("--c2pa-key", metavar="FILE", default=None, help="PEM file of the certificate's private key")


def read_flags(arguments: argparse.Namespace) -> Marker:
    """The `Marker` of a command's flags. Raises what that does."""
    return Marker(arguments.mark, arguments.c2pa_cert, arguments.c2pa_key)


# Signed manifests ------------------------------------------------------------------------------------------------


class Signer:
    """Puts C2PA manifests (https://c2pa.org) into images, with a user's certificate. No server is asked for anything.

    Args:
        certificate: PEM file of the chain, the user's certificate first.
        key: PEM file of its private key, which is not encrypted: RSA, Ed25519, or of the curves P-256, P-384 and P-521.

    Raises:
        ImportError: c2pa-python is not installed.
        ValueError: a file is not there or holds something else, or the key belongs to another certificate.
    """

    certificate: str | Path
    chain: bytes
    key: bytes
    algorithm: Any

    def __init__(self, certificate: str | Path, key: str | Path):
        _import_c2pa()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        self.certificate, self.chain, self.key = certificate, _read_pem(certificate), _read_pem(key)
        try:
            public_key = x509.load_pem_x509_certificates(self.chain)[0].public_key()
        except ValueError as error:
            raise ValueError(f"{str(certificate)!r} holds no certificate in PEM format.") from error
        try:
            private_key = serialization.load_pem_private_key(self.key, password=None)
        except TypeError as error:
            advice = "openssl pkey -in KEY -out PLAIN writes one that is not"
            raise ValueError(f"The key {str(key)!r} is encrypted. Pass a plain one: {advice}.") from error
        except ValueError as error:
            raise ValueError(f"{str(key)!r} holds no private key in PEM format.") from error
        if private_key.public_key() != public_key:
            raise ValueError(
                f"The key {str(key)!r} is not that of the first certificate in {str(certificate)!r}."
            )
        self.algorithm = _algorithm_of(private_key)

    def sign(self, content: bytes, kind: str, source_type: str) -> bytes:
        """Bytes of an image file without a manifest -> with one; `source_type` is a term of the IPTC."""
        c2pa = _import_c2pa()
        software = {"name": SOFTWARE, "version": __version__}
        action = {"action": "c2pa.created", "digitalSourceType": source_type, "softwareAgent": software}
        assertion = {"label": "c2pa.actions", "data": {"actions": [action]}}
        manifest = {"claim_generator_info": [software], "assertions": [assertion]}
        signed = io.BytesIO()
        try:
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None))
            with c2pa.Context.from_dict(C2PA_SETTINGS, signer=signer) as context:
                c2pa.Builder(manifest, context).sign(f"image/{kind.lower()}", io.BytesIO(content), signed)
        except c2pa.C2paError as error:
            raise ValueError(
                f"The certificate {str(self.certificate)!r} cannot sign images ({first_line(error)}). It must be valid "
                "today, for digital signatures, and as extended key usage for documents or e-mails."
            ) from error
        return signed.getvalue()


C2PA_SETTINGS: dict[str, Any] = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": True, "remote_manifest_fetch": False, "ocsp_fetch": False},
}


def _import_c2pa():
    try:
        import c2pa
    except ImportError as error:
        raise ImportError(f"Signed manifests need the package c2pa-python: {C2PA_INSTALL}") from error
    return c2pa


def _read_pem(path):
    try:
        with open(path, "rb") as file:
            return file.read(2**20)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}). Pass a PEM file.") from error


def _algorithm_of(private_key):
    """C2PA's name of how a private key signs."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private_key, ec.EllipticCurvePrivateKey):
        curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
        if private_key.curve.name in curves:
            return curves[private_key.curve.name]
    elif isinstance(private_key, rsa.RSAPrivateKey):
        return "ps256"
    elif isinstance(private_key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise ValueError(
        "The key is of a kind that C2PA does not take. Expected RSA, Ed25519, P-256, P-384 or P-521."
    )


# Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """What an image file says about where the image comes from. Anybody can write this into any file."""

    source_type: str  # a term of the IPTC, mostly DRAWN or COMPOSITE
    software: str | None


def read_mark(path: str | Path) -> Mark | None:
    """The mark in a PNG, JPEG or WebP file, whoever made it; None if there is none.

    Raises:
        ValueError: the file cannot be read as an image of these formats, or its XMP not as XML.
    """
    formats, advice = list(dict.fromkeys(FORMATS.values())), "Pass an image file."
    info = read_info(path, formats, advice)
    if info is None:
        raise ValueError(f"{str(path)!r} cannot be read as {', '.join(formats)}. {advice}")
    try:
        packet = info.get("xmp") or info.get(PNG_XMP) or _find_late_packet(path)
        if not packet:
            return None
        if len(packet) > MOST_XMP_BYTES:
            raise ValueError(f"it has {len(packet):,} bytes; at most {MOST_XMP_BYTES:,} are read")
        text = packet if isinstance(packet, str) else packet.decode("utf-8")  # as these three formats have it
        # the parser would expand its entities before anybody could stop it
        if "<!DOCTYPE" in text:
            raise ValueError("it declares a document type, as no XMP does")
        tree = ElementTree.fromstring(text.strip("\0"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"The XMP in {str(path)!r} cannot be read: {first_line(error)}.") from error
    properties = {"DigitalSourceType": None, "CreatorTool": None}
    rdf = f"{{{NAMESPACES['rdf']}}}"
    # those further down speak of other images, such as ingredients
    for description in (
        found for top in tree.iter(f"{rdf}RDF") for found in top.findall(f"{rdf}Description")
    ):
        for name, prefix in (("DigitalSourceType", "Iptc4xmpExt"), ("CreatorTool", "xmp")):
            properties[name] = properties[name] or _property(description, f"{{{NAMESPACES[prefix]}}}{name}")
    source_type, software = properties.values()
    return Mark(source_type, software) if source_type else None


def _property(description, name):
    """A property of an rdf:Description in any of the three ways to write it; None if it is not there."""
    if (element := description.find(name)) is None:
        return description.get(name)
    return element.get(f"{{{NAMESPACES['rdf']}}}resource") or (element.text or "").strip() or None


def read_info(path: str | Path, formats: Any, advice: str) -> dict[Any, Any] | None:
    """What an image file says before its pixels, which are not decoded: Pillow's `info`; None if it is of no such format.

    Args:
        formats: names as Pillow has them.
        advice: ends the errors.

    Raises:
        ValueError: there is no such file, or it is damaged or dangerously large.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=formats) as image:
                return image.info
    except FileNotFoundError as error:
        raise ValueError(f"There is no file at {str(path)!r}. {advice}") from error
    except PIL.UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        kinds = ", ".join(formats)
        raise ValueError(
            f"{str(path)!r} cannot be read as {kinds} ({first_line(error)}). {advice}"
        ) from error


def _find_late_packet(path):
    """The XMP of a PNG that stands behind its pixels, where other programs may put it, and Pillow looks only after decoding."""
    from PIL.PngImagePlugin import PngStream

    with open(path, "rb") as file, PngStream(file) as stream:
        if file.read(8) != PNG_START:
            return None
        with contextlib.suppress(OSError, struct.error, SyntaxError):  # cut short: nothing more can be found
            kind = None
            while kind != b"IEND":
                kind, position, length = stream.read()
                if kind == b"iTXt":
                    stream.call(kind, position, length)
                file.seek(position + length + 4)
        return stream.im_info.get("xmp") or stream.im_info.get(PNG_XMP)


def describe_manifest(path: str | Path) -> str | None:
    """What the C2PA manifest of an image file says, in a line; None if there is none.

    Whether to believe the one who signed is another matter: no list of trusted certificates is asked.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(C2PA_BOX) < 0:
            return None
        try:
            c2pa = _import_c2pa()
        except ImportError:
            return f"there is one, which is not read: {C2PA_INSTALL}"
        file.seek(0)
        try:
            with (
                c2pa.Context.from_dict(C2PA_SETTINGS) as context,
                c2pa.Reader(file, context=context) as reader,
            ):
                manifest, state = reader.get_active_manifest(), reader.get_validation_state()
            issuer = manifest["signature_info"]["issuer"]
            actions = [
                action
                for assertion in manifest["assertions"]
                if assertion["label"].startswith("c2pa.actions")
                for action in assertion["data"]["actions"]
            ]
            terms = [str(action["digitalSourceType"]) for action in actions if "digitalSourceType" in action]
        except (c2pa.C2paError, KeyError, TypeError, ValueError) as error:
            return f"there is one, which cannot be read ({first_line(error)})"
    verdict = "is not valid" if state == "Invalid" else "fits the image"
    return f"signed by {issuer}, {', '.join(term.removeprefix(TERMS) for term in terms)}; it {verdict}"
