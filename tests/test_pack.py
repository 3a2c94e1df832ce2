"""bench/pack.py: what it writes, and that it refuses what it cannot pack."""

import json

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from bench import pack


def refused(*argv):
    return refusal(pack.main, [str(a) for a in argv])


def picture(path, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = 100 if mode == "L" else (100, 0, 255)
    Image.new(mode, (10, 6), colour).save(path)


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


def test_refusals(tmp_path):
    out = tmp_path / "out.npz"
    (tmp_path / "empty").mkdir()
    assert "no folder" in refused(tmp_path / "nowhere", out)
    assert "no images" in refused(tmp_path / "empty", out)
    (tmp_path / "empty" / "bad.png").write_bytes(b"no image")
    Image.new("I;16", (8, 8)).save(tmp_path / "empty" / "deep.png")
    line = refused(tmp_path / "empty", out)
    assert "bad.png" in line and "deep.png (it has more than 8 bits a channel)" in line
    picture(tmp_path / "in" / "good.png")
    assert "--size 30" in refused(tmp_path / "in", out, "--size", "30")
    assert not out.exists()
    out.write_bytes(b"mine")
    assert "exists already" in refused(tmp_path / "in", out)


def packed(folder, capsys):
    """What pack writes of a folder, and what it prints."""
    out = folder.parent / "out.npz"
    out.unlink(missing_ok=True)
    pack.main([str(folder), str(out), "--size", "8"])
    return np.load(out), capsys.readouterr().out


def test_what_is_hidden_is_passed_over_and_what_cannot_be_read_is_told(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a/1.png", "a/2.JPEG", "a/3.jfif", ".trash/4.png", "a/.5.png", "__MACOSX/6.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100).save(path, "png" if "png" in name else "jpeg")
    (folder / "a/7.heic").write_bytes(b"?")
    (folder / "a/8.png").write_bytes((folder / "a/1.png").read_bytes()[:50])
    (folder / "a/9.png").write_bytes(b"")
    (folder / "loop").symlink_to(folder)
    picture(tmp_path / "elsewhere" / "b" / "1.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    data, told = packed(folder, capsys)
    assert data["y"].tolist() == ["a", "a", "a", "b"]
    assert all(part in told for part in ("packed 4, left out 3", "7.heic", "8.png", "9.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(mode, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    image = Image.new("RGBA", (8, 8), (0, 200, 0, 0))  # a hidden green
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    image = image.convert(mode) if mode != "P" else image.quantize(4)
    image.save(tmp_path / "in/a.png")
    data, _ = packed(tmp_path / "in", capsys)
    x = data["x"][0].reshape(8, 8, -1)
    assert (x[0, 0] == 255).all() and (x[4, 4] == 0).all()


def test_captions_of_all_kinds(tmp_path, capsys):
    folder = tmp_path / "in"
    for i in range(7):
        picture(folder / f"{i}.png")
    (folder / "0.txt").write_bytes(b"\xef\xbb\xbfa red fox\r\n")
    (folder / "1.TXT").write_text("one line\n\nanother\n")
    (folder / "2.txt").write_bytes("ein fuchs für dich".encode("cp1252"))
    (folder / "3.txt").write_text("word " * 9000)
    rows = [{"file_name": "4.png", "text": "from metadata"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data, told = packed(folder, capsys)
    y = data["y"].tolist()
    assert y[0] == "a red fox" and y[1] in ("one line", "another")
    assert len(y[2]) == 500 and y[3:] == ["from metadata", "", ""]
    assert "2.png (2.txt: 'utf-8' codec" in told
    assert "2 of 6 images have no caption" in told
    (folder / "metadata.jsonl").write_text("{}\n")
    assert "metadata.jsonl" in refused(folder, tmp_path / "other.npz")


def test_train_and_test_folders_fill_both_parts(tmp_path, capsys):
    for name in ("train/cat/1.png", "train/2.png", "val/cat/3.png", "other/4.png"):
        picture(tmp_path / "in" / name)
    data, told = packed(tmp_path / "in", capsys)
    assert data["y"].tolist() == ["", "cat"] and data["y_test"].tolist() == ["cat"]
    assert "packed 3, left out 1: other/4.png" in told
    (tmp_path / "in/test").mkdir()
    picture(tmp_path / "in/test/dog/5.png")
    data, _ = packed(tmp_path / "in", capsys)
    assert data["y_test"].tolist() == ["dog"]
