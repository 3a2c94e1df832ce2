"""bench: figures against truth they must have, baselines that must fail, rows that are kept."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import halves, refusal
from PIL import Image
from torch import nn

import prior
from bench import __main__ as bench
from bench import datasets, explore, files, likelihood, models, quality, reader, report
from vae import captioned_digits, load_data

WORDS = ["bright", "dark", "left", "right"]


def bytes_of(*shape, top=256):
    """Random bytes under top, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(top, shape, generator=generator).byte()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return halves(tmp_path_factory.mktemp("data") / "data.npz", 200)


@pytest.fixture(scope="module")
def judge(data):
    return quality.Judge(str(data), steps=100, batch_size=32)


@pytest.fixture(scope="module", params=models.MODELS)
def run(request, data, tmp_path_factory):
    """A run of each model in turn, of two updates at the smallest size."""
    runs = tmp_path_factory.mktemp("runs")
    sizes = "--width 8 --batch-size 8 --train-steps 2 --images 4 --device cpu".split()
    for name in ("diffusion", "one-step") if request.param == "one-step" else (request.param,):
        folder = runs / name
        files = f"--data {data} --out {folder} --npz {folder}/samples.npz".split()
        folder.mkdir()
        models.script(name).main(["--train", *models.choice(name), *sizes, *files])
    return SimpleNamespace(name=name, folder=folder)


def tiny(name, **args):
    return models.fresh(name, (1, 8, 8), WORDS, width=8, **args)


class TestFigures:
    def test_frechet_distance_of_known_normals(self):
        """|mu1 - mu2|^2 + sum of (s1 - s2)^2 for independent coordinates."""
        g = np.random.default_rng(0)
        a, b = g.normal(size=(2, 200_000, 3))
        a = a * [1.0, 2.0, 0.5]
        b = b * [1.5, 2.0, 0.25] + [1, 0, -2]
        assert quality.frechet_distance(a, b) == pytest.approx(5.0 + 0.5**2 + 0.25**2, rel=0.02)
        assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)

    def test_manifold_figures_see_collapse_and_strangers(self):
        g = np.random.default_rng(0)
        real, same = g.normal(size=(2, 400, 4)).astype(np.float32)
        good = quality.manifold_figures(real, same)
        assert good["precision"] > 0.9 and good["recall"] > 0.9
        assert 0.8 < good["density"] < 1.2 and good["coverage"] > 0.9
        collapsed = np.repeat(real[:5], 80, 0) + 1e-3 * same
        bad = quality.manifold_figures(real, collapsed)
        assert bad["precision"] > 0.9 and bad["recall"] < 0.1 and bad["coverage"] < 0.2
        far = quality.manifold_figures(real, same + 50)
        assert max(far.values()) == 0

    def test_sharpness_and_diversity(self):
        x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        assert quality.sharpness(x) == 0
        x[0, 0, 4, 4] = 255
        assert quality.sharpness(x) == pytest.approx(8 / 36)
        features = torch.tensor([0.0, 1, 10, 10, 5])[:, None]
        assert quality.diversity(features, list("aabbc")) == pytest.approx(0.5)
        assert quality.diversity(features, list("abcde")) is None
        assert quality.ratio(1.0, 0) is quality.ratio(None, 1) is None

    def test_attributes_are_places_in_the_caption_or_the_caption(self):
        assert reader.attributes(["a b", "c d"]) == [["a", "c"], ["b", "d"]]
        assert reader.attributes(["a b", "c"]) == [["a b", "c"]]
        assert reader.attributes(["x", "a b"], 2) == [["", "a"], ["", "b"]]

    def test_ink_and_slant_agree_with_all_captions_of_the_digits(self):
        digits = captioned_digits()
        captions = digits["y"].tolist()
        x = torch.from_numpy(digits["x"])[:, None]
        names = sorted(reader.DIGITS)
        stub = SimpleNamespace(values=[[], [], names])
        reader.Reader.fit_digits(stub, x, captions)
        digits = [names.index(caption.split()[2]) for caption in captions]
        read = reader.Reader.read_digits(stub, x, digits, captions)
        assert [right.mean() for right in read.values()] == [1, 1, 1]
        asked = reader.Reader.read_digits(stub, x[:1], digits[:1], ["zero slanted"])
        assert asked["digit"].all() and asked["weight"].isnan().all()

    def test_the_judge_reads_real_images_and_baselines_fail_where_they_should(self, judge):
        given = judge.baselines(20).values()
        real, replay, one = [judge.measure(*images) for images in given]
        assert list(real["agreement"].values()) == [1.0, 1.0] and real["obeyed"] == 1
        assert min(real["shuffled"].values()) < 0.9
        assert real["obeyed_by_chance"] <= min(real["shuffled"].values())
        assert real["nearest"] == 1 and replay["nearest"] < 1e-6
        assert one["diversity"] == 0 and 0.5 < real["diversity"] < 1.5
        far = judge.measure(bytes_of(20, 1, 8, 8), judge.captions_test)
        same = judge.measure(judge.x, judge.captions)
        assert far["fd"] > 10 and abs(same["fd"]) < 0.1

    def test_obeyed_is_the_share_of_images_of_which_all_is_right(self, judge, monkeypatch):
        nan = torch.nan
        a = torch.tensor([1.0, 1, 0, nan])
        b = torch.tensor([1.0, 0, 0, 1])
        read = {"a": a, "b": b}
        monkeypatch.setattr(judge.reader, "read", lambda *_: read)
        whole, parts = judge.obedience(None, None, None)
        assert whole == 0.5 and parts == {"a": pytest.approx(2 / 3), "b": 0.5}

    def test_a_perfect_sample_covers_nearly_all(self, judge):
        half = judge.measure(judge.x[::2], judge.captions[::2])
        assert half["coverage"] > 0.9 and half["precision"] > 0.9

    def test_images_with_a_caption_each_are_matched_with_it(self):
        """Each picture is of one colour, which its caption names."""
        pairs = [(a, b) for a in range(4) for b in range(4)] * 3
        names = [f"{a} and {b}" if a - b else f"only {a}" for a, b in pairs]
        x = torch.zeros(48, 2, 8, 8, dtype=torch.uint8)
        for image, (a, b) in zip(x, pairs):
            image[0], image[1] = 80 * a, 80 * b
        matcher = reader.Reader(x, names, steps=100, batch_size=16)
        features = matcher.features(x)
        right = matcher.read(x, features, names)["text"].mean()
        wrong = matcher.read(x, features, names[1:] + names[:1])["text"].mean()
        assert matcher.matcher and right > 0.9 and wrong < 0.2

    def test_quality_reads_and_refuses(self, data, judge, monkeypatch, tmp_path, capsys):
        files = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
        x, captions = judge.x[:9, 0].numpy(), judge.captions[:9]
        np.savez(files[0], x=x, y=captions)
        np.savez(files[1], x=x[:, :4], y=captions)
        files[2].touch()
        monkeypatch.setattr(quality, "Judge", lambda path: judge)
        common = ["--data", str(data)]
        quality.main([str(files[0]), *common])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == 4 and rows[-1]["nearest"] < 1e-6
        assert "shape" in refusal(quality.main, [str(files[1]), *common])
        assert "no samples" in refusal(quality.main, [str(files[2]), *common])


class Toy(nn.Module):
    """A model of 4x4 images whose density is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def tokenize(self, captions):
        return torch.zeros(len(captions), 1, dtype=torch.long)

    def embed(self, ids):
        return ids.float()


class Mixture(Toy):
    """Each pixel is black with probability 1/4, else white; y has noise."""

    noise = 0.3

    def add_noise(self, x):
        return x + self.noise * torch.randn_like(x)

    def noise_entropy(self):
        return 0.5 * math.log(2 * math.pi * math.e * self.noise**2)

    def clean(self, y, c):
        return y

    def pixel_logits(self, y):
        k = torch.arange(256)
        log_prior = torch.full((256,), -torch.inf)
        log_prior[[0, 255]] = torch.tensor([0.25, 0.75]).log()
        distance = (y[..., None] - k / 127.5 + 1) / self.noise
        return log_prior - distance**2 / 2

    def forward(self, y, c):
        log_p = self.pixel_logits(y).logsumexp(-1) - math.log(self.noise)
        return torch.zeros_like(y), log_p.flatten(1).sum(1)  # the normal's constant is the same


class Normal(Toy):
    """x ~ N(0, S) for a matrix S of 16 values, which depend on each other."""

    def __init__(self):
        super().__init__()
        root = 0.25 * torch.eye(16) + 0.1 * torch.randn(16, 16)
        self.covariance = root @ root.T / 2

    def velocity(self, z, t, c):
        of_z = (1 - t) ** 2 * self.covariance + t**2 * torch.eye(16)
        slope = t * torch.eye(16) - (1 - t) * self.covariance
        slope = slope @ of_z.inverse()
        return (z.flatten(1) @ slope.T).view_as(z)


class TestLikelihood:
    def test_a_bound_with_the_true_posterior_is_the_probability(self):
        torch.manual_seed(0)
        white = torch.rand(400, 1, 4, 4) < 0.75
        result = likelihood.measure(Mixture(), 255 * white.byte(), [""] * 400)
        share = white.float().mean().item()
        truth = -share * math.log2(0.75) - (1 - share) * math.log2(0.25)
        assert abs(result["bits_per_dim"] - truth) < 4 * result["standard_error"]
        assert (result["kind"], result["n"]) == ("bound", 400)

    def test_the_density_of_a_whitened_flow_is_a_normals(self):
        x = bytes_of(500, 1, 8, 8)
        model = tiny("flow")
        model.fit(x)
        result = likelihood.measure(model, x, ["dark"] * 500)
        variance = (2 / 255) ** 2 * (256**2 - 1) / 12 + model.coarse_noise**2
        truth = 0.5 * math.log2(2 * math.pi * math.e * variance)
        assert result["bits_per_dim_of_y"] == pytest.approx(truth, abs=0.1)

    def test_the_flow_of_probability_finds_a_normals_density(self):
        torch.manual_seed(0)
        model = Normal()
        zero = torch.zeros(16)
        normal = torch.distributions.MultivariateNormal(zero, model.covariance)
        x = normal.sample((300,)).clamp(-1, 1)
        x = (127.5 * (x + 1)).round().byte()
        x = x.view(300, 1, 4, 4)
        result = likelihood.measure(model, x, [""] * 300)
        density = normal.log_prob(x.flatten(1) / 127.5 - 1).mean().item()
        truth = math.log2(127.5) - density / (16 * math.log(2))
        assert abs(result["bits_per_dim"] - truth) < 0.08
        assert result["standard_error"] < 0.08
        assert result["kind"] == "ODE estimate"

    def test_importance_weights_find_the_integral_over_z(self, monkeypatch):
        torch.manual_seed(0)
        model = tiny("vae", latent=1)
        x = bytes_of(3, 1, 8, 8)
        monkeypatch.setattr(likelihood, "SAMPLES", 400)
        result = likelihood.measure(model, x, ["dark"] * 3)
        z, log_p = torch.linspace(-6, 6, 1201)[:, None], []
        with torch.no_grad():
            c = model.embed(model.tokenize(["dark"]))
            location = model.decode(z, c.expand(len(z), -1))
            for image in x / 127.5 - 1:
                log_x = likelihood.log_logistic(image, location, model.log_scale)
                joint = log_x.flatten(1).sum(1) + prior.log_prob(z)
                log_p.append(joint.logsumexp(0) + math.log(0.01))
        truth = -torch.stack(log_p).mean().item() / (64 * math.log(2))
        assert result["bits_per_dim"] == pytest.approx(truth, abs=0.02)
        assert likelihood.measure(tiny("gan"), x, ["dark"] * 3) is None


class TestModels:
    def test_held_out_is_a_tenth_of_the_images_or_what_the_file_keeps(self, data, tmp_path):
        x, captions = models.held_out(str(data))
        whole = np.load(data)
        text_of = dict(zip(map(bytes, whole["x"]), whole["y"]))
        trained = set(map(bytes, load_data(data)[0].numpy()))
        left_out = list(map(bytes, x.numpy()))
        assert len(x) == 20 and not trained & set(left_out)
        assert captions == [text_of[image] for image in left_out]
        test = {"x_test": whole["x"][:3], "y_test": ["dark blue left", "", "bright"]}
        np.savez(tmp_path / "a.npz", x=whole["x"], y=whole["y"], **test)
        x, captions = models.held_out(str(tmp_path / "a.npz"))
        assert len(x) == 3 and captions == ["dark left", "", "bright"]
        test["y_test"] = ["dark"]
        np.savez(tmp_path / "b.npz", x=whole["x"], y=whole["y"], **test)
        assert "b.npz" in refusal(models.held_out, str(tmp_path / "b.npz"))

    def test_evaluations_are_counted(self):
        counts = {}
        for name in models.MODELS:
            for label, options in models.settings(name).items():
                counts[label] = models.cost(tiny(name), **options)["evaluations"]
        truth = {"vae": 1, "gan": 1, "vae-gan": 1, "flow": 2, "flow, guidance 1": 1}
        truth |= {"diffusion": 40, "diffusion, guidance 1": 20, "diffusion, dpm, 4 steps": 8}
        truth |= {"diffusion-gan": 4, "autoregressive": 64, "one-step": 1, "one-step, 4 steps": 4}
        assert truth.items() <= counts.items()

    def test_images_are_drawn_as_the_script_draws_them(self, run):
        model, checkpoint = models.load(run.folder)
        assert checkpoint["name"] == run.name
        samples = np.load(run.folder / "samples.npz")
        captions = samples["y"].tolist()
        x = models.draw(model, captions, 0)
        assert np.array_equal(x.permute(0, 2, 3, 1), samples["x"])
        assert not torch.equal(x, models.draw(model, captions, 1))

    def test_what_is_no_run_is_refused_and_flags_are_the_scripts(self, tmp_path):
        assert "no run" in refusal(models.load, tmp_path)
        torch.save({"script": "os"}, tmp_path / "checkpoint.pt")
        assert "no run" in refusal(models.load, tmp_path)
        flags = models.flags("flow-gan", "--batch-size", "7")
        assert (flags.batch_size, flags.model) == (7, "flow-gan")


class TestExplore:
    def test_a_run_of_each_model_gets_its_pictures(self, run, data, capsys):
        explore.main(f"{run.folder} --data {data} --images 4 --device cpu".split())
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        kinds = {"vae": "importance-weighted bound", "diffusion": "ODE estimate", "flow": "bound"}
        kinds |= {"flow-gan": "bound", "autoregressive": "exact"}
        assert last["model"] == run.name
        assert last.get("kind") == kinds.get(run.name)
        assert ("bits_per_dim" in last) == ("standard_error" in last) == (run.name in kinds)
        wanted = {"samples", "interpolation", "path", "loss"}
        if hasattr(models.network(run.name), "encode"):
            wanted.add("reconstruction")
        assert {path.stem for path in run.folder.glob("*.png")} == wanted

    def test_paths_end_in_the_sample(self):
        for name, show in (("diffusion", explore.steps), ("flow", explore.scales)):
            model = models.fresh(name, (1, 20, 20), WORDS, width=8)
            for p in model.parameters():
                nn.init.normal_(p, std=0.1)
            z = prior.sample(2, 1, 20, 20, seed=0)
            c = model.embed(model.tokenize(["dark", "left"]))
            torch.manual_seed(0)
            frames = show(model, z, c)
            torch.manual_seed(0)
            sample = model.sample(z, c)
            assert len(frames) == (20 if name == "diffusion" else len(model.stacks))
            assert torch.allclose(frames[-1].clamp(-1, 1), sample, atol=1e-5)
            assert not torch.allclose(frames[0], sample, atol=1e-3)

    def test_a_run_without_a_log_is_shown_and_a_call_by_file_name_works(self, data, tmp_path):
        model = tiny("vae")
        run = {"script": "vae", "args": model.args, "ema": model.state_dict()}
        torch.save({**run, "update": 1, "captions": ["dark left"]}, tmp_path / "checkpoint.pt")
        call = [sys.executable, str(report.ROOT / "bench/explore.py"), str(tmp_path)]
        call += ["--data", str(data), "--images", "2", "--device", "cpu"]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "path.png").exists() and not (tmp_path / "loss.png").exists()

    def test_other_data_than_the_runs_is_refused(self, tmp_path):
        model = tiny("vae")
        run = {"script": "vae", "args": model.args, "ema": model.state_dict()}
        torch.save(run, tmp_path / "checkpoint.pt")
        assert "--data" in refusal(explore.main, [str(tmp_path), "--device", "cpu"])


class TestBenchmark:
    def test_an_interrupted_call_goes_on(self, monkeypatch, data, tmp_path, capsys):
        calls = []
        measure, real = likelihood.measure, quality.Judge.measure

        def counted(*given):
            calls.append(0)
            return real(*given)

        monkeypatch.setattr(bench, "Judge", lambda path: quality.Judge(path, 20, 16))
        monkeypatch.setattr(quality.Judge, "measure", counted)
        sizes = "--quick --models vae flow --width 8 --batch-size 8 --train-steps 24".split()
        argv = [*sizes, "--device", "cpu", "--runs", str(tmp_path), "--data", str(data)]
        monkeypatch.setattr(likelihood, "measure", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.main(argv)
        assert len(calls) == 3 + 3  # baselines, and the first model at three seeds
        checkpoints = [tmp_path / name / "checkpoint.pt" for name in ("vae", "flow")]
        before = [path.stat().st_mtime_ns for path in checkpoints]
        monkeypatch.setattr(likelihood, "measure", measure)
        bench.main(argv)
        bench.main(argv)
        assert len(calls) == 6 + 9  # vae again, flow with its guidance and without
        assert before == [path.stat().st_mtime_ns for path in checkpoints]
        out = tmp_path / "results"
        results = files.read(out / "quality.json")
        rows = results["rows"]
        assert list(rows)[3:] == ["vae", "flow", "flow, guidance 1"]
        assert rows["vae"]["updates"] == 2 and rows["vae"]["bits_per_dim"]["n"] == 20
        assert rows["flow"]["fd"]["std"] > 0
        assert rows["flow"]["seeds"] == [0, 1, 2]
        assert (out / "samples.png").exists()
        assert "| [vae](/vae.py) | 1 | - |" in capsys.readouterr().out
        bench.main([*argv, "--models", "vae", "--seeds"])
        bench.main([*argv, "--models", "vae", "--seeds"])
        assert len(calls) == 15 + 2  # one draw from each of two more training seeds
        results = files.read(out / "quality.json")
        assert list(results["other_seeds"]) == ["1", "2"]
        runs = report.trained(results, "vae")
        assert len({row["fd"]["mean"] for row in runs}) == 3 and runs[2]["fd"]["std"] is None
        files.write(out / "quality.json", {**results, "device": "another"})
        assert "another" in refusal(bench.main, argv)

    def test_speed_is_timed_and_its_table_is_made(self, data, tmp_path):
        """Through gpu.sh, which hands its options on to pytest."""
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        options = ["--quick", "--width", "8", "-k", "[eager-vae-1 or flow-gan and training"]
        options += ["--data", str(data)]
        call = ["bash", "bench/gpu.sh", "speed", str(tmp_path), *options]
        subprocess.run(call, cwd=report.ROOT, env=env, check=True, capture_output=True)
        speed = files.read(tmp_path / "speed.json")
        assert report.rates(speed).keys() == {"vae"}
        (row,) = report.measured(speed, "training")
        assert row["label"] == "flow-gan" and row["images_per_s"] == row["batch"] / row["seconds"]
        assert "| vae | eager | 1 | 1 |" in report.speed_table(speed)
        assert "| flow-gan | eager | 128 |" in report.training_table(speed)
        assert torch.__version__ in report.where(speed)

    def test_a_claim_holds_over_training_seeds(self):
        rows = {"gan": {"sharpness": {"mean": 1.0, "std": 0.1}}}
        rows["vae"] = {"sharpness": {"mean": 0.7, "std": 0.1}}
        files = {"quality": {"rows": rows}, "speed": {}}
        claim = ["a GAN is sharper than a VAE", "gan", "vae", "sharpness", "1.00 ± 0.10"]
        assert report.claims(files) == [[*claim, "0.70 ± 0.10", "1 and 1", "yes"]]
        blurred = {"1": {"gan": {"sharpness": {"mean": 0.6, "std": None}}}}
        files["quality"]["other_seeds"] = blurred | {"2": {"gan": {"updates": 9}}}  # not as long
        claim[-1] = "0.80 ± 0.28"
        assert report.claims(files) == [[*claim, "0.70 ± 0.10", "2 and 1", "no"]]

    def test_tables_go_between_the_markers_of_a_page(self, tmp_path, monkeypatch):
        spread = {"mean": 0.5, "std": 0.1}
        agreement = {"digit": spread, "slant": {"mean": 0.9, "std": 0.1}}
        row = {"agreement": agreement, "n": 20}
        row |= {figure: spread for figure in ("fd", "obeyed", *report.FIGURES)}
        row |= {"obeyed_by_chance": spread, "diversity": None}
        bits = {"bits_per_dim": 1.234, "kind": "bound", "standard_error": 0.1}
        flow = {**row, "seeds": [0], "evaluations": 2, "updates": 9, "bits_per_dim": bits}
        flow["width"] = 64
        rows = {"real, held out": row, "flow": flow, "flow, guidance 1": {**flow, "evaluations": 1}}
        (tmp_path / "bench/results/fashion").mkdir(parents=True)
        other = {"1": {"flow": {**flow, "fd": {"mean": 2.5, "std": None}}}}
        for folder in ("bench/results", "bench/results/fashion"):
            here = {"device": "a card", "torch": "2.13", "commit": "abc", "other_seeds": other}
            files.write(tmp_path / folder / "quality.json", {**here, "rows": rows})
        note = {"task": "sampling", "label": "flow", "mode": "eager", "images_per_s": 1234.5}
        note |= {"batch": 16, "seconds": 0.0123, "evaluations": 2, "gflop_per_image": 0.04}
        note |= {"mb_per_image": 7.0, "share_of_ceiling": 0.2}
        training = {**note, "task": "training", "updates": 7, "seconds": 2.0, "parameters": 10}
        rows = {**note, "images_per_s": 90}, note, training, {**training, "mode": "", "seconds": 9}
        notes = [{"extra_info": row} for row in rows]
        files.write(tmp_path / "bench/results/speed.json", {"benchmarks": notes})
        (tmp_path / "bench/results/unseen").mkdir()
        unseen = {**here, "rows": {"flow": flow}}
        files.write(tmp_path / "bench/results/unseen/quality.json", unseen)
        (tmp_path / "README.md").write_text("above\n<!-- table -->\nold\n<!-- /table -->\nbelow\n")
        (tmp_path / "bench/results/fashion/samples.png").touch()
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", tmp_path / "bench/results")
        report.main()
        readme = (tmp_path / "README.md").read_text()
        lines = len((models.ROOT / "flow.py").read_text().splitlines())
        cells = f"| [flow](/flow.py) | 2 | 1,234 | 1.5 ± 1.4 | 50 ± 0% | 1.23 (bound) | {lines} |"
        assert readme.startswith("above\n<!-- table -->\n| model |") and "old" not in readme
        assert cells in readme and readme.endswith("|\n<!-- /table -->\nbelow\n")
        page = (tmp_path / "bench/RESULTS.md").read_text()
        assert "## Quality, fashion" in page
        assert page.count("![samples](") == 1 and "(results/fashion/samples.png)" in page
        assert "| flow, guidance 1 | 50.0 ± 10.0% | 50.0 ± 10.0% |" in page
        assert "| flow | 2 | 50.0 ± 0.0% (10.0%) | 1.50 ± 1.41 (0.10) |" in page
        assert "| real images | - | - | 0.5 | 50% |" in readme
        assert "Nearest to real images, by FD: flow, guidance 1 (0.50), then flow (1.50" in page
        assert "never seen together are obeyed: flow 50 ± 10%." in page
        assert "## Claims" not in page  # none has its figures
        assert "| 1.23 (bound) | 2 | 64 | 9 | 0.3 |" in page  # minutes
        assert "| flow | eager | 16 | 2 | 1,234 | 12.3 | 0.040 | 7 | 0.20 | - |" in page
        assert "Measured on a card with torch 2.13" in page and "commit abc" in page
        assert (tmp_path / "bench/results/quality_speed.png").exists()
        assert "a \\| b" in report.table(["head"], [["a | b"]])
        assert report.table(["head"], []) == ""
        assert files.read(tmp_path / "none.json") == {}


def emoji_package(path):
    """A package like emoji-datasource, of a fox, a hand of all tones, and a couple."""
    places = iter(range(100))

    def form(**more):
        place = next(places)
        return {"sheet_x": place % 4, "sheet_y": place // 4, "has_img_google": True, **more}

    tones = list(datasets.TONES)
    hand = {tone: form() for tone in tones}
    hand |= {f"{a}-{b}": form() for a in tones for b in tones if a != b}
    entries = [form(name="RED FOX"), form(name="Waving hand", skin_variations=hand)]
    couple = {f"{tones[0]}-{tones[4]}": form()}
    entries += [form(name="KISS", skin_variations=couple), form(name="none", has_img_google=False)]
    sheet = np.zeros((34 * 9, 34 * 4, 4), np.uint8)
    where = 34 * entries[0]["sheet_y"], 34 * entries[0]["sheet_x"]
    top, left = where[0] + 9, where[1] + 9
    sheet[top : top + 17, left : left + 17] = 200, 0, 0, 255
    picture, text = io.BytesIO(), json.dumps(entries).encode()
    Image.fromarray(sheet).save(picture, "png")
    files = {"package/emoji.json": text, "package/img/google/sheets/32.png": picture.getvalue()}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return entries, sheet


class TestDatasets:
    def test_stacked_and_unseen(self):
        data = datasets.stacked(50)
        assert data["x"].shape == (50, 28, 28, 3)
        assert set(data["y"]) == {""}
        data = datasets.unseen()
        assert set(data["y_test"]) == set(datasets.UNSEEN)
        assert not set(datasets.UNSEEN) & set(data["y"])
        assert len(data["x"]) + len(data["x_test"]) == 5000

    def test_bound_names_its_digits_in_order_and_leaves_captions_out(self):
        data = datasets.bound(300)
        assert data["x"].shape == (300, 28, 28, 3)
        out = set(datasets.left_out())
        assert len(out) == 100 and set(data["y_test"]) <= out
        assert not out & set(data["y"])
        x, captions = load_data()
        names = [caption.split()[2] for caption in captions]
        text_of = dict(zip(map(bytes, x.numpy()), names))
        for image, caption in zip(data["x"][:20], data["y"]):
            channels = [bytes(image[..., i].copy()) for i in range(3)]
            assert caption.split() == [text_of[channel] for channel in channels]

    def test_emoji_are_cut_from_the_sheets_and_named_with_their_tones(self, tmp_path):
        entries, sheet = emoji_package(tmp_path / "emoji.tgz")
        datasets.main(["emoji", str(tmp_path / "emoji.tgz"), str(tmp_path / "e.npz")])
        data = np.load(tmp_path / "e.npz")
        x = np.concatenate([data["x"], data["x_test"]])
        y = [*data["y"].tolist(), *data["y_test"].tolist()]
        toned = sum(caption.endswith(" skin") for caption in y)
        assert toned == 26 and len(data["y_test"]) == 2
        assert all(caption.endswith(" skin") for caption in data["y_test"])
        assert {"waving hand", "waving hand light skin", "kiss light skin and dark skin"} <= set(y)
        red_fox = x[y.index("red fox")]
        assert set(red_fox[0, 0]) == {255}  # transparent
        assert red_fox[16, 16].tolist() == [200, 0, 0]
        assert "npm pack" in refusal(datasets.main, ["emoji", __file__, str(tmp_path / "f.npz")])
        line = refusal(datasets.emoji, [tmp_path / "emoji.tgz"], ["google"], 64)
        assert "npm pack" in line and not (tmp_path / "f.npz").exists()

    def test_modes_of_stacked_digits(self):
        """Read by a stub for which a digit is the first pixel."""
        first = SimpleNamespace(values=[[], [], sorted(reader.DIGITS)])
        first.features = lambda x: x[:, 0, 0, 0].long()
        first.classify = lambda features: [None, None, features]
        names = sorted(reader.DIGITS)
        x = bytes_of(5000, 3, 2, 2, top=10)
        found = datasets.modes(first, x, None)
        assert found["modes"] == len(x[:, :, 0, 0].unique(dim=0))
        assert 0 < found["kl"] < 0.2
        same = x[:1].repeat(50, 1, 1, 1)
        one = datasets.modes(first, same, None)
        assert one["modes"] == 1
        assert one["kl"] == pytest.approx(math.log(1000))
        first_pixels = x[:, :, 0, 0].tolist()
        asked = [" ".join(names[i] for i in pixels) for pixels in first_pixels]
        turned = [" ".join(a.split()[::-1]) for a in asked]
        told = datasets.obeyed(first, x, turned)
        same = [a.split()[0] == a.split()[2] for a in asked]
        n = {part: told[part]["n"] for part in told}
        assert n["seen"] + n["unseen"] == 5000
        shares = [told[part]["all three"] * n[part] for part in n]
        assert sum(shares) == pytest.approx(sum(same))
        assert {told[part]["green"] for part in told} == {1.0}


def test_the_pages_have_the_table_of_the_results():
    for page in report.PAGES:
        assert report.page_table(report.RESULTS, page) in (report.ROOT / page).read_text()
    assert "模型" in report.page_table(report.RESULTS, report.PAGES[1])


def test_headers_have_the_figures_of_the_results():
    quality = files.read(report.RESULTS / "quality.json")
    training = report.measured(files.read(report.RESULTS / "speed.json"), "training")
    seconds = {row["label"]: row["seconds"] * row["updates"] for row in training}
    for name in "vae gan diffusion flow vae-gan flow-gan diffusion-gan".split():
        fd, obeyed = (report.over_seeds(quality, name, figure) for figure in ("fd", "obeyed"))
        text = f"{seconds[name] / 60:.1f} minutes, FD {report.number(fd, 1)}, "
        text += f"{report.percent(obeyed, 0)} of texts obeyed"
        assert text in " ".join(models.script(name).__doc__.split())


def test_the_example_of_the_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.script("vae").main("--train --device cpu --width 8 --train-steps 1 --images 1".split())
    for page in report.PAGES:
        names, text = {}, (report.ROOT / page).read_text()
        exec(text.split("```python\n")[1].split("```")[0], names)
        assert names["x"].shape == (16, 1, 28, 28)
