"""Colour profiles (ICC) that are computed here."""

import struct

import numpy as np

SRGB_TO_XYZ = np.array(
    [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
)  # white of D50
DISPLAY_P3_TO_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
EXCHANGED_TO_XYZ = SRGB_TO_XYZ[:, [1, 2, 0]]
GAMMA = 2.2


def make_profile(to_xyz, space=b"RGB "):
    """An ICC profile of primaries (columns of a matrix) and a gamma; of a grey one the matrix is not used."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(78)
    tags[b"cprt"] = b"text" + bytes(4) + b"a\0\0\0"
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip("rgb", np.asarray(to_xyz).T, strict=True):
            tags[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*column)
            tags[f"{letter}TRC".encode()] = curve
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body
