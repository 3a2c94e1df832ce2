"""Diffusion in one step: a trained network learns to jump, where its sampler walks.

  u(z_t, t, h) = the mean of v along the path that dz/dt = v takes from t down to t - h          (1)
  z_{t-h} = z_t - h u(z_t, t, h),   a jump; u(z_t, t, 0) = v(z_t, t)                             (2)
  u(z_t, t, h) = a v(z_t, t) + (1 - a) u(z_{t-ah}, t - a h, (1 - a) h),   0 < a <= 1             (3)
  z_{t-ah} = z_t - a h v(z_t, t), up to an error that vanishes with a                            (4)
  loss = E m / (sg(m) + 1e-3),   m the mean square of u_theta - sg(the right side of (3))        (5)

(1), (2): MeanFlow (Geng et al. 2025, equation 3). (3) to (5): alpha-Flow (Zhang et al. 2025), whose
loss needs no derivative of the network; sg stops the gradient. v is what diffusion.py has learned,
guided. a falls from 1, where u is v, to 0.05. The network reads c + h f(h), where f starts at 0.

  python diffusion.py --train && python -m bench.one_step --train
"""

import math
from itertools import pairwise

import torch
from torch import nn

import diffusion
from bench import runs


class OneStep(nn.Module):
    """A diffusion model of which a step may have any length."""

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.net = diffusion.Diffusion(shape, vocabulary, width)
        self.args, self.latent_shape = self.net.args, shape
        self.embed, self.tokenize = self.net.embed, self.net.tokenize
        dim = 4 * width
        layers = nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim)
        self.length = nn.Sequential(*layers)
        nn.init.zeros_(self.length[-1].weight)
        nn.init.zeros_(self.length[-1].bias)

    def mean_velocity(self, z, t, h, c):
        """u of (1) for z (B, C, H, W), t and h numbers or (B, 1), c (B, E)."""
        h = torch.zeros_like(c[:, :1]) + h
        return self.net.velocity(z, t, c + h * self.length(h))

    @torch.no_grad()
    def target(self, z, t, h, c, v, a):
        """The right side of (3) for t and h (B, 1), with (4)."""
        z = z - (a * h)[..., None, None] * v
        u = self.mean_velocity(z, t - a * h, (1 - a) * h, c)
        return a * v + (1 - a) * u

    def loss(self, x, c, teacher=None, a=1.0, guidance=1.4):
        """(5) for x (B, C, H, W) in [-1, 1], c (B, E), and what is logged. teacher(z, t, c,
        guidance) is v; without one, v is the model's own at h = 0."""
        t = torch.rand(len(x), 1, device=x.device).sqrt()  # more of the large t, where jumps begin
        h = t * torch.rand_like(t)
        whole = torch.rand_like(t) < 0.25
        t, h = torch.where(whole, 1, t), torch.where(whole, 1, h)
        z = torch.lerp(x, torch.randn_like(x), t[..., None, None])
        with torch.no_grad():
            v = (teacher or self.net.velocity)(z, t, c, guidance)
        error = self.mean_velocity(z, t, h, c) - self.target(z, t, h, c, v, a)
        m = error.square().mean((1, 2, 3))
        loss = (m / (m.detach() + 1e-3)).mean()                                # (5)
        return loss, {"loss": loss, "error": m.mean()}

    @torch.no_grad()
    def sample(self, z, c, steps=1):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1], by as many jumps of equal length."""
        for t, s in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            z = z - (t - s) * self.mean_velocity(z, t, t - s, c)               # (2)
        return z.clamp(-1, 1)


def load(run, device="cpu"):
    return runs.load(OneStep, run, device)


def prepare(model, args):
    """The loss of images and their word ids. runs/one-step-1 is taught by runs/diffusion-1."""
    suffix = args.out.name.partition("one-step")[2]
    teacher, _ = diffusion.load(args.out.parent / f"diffusion{suffix}", args.device)
    teacher.requires_grad_(False)
    model.net.load_state_dict(teacher.state_dict())
    model.embed.requires_grad_(False)  # so that the teacher understands c

    def loss_of(images, ids, progress):
        a = max(0.05, 1 / (1 + math.exp(20 * progress - 6)))  # of (3)
        return model.loss(images, model.embed(ids), teacher.velocity, a)

    return loss_of


def main(argv=None):
    sizes = {"train_steps": 2500, "batch_size": 16, "lr": 1e-3, "width": 64}
    runs.main(argv, "one-step", OneStep, prepare, **sizes)


if __name__ == "__main__":
    main()
