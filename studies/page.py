"""What the pages of studies/ share: their data, packed into one file with the code that shows it.

A page is a template, such as report.html, with {{page.css}}, {{page.js}} and {{data}} in it. It opens by double click
and asks nothing of any network.
"""

import base64
import gzip
import json
from pathlib import Path

import numpy as np


def visible(token: bytes) -> str:
    """A token as text in which every character can be seen, but for the space.

    ⏎ for a line break, ␀ for a null byte, ⟨200B⟩ for a space without width, \\xe2 for a byte that is no character.
    """
    text = token.decode("utf-8", "backslashreplace").replace("\n", "⏎").replace("\t", "⇥").replace("\x7f", "␡")
    return "".join(c if c.isprintable() else chr(0x2400 + ord(c)) if c < " " else f"⟨{ord(c):04X}⟩" for c in text)


def smallest(x: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest type that holds them.

    Others in float32 of three to four significant digits, which gzip packs to half the size: the last 12 bits are 0.
    """
    if x.dtype.kind in "iu":
        low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
        return x.astype(np.min_scalar_type(min(low, -high - 1) if low < 0 else high))
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 11)) & np.uint32(0xFFFFF000)).view(np.float32)


def pack(page: dict, arrays: dict[str, np.ndarray]) -> str:
    """Base64 of gzip of: the length of the JSON (8 bytes, little-endian), the JSON, the arrays at multiples of 8 bytes.

    The JSON is `page` and `arrays`: {name: [dtype, first byte, numbers]}. No letter of base64 means anything in HTML.
    """
    blobs, directory, at = [], {}, 0
    for name, array in arrays.items():
        array = smallest(array)
        directory[name] = [array.dtype.name, at, array.size]
        blobs.append(array.tobytes() + bytes(-array.nbytes % 8))
        at += len(blobs[-1])
    text = json.dumps(page | {"arrays": directory}, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    packed = gzip.compress(b"".join([len(text).to_bytes(8, "little"), text, *blobs]), 6, mtime=0)
    return base64.b64encode(packed).decode()


def filled(template: str, page: dict, arrays: dict[str, np.ndarray]) -> str:
    """A template of this folder with the shared style, the shared code and its data in it."""
    folder = Path(__file__).parent
    text = (folder / template).read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"{{{{{name}}}}}\n", (folder / name).read_text(encoding="utf-8"))
    return text.replace("{{data}}", pack(page, arrays))
