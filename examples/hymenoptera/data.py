"""The data of the demo, where none is given: the tutorial's pictures of ants and bees, else handwritten digits."""

from __future__ import annotations

import hashlib
import urllib.request
import zipfile
from pathlib import Path

URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
SHA256 = "fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209"


def fetch(folder: Path) -> Path:
    """A folder with train/ and val/, made once below `folder`."""
    ants = folder / "hymenoptera_data"
    digits = folder / "digits"
    for ready in (ants, digits):
        if (ready / ".complete").exists():
            return ready
    folder.mkdir(parents=True, exist_ok=True)
    try:
        archive = folder / "hymenoptera_data.zip"
        with urllib.request.urlopen(URL, timeout=20) as reply:
            data = reply.read()
        digest = hashlib.sha256(data).hexdigest()
        if digest != SHA256:
            raise OSError(f"its sha256 is {digest}, expected {SHA256}")
        archive.write_bytes(data)
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        (ants / ".complete").touch()
        return ants
    except OSError as error:
        print(f"the tutorial's pictures cannot be had ({error}): taking scikit-learn's handwritten digits instead")
    return write_digits(digits)


def write_digits(folder: Path, limit: int = 400) -> Path:
    """The first `limit` of scikit-learn's 1,797 real handwritten digits as pictures, one in five for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (picture, label) in enumerate(zip(digits.images[:limit], digits.target[:limit], strict=True)):
        part = folder / ("val" if index % 5 == 0 else "train") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 15.9375).astype("uint8")).convert("RGB").resize((64, 64)).save(part / f"{index:04}.png")
    (folder / ".complete").touch()
    return folder
