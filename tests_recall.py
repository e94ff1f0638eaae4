"""Tests of data/recall.py: generators against a perfect memory and none, scores against their
definitions, the script."""
from data.options import BadInput

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import prepare, recall
from model import LM, Config, save_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Token files of some of this repository's own source, in 30 documents."""
    folder = str(tmp_path_factory.mktemp("corpus") / "tokens")
    with open(f"{HERE}/kernels.py") as f:
        source = f.read()
    documents = [(source[i * 2000:(i + 1) * 2000], float(i == 19)) for i in range(30)]
    prepare.write_corpus(documents, folder, "code4096")
    return folder


class Induction(torch.nn.Module):
    """What followed the current token when it was last seen is likeliest by far. A model that
    remembers this for the `memory` tokens seen last: all of them, a few, or (0) none."""

    def __init__(self, vocab_size, memory=10**9):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.memory = memory
        self.lm_head = torch.nn.Identity()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def features(self, idx, state=None):
        logits = torch.zeros(*idx.shape, self.config.vocab_size)
        for row, tokens in enumerate(idx.tolist()):
            follower = {}
            for t, token in enumerate(tokens):
                if t:
                    follower.pop(tokens[t - 1], None)        # to the end of the dict
                    follower[tokens[t - 1]] = token
                if len(follower) > self.memory:
                    del follower[next(iter(follower))]
                if token in follower:
                    logits[row, t, follower[token]] = 9.0
        return logits, None


def small_model(**changes):
    torch.manual_seed(0)
    shape = dict(block="gla", vocab_size=4096, n_layer=1, d_model=16, n_head=2, d_mlp=16)
    return LM(Config(**shape | changes)).eval()


# ----------------------------------------------------------------------------------------
# made-up sequences


def test_mqar_by_perfect_memory_and_by_none():
    for pairs in (1, 4, 32):
        idx, targets = recall.mqar(np.random.default_rng(pairs), 200, pairs, 4096)
        assert idx.shape == targets.shape == (200, 4 * pairs)
        assert (targets != -100).sum() == 200 * pairs
        blind = []
        for x, y in zip(idx, targets, strict=True):
            memory = dict(zip(x[:2 * pairs:2], x[1:2 * pairs:2], strict=True))
            assert len(memory) == pairs
            asked = y != -100
            assert all(memory[key] == value for key, value in zip(x[asked], y[asked], strict=True))
            blind.append((y[asked] == x[1]).mean())          # always the first value shown
        assert abs(np.mean(blind) - 1 / pairs) < 0.02
        assert recall.accuracy(Induction(4096), idx, targets) == (1.0, 0.0)
    with pytest.raises(BadInput, match="1000 pairs need 2000 symbols"):
        recall.mqar(np.random.default_rng(0), 1, 1000, 4096)


def test_fewshot_by_perfect_memory_and_by_none():
    for shots in (1, 3):
        idx, targets = recall.fewshot(np.random.default_rng(shots), 400, shots, 4096)
        blind = []
        for x, y in zip(idx, targets, strict=True):
            asked = np.flatnonzero(y != -100)
            memory = dict(zip(x[:asked[0]:2], x[1:asked[0]:2], strict=True))
            assert len(asked) == 8 and len(memory) == 8
            assert all(memory[x[t]] == y[t] for t in asked)
            labels = list(dict.fromkeys(x[1:asked[0]:2]))
            blind.append(np.mean([y[t] == labels[0] for t in asked]))
        assert 0.2 < np.mean(blind) < 0.45              # 1 in 4, a little more for a label seen
        assert recall.accuracy(Induction(4096), idx, targets)[0] == 1
    with pytest.raises(BadInput, match="at least 16 tokens"):
        recall.fewshot(np.random.default_rng(0), 1, 1, 12)


def test_passkey_is_in_the_text_and_nowhere_else(corpus):
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    idx, targets = recall.passkey(np.random.default_rng(0), 50, 128, text, tokenizer)
    depths = set()
    for x, y in zip(idx, targets, strict=True):
        decoded = tokenizer.decode(x.tolist())
        key = tokenizer.decode(y[y != -100].tolist())
        assert len(x) == 128
        assert len(key) == 5 and key.isdigit() and decoded.endswith(f"\npasskey = {key}")
        assert decoded.count(f"passkey = {key}") == 2
        depths.add(decoded.index("passkey"))
    assert len(depths) > 20


def test_what_a_passkey_needs(corpus):
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    rng = np.random.default_rng(0)
    for make in (recall.passkey, recall.needle_pairs):
        with pytest.raises(BadInput, match="of 12 tokens is too short; it needs at least"):
            make(rng, 1, 12, text, tokenizer)
        with pytest.raises(BadInput, match="needs more than that of held-out text"):
            make(rng, 1, 64, text[:64], tokenizer)
        assert make(rng, 9, 64, text[:65], tokenizer)[0].shape == (9, 64)
    bytes_only = SimpleNamespace(encode_ordinary=lambda text: [0])
    with pytest.raises(BadInput, match="a token for every digit"):
        recall.Needle(bytes_only)


def test_accuracy_counts_shares_or_all(corpus):
    """Of three answers two are right in the first sequence, three in the second."""
    idx = np.array([[1, 2, 3, 9, 1, 2], [1, 2, 3, 4, 1, 2]])
    targets = np.array([[-100, -100, -100, -100, 2, 5], [-100, -100, -100, -100, 2, 3]])
    mean, error = recall.accuracy(Induction(10), idx, targets)
    assert mean == 0.75 and error == pytest.approx(0.25)
    assert recall.accuracy(Induction(10), idx, targets, all_right=True)[0] == 0.5
    assert np.isnan(recall.accuracy(Induction(10), idx[:1], targets[:1])[1])


# ----------------------------------------------------------------------------------------
# natural text


def test_windows_are_evenly_spaced_and_ask_no_token_twice():
    text = np.arange(1000, dtype=np.uint16)
    for T, n in ((10, 7), (10, 99), (10, 500), (111, 9), (999, 3), (1, 5000)):
        windows, starts = recall.text_windows(text, T, n)
        asked = windows[:, 1:].ravel()
        assert windows.shape == (min(n, 999 // T), T + 1) and windows.dtype == np.int64
        assert len(set(asked.tolist())) == len(asked)
        assert (windows[:, 0] == starts).all() and starts[0] == 0
        if len(starts) > 2:
            assert np.ptp(np.diff(starts)) <= 1
    for T in (0, 1000):
        with pytest.raises(BadInput, match="take a smaller --T or more text"):
            recall.text_windows(text, T, 1)


@pytest.mark.parametrize("block", ("gla", "mamba2"))
def test_token_scores_are_those_of_all_logits_bit_for_bit(block):
    """In any batches, with a padded vocabulary, and with slices that cut through windows."""
    lm = small_model(block=block, vocab_size=4099, pad_vocab=16, conv_size=4, d_state=4,
                     headdim=16)
    windows = np.random.default_rng(0).integers(4099, size=(9, 101))
    x = torch.from_numpy(windows)
    with torch.no_grad():
        logits = lm(x[:, :-1])[0]
    losses, hits = recall.token_scores(lm, windows)
    assert losses.dtype == np.float32 and hits.dtype == bool
    if not torch.cuda.is_available():
        expected = F.cross_entropy(logits.mT, x[:, 1:], reduction="none")
        assert (losses == expected.numpy()).all()
    assert (hits == (logits.argmax(-1) == x[:, 1:]).numpy()).all()
    for batch_tokens in (1, 200, 500):
        again, hits_again = recall.token_scores(lm, windows, batch_tokens)
        assert np.allclose(losses, again, atol=1e-5) and (hits == hits_again).all()


def test_text_loss_is_the_loss_and_falls_where_the_context_helps():
    lm = small_model()
    text = np.random.default_rng(0).integers(4096, size=700)
    loss, error, _ = recall.text_loss(lm, text, 99)
    windows, _ = recall.text_windows(text, 99, 64)
    targets = torch.from_numpy(windows[:, 1:])
    assert len(windows) == 7 and error > 0
    assert loss == pytest.approx(lm(torch.from_numpy(windows[:, :-1]), targets)[1].item(), abs=1e-5)
    shorter, no_error, _ = recall.text_loss(lm, text[:40], 99)     # one window of 39
    assert 0 < shorter < 20 and np.isnan(no_error)
    phrase = np.tile(np.random.default_rng(0).permutation(30), 40)
    assert recall.text_loss(Induction(30), phrase, 160)[2] < -1
    assert recall.text_loss(Induction(30, memory=0), phrase, 160)[2] == pytest.approx(0)


@pytest.mark.parametrize("vocab_size", (7, 1 << 16, 100000))
def test_bigram_counts(vocab_size):
    tokens = np.random.default_rng(0).integers(7, size=500) * (vocab_size // 7)
    tokens[-1] = vocab_size - 1
    kind = np.uint32 if vocab_size > 1 << 16 else np.uint16
    expected = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for at_once in (3, 100, 10**6):
        counts = recall.BigramCounts.of(tokens.astype(kind), vocab_size, at_once)
        assert counts.counts.sum() == 499 and len(counts.pairs) == len(expected)
        asked = np.random.default_rng(1).choice(tokens, size=(3, 200))
        seen = counts.times_seen(recall.bigrams(asked, vocab_size))
        for row, found in zip(asked.tolist(), seen, strict=True):
            assert found.tolist() == [expected[pair] for pair in zip(row, row[1:])]  # noqa: B905


def test_counts_are_kept_beside_the_token_files(corpus, monkeypatch):
    train, _, meta = prepare.load_corpus(corpus)
    first = recall.bigram_counts(corpus, train, meta)
    assert [f for f in os.listdir(corpus) if "bigrams" in f] == ["bigrams.npz"]
    monkeypatch.setattr(recall.BigramCounts, "of", None)                   # not called again
    kept = recall.bigram_counts(corpus, train, meta)
    assert (kept.pairs == first.pairs).all() and (kept.counts == first.counts).all()
    monkeypatch.undo()
    other = recall.bigram_counts(corpus, train[:100], meta | {"sha256": "another corpus"})
    assert other.counts.sum() == 99
    for damage in (b"", b"PK\x03\x04 cut short"):
        with open(f"{corpus}/bigrams.npz", "wb") as f:
            f.write(damage)
        again = recall.bigram_counts(corpus, train, meta)
        assert (again.pairs == first.pairs).all()
    nameless = recall.bigram_counts(corpus, train[:50], {"vocab_size": 4096})
    assert nameless.counts.sum() == 49                       # of no known corpus: not kept
    assert (recall.bigram_counts(corpus, train, meta).pairs == first.pairs).all()


def test_rare_repeats_by_definition(monkeypatch):
    """Every group, its scores and its errors, against loops."""
    monkeypatch.setattr(recall, "NEAR", 5)
    monkeypatch.setattr(recall, "FAR", 12)
    rng = np.random.default_rng(0)
    train, text = rng.integers(8, size=300), rng.integers(8, size=900)
    lm = small_model(vocab_size=8)
    counts = recall.BigramCounts.of(train, 8)
    result = recall.rare_repeats(lm, text, counts, eot=3, T=60, n=9, at_most=4)
    windows, starts = recall.text_windows(text, 60, 9)
    losses, hits = recall.token_scores(lm, windows)
    in_training = Counter(zip(train.tolist(), train[1:].tolist()))  # noqa: B905
    found = {name: [] for name in ("near", "middle", "far", "repeats", "new", "other")}
    for row, tokens in enumerate(windows.tolist()):
        last = {}
        for t in range(60):
            pair = tokens[t], tokens[t + 1]
            document = (text[:starts[row] + t + 1] == 3).sum()
            entry = losses[row, t], hits[row, t], row, document
            ago = t - last.get(pair, t)
            rare = in_training[pair] <= 4
            last[pair] = t
            if not rare or not ago:
                found["other"].append(entry)
            if rare and not ago:
                found["new"].append(entry)
            if rare and ago:
                found["repeats"].append(entry)
                found["near" if ago < 5 else "middle" if ago < 12 else "far"].append(entry)
    assert {k: result[k] for k in ("T", "windows", "at_most")} == {
        "T": 60, "windows": 9, "at_most": 4}
    assert set(result["groups"]) == set(found)
    for name, entries in found.items():
        group = result["groups"][name]
        loss, hit, window, document = map(np.array, zip(*entries, strict=True))
        assert group["tokens"] == len(entries) > 3
        assert group["loss"] == pytest.approx(loss.mean(), rel=1e-5)
        assert group["accuracy"] == pytest.approx(hit.mean())
        assert group["loss_se"] == pytest.approx(recall.cluster_error(loss, window), rel=1e-5)
        assert group["accuracy_se_documents"] == pytest.approx(
            recall.cluster_error(hit, document))


def test_rare_repeats_tell_a_memory_from_none():
    """Names that training never had, used again and again, between words that it knows."""
    rng = np.random.default_rng(0)
    train = rng.integers(50, size=20000)
    text = rng.integers(50, size=3000)
    names = rng.permutation(np.arange(50, 100))
    for place in range(10, 2990, 30):
        name = rng.integers(25)
        text[place:place + 2] = names[2 * name:2 * name + 2]
    counts = recall.BigramCounts.of(train, 100)
    memory, none = (recall.rare_repeats(Induction(100, memory), text, counts, 99, T=1000,
                                        at_most=0)["groups"] for memory in (10**9, 0))
    assert memory["repeats"]["accuracy"] > 0.9 and none["repeats"]["accuracy"] == 0
    assert memory["new"]["accuracy"] < 0.05
    assert memory["repeats"]["loss"] < none["repeats"]["loss"] - 2
    assert "far" not in memory                                # no window is that long
    parts = memory["near"]["tokens"] + memory["middle"]["tokens"]
    assert parts == memory["repeats"]["tokens"]
    assert memory["repeats"]["tokens"] + memory["other"]["tokens"] == 2000


def test_rare_repeats_separate_memories_of_other_sizes(corpus):
    """Natural text: a memory four times as large recalls more."""
    text, train, _ = prepare.load_corpus(corpus)             # its larger part is the text here
    counts = recall.BigramCounts.of(train, 4096)
    scores = {}
    for memory in (16, 64, 256):
        result = recall.rare_repeats(Induction(4096, memory), text, counts, 4095, T=1500)
        scores[memory] = result["groups"]
    few, some, many = (scores[memory]["near"]["accuracy"] for memory in scores)
    assert few + 0.1 < some and some + 0.1 < many
    few, some, many = (scores[memory]["new"]["accuracy"] for memory in scores)
    assert max(few, some, many) < 0.05


def test_cluster_error():
    values = np.random.default_rng(0).normal(size=60)
    alone = recall.cluster_error(values, np.arange(60))
    assert alone == pytest.approx(values.std(ddof=1) / 60 ** 0.5)
    twice = recall.cluster_error(np.repeat(values, 2), np.repeat(np.arange(60), 2))
    assert twice == pytest.approx(alone)             # saying a thing twice is no new evidence
    assert np.isnan(recall.cluster_error(values, np.zeros(60)))


def test_needle_pairs_differ_in_the_line_alone(corpus):
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    line_tokens = recall.Needle(tokenizer).line_tokens
    rng = np.random.default_rng(0)
    present, absent, targets = recall.needle_pairs(rng, 40, 100, text, tokenizer)
    for with_line, without, answers in zip(present, absent, targets, strict=True):
        key = tokenizer.decode(answers[answers != -100].tolist())
        other = np.flatnonzero(with_line != without)
        assert np.ptp(other) < line_tokens
        assert tokenizer.decode(with_line.tolist()).count(f"\npasskey = {key}") == 2
        assert tokenizer.decode(without.tolist()).count(f"passkey = {key}") == 1
        begin = without[:50].tobytes()
        assert begin in text.astype(np.int64).tobytes()      # text as it was


def test_needle_gain_is_above_zero_for_a_memory_alone(corpus):
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    vocab_size = tokenizer.n_vocab
    memory = recall.needle_gain(Induction(vocab_size), text, tokenizer, 100, n=20)
    assert memory["gain"] > 5 * memory["gain_se"] and memory["digits"] > 5 * memory["digits_se"]
    none = recall.needle_gain(Induction(vocab_size, memory=0), text, tokenizer, 100, n=20)
    assert none["gain"] == none["digits"] == 0


def test_likelihood_of_answers_against_all_logits():
    lm = small_model(vocab_size=50)
    rng = np.random.default_rng(0)
    idx = rng.integers(50, size=(7, 30))
    targets = np.full_like(idx, -100)
    targets[:, -4:] = rng.integers(10, size=(7, 4))
    among_all, among_few = recall.answer_likelihood(lm, idx, targets, np.arange(10))
    with torch.no_grad():
        logits = lm(torch.from_numpy(idx))[0][:, -4:]
    answers = torch.from_numpy(targets[:, -4:, None])
    expected = logits.log_softmax(-1).gather(-1, answers).mean((1, 2))
    assert torch.allclose(among_all, expected, atol=1e-5)
    expected = logits[..., :10].log_softmax(-1).gather(-1, answers).mean((1, 2))
    assert torch.allclose(among_few, expected, atol=1e-5)


# ----------------------------------------------------------------------------------------
# all scores together, and the script


def test_score_and_its_check(corpus):
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    sizes = dict(T=32, pairs=(2, 4), shots=(1,), n=8)
    result = recall.score(small_model(), text, tokenizer, **sizes)
    assert result == recall.score(small_model(), text, tokenizer, **sizes)
    assert set(result["recall"]) == set(result["chance"]) == {"mqar", "passkey", "fewshot"}
    assert result["recall"]["passkey"] == {}                 # only where it is asked for
    assert result["chance"]["mqar"] == {"2": 0.5, "4": 0.25}
    assert result["chance"]["fewshot"] == {"1": 0.25}
    samples = result["samples"]
    assert np.mean(samples["mqar"]["4"]) == pytest.approx(result["recall"]["mqar"]["4"])
    assert len(samples["fewshot"]["1"]) == 8
    assert np.mean(samples["text"]) == pytest.approx(result["val_loss"])
    recall.check_text(text[:64], tokenizer)
    recall.check_text(text, tokenizer, lengths=(64,))
    for bad in (dict(pairs=(4, 200)), dict(lengths=(8,)), dict(lengths=(10**6,))):
        with pytest.raises(BadInput):
            recall.check_text(text, tokenizer, **bad)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["recall.py", "--device=cpu", *arguments])
    recall.main()


def test_script_prints_the_numbers_of_the_run(corpus, tmp_path, monkeypatch, capsys):
    """With the run's own windows and pairs, the same every time, as JSON too."""
    lm = small_model(tokenizer="code4096")
    checkpoint = str(tmp_path / "model.pt")
    save_checkpoint(checkpoint, lm, {"options": {"block_size": 48, "pairs": "2,8"}})
    tokenizer = prepare.load_tokenizer("code4096")
    _, text, _ = prepare.load_corpus(corpus)
    outputs = []
    for name in ("first.json", "second.json"):
        run(monkeypatch, f"--ckpt={checkpoint}", f"--data={corpus}", f"--json={tmp_path / name}")
        outputs.append(capsys.readouterr().out.replace(name, ""))
        with open(tmp_path / name) as f:
            written = json.load(f)
    assert outputs[0] == outputs[1]
    assert not list(tmp_path.glob("*.tmp"))
    expected = recall.score(lm, text, tokenizer, T=48, pairs=(2, 8))
    assert {name: written[name] for name in expected} == expected
    assert written["rare_repeats"]["T"] == 48 and "repeats" in written["rare_repeats"]["groups"]
    assert set(written["needle_gain"]) == {"48"}
    assert f"loss {expected['val_loss']:.4f}" in outputs[0] and "everything else" in outputs[0]
    assert "passkey" not in outputs[0]


def test_bad_input_of_the_script_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    ours = str(tmp_path / "ours.pt")
    save_checkpoint(ours, small_model(tokenizer="code4096"))
    other = str(tmp_path / "other.pt")
    save_checkpoint(other, small_model(tokenizer="gpt2", vocab_size=50257))
    small = str(tmp_path / "small.pt")
    save_checkpoint(small, small_model(vocab_size=300))
    for expected, *arguments in (
            ("name a checkpoint",),
            ("prepare it with --tokenizer=gpt2", f"--ckpt={other}"),
            ("4096 token ids, the model 300", f"--ckpt={small}"),
            ("--pairs=4,x is not a list", f"--ckpt={ours}", "--pairs=4,x"),
            ("1000 pairs need 2000 symbols", f"--ckpt={ours}", "--pairs=1000"),
            ("needs more than that of held-out text", f"--ckpt={ours}", "--lengths=9999999"),
            ("needs more than that of held-out text", f"--ckpt={ours}", "--needle=9999999"),
            ("no such folder", f"--ckpt={ours}", f"--json={tmp_path}/none/x.json"),
            ("nearest known one is --needle", f"--ckpt={ours}", "--needles=4")):
        with pytest.raises(BadInput) as refused:
            run(monkeypatch, f"--data={corpus}", *arguments)
        assert expected in str(refused.value) and "\n" not in str(refused.value)
        assert capsys.readouterr().out == ""                 # nothing was scored before
    done = subprocess.run([sys.executable, f"{HERE}/data/recall.py", "--device=cpu"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
