"""What the two models of bench/ do as the scripts do: flags, checkpoints, samples.

The scripts each say it themselves, as each can be copied alone; a model of bench/ cannot.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from bench import models


def parser(**defaults):
    """The flags that both have, and their defaults."""
    result = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = result.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, 5,000 captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=models.HERE, choices=sorted({models.HERE, "cpu"}))
    flag("--train-steps", type=int, help="updates")
    flag("--batch-size", type=int, help="images an update, of all ranks together")
    flag("--lr", type=float)
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this file")
    result.set_defaults(**defaults)
    return result


def refuse_to_overwrite(parser, args):
    if args.train and not args.resume and (args.out / "checkpoint.pt").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")


def load(network, run, script):
    """The model of a script's run with averaged weights, and its checkpoint, read without running
    code."""
    try:
        checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
        model = network(**checkpoint["args"])
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise SystemExit(f"{run} holds no run of bench.{script}: {type(error).__name__}") from None
    return model, checkpoint


def record(args, update, log, checkpoint, parts):
    """Logs each tenth update, and writes a checkpoint where one is due."""
    save = update % args.checkpoint_every == 0 or update == args.train_steps
    if not (save or update % 10 == 0):
        return
    log = {name: value.item() for name, value in log.items()}
    if not all(map(math.isfinite, log.values())):
        raise SystemExit(f"the loss is not finite at update {update}: lower --lr")
    with open(args.out / "log.jsonl", "a") as file:
        print(json.dumps({"update": update, **log}), file=file)
    if save:
        checkpoint |= {name: part.state_dict() for name, part in parts.items()}
        checkpoint["update"] = update
        torch.save(checkpoint, args.out / "checkpoint.tmp")
        os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")


def draw(args, model, checkpoint, **options):
    """args.images images, uint8 (N, C, H, W), and their captions: those asked for, or some of the
    training set."""
    texts = args.caption or checkpoint["captions"]
    captions = [texts[i] for i in models.evenly(args.images, len(texts))]
    x = models.draw(model, captions, args.seed, **options)
    if args.npz:
        np.savez_compressed(args.npz, x=x.movedim(1, 3).numpy(), y=captions)
    return x, captions
