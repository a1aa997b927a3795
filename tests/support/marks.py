"""Marks of images as another program finds them: the XMP packet's text in the file, read by the standard library's parser."""

import re
from xml.etree import ElementTree

TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DIGITAL_SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
CREATOR_TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
DRAWN, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"


def mark_of(file):
    """(term, software) in the bytes or the path of an image file; None if it has no XMP."""
    content = file if isinstance(file, bytes) else open(file, "rb").read()
    packets = re.findall(rb"<x:xmpmeta.*?</x:xmpmeta>", content, re.DOTALL)
    assert len(packets) <= 1
    if not packets:
        return None
    tree = ElementTree.fromstring(packets[0])
    source_type = tree.find(f".//{DIGITAL_SOURCE_TYPE}").text
    assert source_type.startswith(TERMS)
    return source_type.removeprefix(TERMS), tree.find(f".//{CREATOR_TOOL}").text


def term_of(file):
    """The term alone; None if the file has no mark."""
    found = mark_of(file)
    return found and found[0]
