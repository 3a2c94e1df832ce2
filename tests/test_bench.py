"""bench: figures against truth they must have, baselines that show copies, rows that are kept."""

import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import halves, refusal
from PIL import Image
from torch import nn

import prior
from bench import __main__ as bench
from bench import emoji, explore, files, likelihood, models, quality, reader, report
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
        folder = runs / f"{name}-1"
        files = f"--data {data} --out {folder}".split()
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
        real, same = torch.from_numpy(g.normal(size=(2, 400, 4)))
        good = quality.manifold_figures(real, same)
        assert 0.8 < good.pop("density") < 1.2 and min(good.values()) > 0.9
        collapsed = real[:5].repeat(80, 1) + 1e-3 * same
        bad = quality.manifold_figures(real, collapsed)
        assert bad["precision"] > 0.9 and bad["recall"] < 0.1 and bad["coverage"] < 0.2
        far = quality.manifold_figures(real, same + 50)
        assert max(far.values()) == 0
        twelve = real[:12].repeat(20, 1)
        repeated = quality.manifold_figures(twelve, twelve[:96])
        assert min(repeated[name] for name in ("precision", "recall", "coverage")) == 1

    def test_sharpness(self):
        x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        assert quality.sharpness(x) == 0
        x[0, 0, 4, 4] = 255
        assert quality.sharpness(x) == pytest.approx(8 / 36)

    def test_a_grid_shows_at_its_period(self):
        x = bytes_of(50, 3, 16, 16, top=40)
        assert quality.grid(x, 2) == pytest.approx(1, abs=0.1)
        columns = x.clone()
        columns[..., ::4] += 50  # and of period 2, by its harmonic
        assert quality.grid(columns, 4) > 5 and quality.grid(columns, 2) > 5
        rows = x.clone()
        rows[..., ::2, :] += 50
        assert quality.grid(rows, 2) > 5 and quality.grid(rows, 4) < 1.2

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

    def test_the_judge_reads_real_images_and_baselines_fail_where_they_should(self, judge):
        given = judge.baselines(20).values()
        real, replay = [judge.measure(*images) for images in given]
        assert list(real["agreement"].values()) == [1.0, 1.0] and real["obeyed"] == 1
        assert real["obeyed_by_chance"] < 0.9
        assert real["nearest"] == 1 and replay["nearest"] < 1e-6
        far = judge.measure(bytes_of(20, 1, 8, 8), judge.captions_test)
        same = judge.measure(judge.x, judge.captions)
        assert far["fd"] > 10 and abs(same["fd"]) < 0.1

    def test_obeyed_is_the_share_of_images_of_which_all_is_right(self, judge, monkeypatch):
        read = {"a": torch.tensor([1, 1, 0, torch.nan]), "b": torch.tensor([1.0, 0, 0, 1])}
        monkeypatch.setattr(judge.reader, "read", lambda *_: read)
        found = judge.obedience(judge.x[:4], judge.captions[:4])
        assert found["obeyed"] == 0.5
        assert found["agreement"] == {"a": pytest.approx(2 / 3), "b": 0.5}
        monkeypatch.undo()
        assert judge.obedience(judge.x[:4], ["none of these"] * 4)["obeyed"] is None

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
        assert matcher.matcher
        assert right > 0.9 and wrong < 0.2

    def test_half_of_the_rivals_are_the_nearest_captions(self):
        """Where one other caption fits better than its own, an image is wrong if it is a rival."""
        names = [f"cat {tone} skin" for tone in "abcdef"] + [f"word{i} of two" for i in range(40)]
        stub = SimpleNamespace(candidates=names, classifier=SimpleNamespace(out=lambda x: x))
        text = reader.Text(sorted({word for name in names for word in name.split()}), 8)
        for better in (3, 30):
            fit = torch.eye(len(names))[better].repeat(500, 1)
            fits = {46: fit, 500: torch.full((500, 500), 0.5)}  # of all captions, of its own
            match = lambda out, ids: fits[len(ids)]  # noqa: B023, E731
            stub.matcher = SimpleNamespace(text=text, match=match)
            right = reader.Reader.match(stub, torch.zeros(500, 3), names[:1] * 500, 11)
            truth = 0 if better == 3 else 1 - 5 / 40
            assert right.mean() == pytest.approx(truth, abs=0.06)

    def test_quality_reads_and_refuses(self, data, judge, monkeypatch, tmp_path, capsys):
        nine, one = tmp_path / "nine.npz", tmp_path / "one.npz"
        x, captions = judge.x[:9, 0].numpy(), judge.captions[:9]
        np.savez(nine, x=x, y=captions)
        monkeypatch.setattr(quality, "Judge", lambda path: judge)
        common = ["--data", str(data)]
        quality.main([str(nine), *common])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == 3 and rows[-1]["nearest"] < 1e-6
        np.savez(one, x=x[:1], y=captions[:1])
        with pytest.raises(ValueError, match="two or more"):
            quality.main([str(one), *common])


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
    noise, scales, latent_shape = 0.3, [0.3], (1, 4, 4)
    stacks = [SimpleNamespace(std=torch.ones(()))]

    def analyze(self, y):
        return [y]

    def add_noise(self, x):
        return x + self.noise * torch.randn_like(x)

    def clean(self, y, c):
        return y

    def factors(self, y, c):
        black, white = (torch.distributions.Normal(x, self.noise) for x in (-1, 1))
        p = 0.25 * black.log_prob(y).exp() + 0.75 * white.log_prob(y).exp()
        of_zero = 8 * math.log(2 * math.pi)  # of 16 values, which log N(z; 0, I) takes off
        return [(torch.zeros_like(y), p.log().flatten(1).sum(1) + of_zero)]


class Spread(Toy):
    """Each pixel is black, spread over its bin: the velocity of what it becomes with noise."""

    def velocity(self, z, t, c):
        middles = torch.linspace(-1, 1, 201, dtype=torch.double)[1::2]
        x = -1 + middles / 255
        eps = (z.double()[..., None] - (1 - t) * x) / t
        weight = (-0.5 * eps**2).softmax(-1)
        return (weight * (eps - x)).sum(-1).float()


class TestLikelihood:
    def test_a_bound_with_the_true_posterior_is_the_probability(self):
        torch.manual_seed(0)
        white = torch.rand(400, 1, 4, 4) < 0.75
        known = 255 * white.byte(), [""] * 400
        result = likelihood.measure(Mixture(), *known, known)
        share = white.float().mean().item()
        truth = -share * math.log2(0.75) - (1 - share) * math.log2(0.25)
        assert abs(result["bits_per_dim"] - truth) < 4 * result["standard_error"]
        assert (result["kind"], result["n"]) == ("bound", 400)

    def test_black_images_cost_nothing(self):
        x = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
        result = likelihood.measure(Spread(), x, [""] * 100, (torch.cat([x, 255 - x]), [""] * 200))
        assert (result["kind"], result["n"]) == ("bound", 100)
        assert abs(result["bits_per_dim"]) < 4 * result["standard_error"] + 0.01
        assert result["standard_error"] < 0.05

    def test_the_entropy_of_a_flows_noise(self):
        model = models.fresh("flow", (1, 20, 20), WORDS, width=8)
        scales = torch.full((1, 20, 20), model.noise)
        scales.view(-1)[:100] = model.coarse_noise  # one part of four
        truth = torch.distributions.Normal(0.0, scales).entropy().sum().item()
        assert likelihood.noise_entropy(model) == pytest.approx(truth, rel=1e-5)

    def test_importance_weights_find_the_integral_over_z(self, monkeypatch):
        torch.manual_seed(0)
        model = tiny("vae", latent=1)
        x = bytes_of(3, 1, 8, 8)
        monkeypatch.setattr(likelihood, "SAMPLES", 400)
        known = x, ["dark"] * 3
        result = likelihood.measure(model, *known, known)
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
        assert likelihood.measure(tiny("gan"), *known, known) is None


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

    def test_evaluations_are_counted(self):
        counts = {}
        for name in models.MODELS:
            for label, options in models.settings(name).items():
                counts[label] = models.cost(tiny(name), **options)["evaluations"]
        truth = {"vae": 1, "gan": 1, "vae-gan": 1, "flow": 2, "flow, guidance 1": 1}
        truth |= {"diffusion": 20, "diffusion, guidance 1": 10, "diffusion, 4 steps": 8}
        truth |= {"diffusion, ddpm, 20 steps": 40, "diffusion, 50 steps": 100}
        truth |= {"diffusion-gan": 4, "autoregressive": 64, "one-step": 1, "one-step, 4 steps": 4}
        assert truth.items() <= counts.items()

    def test_images_are_drawn_as_the_script_draws_them(self, run):
        model, checkpoint = models.load(run.folder)
        assert checkpoint["name"] == run.name
        captions, file = ["dark left", "bright right"], run.folder / "a.npz"
        x = models.draw(model, captions, 0)
        assert not torch.equal(x, models.draw(model, captions, 1))
        if run.name not in ("autoregressive", "one-step"):
            call = [*models.choice(run.name), *"--sample --images 2 --device cpu --out".split()]
            call += [str(run.folder), "--npz", str(file), *(f"--caption={c}" for c in captions)]
            models.script(run.name).main(call)
            assert np.array_equal(x.permute(0, 2, 3, 1), np.load(file)["x"])

    def test_minutes_are_those_of_the_log(self, tmp_path):
        tens = range(10, 201, 10)
        rows = [{"update": i, "seconds": 0.6 * i} for i in tens]
        rows[7]["seconds"] += 1000  # something else ran
        rows += [{"update": 200 + i, "seconds": 1.2 * i} for i in tens]  # resumed
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert models.minutes(tmp_path) == pytest.approx(6, rel=0.05)


class TestExplore:
    def test_a_run_of_each_model_gets_its_pictures(self, run, data, capsys):
        explore.main(f"{run.folder} --data {data} --images 4 --device cpu".split())
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        kinds = {"vae": "importance-weighted bound", "diffusion": "bound", "flow": "bound"}
        kinds |= {"flow-gan": "bound", "autoregressive": "exact"}
        assert last["model"] == run.name
        assert last.get("kind") == kinds.get(run.name)
        assert ("bits_per_dim" in last) == ("standard_error" in last) == (run.name in kinds)
        wanted = {"samples", "idea", "interpolation"}
        if run.name in ("diffusion", "one-step"):
            wanted.add("steps")
        if hasattr(models.network(run.name), "encode"):
            wanted.add("reconstruction")
        assert wanted == {path.stem for path in run.folder.glob("*.png")}


class TestBenchmark:
    def test_an_interrupted_call_goes_on(self, monkeypatch, data, tmp_path, capsys):
        calls = []
        measure, real = likelihood.measure, quality.Judge.likeness

        def counted(*given):
            calls.append(0)
            return real(*given)

        monkeypatch.setattr(bench, "Judge", lambda path: quality.Judge(path, 20, 16))
        monkeypatch.setattr(quality.Judge, "likeness", counted)
        sizes = "--quick --models vae flow --width 8 --batch-size 8 --train-steps 2".split()
        argv = [*sizes, "--device", "cpu", "--runs", str(tmp_path), "--data", str(data)]
        monkeypatch.setattr(likelihood, "measure", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.main(argv)
        assert len(calls) == 2 + 1  # baselines, and the first model
        flow, vae = checkpoints = sorted(tmp_path.glob("*/checkpoint.pt"))
        before = [path.stat().st_mtime_ns for path in checkpoints]
        monkeypatch.setattr(likelihood, "measure", measure)
        bench.main(argv)
        bench.main(argv)
        assert len(calls) == 3 + 2  # vae again, and flow
        assert before == [path.stat().st_mtime_ns for path in checkpoints]
        rows = files.read(tmp_path / "results/quality.json")["rows"]
        row = rows["vae"]["0"]
        assert list(rows)[2:] == ["vae", "flow"]
        assert row["parameters"] > 1000
        assert (row["updates"], row["n"], row["likelihood"]["n"]) == (2, 200, 20)
        assert "| [vae](/vae.py) | 1 |" in capsys.readouterr().out
        weights = torch.load(vae, weights_only=True)
        weights["ema"]["log_scale"] += 1
        torch.save(weights, vae)
        stage = shutil.copytree(tmp_path / "vae", tmp_path / "stage")
        stage = stage.rename(tmp_path / "vae/at-2")
        bench.main([*argv, "--models", "vae"])
        (stage.rename(tmp_path / "vae-1") / "checkpoint.pt").unlink()  # as if not yet written
        assert len(calls) == 5 + 2  # of other weights, and the copy
        bench.main([*argv, "--models", "vae", "--seeds", "1", "2"])
        assert len(calls) == 7 + 2
        results = files.read(tmp_path / "results/quality.json")
        assert "vae, update 2" in results["rows"]
        assert report.values(results, "vae", "likelihood")[1:] == [None, None]
        assert len(set(report.values(results, "vae", "fd"))) == 3
        files.write(tmp_path / "results/quality.json", {**results, "torch": "another"})
        for call in (argv, ["--models", "--out", str(tmp_path / "results")]):  # of the digits
            assert "another" in refusal(bench.main, call)

    def test_speed_is_timed_in_five_rounds(self, tmp_path):
        call = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-k", "[vae-eager-1"]
        call += ["--benchmark-json", str(tmp_path / "speed-vae.json")]
        subprocess.run(call, cwd=report.ROOT, check=True, capture_output=True)
        notes, machine = report.benchmarks(tmp_path)
        assert report.rates(notes).keys() == {"vae"} and len(notes[0]["rounds"]) >= 5
        assert 0 < notes[0]["share_of_ceiling"] < 1
        assert torch.__version__ in report.where(machine)
        subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=report.ROOT, check=True)

    def test_a_claim_holds_by_welchs_test_over_training_seeds(self):
        def rows(*values):
            return {str(seed): {"sharpness": value} for seed, value in enumerate(values)}

        blurred = rows(0.7, 0.72, 0.71)
        sharper, unsure = rows(1.0, 1.1, 1.05), rows(0.5, 0.7, 1.0)
        cases = [(rows(1.0), "one seed"), (sharper, "; holds"), (unsure, "does not hold")]
        for gan, told in [*cases, (rows(0.1, 0.11, 0.12), "the reverse holds")]:
            quality = {"rows": {"gan": gan, "vae": blurred}}
            text = report.claims_table(quality, [])
            assert "a GAN is sharper than a VAE | sharpness | gan: " in text
            assert text.endswith(f"{told} |")
        times = {"mode": "eager", "batch": 64, "rounds": [0.1, 0.11, 0.1]}
        notes = [{**times, "label": label} for label in ("one-step", "diffusion")]
        assert "one jump is faster than ten steps" in report.claims_table({}, notes)

    def test_pages_and_tables(self, tmp_path, monkeypatch):
        row = {"fd": 5.0, "recall": 0.5, "obeyed": 0.5, "sharpness": 1.0, "commit": "abc"}
        bits = {"bits_per_dim": 1.234, "kind": "bound", "standard_error": 0.1, "n": 9}
        flow = {**row, "evaluations": 2, "updates": 9, "likelihood": bits, "minutes": 12.3}
        shorter = {**flow, "updates": 3, "fd": 99.0}
        seeds = {"0": flow, "1": {**flow, "fd": 7.0, "device": "b"}, "2": shorter}
        step = {"0": {**flow, "likelihood": None, "fd": 6.0}}
        rows = {"real, held out": {"0": row}, "flow": seeds, "diffusion, 4 steps": step}
        rows |= {"diffusion": step, "one-step": step}  # whose minutes are both's
        out = tmp_path / "bench/results"
        (out / "emoji").mkdir(parents=True)
        here = {"device": "a card", "torch": "2.13", "rows": rows}
        files.write(out / "quality.json", here)
        files.write(out / "emoji/quality.json", here)
        note = {"label": "flow", "mode": "eager", "images_per_s": 1234.5, "batch": 16}
        note |= {"seconds": 0.0123, "gflop_per_image": 0.04, "share_of_ceiling": 0.2}
        one, compiled = {**note, "images_per_s": 90, "batch": 1}, {**note, "mode": "compiled"}
        notes = [one, note, compiled, {**note, "label": "diffusion, 50 steps"}]
        speed = {"machine_info": here, "benchmarks": [{"extra_info": note} for note in notes]}
        files.write(out / "speed-flow.json", speed)
        old = "above\n<!-- table -->\n| 模型 |\n|---|\nold\n<!-- /table -->\nbelow\n"
        (tmp_path / "README.md").write_text(old)
        (out / "emoji/samples.png").touch()
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", out)
        report.main()
        readme = (tmp_path / "README.md").read_text()
        cells = "| [flow](/flow.py) | 2 | 1,234 | 6.0 ± 1.4 | 50 ± 0% | 1.23 (bound) | 12.3 |"
        assert readme.startswith("above\n<!-- table -->\n| 模型 |\n|---|\n| real, held out |")
        assert f"\n{cells}\n" in readme and "| 24.6 |\n<!-- /table -->\nbelow\n" in readme
        page = (tmp_path / "bench/RESULTS.md").read_text()
        assert "| diffusion, 4 steps | 2 | 6.0 | 0.50 | 50% | - |" in page
        assert "| flow | 0.040 | 1,234 | 0.20 | 1,234 | 0.20 | 12.3 | - |" in page
        assert "| flow | - | - | - | - | - | 6.0 ± 1.4 | 50 ± 0% |" in page
        assert "| flow | 1.234 | 0.100 | bound | 9 |" in page and "50 steps" not in page
        assert "Measured on a card and b with torch 2.13, commit abc." in page
        assert "(results/emoji/samples.png)" in page and "older networks (" not in page
        assert all(line.count("|") <= 9 for line in page.splitlines())
        assert {"quality_speed", "quality_minutes"} <= {path.stem for path in out.glob("*.png")}
        assert "a \\| b" in files.table(["head"], [["a | b"]])


class TestEmoji:
    def test_they_are_cut_from_the_sheets_and_named_with_their_tones(self, tmp_path):
        """A package like emoji-datasource, of a fox, a hand of five tones, and 25 couples."""
        places = iter(range(100))

        def form(**more):
            place = next(places)
            return {"sheet_x": place % 4, "sheet_y": place // 4, "has_img_google": True, **more}

        tones = list(emoji.TONES)
        hand = form(name="hand", skin_variations={tone: form() for tone in tones})
        fox, none = form(name="RED FOX"), form(name="none", has_img_google=False)
        couples = {f"{a}-{b}": form() for a in tones for b in tones}
        entries = [fox, none, hand, form(name="KISS", skin_variations=couples)]
        sheet = np.zeros((34 * 9, 34 * 4, 4), np.uint8)
        sheet[43:60, 77:94] = 200, 0, 0, 255
        picture, text = io.BytesIO(), json.dumps(entries).encode()
        Image.fromarray(sheet).save(picture, "png")
        content = {"emoji.json": text, "img/google/sheets/32.png": picture.getvalue()}
        with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as tar:
            for name, part in content.items():
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
        call = tmp_path / "emoji.tgz", tmp_path / "e.npz", "--vendors", "google"
        emoji.main([str(part) for part in call])
        data = np.load(tmp_path / "e.npz")
        assert (len(data["y"]), len(data["y_test"])) == (30, 3)
        y = [*data["y"].tolist(), *data["y_test"].tolist()]
        assert {"hand", "hand light skin", "kiss light skin and dark skin"} <= set(y)
        fox = data["x"][y.index("red fox")]
        assert set(fox[0, 0]) == {255}  # transparent
        red = np.argwhere((fox == [200, 0, 0]).all(2))
        assert (len(red), red.min(), red.max()) == (17 * 17, 8, 24)


def test_the_pages_have_the_tables_of_the_results():
    for name in report.PAGES:
        text = (report.ROOT / name).read_text()
        assert "| [vae](/vae.py) |" in text and report.page(text, report.RESULTS) == text
    assert report.results(report.RESULTS) == (report.ROOT / "bench/RESULTS.md").read_text()


def test_headers_have_the_figures_of_the_results():
    quality = files.read(report.RESULTS / "quality.json")
    for name in "vae gan diffusion flow vae-gan flow-gan diffusion-gan".split():
        fd, obeyed = report.figures(quality, name, "fd", "obeyed")
        minutes = report.seeds(quality, name)[0]["minutes"]
        text = f"{minutes:.1f} minutes, FD {fd}, {obeyed} of texts obeyed"
        assert text in " ".join(models.script(name).__doc__.split())


def test_the_example_of_the_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.script("vae").main("--train --device cpu --width 8 --train-steps 1 --images 1".split())
    for page in report.PAGES:
        names, text = {}, (report.ROOT / page).read_text()
        exec(text.split("```python\n")[1].split("```")[0], names)
        assert names["x"].shape == (16, 1, 28, 28)
