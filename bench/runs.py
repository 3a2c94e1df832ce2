"""What the two models of bench/ do as the scripts do, each of which can be copied alone."""

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
from vae import load_data, words_of


def load(network, run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
    model = network(**checkpoint["args"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last), checkpoint


def main(argv, name, network, prepare, **defaults):
    """Reads the flags, trains with the loss_of that prepare(model, args) returns, and draws."""
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, default=Path("runs", name), help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=models.HERE)
    for key, value in defaults.items():  # --train-steps, --batch-size, --lr, --width
        flag("--" + key.replace("_", "-"), type=type(value), default=value)
    flag("--images", type=int, default=80, help="how many to draw, for captions of training")
    args = parser.parse_args(argv)
    if not args.train:
        return parser.print_help()
    if not args.resume and (args.out / "log.jsonl").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    x, captions = load_data(args.data)
    torch.manual_seed(args.seed)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary, "width": args.width}
    new = {"script": name, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(network, args.out)[1] if args.resume else new
    model = network(**checkpoint["args"])
    train(args, model, checkpoint, x, captions, prepare(model, args))
    model, _ = load(network, args.out, args.device)
    captions = np.random.default_rng(0).permutation(captions)[: args.images].tolist()
    x = models.draw(model, captions, args.seed) / 127.5 - 1
    rows = list(zip((f"{caption}, ..." for caption in captions[::8]), x.split(8)))
    pictures.picture(args.out / "samples.png", rows)


def train(args, model, checkpoint, x, captions, loss_of):
    """Trains a model by loss_of(images, word ids, progress) from the checkpoint on."""
    model.to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    ema = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
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
        save = update % 500 == 0 or update == args.train_steps
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
