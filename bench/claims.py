"""What textbooks say of these models, each statement beside a measurement that may refute it.

Each function below takes what was measured or trained and returns the claim, the figures behind the
verdict, one line that tells them, and the verdict, which is computed from the figures: "yes", "no",
or "in part". `python -m bench` calls them all.
"""

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import prior
from bench import models
from bench.quality import frechet_distance
from bench.report import number
from diffusion import to_words


def row(claim, measured, verdict, **figures):
    if isinstance(verdict, (bool, np.bool_)):
        verdict = "yes" if verdict else "no"
    return {"claim": claim, "measured": measured, "verdict": verdict, "figures": figures}


def below(a, b):
    """Is figure a under figure b by more than both spread?"""
    return a["mean"] + a["std"] < b["mean"] - b["std"]


# ------------------------------------------------------------------- of the latent, without data


def normal_sums():
    """The central-limit argument: sums of independent factors tend to a normal."""
    seeds = torch.arange(200_000)
    u = (prior.uniform(seeds, (32,)) - 0.5) * 12**0.5
    distance = {
        n: float(stats.kstest((u[:, :n].sum(1) / n**0.5).double().numpy(), "norm").statistic)
        for n in (1, 2, 4, 8, 16, 32)
    }
    line = ", ".join(f"{n}: {d:.4f}" for n, d in distance.items())
    claim = "sums of many independent factors tend to a normal (why nature's codes may be normal)"
    falling = all(distance[a] > distance[b] for a, b in ((1, 2), (2, 4), (4, 8)))
    verdict = falling and distance[32] < 0.005
    return row(claim, f"Kolmogorov-Smirnov distance of n uniform ones' sum: {line}", verdict,
               distance=distance)  # fmt: skip


def normal_against_uniform():
    """Mixing two draws of a normal prior gives a draw of it; of a uniform one it does not."""
    seeds, share = torch.arange(200_000), {}
    z = prior.normal(seeds, (2,)).double()
    u = (prior.uniform(seeds, (2,), 1).double() - 0.5) * 12**0.5
    uniform = stats.uniform(-(3**0.5), 12**0.5)
    for name, v, cdf in (("normal", z, "norm"), ("uniform", u, uniform.cdf)):
        mixed = (v[:, 0] + v[:, 1]) / 2**0.5
        share[name] = float(stats.kstest(mixed.numpy(), cdf).statistic)
    line = f"distance of (z0 + z1) / sqrt(2) to its prior: normal {share['normal']:.4f}, "
    line += f"uniform {share['uniform']:.4f}"
    verdict = share["normal"] < 0.005 < 0.02 < share["uniform"]
    return row("a normal prior stays itself under rotations and mixing, a uniform one does not",
               line, verdict, **share)  # fmt: skip


def analytic_kl():
    """The closed form against its Monte Carlo estimate: same mean, no variance, less time."""
    seeds = torch.arange(2000)
    mu = 0.7 * prior.normal(seeds[:1], (64,))[0]
    log_var = -prior.normal(seeds[:1], (64,), 1)[0].abs()
    exact = prior.kl(mu, log_var).sum().item()
    eps = prior.normal(seeds, (64,), 2)
    z = prior.reparameterize(mu.expand_as(eps), log_var.expand_as(eps), eps)
    estimates = (prior.log_prob(eps) - 0.5 * log_var.sum() - prior.log_prob(z)).double()
    error = (estimates.std() / len(estimates) ** 0.5).item()
    times = []
    calls = (lambda: prior.kl(mu, log_var).sum(), lambda: prior.log_prob(eps) - prior.log_prob(z))
    for call in calls:
        call()
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) / 100)
    agree = abs(estimates.mean().item() - exact) < 4 * error
    line = f"closed form {exact:.3f} nats; 2,000 draws {estimates.mean():.3f} ± {error:.3f}, "
    line += f"one draw scatters by {estimates.std():.2f}, and 2,000 take "
    line += f"{times[1] / times[0]:.0f} times as long"
    return row("the KL to N(0, I) has a closed form, exact and free of noise", line, agree,
               exact=exact, mean=estimates.mean().item(), standard_error=error,
               scatter=estimates.std().item(), seconds=times)  # fmt: skip


def gradient_variance():
    """d/dmu E f(z), f(z) = |z - 1|^2, by reparameterization and by the score function."""
    n, d = 20_000, 16
    eps = prior.normal(torch.arange(n), (d,)).double()
    z = 0.5 + eps  # mu = 0.5, sigma = 1: the truth is 2 (mu - 1) = -1
    f = (z - 1).square().sum(1, keepdim=True)
    path, score = 2 * (z - 1), f * eps
    figures = {name: (g.mean().item(), g.var(0).mean().item()) for name, g in
               (("reparameterized", path), ("score function", score))}  # fmt: skip
    ratio = figures["score function"][1] / figures["reparameterized"][1]
    right = all(abs(mean + 1) < 0.1 for mean, _ in figures.values())
    line = f"{'both have' if right else 'not both have'} the right mean; "
    line += f"the score function's variance is {ratio:.0f} times as large"
    claim = "reparameterization carries gradients with little variance"
    return row(claim, line, right and ratio > 5, **figures)


# --------------------------------------------------------------------------- of data and samples


def independent_pixels(judge, n):
    """Each pixel drawn from its caption's marginal, independently of the others."""
    captions = models.cycle(judge.captions_test, n)
    rows = {caption: [] for caption in captions}
    for i, caption in enumerate(judge.captions):
        if caption in rows:
            rows[caption].append(i)
    pick = prior.uniform(prior.fold_in(7, torch.arange(n)), tuple(judge.x.shape[1:]))
    images = []
    for u, caption in zip(pick, captions):
        pool = judge.x[rows[caption] or slice(None)]
        images.append(pool.gather(0, (u * len(pool)).long()[None])[0])
    return torch.stack(images), captions


def pixels_are_dependent(quality):
    pixels, real = (quality[name] for name in ("independent pixels", "real, held out"))
    line = f"drawn pixel by pixel: FLD {pixels['fld']['mean']:.0f}, sharpness "
    line += f"{pixels['sharpness']['mean']:.1f}; real images: {real['fld']['mean']:.0f} and 1"
    verdict = pixels["fld"]["mean"] > 3 * real["fld"]["mean"]
    return row("pixels must not be drawn independently", line, verdict)


def many_right_images(quality):
    one = quality["one image a caption"]
    known = {*models.SCRIPTS, "diffusion dpm, 20"}
    fld = {name: row["fld"]["mean"] for name, row in quality.items() if name in known}
    best, real = min(fld, key=fld.get), quality["real, held out"]
    line = f"one image a caption covers {100 * one['coverage']['mean']:.0f}% of the training "
    line += f"images, real ones {100 * real['coverage']['mean']:.0f}%; {best} has "
    line += f"{quality[best]['diversity']['mean']:.2f} of the real diversity within a caption"
    verdict = one["coverage"]["mean"] < 0.5 * real["coverage"]["mean"]
    return row("a text has many right images, so the answer is a distribution", line, verdict)


def autoregression_is_slow(speed):
    rates = {name: speed[name] for name in ("autoregressive", "vae", "flow", "gan")}
    line = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()) + " images/s"
    slowest = min(rate for name, rate in rates.items() if name != "autoregressive")
    return row("pixel by pixel is far too slow", line, slowest > 10 * rates["autoregressive"])


def vae_is_blurry(quality):
    sharp = {name: quality[name]["sharpness"]["mean"] for name in ("vae", "gan", "flow")}
    line = "Laplacian over real images': " + ", ".join(f"{k} {v:.2f}" for k, v in sharp.items())
    others = [value for name, value in sharp.items() if name != "vae"]
    return row("VAE samples are blurry", line, sharp["vae"] < 0.85 * min(others))


def gan_is_one_shot_and_sharp(quality, speed):
    """As sharp as real images, and as fast as any other that was timed."""
    sharp, rest = quality["gan"]["sharpness"]["mean"], set(speed) - {"gan"}
    fastest = max(rest, key=speed.get) if rest else "gan"
    line = f"sharpness {sharp:.2f} (real images: 1); {speed['gan']:.3g} images/s with one "
    line += f"evaluation, the fastest other, {fastest}, {speed[fastest]:.3g}"
    fast = speed["gan"] > 0.8 * speed[fastest]
    return row("a GAN is one-shot and sharp", line, fast and abs(sharp - 1) < 0.15)


def diffusion_is_best_and_slow(quality, speed):
    """At guidance 1, as all others; 20 steps."""
    fld = {name: row["fld"] for name, row in quality.items()
           if name in models.SCRIPTS and name != "autoregressive"}  # fmt: skip
    ours, other = quality["diffusion dpm, 20"]["fld"], min(fld, key=lambda name: fld[name]["mean"])
    curve = {name: speed[name] for name in quality if "dpm" in name and name in speed}
    line = f"FLD of the best other, {other}: {number(fld[other], 1)}; " + "; ".join(
        f"{name.removeprefix('diffusion dpm, ')} steps {number(quality[name]['fld'], 1)} at "
        f"{rate:.3g} images/s" for name, rate in curve.items()
    )  # fmt: skip
    slow, best = speed["diffusion dpm, 20"] < 0.2 * speed["vae"], below(ours, fld[other])
    verdict = "yes" if best and slow else "in part" if best or slow else "no"
    return row("diffusion has the best quality, and is slow", line, verdict)


def critic_ends_at_a_half(folder):
    rows = [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]
    training, held_out = rows[-1]["sign_rate"], rows[-1]["held_out_sign_rate"]
    line = f"D ranks real above generated in {100 * training:.0f}% of pairs at the end of "
    line += f"training, in {100 * held_out:.0f}% with held-out images"
    return row("a GAN's discriminator ends near 1/2", line, abs(held_out - 0.5) < 0.1)


def gan_is_unstable(results):
    """results: coverage of short runs, {"with penalties": [...], "without": [...]}, by seed."""
    line = "; ".join(
        f"{name}: coverage " + ", ".join(f"{value:.2f}" for value in values) + " (by training seed)"
        for name, values in results.items()
    )
    collapsed = np.mean(results["without"]) < 0.5 * np.mean(results["with penalties"])
    return row("a GAN's training is unstable and prone to collapse; gradient penalties help",
               line, bool(collapsed), **results)  # fmt: skip


def hybrid_pairs(quality):
    """Each hybrid that was scored and what it extends."""
    pairs = {"vae-gan": "vae", "flow-gan": "flow", "diffusion-gan": "diffusion dpm, 4"}
    return {a: b for a, b in pairs.items() if {a, b} <= quality.keys()}


def hybrids_combine(quality):
    """Each is to have a lower FLD than what it extends."""
    lines, better = [], []
    for names in hybrid_pairs(quality).items():
        a, b = (quality[name]["fld"] for name in names)
        lines.append(f"{names[0]} {number(a, 1)}, {names[1]} {number(b, 1)}")
        better.append(below(a, b))
    verdict = "yes" if all(better) else "in part" if any(better) else "no"
    return row("hybrids combine strengths", "FLD: " + "; ".join(lines), verdict)


# ------------------------------------------------------------------------------ of trained models


def codes(model, run, x, captions):
    """z of images x in [-1, 1] (N, C, H, W): a VAE's drawn from its posterior; diffusion's along
    the ODE of guidance 1, from t = 1e-3 on times that are log-uniform, as noise grows."""
    module, z = models.script(model.name), []
    words = module.to_words(captions, run["vocabulary"]).to(model.device)
    for i in torch.arange(len(x)).split(50):
        images, c = x[i].to(model.device), model.embed(words[i])
        if model.name == "vae":
            mu, log_var = model.encoder(images, c)
            code = prior.reparameterize(mu, log_var, prior.normal(i.to(mu.device), mu.shape[1:], 1))
        elif model.name == "diffusion":
            code = module.heun(model.velocity(c), images, torch.logspace(-3, 0, 51).tolist())
        else:
            code = model.encode(images, c)
        z.append(code.cpu())
    return torch.cat(z)


def code_is_normal(model, run, judge, n=500):
    """The codes of held-out images. Each pixel value is drawn from its bin: an invertible code has
    no spread where all images are alike."""

    def tell(z):
        """Mean Kolmogorov-Smirnov distance to N(0, 1) and mean |correlation| of z (N, D)."""
        correlation = np.abs(np.corrcoef(z.T.numpy()))
        ks = np.mean([stats.kstest(v, "norm").statistic for v in z.T.numpy()])
        return float(ks), float(correlation[np.triu_indices(len(correlation), 1)].mean())

    x, captions = judge.x_test[:n], judge.captions_test[:n]
    x = (x + prior.uniform(torch.arange(len(x)), x.shape[1:]) - 0.5) / 127.5 - 1
    encoded = codes(model, run, x, captions)
    z = encoded.flatten(1).double()
    d = z.shape[1]
    some = z[:, torch.arange(min(d, 64)) * d // min(d, 64)]
    ks, correlation = tell(some)
    ideal = tell(prior.normal(torch.arange(len(z)), some.shape[1:]).double())
    figures = {
        "mean": z.mean(0).abs().mean().item(), "std": z.std(0).mean().item(),
        "norm": (z.norm(dim=1).mean() / d**0.5).item(), "ks": ks, "correlation": correlation,
        "ks of normals": ideal[0], "correlation of normals": ideal[1],
    }  # fmt: skip
    line = f"KS {ks:.3f} and |correlation| {correlation:.3f} (of as many true normals: "
    line += f"{ideal[0]:.3f} and {ideal[1]:.3f}); |mean| {figures['mean']:.3f}, std "
    line += f"{figures['std']:.3f}, |z| / sqrt(D) {figures['norm']:.3f}"
    if model.name == "vae":  # what q(z) misses of the prior, the decoder has never seen
        for key, code in (("N(0, I)", None), ("codes", encoded)):
            images = models.samples(model, run, captions, 0, code)
            figures[key] = float(frechet_distance(judge.features, judge.embed(images)))
        line += f"; FLD decoded from N(0, I) {figures['N(0, I)']:.1f}, from codes "
        line += f"{figures['codes']:.1f}"
    normal = ks < 1.5 * ideal[0] and correlation < 1.5 * ideal[1]
    return row(f"the code of {model.name}.py is N(0, I)", line, normal, **figures)


def flow_is_exact(model, run, judge, n=200):
    x, captions = judge.x_test[:n] / 127.5 - 1, judge.captions_test[:n]
    z = codes(model, run, x, captions)
    c = model.embed(to_words(captions, run["vocabulary"]).to(model.device))
    y = model.sample(z.to(model.device), c).cpu()
    error = (y - x).abs().max().item()
    same = z[0].numel() == x[0].numel()
    line = f"z has {z[0].numel()} numbers, an image {x[0].numel()}; "
    line += f"largest round-trip error {error:.1e}"
    claim = "a flow's latent has the image's dimension, and its inverse is exact"
    return row(claim, line, same and error < 1e-3, error=error)


def likelihood_is_exact(model, run, judge, n=3):
    """log |det dz/du| as the flow sums it up, against the whole Jacobian by autograd."""
    x, captions = judge.x_test[:n] / 127.5 - 1, judge.captions_test[:n]
    u = model.dequantize(x.to(model.device), torch.arange(n, device=model.device))
    c = model.embed(to_words(captions, run["vocabulary"]).to(model.device))
    ours, differences = model(u, c)[1].tolist(), []
    for i in range(n):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, i=i: model(v[None], c[i : i + 1])[0].flatten(), u[i]
        )
        truth = torch.linalg.slogdet(jacobian.flatten(1).double())[1].item()
        differences.append(abs(ours[i] - truth))
    line = f"log |det| of {n} images' Jacobians, about {np.mean(ours):.0f} nats: what the flow sums"
    line += f" up and what autograd finds differ by {max(differences):.1e} at most"
    verdict = max(differences) < 1e-4 * max(map(abs, ours))
    return row("a flow's likelihood is exact", line, verdict, differences=differences)


def paths_are_smooth(model, run, judge, n=24, steps=16):
    """Along the arc from z to z: the largest step over the mean one, in feature space; beside it a
    straight line between the same two images, in pixel space."""
    module = models.script(model.name)
    words = to_words(models.cycle(judge.captions_test, n), run["vocabulary"]).to(model.device)
    seeds, c = torch.arange(2 * n, device=model.device), model.embed(words)
    z0, z1 = prior.normal(seeds, model.latent_shape).chunk(2)
    times = torch.linspace(0, 1, steps + 1).tolist()
    arc = [module.draw(model, prior.slerp(z0, z1, t), c, seeds[:n]) for t in times]
    line = [(1 - t) * arc[0].float() + t * arc[-1].float() for t in times]

    def largest_over_mean(path):
        features = [judge.embed(x.byte()) for x in path]
        lengths = torch.stack([(b - a).norm(dim=1) for a, b in pairwise(features)])
        return (lengths.max(0).values / lengths.mean(0)).mean().item()

    figures = {"arc": largest_over_mean(arc), "line": largest_over_mean(line)}
    measured = f"largest over mean step: {figures['arc']:.2f} along the arc, "
    measured += f"{figures['line']:.2f} along the line between its ends' pixels (1 is even)"
    ratio = figures["arc"] / figures["line"]
    verdict = "yes" if ratio <= 1 else "in part" if ratio < 1.25 else "no"
    claim = f"close z give close images, slerp paths are smooth ({model.name})"
    return row(claim, measured, verdict, **figures)
