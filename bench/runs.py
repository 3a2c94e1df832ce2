"""What the two models of bench/ do as the scripts do: flags, training, checkpoints, samples.
The scripts each say it themselves, as each can be copied alone."""

import argparse
import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bench import models, pictures


def parser(**defaults):
    """The flags that both have, and their defaults."""
    result = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = result.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=models.HERE, choices=sorted({models.HERE, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the loss")
    flag("--train-steps", type=int, help="updates")
    flag("--batch-size", type=int, help="images an update")
    flag("--lr", type=float)
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this file")
    result.set_defaults(**defaults)
    return result


def start(parser, argv, train, sample):
    """Reads the flags and does what they ask for."""
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    if args.train and not args.resume and (args.out / "log.jsonl").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    if args.train:
        train(args)
    sample(args)


def load(network, run, device):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
    model = network(**checkpoint["args"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last), checkpoint


def train(args, model, checkpoint, x, captions, loss_of):
    """Trains a model with loss_of(images, word ids, progress) up to update args.train_steps, from
    the checkpoint on."""
    model.to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    ema = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
    if args.compile:
        loss_of = torch.compile(loss_of)
    args.out.mkdir(parents=True, exist_ok=True)

    bar = tqdm(range(checkpoint["update"] + 1, args.train_steps + 1))
    for update in bar:
        # seeded at each update, so that a resumed run draws what one that never stopped draws
        torch.manual_seed(hash((args.seed, update)))
        i = torch.randint(len(x), (args.batch_size,), device=x.device)
        progress = (update - 0.5) / args.train_steps
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss, log = loss_of(x[i] / 127.5 - 1, ids[i], progress)
        optimizer.zero_grad()
        loss.backward()
        log["grad_norm"] = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * progress, 1 - progress)
        optimizer.step()
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 9 / (9 + update))  # over the last tenth of the updates
        save = update % args.checkpoint_every == 0 or update == args.train_steps
        if not (save or update % 10 == 0):
            continue
        log = {name: value.item() for name, value in log.items()}
        if not all(map(math.isfinite, log.values())):
            raise SystemExit(f"training diverged before update {update}: lower --lr")
        bar.set_postfix(log, refresh=False)
        log = {"update": update, "seconds": bar.format_dict["elapsed"], **log}
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps(log), file=file)
        if save:
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint["update"] = update
            torch.save(checkpoint, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")


def draw(args, model, checkpoint, **options):
    """Draws args.images images for texts, or for captions of the training set: samples.png."""
    texts = args.caption or checkpoint["captions"]
    order = np.random.default_rng(0).choice(len(texts), args.images)
    chosen = models.evenly(args.images, len(texts)) if args.caption else order
    captions = [texts[i] for i in chosen]
    x = models.draw(model, captions, args.seed, **options)
    if args.npz:
        np.savez_compressed(args.npz, x=x.movedim(1, 3).numpy(), y=captions)
    titles = [f"{caption}, ..." for caption in captions[:80:8]]
    pictures.picture(args.out / "samples.png", list(zip(titles, (x[:80] / 127.5 - 1).split(8))))
