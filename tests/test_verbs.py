"""Verbs and flags, and what each refuses: one line, exit code 2, nothing overwritten."""

import json

import numpy as np
import pytest
import torch

import diffusion

CAPTIONS = ["--caption", "bright left", "--caption", "dark right", "--caption", ""]


@pytest.fixture
def trained(run):
    run("--train", "--train-steps", "2")
    return run


def images(path):
    with np.load(path, allow_pickle=False) as data:
        return data["x"], data["y"].tolist()


def test_sample_cycles_through_captions_and_needs_no_data(trained, data, tmp_path):
    data.unlink()
    trained("--sample", "--n", "7", *CAPTIONS, "--npz", tmp_path / "a.npz")
    x, y = images(tmp_path / "a.npz")
    assert x.shape == (7, 8, 8, 1) and x.dtype == np.uint8
    assert y == ["bright left", "dark right", ""] * 2 + ["bright left"]
    trained("--sample", "--n", "3", *CAPTIONS, "--npz", tmp_path / "b.npz")
    assert np.abs(images(tmp_path / "b.npz")[0].astype(int) - x[:3]).max() <= 1
    trained("--sample", "--n", "3", *CAPTIONS, "--npz", tmp_path / "c.npz", "--seed", "1")
    assert not np.array_equal(images(tmp_path / "c.npz")[0], x[:3])
    trained("--sample", "--n", "4", "--npz", tmp_path / "d.npz")
    assert len(set(images(tmp_path / "d.npz")[1])) > 1  # held-out captions


def test_samples_can_be_trained_on(trained, tmp_path):
    trained("--sample", "--n", "20", "--npz", tmp_path / "a.npz")
    trained(
        "--train", "--train-steps", "1", "--data", tmp_path / "a.npz", "--out", tmp_path / "next"
    )


def test_images_in_colour_without_a_word_train_and_sample(run, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "rgb.npz", x=x, y=np.array([""] * 12))
    run("--train", "--train-steps", "2", "--data", tmp_path / "rgb.npz")
    run("--sample", "--n", "3", "--npz", tmp_path / "a.npz")
    assert images(tmp_path / "a.npz")[0].shape == (3, 8, 8, 3)


def test_interpolate(trained):
    trained("--interpolate", *CAPTIONS)
    assert (trained.out / "interpolation.png").stat().st_size > 1000


def test_reconstruct(trained, model, refused, capsys):
    if model in ("gan", "diffusion-gan"):
        assert "no encoder" in refused("--reconstruct")
        return
    trained("--reconstruct")
    assert (trained.out / "reconstruction.png").stat().st_size > 1000
    assert "mean absolute error of 4 images" in capsys.readouterr().out


def test_evaluate_ends_in_json(trained, model, refused, capsys):
    if model in ("gan", "vae-gan", "diffusion-gan"):
        assert "no likelihood" in refused("--evaluate")
        return
    trained("--evaluate")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n"] == 4 and np.isfinite(result["bits_per_dim"]) and result["standard_error"] > 0


def test_verbs_combine_and_none_prints_the_help(run, capsys):
    run("--train", "--sample", "--interpolate", "--train-steps", "1", "--n", "4")
    assert (run.out / "samples.png").exists() and (run.out / "interpolation.png").exists()
    capsys.readouterr()
    run()
    out = capsys.readouterr().out
    assert "--train-steps" in out and "--evaluate" in out and "python" in out


def test_a_finished_run_is_not_overwritten(trained, refused):
    before = (trained.out / "checkpoint.pt").read_bytes()
    assert "--resume" in refused("--train", "--train-steps", "3")
    assert (trained.out / "checkpoint.pt").read_bytes() == before


def test_a_changed_architecture_or_other_data_are_named(trained, refused, tmp_path):
    assert "--embedding 24" in refused("--train", "--resume", "--embedding", "24")
    assert "--embedding 24" in refused("--sample", "--embedding", "24")
    x = np.zeros((20, 12, 12), np.uint8)
    np.savez(tmp_path / "other.npz", x=x, y=np.array(["bright left"] * 20))
    assert "--data" in refused("--train", "--resume", "--data", tmp_path / "other.npz")
    assert "--data" in refused("--reconstruct", "--data", tmp_path / "other.npz")


def test_sampling_before_training(refused, run):
    for verb in ("--sample", "--interpolate", "--reconstruct", "--evaluate"):
        assert "--train" in refused(verb)
    assert not run.out.exists()


def test_unknown_words_name_near_ones(trained, refused):
    line = refused("--sample", "--caption", "brigt left")
    assert "'brigt'" in line and "bright" in line


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkpoints_that_are_none(trained, refused, tmp_path):
    path = trained.out / "checkpoint.pt"
    good = path.read_bytes()
    foreign = torch.load(path, weights_only=True) | {"script": "other"}
    for broken in (good[: len(good) // 2], b"garbage", b""):
        path.write_bytes(broken)
        assert "checkpoint" in refused("--sample")
        assert "checkpoint" in refused("--train", "--resume", "--train-steps", "9")
        assert path.read_bytes() == broken
    torch.save(torch.zeros(3), path)
    assert "checkpoint" in refused("--sample")
    torch.save(foreign, path)
    assert "other.py" in refused("--sample")
    torch.save({"script": Payload(tmp_path / "ran")}, path)
    assert "checkpoint" in refused("--sample")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [["--n", "0"], ["--steps", "0"], ["--train-steps", "0"], ["--batch-size", "-1"], ["--lr", "-1"],
     ["--lr", "nan"], ["--n", "many"], ["--nonsense"], ["--device", "tpu"], ["--width", "4"],
     ["--seed", str(2**64)]],
)  # fmt: skip
def test_bad_flags(flags, refused, run, script):
    if flags[0] == "--steps" and script is not diffusion:
        pytest.skip("not a flag of this script")
    assert flags[0].lstrip("-") in refused("--train", *flags)
    assert not run.out.exists()


def test_an_absent_device(refused, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refused("--train", "--device", "cuda")
    assert not run.out.exists()


def test_an_npz_in_no_folder_is_refused_before_any_work(refused, run, tmp_path):
    assert "--npz" in refused("--train", "--sample", "--npz", tmp_path / "nowhere" / "a.npz")
    assert not run.out.exists()
