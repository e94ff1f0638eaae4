"""Recall: what a model can still use of its context, in made-up sequences and in text.

    python data/recall.py --ckpt=out/recipe-gla/statex.pt      the recipe's own numbers
    python data/recall.py --ckpt=out/recipe-gla/statex.pt --control=out/recipe-gla/lpt.pt
    python data/recall.py --ckpt=fla-hub/gla-1.3B-100B --data=data/text --json=gla.json

Made-up sequences: nothing but the context tells the answer. A generator returns idx and
targets, both (n, T) int64: targets[i, t] is the token expected after idx[i, :t + 1], or
-100 where nothing is asked.

    mqar      multi-query associative recall (Arora et al., arXiv 2312.04927): key-value
              pairs, then every key again. Chance: 1 / pairs for any value shown; for any
              shown and not asked for yet (1 + 1/2 + ... + 1/pairs) / pairs, 0.127 for 32,
              without knowing a single pair.
    fewshot   a fresh random map from 8 tokens to 4 labels, shown `shots` times, then
              asked. Chance: 1 / 4; always the label that was shown most often: 0.44.
    passkey   5 digits on a line amid real text, asked for at its end (Mohtashami and
              Jaggi, arXiv 2305.16300). Right if all five are. Chance: 1e-5.

Natural text: no training on such sequences is needed.

    text_loss     held-out loss, and the in-context score: the loss of late tokens minus
                  that of early ones (after Olsson et al., arXiv 2209.11895). Chance: 0.
    rare_repeats  loss and accuracy on the second token of a bigram that training has at
                  most RARE times, but that was before in the window (after the "AR hits"
                  of Arora et al.). Training has hardly taught it; what is right comes
                  from the state. Chance: what the model scores where such a bigram is new
                  to its window.
    needle_gain   how much likelier, in nats per digit, a passkey is with its line in the
                  context than without. Chance: 0; it is above 0 long before a passkey is
                  right.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.options import (
    BadInput,
    check_json,
    command_line,
    number_list,
    option,
    pick_device,
    run_script,
    write_file,
)

import contextlib
import json
import math
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.prepare import check_tokenizer, check_vocabulary, load_corpus, load_tokenizer
from model import LM, load_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))
SYMBOLS = 256           # mqar and fewshot draw from this many tokens of the vocabulary
ITEMS = 8               # of fewshot
LABELS = 4              # of fewshot
DIGITS = 5              # of a passkey
NEAR = 512              # distance, in tokens, from which a repeat is no longer near
FAR = 2048              # distance, in tokens, from which it is far
# A bigram is rare if training has it at most this often. At every threshold two thirds of the
# near repeats can be had by copying what followed the token last time, so a lower one only
# leaves fewer tokens to score (see data/results/README.md).
RARE = 10


# ----------------------------------------------------------------------------------------
# made-up sequences


def symbols(vocab_size):
    """The tokens that mqar and fewshot draw from, always the same ones, (min(SYMBOLS,
    vocab_size),). The first half of them are keys, the second half values."""
    return np.random.default_rng(0).permutation(vocab_size)[:SYMBOLS]


def draw(rng, n, count, pool):
    """n rows of `count` distinct entries of pool."""
    return pool[np.argsort(rng.random((n, len(pool))), axis=1)[:, :count]]


def mqar(rng, n, pairs, vocab_size):
    """n sequences of 4 * pairs tokens: key, value, key, value, ...; then every key
    again in random order, each followed by its value, which is asked for. -> idx,
    targets. Raises BadInput where there are more pairs than keys."""
    pool = symbols(vocab_size)
    half = len(pool) // 2
    if pairs > half:
        raise BadInput(f"{pairs} pairs need {2 * pairs} symbols and there are {len(pool)}; "
                       f"ask for at most {half}")
    keys = draw(rng, n, pairs, pool[:half])
    values = draw(rng, n, pairs, pool[half:])
    order = np.argsort(rng.random((n, pairs)), axis=1)
    asked = np.take_along_axis(keys, order, axis=1)
    answers = np.take_along_axis(values, order, axis=1)
    shown = np.stack((keys, values), axis=2)
    again = np.stack((asked, answers), axis=2)
    idx = np.concatenate((shown, again), axis=1).reshape(n, -1)
    targets = np.full_like(idx, -100)
    targets[:, 2 * pairs::2] = answers
    return idx, targets


def fewshot(rng, n, shots, vocab_size):
    """n sequences of 16 * (shots + 1) tokens: every item with its label, in random
    order, `shots` times over; then once more, the labels asked for. -> idx, targets.
    Raises BadInput where the vocabulary is too small."""
    pool = symbols(vocab_size)
    half = len(pool) // 2
    if half < ITEMS:
        raise BadInput(f"fewshot needs a vocabulary of at least {2 * ITEMS} tokens; this one "
                       f"has {vocab_size}")
    items = draw(rng, n, ITEMS, pool[:half])
    labels = draw(rng, n, LABELS, pool[half:])
    of_item = np.take_along_axis(labels, rng.integers(LABELS, size=(n, ITEMS)), axis=1)
    rounds = []
    for _ in range(shots + 1):
        order = np.argsort(rng.random((n, ITEMS)), axis=1)
        item_now = np.take_along_axis(items, order, axis=1)
        label_now = np.take_along_axis(of_item, order, axis=1)
        rounds.append(np.stack((item_now, label_now), axis=2))
    idx = np.concatenate(rounds, axis=1).reshape(n, -1)
    targets = np.full_like(idx, -100)
    asked = 2 * ITEMS * shots
    targets[:, asked::2] = idx[:, asked + 1::2]
    return idx, targets


class Needle:
    """The pieces of a passkey in a tokenizer's ids. Its line in the text is start, five
    of the ten digits, end; the question is start, the answer the same five."""

    def __init__(self, tokenizer):
        encode = tokenizer.encode_ordinary
        self.start = encode("\npasskey =") + encode(" ")
        self.end = encode("\n")
        self.digits = np.array([encode(str(digit))[-1] for digit in range(10)])
        self.question_tokens = len(self.start) + DIGITS
        self.line_tokens = self.question_tokens + len(self.end)
        self.least = self.line_tokens + self.question_tokens + 1        # with a token of text
        if len(set(self.digits.tolist())) < 10:
            raise BadInput("a passkey needs a tokenizer that has a token for every digit")

    def room(self, length, text):
        """Tokens before the question in a sequence of `length` tokens. Raises BadInput where it has
        none, or the text is too short."""
        if length < self.least:
            raise BadInput(f"a passkey sequence of {length} tokens is too short; it needs at "
                           f"least {self.least}")
        if len(text) <= length:
            raise BadInput(f"a passkey sequence of {length} tokens needs more than that of "
                           f"held-out text, and there are {len(text)}; take a shorter length")
        return length - self.question_tokens


def needle_pairs(rng, n, length, text, tokenizer):
    """n pairs of sequences of `length` tokens: held-out text (token ids), then `passkey = `
    and five digits, which are asked for. In the first of a pair `passkey = ddddd` is written
    over the text, on a line of its own at a random depth. -> idx with the line, idx
    without, targets. Raises BadInput, see Needle.room."""
    needle = Needle(tokenizer)
    room = needle.room(length, text)
    present = np.empty((n, length), np.int64)
    absent = np.empty((n, length), np.int64)
    targets = np.full((n, length), -100, np.int64)
    for i in range(n):
        key = needle.digits[rng.integers(10, size=DIGITS)]
        begin = rng.integers(len(text) - room)
        depth = rng.integers(room - needle.line_tokens + 1)
        line = np.concatenate((needle.start, key, needle.end))
        absent[i] = np.concatenate((text[begin:begin + room], needle.start, key))
        present[i] = absent[i]
        present[i, depth:depth + needle.line_tokens] = line
        targets[i, -DIGITS - 1:-1] = key
    return present, absent, targets


# ----------------------------------------------------------------------------------------
# scores of made-up sequences


@torch.no_grad()
def asked_logits(lm, idx, targets):
    """Run lm over idx, 16,384 tokens at a time. Yields per batch: asked (rows, T), where
    a target counts; and for those positions, in order, the logits (answers, vocab_size)
    and the targets (answers,)."""
    device = next(lm.parameters()).device
    rows = max(1, 16384 // idx.shape[1])
    for start in range(0, len(idx), rows):
        tokens = torch.from_numpy(idx[start:start + rows]).to(device)
        expected = torch.from_numpy(targets[start:start + rows]).to(device)
        asked = expected != -100
        features, _ = lm.features(tokens)
        logits = lm.lm_head(features[asked])[:, :lm.config.vocab_size]
        yield asked, logits, expected[asked]


def answered(lm, idx, targets, all_right=False):
    """What each sequence scores, a tensor (n,): the share of its answers that are the
    model's likeliest token; with all_right 1 where every one is, else 0."""
    scores = []
    for asked, logits, answers in asked_logits(lm, idx, targets):
        right = torch.zeros_like(asked)
        right[asked] = logits.argmax(-1) == answers
        share = right.sum(1) / asked.sum(1)
        scores.append((share == 1).float() if all_right else share)
    return torch.cat(scores)


def mean_and_error(scores):
    """-> (mean, its standard error) of scores (n,), a tensor; NaN for one score."""
    error = math.nan
    if len(scores) > 1:
        error = (scores.std() / len(scores) ** 0.5).item()
    return scores.mean().item(), error


@dataclass
class Sizes:
    """Options of `score`."""
    T: int                              # tokens of a window of text
    pairs: tuple                        # of mqar
    shots: tuple = (1, 2, 4)            # of fewshot
    lengths: tuple = ()                 # of passkey sequences, in tokens; none: no passkey
    n: int = 256                        # sequences per task and size
    seed: int = 1                       # of the sequences

    def by_task(self):
        return {"mqar": self.pairs, "fewshot": self.shots, "passkey": self.lengths}


TEXT_ALONE = {"pairs": (), "shots": ()}         # of a model that saw no recall sequences
CHANCE = {"mqar": lambda pairs: 1 / pairs, "fewshot": lambda shots: 1 / LABELS,
          "passkey": lambda length: 10 ** -DIGITS}


def sequences(task, rng, n, size, vocab_size, text, tokenizer):
    """n sequences of a made-up task -> idx, targets. For a task of your own: a case here, its
    chance and perhaps TEXT_ALONE above, its sizes in Sizes and Sizes.by_task, and if you like a
    name for its rows in data/report.py's TASKS. A finished recipe is scored anew where its
    results.json was removed. Training (train.py's recall_batch and `evaluate`), the recipe's
    picture and its closing sentence know mqar alone."""
    if task == "mqar":
        return mqar(rng, n, size, vocab_size)
    if task == "fewshot":
        return fewshot(rng, n, size, vocab_size)
    if task == "passkey":
        idx, _, targets = needle_pairs(rng, n, size, text, tokenizer)
        return idx, targets
    raise BadInput(f"`sequences` makes none of the task {task}")


def score(lm, text, tokenizer, **sizes):
    """The scores of a model, on the same sequences for every model of its vocabulary.

    text: held-out token ids. sizes: fields of Sizes.
    Returns a dict of val_loss, val_loss_se, icl_score (see text_loss); recall,
    recall_se and chance, each {task: {size: number}} for the tasks mqar, fewshot and
    passkey, the size a string; and samples, {task: {size: list}, "text": list}: what
    every sequence and every window of text scored, to compare models on the same ones.
    Raises BadInput."""
    sizes = Sizes(**sizes)
    tasks = sizes.by_task()
    means, errors, chance, samples = ({task: {} for task in tasks} for _ in range(4))
    for task, of_task in tasks.items():
        for size in of_task:
            rng = np.random.default_rng([sizes.seed, size])
            idx, targets = sequences(task, rng, sizes.n, size, lm.config.vocab_size, text,
                                     tokenizer)
            scores = answered(lm, idx, targets, all_right=task == "passkey")
            means[task][str(size)], errors[task][str(size)] = mean_and_error(scores)
            chance[task][str(size)] = CHANCE[task](size)
            samples[task][str(size)] = scores.tolist()
    losses = text_losses(lm, text, sizes.T)
    samples["text"] = losses.mean(1).tolist()
    loss, loss_error, in_context = summary(losses)
    return {"val_loss": loss, "val_loss_se": loss_error, "icl_score": in_context,
            "recall": means, "recall_se": errors, "chance": chance, "samples": samples}


def check_text(text, tokenizer, **sizes):
    """Raises BadInput where `score` would for this text and these sizes. Called before a
    training run that ends with a score. Draws one sequence of each kind."""
    sizes = Sizes(**sizes)
    rng = np.random.default_rng(0)
    for task, of_task in sizes.by_task().items():
        for size in of_task:
            if task not in CHANCE:
                raise BadInput(f"CHANCE does not say how often {task} is right by chance")
            idx, targets = sequences(task, rng, 1, size, tokenizer.n_vocab, text, tokenizer)
            if idx.shape != targets.shape or (targets == -100).all():
                raise BadInput(f"a sequence of {task} asks for nothing, or idx and targets have "
                               f"unlike shapes: {idx.shape}, {targets.shape}")
    text_windows(text, min(sizes.T, len(text) - 1), 1)


# ----------------------------------------------------------------------------------------
# natural text: the loss and a hit or a miss for every token


def text_windows(text, T, n):
    """At most n windows of T + 1 tokens of text, evenly spaced. A window asks for each
    of its tokens but the first, and no token of the text is asked for twice. -> windows
    (n, T + 1), where they start (n,), both int64. Raises BadInput."""
    if not 0 < T < len(text):
        raise BadInput(f"a window of {T} tokens needs {T + 1} of held-out text, and there are "
                       f"{len(text)}; take a smaller --T or more text")
    n = min(n, (len(text) - 1) // T)
    starts = np.linspace(0, len(text) - T - 1, n).astype(np.int64)
    windows = np.stack([text[start:start + T + 1] for start in starts])
    return windows.astype(np.int64), starts


@torch.no_grad()
def token_scores(lm, windows, batch_tokens=0):
    """What lm makes of windows (n, T + 1) of token ids, in one pass.

    -> losses (n, T) float32, in nats, and hits (n, T) bool, whether the token was the
    likeliest one, of every token but a window's first. batch_tokens: tokens per forward
    pass, at least one window; 0: 16,384 on a CPU, 131,072 on a GPU. The logits are made
    for a part of a window at a time, so it can be of any length. Autocast is the
    caller's."""
    device = next(lm.parameters()).device
    on_gpu = device.type == "cuda"
    vocab_size = lm.config.vocab_size
    T = windows.shape[1] - 1
    if not batch_tokens:
        batch_tokens = 1 << 17 if on_gpu else 1 << 14
    rows = max(1, batch_tokens // T)
    logits_at_once = 1 << 27 if on_gpu else 1 << 20         # on a CPU they fit a cache
    part_tokens = max(1, logits_at_once // vocab_size)
    losses = []
    hits = []
    for start in range(0, len(windows), rows):
        batch = torch.from_numpy(windows[start:start + rows]).to(device)
        features, _ = lm.features(batch[:, :-1])
        expected = batch[:, 1:].flatten()
        parts = zip(features.flatten(0, 1).split(part_tokens), expected.split(part_tokens),
                    strict=True)
        for x, y in parts:
            logits = lm.lm_head(x)[:, :vocab_size].float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            hits.append(logits.argmax(-1) == y)
    return (torch.cat(losses).view(-1, T).cpu().numpy(),
            torch.cat(hits).view(-1, T).cpu().numpy())


def text_losses(lm, text, T, n=64):
    """The loss of every token (windows, T), in nats, a tensor, on at most n windows of
    T tokens; of all the text where it is shorter."""
    windows, _ = text_windows(text, min(T, len(text) - 1), n)
    return torch.from_numpy(token_scores(lm, windows)[0])


def summary(losses):
    """losses (windows, T) -> (mean, standard error over windows, in-context score). The
    last is the mean loss in a window's last quarter minus that in its second eighth:
    below 0 where the context helps."""
    T = losses.shape[1]
    _, error = mean_and_error(losses.mean(1))
    early = losses[:, T // 8:max(T // 4, T // 8 + 1)].mean()
    late = losses[:, 3 * T // 4:].mean()
    return losses.mean().item(), error, (late - early).item()


def text_loss(lm, text, T, n=64):
    """-> (loss, its standard error over windows, in-context score), in nats per token,
    of text_losses."""
    return summary(text_losses(lm, text, T, n))


# ----------------------------------------------------------------------------------------
# natural text: repeats of rare bigrams


def bigrams(tokens, vocab_size):
    """Every token but the first, together with the one before it, as one number:
    tokens (..., T + 1) -> (..., T), uint32 or, where they do not fit, uint64."""
    kind = np.uint32 if vocab_size <= 1 << 16 else np.uint64
    tokens = tokens.astype(kind)
    return tokens[..., :-1] * kind(vocab_size) + tokens[..., 1:]


@dataclass
class BigramCounts:
    """How often each bigram is in a training text."""
    vocab_size: int
    pairs: np.ndarray           # (m,) as `bigrams` gives them, sorted, each once
    counts: np.ndarray          # (m,) int64

    @classmethod
    def of(cls, tokens, vocab_size, at_once=1 << 24):
        """Count those of tokens (n,), at_once tokens at a time."""
        pairs = bigrams(tokens[:1], vocab_size)             # none yet
        counts = np.zeros(0, np.int64)
        for start in range(0, len(tokens) - 1, at_once):
            part = bigrams(tokens[start:start + at_once + 1], vocab_size)
            found, times = np.unique(part, return_counts=True)
            pairs, place = np.unique(np.concatenate((pairs, found)), return_inverse=True)
            counts = np.bincount(place, np.concatenate((counts, times))).astype(np.int64)
        return cls(vocab_size, pairs, counts)

    def times_seen(self, pairs):
        """How often each of pairs (...) is in the training text."""
        place = np.searchsorted(self.pairs[:-1], pairs)     # beyond all: the last place
        return np.where(self.pairs[place] == pairs, self.counts[place], 0)


def bigram_counts(folder, train, meta):
    """The BigramCounts of a corpus: load_corpus(folder) gives train and meta. Counted
    once, then kept beside the token files in bigrams.npz, with the sha256 that they
    belong to. In a folder that cannot be written they are counted anew each time."""
    path = f"{folder}/bigrams.npz"
    identity = f"{meta.get('sha256')} {meta['vocab_size']}"
    try:
        with np.load(path) as kept:
            if str(kept["corpus"]) == identity:
                return BigramCounts(meta["vocab_size"], kept["pairs"], kept["counts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass                                        # not there, or not whole: count again
    table = BigramCounts.of(train, meta["vocab_size"])
    if meta.get("sha256") and os.access(folder, os.W_OK):
        with contextlib.suppress(BadInput):         # the disk may be full
            write_file(path, lambda file: np.savez(
                file, corpus=identity, pairs=table.pairs, counts=table.counts))
    return table


def repeat_distance(pairs):
    """How many tokens ago each bigram last was in its window, 0 where it is new to it.
    pairs (n, T), as `bigrams` gives them -> (n, T) int64"""
    order = np.argsort(pairs, axis=1, kind="stable")            # equal ones in order of time
    in_order = np.take_along_axis(pairs, order, axis=1)
    seen_before = in_order[:, 1:] == in_order[:, :-1]
    ago = np.where(seen_before, order[:, 1:] - order[:, :-1], 0)
    distance = np.zeros(pairs.shape, np.int64)
    np.put_along_axis(distance, order[:, 1:], ago, axis=1)
    return distance


def rare_repeats(lm, text, counts, eot, T=4096, n=1024, at_most=RARE, control=None):
    """Loss and accuracy of lm on the second token of bigrams that are in the training
    text at most at_most times and were before in the window, on at most n windows of T
    tokens.

    text: held-out token ids. counts: BigramCounts of the training text. eot: the token
    that ends a document. Returns {"T", "windows", "documents", "at_most", "groups"};
    groups is {name: {"tokens", "loss", "accuracy", and of both the standard errors over
    windows, "_se", and over documents, "_se_documents"}}, without the groups that have
    no token:
        near     the last occurrence is less than NEAR tokens ago
        middle   less than FAR
        far      FAR or more
        repeats  all of these
        new      bigrams as rare, new to the window: what is known without a memory
        other    every token that is not in `repeats`
    control, another LM: also what lm has more, "loss_more" and "accuracy_more", with the
    errors of the differences token by token, far smaller than those of either."""
    windows, starts = text_windows(text, T, n)
    losses, hits = token_scores(lm, windows)
    measures = {"loss": losses, "accuracy": hits}
    if control is not None:
        control_losses, control_hits = token_scores(control, windows)
        measures |= {"loss_more": losses - control_losses,
                     "accuracy_more": hits.astype(np.int8) - control_hits}
    pairs = bigrams(windows, counts.vocab_size)
    rare = counts.times_seen(pairs) <= at_most
    distance = repeat_distance(pairs)
    repeats = rare & (distance > 0)
    chosen = {"near": repeats & (distance < NEAR),
              "middle": repeats & (distance >= NEAR) & (distance < FAR),
              "far": repeats & (distance >= FAR),
              "repeats": repeats,
              "new": rare & (distance == 0),
              "other": ~repeats}
    place = starts[:, None] + np.arange(1, T + 1)               # in the text
    document = np.searchsorted(np.flatnonzero(text == eot), place)  # how many ended before
    window = np.broadcast_to(np.arange(len(windows))[:, None], place.shape)
    groups = {}
    for name, mask in chosen.items():
        if not mask.any():
            continue
        group = {"tokens": int(mask.sum())}
        for measure, values in measures.items():
            group[measure] = float(values[mask].mean(dtype=np.float64))
            group[f"{measure}_se"] = cluster_error(values[mask], window[mask])
            group[f"{measure}_se_documents"] = cluster_error(values[mask], document[mask])
        groups[name] = group
    return {"T": T, "windows": len(windows), "documents": len(np.unique(document)),
            "at_most": at_most, "groups": groups}


def cluster_error(values, clusters):
    """The standard error of the mean of values (n,) where those of one cluster go
    together: of a ratio of sums over clusters, linearised. clusters: their numbers, from
    0, (n,) integers. NaN for one cluster."""
    sizes = np.bincount(clusters)
    n = np.count_nonzero(sizes)
    if n == 1:
        return math.nan
    off = np.bincount(clusters, values) - values.mean(dtype=np.float64) * sizes
    return math.sqrt(n / (n - 1) * (off ** 2).sum()) / len(values)


# ----------------------------------------------------------------------------------------
# natural text: a needle


def needle_gain(lm, text, tokenizer, length, n=256, seed=1):
    """How much likelier a passkey is, in nats per digit, with its line in a context of
    `length` tokens of text than without it, on n pairs of sequences.

    Returns {"gain", "gain_se", "digits", "digits_se"}. gain is of the likelihood among
    all tokens: the line also tells that digits follow, and that can be most of it.
    digits is of the likelihood among the ten digits: the line only tells which. There a
    model without memory has 0, a perfect one about ln 10 = 2.303."""
    needle = Needle(tokenizer)
    rng = np.random.default_rng([seed, length])
    present, absent, targets = needle_pairs(rng, n, length, text, tokenizer)
    with_line = answer_likelihood(lm, present, targets, needle.digits)
    without = answer_likelihood(lm, absent, targets, needle.digits)
    gain, gain_error = mean_and_error(with_line[0] - without[0])
    digits, digits_error = mean_and_error(with_line[1] - without[1])
    return {"gain": gain, "gain_se": gain_error, "digits": digits, "digits_se": digits_error}


def answer_likelihood(lm, idx, targets, choices):
    """The mean log-likelihood of each sequence's answers, in nats -> among all tokens
    (n,), and among those of `choices` (n,). All have the same number of answers."""
    among_all, among_choices = [], []
    for asked, logits, answers in asked_logits(lm, idx, targets):
        logits = logits.float()
        right = logits.gather(1, answers[:, None])[:, 0]
        few = logits[:, torch.from_numpy(choices).to(logits.device)]
        rows = len(asked)
        among_all.append((right - logits.logsumexp(1)).view(rows, -1).mean(1))
        among_choices.append((right - few.logsumexp(1)).view(rows, -1).mean(1))
    return torch.cat(among_all), torch.cat(among_choices)


# ----------------------------------------------------------------------------------------
# the script


@dataclass
class Options:
    ckpt: str = option("", "the checkpoint to score: a .pt, a folder or a hub id")
    control: str = option("", "another checkpoint: also --ckpt's scores minus its, of all but the "
                              "in-context score and the needle gain")
    data: str = option(f"{HERE}/python", "folder of token files, see data/prepare.py")
    T: int = option(0, "tokens of a window of text; 0: as the checkpoint was trained, else 4096")
    pairs: str = option("", "of mqar; empty: as the checkpoint was trained, else 4,8,16,32; "
                            "trained on text alone, neither mqar nor fewshot")
    lengths: str = option("", "of passkey sequences, in tokens; empty: no passkey")
    needle: str = option("", "contexts of the needle gain, in tokens; empty: T, where a line fits")
    n: int = option(256, "sequences per task and size")
    windows: int = option(1024, "windows of text for rare repeats, at most")
    rare: int = option(RARE, "a bigram is rare if training has it at most this often")
    seed: int = option(1, "of the sequences")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: the GPU if there is one")
    json: str = option("", "a file to write all of it to")


def main():
    options = Options(**command_line(Options, __doc__))
    device = pick_device(options.device)
    if not options.ckpt:
        raise BadInput("name a checkpoint: --ckpt=out/recipe-gla/statex.pt")
    check_json(options.json)
    if not options.n or not options.windows:
        raise BadInput("--n and --windows must be at least 1")
    lm, trained = read_checkpoint(options.ckpt)
    control = read_checkpoint(options.control)[0] if options.control else None
    train, text, meta = load_corpus(options.data)
    check_tokens(lm.config, text, meta, options.data)
    lm.to(device).eval()
    if control:
        check_tokens(control.config, text, meta, options.data)
        ours, theirs = lm.config.vocab_size, control.config.vocab_size
        if ours != theirs:
            raise BadInput(f"{options.ckpt} and --control={options.control} have unlike "
                           f"vocabularies ({ours}, {theirs}); their scores cannot be compared")
        control.to(device).eval()
    tokenizer = load_tokenizer(meta["tokenizer"])
    sizes = chosen_sizes(options, trained, text)
    check_text(text, tokenizer, **sizes)
    needle = Needle(tokenizer)
    contexts = number_list("needle", options.needle)
    if not contexts and sizes["T"] >= needle.least:
        contexts = [sizes["T"]]
    for length in contexts:
        needle.room(length, text)
    print(f"{options.ckpt} on the held-out text of {options.data}; +- is one standard error, "
          "(in brackets) chance")
    trained_on = trained.get("data", options.data)
    if os.path.realpath(trained_on) != os.path.realpath(options.data):
        print(f"(it was trained on {trained_on})")
    if not trained and not options.T:
        print("(the checkpoint does not say in which windows it was trained; --T does)")
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        result = score(lm, text, tokenizer, **sizes)
        if not math.isfinite(result["val_loss"]):
            raise BadInput(f"the loss of {options.ckpt} on this text is {result['val_loss']}, as "
                           "after a run that diverged; score an earlier checkpoint")
        print_scores(result, sizes["T"])
        if control:
            result["more"] = differences(result, score(control, text, tokenizer, **sizes))
            print_more(result["more"], options.control)
        counts = bigram_counts(options.data, train, meta)
        repeats = rare_repeats(lm, text, counts, tokenizer.eot_token, sizes["T"],
                               options.windows, options.rare, control)
        print_repeats(repeats, options.control)
        gains = {str(length): needle_gain(lm, text, tokenizer, length, options.n, options.seed)
                 for length in contexts}
        print_gains(gains)
    if options.json:
        result = {"ckpt": options.ckpt, "control": options.control, "data": options.data,
                  "corpus": meta.get("sha256"), "T": sizes["T"], "n": options.n,
                  "seed": options.seed, **result, "rare_repeats": repeats, "needle_gain": gains}
        encoded = json.dumps(without_nan(result), indent=1).encode()
        write_file(options.json, lambda file: file.write(encoded))
        print(options.json)


def read_checkpoint(name):
    """-> (lm, the options that it was trained with, {} where they are not known)."""
    if os.path.isdir(name) or not name.endswith(".pt"):
        return LM.from_pretrained(name), {}
    lm, train = load_checkpoint(name)
    return lm, (train or {}).get("options", {})


def chosen_sizes(options, trained, text):
    """The fields of Sizes for `score`: what was typed, else the values of the training
    run, so that the numbers are those that it ended with. Windows are no longer than
    the text. Raises BadInput."""
    T = options.T or trained.get("block_size", 4096)
    if T >= len(text):
        print(f"(the held-out text has {len(text)} tokens: windows are no longer than that)")
    sizes = {"T": min(T, len(text) - 1), "n": options.n, "seed": options.seed,
             "lengths": number_list("lengths", options.lengths),
             "pairs": number_list("pairs", options.pairs or trained.get("pairs", "4,8,16,32"))}
    if trained.get("recall_tokens") == 0 and not options.pairs:
        sizes |= TEXT_ALONE
    return sizes


def check_tokens(config, text, meta, folder):
    """Raises BadInput where the ids of a corpus are not what the model learned."""
    check_tokenizer(config.tokenizer, meta)
    check_vocabulary(config, meta, folder)
    if text.max() >= config.vocab_size:
        raise BadInput(f"{folder} has the token id {text.max()}, which its meta.json denies; "
                       "prepare the text again")


def without_nan(value):
    """JSON has no NaN: an error that cannot be known becomes null."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def error_text(se, digits=4):
    """A standard error as text; a dash where one window or document says nothing of it."""
    return "-" if math.isnan(se) else f"{se:.{digits}f}"


def print_scores(result, T):
    print(f"\nloss {result['val_loss']:.4f} +- {error_text(result['val_loss_se'])} nats per token, "
          f"in-context score {result['icl_score']:+.4f}, windows of {T} tokens")
    for task, table in result["recall"].items():
        cells = []
        for size, mean in table.items():
            se = result["recall_se"][task][size]
            chance = result["chance"][task][size]
            cells.append(f"{size}: {mean:.3f} +- {error_text(se, 3)} ({chance:.2g})")
        if cells:
            print(f"{task:8s}", "   ".join(cells))


def differences(result, of_control):
    """What one result of `score` has more than another, sequence by sequence: {task: {size:
    (mean, standard error)}}, and of the windows of text {"text": (mean, error)}."""
    def more(a, b):
        return mean_and_error(torch.tensor(a).double() - torch.tensor(b).double())
    ours, theirs = result["samples"], of_control["samples"]
    found = {task: {size: more(ours[task][size], theirs[task][size]) for size in of_task}
             for task, of_task in result["recall"].items()}
    return found | {"text": more(ours["text"], theirs["text"])}


def print_more(more, control):
    mean, se = more["text"]
    print(f"more than {control}, sequence by sequence\nloss {mean:+.4f} +- {error_text(se)}")
    for task, of_task in more.items():
        if of_task and task != "text":
            print(f"{task:8s}", "   ".join(f"{size}: {mean:+.3f} +- {error_text(se, 3)}"
                                           for size, (mean, se) in of_task.items()))


def print_repeats(repeats, control):
    print("\nrare repeats: bigrams that this corpus' training text has at most "
          f"{repeats['at_most']} times; "
          f"{repeats['windows']} windows of {repeats['T']} tokens, "
          f"{repeats['documents']} documents")
    print(f"  {'':23s}{'tokens':>9s}   {'loss +- over windows, documents':34s}accuracy, likewise")
    print_groups(repeats["groups"], ("loss", "accuracy"))
    if control:
        print(f"more than {control}, token by token (loss below 0: better)")
        print_groups(repeats["groups"], ("loss_more", "accuracy_more"), sign="+")


def print_groups(groups, measures, sign=""):
    labels = {"near": f"under {NEAR} tokens ago", "middle": f"{NEAR} to {FAR - 1}",
              "far": f"{FAR} or more", "repeats": "all repeats", "new": "as rare, but new",
              "other": "everything else"}
    for name, group in groups.items():
        cells = [f"{group[m]:{sign}.4f} +- {error_text(group[m + '_se'])}, "
                 f"{error_text(group[m + '_se_documents'])}" for m in measures]
        print(f"  {labels[name]:23s}{group['tokens']:9d}   {cells[0]:34s}{cells[1]}")


def print_gains(gains):
    if gains:
        print("\nneedle gain, nats per digit (among the ten digits: 2.303 is perfect)")
    for length, gain in gains.items():
        print(f"  {length} tokens: {gain['gain']:+.4f} +- {error_text(gain['gain_se'])} "
              f"({gain['digits']:+.4f} +- {error_text(gain['digits_se'])})")


if __name__ == "__main__":
    run_script(main)
