"""bench/pack.py: what it writes, and that it refuses what it cannot pack."""

import gzip

import numpy as np
import pytest
from PIL import Image

from bench import pack


def refused(capsys, *argv):
    """The one line that pack ends with when it refuses argv, after argparse's usage if it does."""
    with pytest.raises(SystemExit) as stop:
        pack.main([str(a) for a in argv])
    text = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    line = text.strip().splitlines()[-1]
    assert line.startswith("bench.pack: ") or "error: " in line
    return line


def picture(path, mode="L", size=(10, 6), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 255)
    Image.new(mode, size, colour).save(path)


def test_images_become_crops_with_the_captions_beside_them(tmp_path):
    picture(tmp_path / "in" / "red_fox" / "a.png")
    picture(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "b.txt").write_text("a small fox\n")
    left_black = np.zeros((8, 24), np.uint8)
    left_black[:, 8:16] = 255  # the centre square alone is white
    Image.fromarray(left_black).save(tmp_path / "in" / "c.png")
    pack.main([str(tmp_path / "in"), str(tmp_path / "out.npz"), "--size", "8"])
    data = np.load(tmp_path / "out.npz")
    assert (data["x"].shape, data["x"].dtype) == ((3, 8, 8), np.uint8)
    assert data["y"].tolist() == ["a small fox", "", "red fox"]
    assert set(data["x"][0].flat) == {100} and set(data["x"][1].flat) == {255}
    picture(tmp_path / "in" / "red_fox" / "b.jpg", "RGB")  # one in colour: then all are
    pack.main([str(tmp_path / "in"), str(tmp_path / "more.npz")])
    assert np.load(tmp_path / "more.npz")["x"].shape == (4, 32, 32, 3)


def write_idx(path, array):
    shape = np.array(array.shape, ">u4").tobytes()
    data = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def mnist_folder(folder, n_labels=6):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    y = np.arange(n_labels, dtype=np.uint8) % 3
    write_idx(folder / "train-images-idx3-ubyte.gz", x)
    write_idx(folder / "train-labels-idx1-ubyte", y)
    write_idx(folder / "t10k-images-idx3-ubyte", x[:2])
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", y[:2])
    return x, y


def test_mnist_files_keep_pixels_labels_and_test_set(tmp_path):
    x, y = mnist_folder(tmp_path)
    pack.main([str(tmp_path), str(tmp_path / "out.npz"), "--names", "shirt, shoe,ankle boot"])
    data = np.load(tmp_path / "out.npz")
    assert np.array_equal(data["x"], x) and np.array_equal(data["x_test"], x[:2])
    assert data["y"].tolist() == ["shirt", "shoe", "ankle boot"] * 2
    assert data["y_test"].tolist() == ["shirt", "shoe"]


def test_refusals(tmp_path, capsys):
    out = tmp_path / "out.npz"
    (tmp_path / "empty").mkdir()
    assert "no folder" in refused(capsys, tmp_path / "nowhere", out)
    assert "neither images" in refused(capsys, tmp_path / "empty", out)
    picture(tmp_path / "in" / "a" / "good.png")
    (tmp_path / "in" / "a" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in refused(capsys, tmp_path / "in", out)
    Image.new("I;16", (8, 8)).save(tmp_path / "in" / "a" / "bad.png")
    assert "bad.png" in refused(capsys, tmp_path / "in", out)
    assert "--size 30" in refused(capsys, tmp_path / "in", out, "--size", "30")
    (tmp_path / "mnist").mkdir()
    mnist_folder(tmp_path / "mnist", n_labels=5)
    assert "5 labels" in refused(capsys, tmp_path / "mnist", out)
    mnist_folder(tmp_path / "mnist")
    assert "2 names" in refused(capsys, tmp_path / "mnist", out, "--names", "a,b")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(b"\0\0")
    assert "cannot be read" in refused(capsys, tmp_path / "mnist", out)
    assert not out.exists()
    out.write_bytes(b"mine")
    (tmp_path / "in" / "a" / "bad.png").unlink()
    assert "exists already" in refused(capsys, tmp_path / "in", out)
    assert out.read_bytes() == b"mine"
