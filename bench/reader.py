"""What reads an image: is it what its caption asks for?

An attribute is a place in the caption, where all captions have as many words, else the caption as a
whole. A classifier reads it, trained on the training images alone. Weight and slant of the built-in
digits are read by formulas instead, the captions' own.

Where there are nearly as many captions as images, a classifier has nothing to learn. There pictures
and texts are learned into one space (a small CLIP, Radford et al. 2021), again from the training
images alone; an image is as asked if of 100 captions its own fits best. Half of the others differ
from it in the fewest words, as other skin tones do; half are random.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vae import Text, words_of

DIGITS = "zero one two three four five six seven eight nine".split()


class Classifier(nn.Module):
    """Images in [0, 1], (B, C, H, W) -> logits of all attributes side by side."""

    def __init__(self, shape, n):
        super().__init__()
        layers, channels = [], (shape[0], 32, 32, 64, 64)
        for i in range(4):
            conv = nn.Conv2d(channels[i], channels[i + 1], 3, stride=1 + i % 2, padding=1)
            layers += [conv, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        size = 64 * (shape[1] // 4) * (shape[2] // 4)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 128), nn.ReLU())
        self.out = nn.Linear(128, n)

    def forward(self, x):
        return self.out(self.features(x))


def train_classifier(x, labels, sizes, steps, batch_size):
    """A classifier of images x, uint8 (N, C, H, W), into attributes of so many values each, with
    their labels, (N,) for each; trained on images moved by up to two pixels."""
    torch.manual_seed(0)
    classifier = Classifier(x.shape[1:], sum(sizes))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    generator = torch.Generator().manual_seed(0)
    padded = F.pad(x, (2, 2, 2, 2))
    size = x.shape[2]
    for _ in range(steps):
        i = torch.randint(len(x), (batch_size,), generator=generator)
        down, right = torch.randint(5, (2,), generator=generator).tolist()
        moved = padded[i, :, down : down + size, right : right + size] / 255
        losses = []
        for part, column in zip(classifier(moved).split(sizes, 1), labels):
            losses.append(F.cross_entropy(part, column[i], label_smoothing=0.1))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


class Matcher(nn.Module):
    """Pictures and texts in one space: unit vectors, close where the two belong together."""

    def __init__(self, shape, vocabulary, dim=128):
        super().__init__()
        self.picture = Classifier(shape, dim)
        self.text = Text(vocabulary, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def match(self, out, ids):
        """How well each picture, by its outputs (B, dim), fits each text, ids (T, L): (B, T)."""
        pictures = F.normalize(out, dim=1)
        texts = F.normalize(self.text(ids), dim=1)
        return self.log_scale.exp() * pictures @ texts.T


def train_matcher(x, captions, steps, batch_size):
    """A Matcher of images x, uint8 (N, C, H, W), and their captions, by InfoNCE both ways; images
    are moved by up to two pixels, and a tenth of the words is hidden."""
    torch.manual_seed(0)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    matcher = Matcher(x.shape[1:], vocabulary)
    ids = matcher.text.tokenize(captions)
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    padded = F.pad(x, (2, 2, 2, 2), value=255)
    size, own = x.shape[2], torch.arange(batch_size)
    for _ in range(steps):
        i = torch.randint(len(x), (batch_size,))
        down, right = torch.randint(5, (2,)).tolist()
        moved = padded[i, :, down : down + size, right : right + size] / 255
        words = ids[i] * (torch.rand(ids[i].shape) > 0.1)
        logits = matcher.match(matcher.picture(moved), words)
        loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return matcher.eval().requires_grad_(False)


def attributes(captions, n=None):
    """Captions -> a list of columns, each the value of one attribute in each caption; n: of how
    many words, if captions had n in training."""
    rows = [caption.split() for caption in captions]
    lengths = {len(row) for row in rows}
    n = n or (lengths.pop() if len(lengths) == 1 else 1)
    if n < 2:
        return [list(captions)]
    rows = [row if len(row) == n else [""] * n for row in rows]
    return [list(column) for column in zip(*rows)]


def ink_and_slant(x):
    """Of grey images, uint8 (N, 1, S, S): the mean I, and -sum I x y / sum I y^2 about the centre
    of mass, y down: (2, N)."""
    mass = x[:, 0].double() / 255
    side = torch.arange(x.shape[2], dtype=torch.double)
    total = mass.sum((1, 2)) + 1e-9
    middle_y = mass.sum(2) @ side / total
    middle_x = mass.sum(1) @ side / total
    down = side[:, None] - middle_y[:, None, None]
    right = side - middle_x[:, None, None]
    moment = (mass * down**2).sum((1, 2)) + 1e-9
    slant = -(mass * down * right).sum((1, 2)) / moment
    return torch.stack([mass.mean((1, 2)), slant])


class Reader:
    """Reads images like x, uint8 (N, C, H, W), as its captions do."""

    def __init__(self, x, captions, steps=None, batch_size=128):
        self.values = []
        for column in attributes(captions):
            words = sorted(set(column))
            self.values.append({word: i for i, word in enumerate(words)})
        self.sizes = [len(values) for values in self.values]
        self.medians = self.matcher = None
        steps = steps or min(max(len(x) // 20, 800), 4000)
        if len(self.sizes) == 1 and self.sizes[0] > len(x) / 5:
            self.matcher = train_matcher(x, captions, 3 * steps, batch_size)
            self.candidates = sorted(set(captions))
            self.classifier = self.matcher.picture
            return
        labels = self.labels(captions)
        self.classifier = train_classifier(x, labels, self.sizes, steps, batch_size)

    def fit_digits(self, x, captions):
        """Takes the medians of ink and slant, (2, 10), from all images of each built-in digit."""
        figures = ink_and_slant(x)
        words = [caption.split()[2] for caption in captions]
        self.medians = torch.full((2, 10), torch.nan)
        for i, digit in enumerate(DIGITS):
            same = torch.tensor([word == digit for word in words])
            if same.any():
                self.medians[:, i] = figures[:, same].quantile(0.5, 1)

    def labels(self, captions):
        """The class of each attribute: int64 (N,) each, -1 where no training caption had it."""
        labels = []
        for values, column in zip(self.values, attributes(captions, len(self.values))):
            labels.append(torch.tensor([values.get(word, -1) for word in column]))
        return labels

    def features(self, x):
        """What the classifier sees last in uint8 images: (N, 128)."""
        return torch.cat([self.classifier.features(part / 255) for part in x.split(500)])

    def classify(self, features):
        """The likeliest value of each attribute: (N,) each."""
        parts = self.classifier.out(features).split(self.sizes, 1)
        return [part.argmax(1) for part in parts]

    def read(self, x, features, captions):
        """Is each attribute read as asked? 1 or 0, (N,) for each, under its name; NaN where the
        caption does not ask for it."""
        if self.matcher:
            return {"text": self.match(features, captions)}
        read = self.classify(features)
        if self.medians is not None:
            return self.read_digits(x, read[2], captions)
        right = []
        for seen, asked in zip(read, self.labels(captions)):
            right.append(torch.where(asked < 0, torch.nan, (seen == asked).float()))
        if len(right) == 1:
            return {"text": right[0]}
        return {f"word {i + 1}": column for i, column in enumerate(right)}

    def match(self, features, captions, n=100):
        """Whether of n captions each image's own fits it best, 1 or 0, (N,)."""
        generator, right = torch.Generator().manual_seed(0), []
        sets = {caption: set(caption.split()) for caption in self.candidates}
        for out, caption in zip(self.classifier.out(features), captions):
            order = torch.randperm(len(sets), generator=generator).tolist()
            others = [self.candidates[i] for i in order if self.candidates[i] != caption]
            asked = set(caption.split())
            far = {other: len(asked ^ sets[other]) for other in others}
            near = sorted(far, key=far.get)[: n // 2]
            rest = [other for other in others if other not in near]
            rivals = [*near, *rest][: n - 1]
            ids = self.matcher.text.tokenize([caption, *rivals])
            right.append(self.matcher.match(out[None], ids).argmax() == 0)
        return torch.stack(right).float()

    def read_digits(self, x, digits, captions):
        """The same for the built-in digits, whatever the order of the words."""
        names, figures = list(self.values[2]), ink_and_slant(x)
        result = {name: torch.full((len(x),), torch.nan) for name in ("digit", "weight", "slant")}
        for i, caption in enumerate(captions):
            words = set(caption.split())
            for digit in words & set(DIGITS):
                over = figures[:, i] > self.medians[:, DIGITS.index(digit)]
                weight = "bold" if over[0] else "thin"
                slant = "slanted" if over[1] else "upright"
                result["digit"][i] = names[digits[i]] == digit
                if words & {"bold", "thin"}:
                    result["weight"][i] = weight in words
                if words & {"slanted", "upright"}:
                    result["slant"][i] = slant in words
        return result
