"""Recall and in-context-learning tasks: generators and scores.

    python data/recall.py --ckpt=out/recipe-gla/statex.pt         score a checkpoint

Every generator returns idx and targets, both (n, T) int64 arrays: targets[i, t] is the token expected after idx[i, :t+1],
or -100 where nothing is asked. Nothing but the context tells the answer, so a model without memory is at chance.

    mqar      multi-query associative recall (Arora et al., arXiv 2312.04927): N key-value pairs, then the keys again
    passkey   a 5-digit key assigned on one line of real text, asked for at the end (Mohtashami & Jaggi, arXiv 2305.16300)
    fewshot   a fresh random map from tokens to labels, shown `shots` times, then asked
    text_loss held-out loss, and the in-context score: late tokens' loss minus early ones' (Olsson et al., arXiv 2209.11895)
"""
import os, sys

import numpy as np

SYMBOLS = 256          # mqar and fewshot draw from this many tokens of the vocabulary, the same ones always
LABELS = 4             # of fewshot; chance is 1 in LABELS
DIGITS = 5             # of a passkey


def symbols(vocab_size):
    """The fixed tokens that mqar and fewshot draw from: the first half are keys, the second half values."""
    return np.random.default_rng(0).permutation(vocab_size)[:min(SYMBOLS, vocab_size)]


def draw(rng, n, k, pool):
    """n rows of k distinct entries of pool."""
    return pool[np.argsort(rng.random((n, len(pool))), axis=1)[:, :k]]


def mqar(rng, n, pairs, vocab_size):
    """n sequences of 4 * pairs tokens: k1 v1 k2 v2 ..., then every key again in random order, each before its value."""
    pool = symbols(vocab_size)
    half = len(pool) // 2
    if pairs > half:
        raise ValueError(f"{pairs} pairs need {2 * pairs} symbols; there are {len(pool)}")
    keys, values = draw(rng, n, pairs, pool[:half]), draw(rng, n, pairs, pool[half:])
    order = np.argsort(rng.random((n, pairs)), axis=1)
    asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    idx = np.concatenate([np.stack([keys, values], 2), np.stack([asked, answers], 2)], axis=1).reshape(n, -1)
    targets = np.full_like(idx, -100)
    targets[:, 2 * pairs::2] = answers
    return idx, targets


def fewshot(rng, n, shots, vocab_size, items=8):
    """n sequences: every item with its label, in random order, `shots` times, then once more to be asked."""
    pool = symbols(vocab_size)
    half = len(pool) // 2
    tokens, labels = draw(rng, n, items, pool[:half]), draw(rng, n, LABELS, pool[half:])
    label = np.take_along_axis(labels, rng.integers(LABELS, size=(n, items)), 1)
    rounds = []
    for _ in range(shots + 1):
        order = np.argsort(rng.random((n, items)), axis=1)
        rounds.append(np.stack([np.take_along_axis(tokens, order, 1), np.take_along_axis(label, order, 1)], 2))
    idx = np.concatenate(rounds, axis=1).reshape(n, -1)
    targets = np.full_like(idx, -100)
    asked = 2 * items * shots
    targets[:, asked::2] = idx[:, asked + 1::2]
    return idx, targets


def passkey(rng, n, length, text, tokenizer):
    """n sequences of `length` tokens: text with `passkey = ddddd` on a line of its own at a random depth, and at the end
    `passkey = ` with the digits to be filled in. text: token ids of held-out text. Each digit is a token of its own."""
    line, line_end = tokenizer.encode_ordinary("\npasskey ="), tokenizer.encode_ordinary("\n")
    space = tokenizer.encode_ordinary(" ")
    digit = np.array([tokenizer.encode_ordinary(str(d))[-1] for d in range(10)])
    question = len(line) + len(space) + DIGITS
    room = length - 2 * question - len(line_end)
    if room < 1:
        raise ValueError(f"a passkey needs {2 * question + len(line_end) + 1} tokens; length is {length}")
    idx, targets = np.empty((n, length), np.int64), np.full((n, length), -100, np.int64)
    for i in range(n):
        key = digit[rng.integers(10, size=DIGITS)]
        start, depth = rng.integers(len(text) - room), rng.integers(room)
        words = text[start:start + room]
        idx[i] = np.concatenate([words[:depth], line, space, key, line_end, words[depth:], line, space, key])
        targets[i, -DIGITS - 1:-1] = key
    return idx, targets


# ---------------------------------------------------------------------------------------------------------------------
# scores


def accuracy(lm, idx, targets, whole=False, batch=16384):
    """-> (accuracy, standard error over sequences). A sequence scores the share of its answers that the model's
    likeliest token gets right; with whole=True, 1 if all are right, else 0."""
    import torch
    device, scores = next(lm.parameters()).device, []
    rows = max(1, batch // idx.shape[1])
    with torch.no_grad():
        for i in range(0, len(idx), rows):
            x, y = (torch.from_numpy(a[i:i + rows]).to(device) for a in (idx, targets))
            asked = y != -100
            right = torch.zeros_like(asked)
            features, _ = lm.features(x)
            logits = lm.lm_head(features[asked])[:, :lm.config.vocab_size]
            right[asked] = logits.argmax(-1) == y[asked]
            score = right.sum(1) / asked.sum(1)
            scores.append((score == 1).float() if whole else score)
    scores = torch.cat(scores)
    return scores.mean().item(), (scores.std() / len(scores) ** 0.5).item()


def text_loss(lm, text, T, windows=64, batch=16384):
    """-> (loss, its standard error over windows, in-context score), in nats a token, on evenly spaced windows of T + 1
    tokens. The in-context score is the mean loss of the last quarter minus that of the second eighth of a window:
    negative when the context helps."""
    import torch
    import torch.nn.functional as F
    device, losses = next(lm.parameters()).device, []
    windows = min(windows, max(1, (len(text) - 1) // T))
    T = min(T, len(text) - 1)
    starts = np.linspace(0, len(text) - T - 1, windows).astype(np.int64)
    rows = np.stack([text[s:s + T + 1] for s in starts]).astype(np.int64)
    with torch.no_grad():
        for i in range(0, windows, max(1, batch // T)):
            x = torch.from_numpy(rows[i:i + max(1, batch // T)]).to(device)
            logits = lm(x[:, :-1])[0]
            losses.append(F.cross_entropy(logits.float().mT, x[:, 1:], reduction="none"))
    losses = torch.cat(losses)                                                      # (windows, T)
    early, late = losses[:, T // 8:max(T // 4, T // 8 + 1)].mean(), losses[:, 3 * T // 4:].mean()
    return losses.mean().item(), (losses.mean(1).std() / windows ** 0.5).item(), (late - early).item()


def score(lm, text, tokenizer, pairs=(4, 8, 16, 32), lengths=(64, 128, 256), shots=(1, 2, 4), T=256, n=256, seed=1):
    """All the scores of a model, on the same sequences for every model with this vocabulary: a dict with val_loss,
    icl_score, recall (task -> size -> accuracy) and, of the same shape, the standard errors."""
    rng = lambda size: np.random.default_rng([seed, size])
    vocab = lm.config.vocab_size
    tables = {"mqar": {p: accuracy(lm, *mqar(rng(p), n, p, vocab)) for p in pairs},
              "passkey": {t: accuracy(lm, *passkey(rng(t), n, t, text, tokenizer), whole=True) for t in lengths},
              "fewshot": {s: accuracy(lm, *fewshot(rng(s), n, s, vocab)) for s in shots}}
    loss, loss_se, icl = text_loss(lm, text, T)
    pick = lambda i: {task: {str(k): v[i] for k, v in table.items()} for task, table in tables.items()}
    return {"val_loss": loss, "val_loss_se": loss_se, "icl_score": icl, "recall": pick(0), "recall_se": pick(1)}


def main():
    import torch
    from data.prepare import BadInput, command_line, load_corpus, load_tokenizer
    from model import LM
    o = command_line(__doc__, ckpt="", data=f"{os.path.dirname(os.path.abspath(__file__))}/python", n=256, seed=1,
                     device="cuda" if torch.cuda.is_available() else "cpu")
    if not o.ckpt:
        raise BadInput("name a checkpoint: --ckpt=out/recipe-gla/statex.pt")
    lm = LM.from_pretrained(o.ckpt).to(o.device).eval()
    _, val, meta = load_corpus(o.data)
    if meta["vocab_size"] > lm.config.vocab_size:
        raise BadInput(f"{o.data} has {meta['vocab_size']} token ids, the model {lm.config.vocab_size}; prepare the text with its tokenizer")
    s = score(lm, val, load_tokenizer(meta["tokenizer"]), n=o.n, seed=o.seed)
    print(f"val loss {s['val_loss']:.4f} +- {s['val_loss_se']:.4f}   in-context score {s['icl_score']:+.4f}")
    for task, table in s["recall"].items():
        print(f"{task:8s}", "   ".join(f"{k}: {v:.3f} +- {s['recall_se'][task][k]:.3f}" for k, v in table.items()))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from data.prepare import main_line
    main_line(main)
