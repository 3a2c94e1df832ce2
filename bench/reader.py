"""What reads an image: is it what its caption asks for?

An attribute is a place in the caption, where all captions are of equally many words, else the
caption as a whole. A classifier reads it, trained on the training images alone; formulas read
weight and slant of the built-in digits, the captions' own.

Where a caption has under five images on average, pictures and texts of the training set are learned
into one space instead (a small CLIP, Radford et al. 2021); an image is as asked if of 100 captions
its own fits best. Half of the others share most words with it.
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
            c_in, c_out = channels[i : i + 2]
            conv = nn.Conv2d(c_in, c_out, 3, stride=1 + i % 2, padding=1)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        size = 64 * (shape[1] // 4) * (shape[2] // 4)
        layers += [nn.Flatten(), nn.Linear(size, 128), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(128, n)

    def forward(self, x):
        return self.out(self.features(x))


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


def fit(network, x, loss_of, steps, batch_size, lr, ground=0):
    """Trains with loss_of(images in [0, 1], places i) of images x, uint8 (N, C, H, W), which are
    moved by up to two pixels over a ground."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    padded = F.pad(x, (2, 2, 2, 2), value=ground)
    size, generator = x.shape[2], torch.Generator().manual_seed(0)
    for _ in range(steps):
        i = torch.randint(len(x), (batch_size,), generator=generator)
        down, right = torch.randint(5, (2,), generator=generator).tolist()
        moved = padded[i, :, down : down + size, right : right + size]
        loss = loss_of(moved / 255, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def train_classifier(x, labels, sizes, steps, batch_size):
    """A classifier of images x, uint8 (N, C, H, W), into attributes of so many values each, with
    their labels, (N,) for each."""
    torch.manual_seed(0)
    classifier = Classifier(x.shape[1:], sum(sizes))

    def loss_of(images, i):
        losses = []
        for part, column in zip(classifier(images).split(sizes, 1), labels):
            losses.append(F.cross_entropy(part, column[i], label_smoothing=0.1))
        return torch.stack(losses).mean()

    return fit(classifier, x, loss_of, steps, batch_size, 4e-3)


def train_matcher(x, captions, steps, batch_size):
    """A Matcher of images x, uint8 (N, C, H, W), and their captions, by InfoNCE both ways; a tenth
    of the words is hidden."""
    torch.manual_seed(0)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    matcher = Matcher(x.shape[1:], vocabulary)
    ids, own = matcher.text.tokenize(captions), torch.arange(batch_size)

    def loss_of(images, i):
        words = ids[i] * (torch.rand(ids[i].shape) > 0.1)
        logits = matcher.match(matcher.picture(images), words)
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

    return fit(matcher, x, loss_of, steps, batch_size, 2e-3, ground=255)


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
        self.medians = torch.empty(2, 10)
        for i, digit in enumerate(DIGITS):
            same = torch.tensor([word == digit for word in words])
            self.medians[:, i] = figures[:, same].quantile(0.5, 1)

    def labels(self, captions):
        """The class of each attribute: int64 (N,) each, -1 where no training caption had it."""
        labels = []
        for values, column in zip(self.values, attributes(captions, len(self.values))):
            labels.append(torch.tensor([values.get(word, -1) for word in column]))
        return labels

    def features(self, x):
        """What the classifier sees last in uint8 images: (N, 128)."""
        parts = [self.classifier.features(part / 255) for part in x.split(500)]
        return torch.cat(parts)

    def read(self, x, features, captions):
        """Is each attribute read as asked? 1 or 0, (N,) for each, under its name; NaN where the
        caption does not ask for it."""
        if self.matcher:
            return {"text": self.match(features, captions)}
        parts = self.classifier.out(features).split(self.sizes, 1)
        read = [part.argmax(1) for part in parts]
        if self.medians is not None:
            return self.read_digits(x, read[2], captions)
        right = []
        for seen, asked in zip(read, self.labels(captions)):
            same = (seen == asked).float()
            right.append(same.where(asked >= 0, torch.nan))
        if len(right) == 1:
            return {"text": right[0]}
        return {f"word {i + 1}": column for i, column in enumerate(right)}

    def match(self, features, captions, n=100):
        """Whether of n captions each image's own fits it best, 1 or 0, (N,)."""
        generator = torch.Generator().manual_seed(0)
        out, text = self.classifier.out(features), self.matcher.text
        ids, own = text.tokenize(self.candidates), text.tokenize(captions)
        fit = self.matcher.match(out, ids)
        own_fit = self.matcher.match(out, own).diagonal()
        zero = torch.zeros(1, text.word.num_embeddings)
        has = zero.repeat(len(ids), 1).scatter(1, ids, 1)[:, 1:]
        asked = zero.repeat(len(own), 1).scatter(1, own, 1)[:, 1:]
        both = asked @ has.T
        far = asked.sum(1, keepdim=True) + has.sum(1) - 2 * both               # words that differ
        far = far + torch.rand(far.shape, generator=generator) / 2
        for row, caption in zip(far, captions):
            row[[caption == other for other in self.candidates]] = torch.inf
        order = far.argsort(1)[:, :-1]
        near, rest = order[:, : n // 2], order[:, n // 2 :]
        some = torch.rand(rest.shape, generator=generator).argsort(1)
        some = some[:, : n - 1 - n // 2]
        rivals = torch.cat([near, rest.gather(1, some)], 1)
        return (fit.gather(1, rivals) < own_fit[:, None]).all(1).float()

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
