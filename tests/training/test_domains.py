"""The example data: crops whose objects are numbered, in two folders that share no pixel."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)


def wheel(path):
    """A file like stardist's wheel: grey values that name their place, and squares for nuclei."""
    y, x = np.mgrid[:512, :512]
    nuclei = np.where((y % 32 < 20) & (x % 32 < 20), 1 + y // 32 * 16 + x // 32, 0)
    nuclei[(y % 32 > 0) & (y < 32)] = 0  # those of the first row are too small
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in (("img", x // 4 + y // 16), ("mask", nuclei)):
            file = io.BytesIO()
            Image.fromarray(values.astype(np.uint16)).save(file, "tiff")
            archive.writestr(f"stardist/data/images/{name}2d.tif", file.getvalue())
    return path


def test_nuclei(tmp_path):
    result = run(EXAMPLES / "nuclei.py", wheel(tmp_path / "stardist.whl"), tmp_path / "out")
    assert result.returncode == 0, result.stderr
    y, x = np.mgrid[:512, :512]
    grey = x // 4 + y // 16
    low, high = np.percentile(grey[:, :384], [1, 99.8])
    for part, number, columns in (("train", 48, range(384)), ("test", 16, range(384, 512))):
        images = sorted((tmp_path / "out" / part / "images").iterdir())
        assert len(images) == number
        for path in images:
            image = np.array(Image.open(path))
            mask = np.array(Image.open(path.parents[1] / "masks" / path.name))
            top, left = map(int, path.stem.split("-"))
            assert image.shape == mask.shape == (64, 64)
            assert image.dtype == np.uint8
            seen = np.clip((grey[top : top + 64, left : left + 64] - low) / (high - low), 0, 1)
            assert np.abs(image - 255 * seen**0.5).max() <= 1, "bytes are rounded down"
            assert left in columns
            assert left + 63 in columns
            values, areas = np.unique(mask, return_counts=True)
            assert values.tolist() == list(range(values.max() + 1))
            assert areas[1:].min() >= 40


def test_what_is_no_wheel_of_stardist(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"no zip")
    result = run(EXAMPLES / "nuclei.py", tmp_path / "other.whl", tmp_path / "out")
    assert result.returncode == 1
    assert "pip download --no-deps stardist" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
