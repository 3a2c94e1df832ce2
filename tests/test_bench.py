"""bench: figures against truth they must have, baselines that must fail, rows that are kept."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from scipy import stats

import prior
from bench import autoregressive, claims, correct, datasets, models, quality, report, throughput


def test_frechet_distance_of_known_normals():
    """|mu1 - mu2|^2 + sum of (s1 - s2)^2 for independent coordinates."""
    g = np.random.default_rng(0)
    a = g.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5]
    b = g.normal(size=(200_000, 3)) * [1.5, 2.0, 0.25] + [1.0, 0.0, -2.0]
    truth = 5.0 + 0.5**2 + 0.25**2
    assert quality.frechet_distance(a, b) == pytest.approx(truth, rel=0.02)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_manifold_figures_see_collapse_and_strangers():
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


def test_attributes_are_places_in_the_caption_or_the_caption():
    assert quality.attributes(["a b", "c d"]) == [["a", "c"], ["b", "d"]]
    assert quality.attributes(["a b", "c"]) == [["a b", "c"]]
    assert quality.attributes(["", ""]) == [["", ""]]
    assert quality.attributes(["x", "a b"], 2) == [["", "a"], ["", "b"]]


def test_sharpness_and_diversity():
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert quality.sharpness(x) == 0
    x[0, 0, 4, 4] = 255
    assert quality.sharpness(x) == pytest.approx(8 / 36)
    features = torch.tensor([[0.0], [1.0], [10.0], [10.0], [5.0]])
    assert quality.diversity(features, ["a", "a", "b", "b", "c"]) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge of the bright and dark halves that conftest's data has, on more images."""
    g = np.random.default_rng(0)
    x = g.integers(0, 60, (200, 8, 8), np.uint8)
    y = []
    for i in range(200):
        half, light = ("left", "right")[i % 2], ("bright", "dark")[i // 2 % 2]
        x[i, :, 4 * (i % 2) : 4 * (i % 2) + 4] += np.uint8(180 if light == "bright" else 80)
        y.append(f"{light} {half}")
    path = tmp_path_factory.mktemp("judge") / "data.npz"
    np.savez(path, x=x, y=np.array(y))
    return quality.Judge(str(path), steps=60, batch_size=32)


def test_the_judge_reads_real_images_and_baselines_fail_where_they_should(judge):
    rows = {name: judge.measure(*images) for name, images in judge.baselines(20).items()}
    real, replay, one = rows.values()
    assert list(real["agreement"].values()) == [1.0, 1.0]
    assert min(real["shuffled"].values()) < 0.9  # all held-out images are "left"
    assert real["nearest"] == 1 and replay["nearest"] == 0
    assert one["diversity"] == 0 and 0.5 < real["diversity"] < 1.5
    assert all(np.isfinite(value) for key, value in real.items() if not isinstance(value, dict))
    noise = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    far = judge.measure(noise, judge.captions_test[:20])
    same = judge.measure(judge.x, judge.captions)
    assert far["fld"] > 10 and abs(same["fld"]) < 0.1


def test_independent_pixels_keep_each_captions_marginals(judge):
    x, captions = claims.independent_pixels(judge, 2000)
    for caption in set(captions):
        drawn = x[[text == caption for text in captions]].float()
        truth = judge.x[[text == caption for text in judge.captions]].float()
        assert (drawn.mean(0) - truth.mean(0)).abs().max() < 12
        columns = drawn[:, 0, 2, 2:4]
        assert abs(np.corrcoef(columns.T.numpy())[0, 1]) < 0.2


def test_claims_about_normals_hold_and_their_figures_are_right():
    for claim in (claims.normal_sums, claims.normal_against_uniform):
        assert claim()["verdict"] == "yes"
    kl = claims.analytic_kl()
    assert kl["verdict"] == "yes"
    assert abs(kl["figures"]["mean"] - kl["figures"]["exact"]) < 4 * kl["figures"]["standard_error"]
    gradients = claims.gradient_variance()
    assert gradients["figures"]["reparameterized"][1] == pytest.approx(4, rel=0.05)


def test_rows_are_written_one_by_one_and_kept(tmp_path):
    from bench.__main__ import Rows

    calls, path, cpu = [], tmp_path / "r.json", torch.device("cpu")
    for updates in (5, 5, 6):  # a run that was trained on is measured again
        rows = Rows(path, cpu, lambda text: None)
        rows.add("a", lambda: calls.append("a") or {"value": 1}, updates=updates)
    assert calls == ["a", "a"]
    row = json.loads(path.read_text())["rows"]["a"]
    assert (row["value"], row["updates"]) == (1, 6) and row["commit"]
    report.write(path, {**report.read(path), "device": "another"})
    with pytest.raises(SystemExit):
        Rows(path, cpu, lambda text: None)


def test_a_finished_run_is_taken_if_it_is_as_long_as_asked(monkeypatch, tmp_path):
    from bench import __main__ as bench

    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/checkpoint.pt").touch()
    run = {"config": {"train_steps": 100}, "k": 100}
    monkeypatch.setattr(models.script("vae"), "load", lambda path: run)
    monkeypatch.setattr(models, "train", lambda *given: pytest.fail("trained again"))
    speed = {"vae": {"training": {"train_steps": 100, "seconds": 0.01}}}
    for steps, seconds, taken in (
        (100, None, True), (110, None, False), (500, 1.1, True), (500, 2.0, False),
    ):  # fmt: skip
        speed["vae"]["training"]["train_steps"] = steps
        if taken:
            bench.train_all(["vae"], tmp_path, speed, seconds, print)
        else:
            with pytest.raises(SystemExit):
                bench.train_all(["vae"], tmp_path, speed, seconds, print)


def test_a_sampler_is_timed_in_the_dtype_asked_for():
    model = models.build("gan", (1, 8, 8), 14, "cpu", width=32, embedding=16)
    dtypes = None, torch.float32, torch.bfloat16
    default, fp32, bf16 = (throughput.sampler(model, 3, dtype=dtype)() for dtype in dtypes)
    assert torch.equal(default, fp32) or torch.equal(default, bf16)
    assert 0 < (fp32 - bf16).abs().max() < 0.1


@pytest.mark.parametrize("flags", ["--width 40", "--batch-size 0", "--shape 1 8 6", "--seconds -1"])
def test_throughput_refuses_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["vae", *flags.split()])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_disturbed_row_is_timed_again_and_said_to_be(monkeypatch):
    guard = throughput.Guard(torch.device("cpu"))
    ceilings = iter([1.0, 0.5, 1.0, 1.0])
    monkeypatch.setattr(throughput, "ceilings", lambda device: {"matmul_tflops": next(ceilings)})
    times = iter([[9.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    monkeypatch.setattr(throughput, "seconds", lambda call, device, repeats: next(times))
    assert guard.time(None, 3) == {"seconds": 1.0, "scatter": 0.0, "disturbed": False}
    ceilings, times = iter([1.0, 0.1] * 4), iter([[4.0], [2.0], [3.0], [5.0]])
    monkeypatch.setattr(throughput, "ceilings", lambda device: {"matmul_tflops": next(ceilings)})
    monkeypatch.setattr(throughput, "seconds", lambda call, device, repeats: next(times))
    assert guard.time(None, 1) == {"seconds": 2.0, "scatter": 0.0, "disturbed": True}


def test_bytes_and_profile_of_a_call():
    a, b = torch.zeros(64, 32), torch.zeros(32, 16)
    needed = 4 * (64 * 32 + 32 * 16 + 64 * 16) / 1e6
    assert throughput.megabytes(lambda: (a @ b).view(-1)) == pytest.approx(needed)
    seen = throughput.profile(lambda: [a @ b for _ in range(10)], torch.device("cpu"), 60)
    assert "aten::mm" in seen["shares"] and 0.9 < seen["idle"] < 1


@pytest.mark.parametrize("name", models.SCRIPTS)
def test_evaluations_are_what_sampling_calls(name):
    """Counted by a hook on the network that each image passes through."""
    model = models.build(name, (1, 8, 8), 4, "cpu", width=32, embedding=16)
    if name == "diffusion":  # guidance 1.5: one call with the batch twice counts twice
        model.cfg = models.replace(model.cfg, sampler="heun", steps=3)
    networks = {"vae": "decoder", "flow": "last", "gan": "generator", "diffusion": "net"}
    networks |= {"vae-gan": "decoder", "flow-gan": "flow.last", "diffusion-gan": "net"}
    networks["autoregressive"] = "norm"
    network, rows = model.get_submodule(networks[name]), []
    if name.startswith("flow"):
        inverse = network.inverse
        network.inverse = lambda *a: rows.append(len(a[0])) or inverse(*a)
    else:
        network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    call = throughput.sampler(model, 2)
    call()
    assert sum(rows) / 2 == models.evaluations(model)


@pytest.mark.parametrize("name", models.SCRIPTS)
def test_every_model_builds_and_samples_as_its_script_does(name):
    model = models.build(name, (1, 8, 8), 4, "cpu", width=32, embedding=16)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    run = {"vocabulary": ["bright", "dark", "left", "right"]}
    captions = models.cycle(["bright left", "dark"], 5)
    x = models.samples(model, run, captions, 3)
    assert x.shape == (5, 1, 8, 8) and x.dtype == torch.uint8
    again = models.samples(model, run, captions, 3, batch=2)
    assert (x.int() - again.int()).abs().float().mean() < 0.5
    assert not torch.equal(x, models.samples(model, run, captions, 4))


def test_a_table_and_its_claims_from_nothing_but_models(judge, tmp_path):
    from bench import __main__ as bench

    loaded = {}
    for name in ("vae", "flow", "diffusion", "vae-gan"):
        options = {"steps": 2} if name == "diffusion" else {}
        model = models.build(name, (1, 8, 8), 4, "cpu", width=32, embedding=16, **options)
        loaded[name] = model, {"vocabulary": ["bright", "dark", "left", "right"], "k": 7}
    rows = bench.Rows(tmp_path / "quality.json", torch.device("cpu"), print)
    bench.quality(rows, judge, loaded, quick=True)
    scores = rows.data["rows"]
    guided = "diffusion dpm, 20, guidance 1.5"
    assert {"vae", "flow", "vae-gan", "diffusion dpm, 4", guided, "real, held out"} <= scores.keys()
    assert (scores[guided]["evaluations"], scores["diffusion dpm, 20"]["evaluations"]) == (40, 20)
    assert scores[guided]["bits_per_dim"] is None
    assert scores["diffusion dpm, 20"]["bits_per_dim"]["kind"] == "ODE estimate"
    assert scores["flow"]["bits_per_dim"]["kind"] == "dequantized bound"
    assert scores["vae"]["updates"] == 7 and scores["vae-gan"]["bits_per_dim"] is None
    rates = {"vae": 1000.0, "diffusion dpm, 20": 10.0, "diffusion dpm, 4": 50.0}
    truth = bench.Rows(tmp_path / "claims.json", torch.device("cpu"), print)
    bench.all_claims(truth, judge, scores, rates, loaded, tmp_path)
    verdicts = {name: row["verdict"] for name, row in truth.data["rows"].items()}
    assert verdicts["exact"] == verdicts["many right images"] == "yes"
    assert verdicts["hybrids"] in ("no", "in part", "yes")
    assert verdicts["diffusion"] in ("in part", "yes")  # slow, whatever else
    # the fresh head of a VAE says N(0, I) whatever the image; nothing tells a fresh flow to
    assert (verdicts["code, vae"], verdicts["code, flow"]) == ("yes", "no")


class TestAutoregressive:
    def tiny(self):
        torch.manual_seed(0)
        cfg = autoregressive.Config(width=32, embedding=16, layers=2)
        model = autoregressive.GPT(cfg, (2, 3, 3), 3).eval().requires_grad_(False)
        torch.nn.init.normal_(model.head.weight, std=0.5)
        return model

    def test_each_value_depends_on_those_before_alone(self):
        model, c = self.tiny(), torch.randn(1, 16)
        values = torch.randint(0, 256, (1, 18))
        before = model.logits(values, c)
        for i in (0, 7, 17):
            other = values.clone()
            other[0, i] = (other[0, i] + 100) % 256
            same = (model.logits(other, c) == before).all(2)[0]
            assert same[: i + 1].all() and not same[i + 1 :].any()

    def test_cached_sampling_draws_from_the_model(self):
        model, seeds = self.tiny(), torch.arange(3)
        z, c = prior.normal(seeds, (2, 3, 3)), torch.randn(3, 16)
        x = model.sample(z, c)
        values = ((x + 1) * 127.5).round().long().flatten(1)
        p = model.logits(values, c).softmax(2)
        upper = p.cumsum(2).gather(2, values[..., None])[..., 0]
        lower = upper - p.gather(2, values[..., None])[..., 0]
        u = torch.special.ndtr(z.flatten(1))
        assert (lower - 1e-5 <= u).all() and (u <= upper + 1e-5).all()
        assert torch.equal(model.sample(model.encode(x, c), c), x)

    def test_bits_are_the_cross_entropy_and_sum_to_one(self):
        model, c = self.tiny(), torch.randn(256, 16)[:1].expand(256, -1)
        x = torch.zeros(256, 2, 3, 3)
        x.view(256, -1)[:, -1] = torch.arange(256) / 127.5 - 1  # all values of the last one
        bits = model.bits_per_dim(x, c, None) * 18
        first = model.nats(x, c)[0, :-1].sum() / np.log(2)
        assert (2 ** -(bits - first)).sum().item() == pytest.approx(1, abs=1e-3)


def test_tables_are_made_of_result_files(tmp_path):
    spread = {"mean": 0.5, "std": 0.1}
    row = {"agreement": {"digit": spread}, "bits_per_dim": None, "n": 20}
    row |= {k: spread for k in "fld precision recall density coverage sharpness nearest".split()}
    report.write(tmp_path / "quality.json", {"rows": {"vae": {**row, "diversity": spread}}})
    assert "| vae | 50.0 ± 10.0% | 0.5 ± 0.1 |" in report.quality_table(tmp_path)
    assert "a \\| b" in report.table(["head"], [["a | b"]])
    assert report.read(tmp_path / "none.json") == {}
    assert report.gpu_table(tmp_path).startswith("Not measured yet")
    timed = {"name": "vae", "mode": "graph", "dtype": "bf16", "evaluations": 1, "latency": 1e-4}
    timed |= {"images_per_s": 1e6, "gflops_per_image": 0.1, "parameters": 2e6, "bound": "memory"}
    timed |= {"megabytes_per_image": 3.0, "share_of_ceiling": 0.4, "peak_memory_mb": 700.0}
    (tmp_path / "gpu").mkdir()
    card = {"device": "a card", "torch": "2.13"}
    speed = {**card, "sampling": [timed], "training": None}
    report.write(tmp_path / "gpu/throughput-vae.json", speed)
    checked = {"compiled": {"mean": 0.001, "largest": 1.0, "right": True}}
    report.write(tmp_path / "gpu/correct-vae.json", {**card, "rows": checked})
    trained = {"training": {"seconds": 0.5}, "sampling": [timed]}
    report.write(tmp_path / "gpu/training-vae.json", {**card, "rows": {"vae": trained}})
    row |= {"diversity": spread, "updates": 40, "evaluations": 1, "parameters": 2e6}
    report.write(tmp_path / "gpu/quality-vae.json", {**card, "rows": {"vae": row}})
    assert "a card, torch 2.13:" in report.gpu_table(tmp_path)
    line = "| vae | graph, bf16 | 1 | 1000000 | 0.1 | 0.100 | 3.0 | memory | 40% | 700 | 2.00 |"
    assert line in report.gpu_table(tmp_path)
    assert "| vae | compiled | 0.001 | 1.0 | yes |" in report.gpu_table(tmp_path)
    assert report.gpu_table(tmp_path).endswith("| 0.50 ± 0.10 | - | 2.00 | 20 | 1 |")
    report.write(tmp_path / "throughput.json", {"rows": {"vae": trained}})
    report.write(tmp_path / "quality.json", {"rows": {"vae": row}})
    assert report.quality_table(tmp_path).endswith("| - | 2.00 | 20 | 1 |")
    found = {"modes": {"mean": 998.0, "std": 1.0}, "kl": {"mean": 0.1, "std": 0.01}}
    report.write(tmp_path / "stacked.json", {"rows": {"gan": found}})
    assert "| gan | 998 ± 1 | 0.100 ± 0.010 |" in report.stacked_table(tmp_path)
    agreement = {"agreement": {"digit": spread, "weight": spread, "slant": spread}}
    report.write(tmp_path / "unseen.json", {"rows": {"vae, left out": agreement}})
    assert "| vae | left out | 50.0 ± 10.0% |" in report.unseen_table(tmp_path)
    assert stats.norm.cdf(0) == 0.5


def test_modes_of_stacked_digits(monkeypatch):
    """Images whose three channels are real digits: as many modes as there are different triples."""
    digits = quality.Judge(steps=200)
    pick = (prior.uniform(torch.arange(1000), (3,)) * len(digits.x)).long()
    x = digits.x[pick, 0]
    names = [caption.split()[2] for caption in digits.captions]
    truth = {tuple(names[i] for i in row) for row in pick.tolist()}
    found = datasets.modes(digits, x)
    assert abs(found["modes"] - len(truth)) < 0.05 * len(truth)
    one = datasets.modes(digits, x[:1].expand(50, -1, -1, -1))
    assert one["modes"] == 1 and one["kl"] == pytest.approx(np.log(1000))


def test_data_of_stacked_and_unseen_captions():
    data = datasets.stacked(50)
    assert data["x"].shape == (50, 28, 28, 3) and set(data["y"]) == {""}
    data = datasets.unseen()
    assert not set(datasets.UNSEEN) & set(data["y"])
    assert set(datasets.UNSEEN) < set(data["y_test"])
    assert len(set(data["y"])) == 37 and len(data["x"]) == len(data["y"]) < 4500


@pytest.mark.parametrize("part", ["speed", "correct", "flow"])
def test_gpu_parts_run_at_tiny_size(part, data, tmp_path):
    out = tmp_path / "results"
    env = {**os.environ, "TINY": "1", "DATA": str(data), "CUDA_VISIBLE_DEVICES": ""}
    call = ["bash", "bench/gpu.sh", part, str(out)]
    subprocess.run(call, cwd=report.ROOT, env=env, check=True, capture_output=True)
    files = {path.name for path in out.iterdir()}
    if part == "speed":
        assert files == {"throughput-flow.json", "throughput-autoregressive.json"}
        for name in files:
            rows = json.loads((out / name).read_text())["sampling"]
            assert rows and all(row["images_per_s"] > 0 for row in rows)
    elif part == "correct":
        assert files == {"correct-flow.json"}
        rows = json.loads((out / "correct-flow.json").read_text())["rows"]
        assert rows.keys() == {"compiled", "there and back"}
        assert all(row["right"] for row in rows.values())
    else:
        assert files == {"quality-flow.json", "training-flow.json", "samples-flow.png"}
        row = json.loads((out / "quality-flow.json").read_text())["rows"]["flow"]
        assert row["updates"] == 20 and row["bits_per_dim"]["kind"] == "dequantized bound"


def test_a_wrong_fast_way_is_seen(monkeypatch):
    model = models.build("vae", (1, 8, 8), 4, "cpu", width=32, embedding=16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    run, script = {"vocabulary": ["bright"], "captions": ["bright"]}, models.script("vae")
    monkeypatch.setattr(script, "compile_parts", lambda model: None)
    assert all(row["right"] for row in correct.check(model, run, 4).values())
    monkeypatch.setattr(script, "compile_parts", lambda model: model.decoder.head.weight.mul_(2))
    rows = correct.check(model, run, 4)
    assert not rows["compiled"]["right"] and not rows["compiled bf16"]["right"]
    assert rows["bf16"]["right"]


def test_an_interrupted_call_goes_on(monkeypatch, data, tmp_path):
    from bench import __main__ as bench

    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.1)
    call = ["--quick", "--models", "vae", "--runs", str(tmp_path), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "quality", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.main([*call, "--data", str(data)])
    paths = [tmp_path / name for name in ("results/throughput.json", "vae/checkpoint.pt")]
    before = [path.stat().st_mtime_ns for path in paths]
    bench.main([*call, "--data", str(data)])
    assert before == [path.stat().st_mtime_ns for path in paths]
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"throughput.json", "quality.json", "samples.png", "quality_speed.png"}
    with pytest.raises(SystemExit):  # its figures are of other data
        bench.main(call)
