"""What was found by trying to break things; each test belongs to the file that it names."""
from data.options import BadInput

import base64
import contextlib
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model as model_script
import train as train_script
from data import options, prepare, recall, report
from expand import expand
from model import LM, Config, load_checkpoint, save_checkpoint
from test_statex import TINY, cli, ran, refused, small


# model.py

@pytest.mark.parametrize("block", ["gla", "mamba2"])
def test_ids_states_and_prompts_that_are_none(block):
    """On the right what the message says."""
    lm = small(block)
    idx = torch.randint(61, (2, 9))
    state = lm(idx)[2]
    for call, says in (
            (lambda: lm([[1, 2]]), "idx is of type list"),
            (lambda: lm(torch.tensor([[61]])), "token id 61; expected 0 to 60"),
            (lambda: lm(torch.tensor([[-1]])), "token id -1"),
            (lambda: lm(idx, idx + 61), "targets has the token id"),
            (lambda: lm(idx, idx * 0 - 1), "targets has the token id -1"),
            (lambda: lm(idx, idx.float()), "is torch.float32"),
            (lambda: lm(idx, idx.tolist()), "targets is of type list"),
            (lambda: lm(idx, state=5), "state is of type int"),
            (lambda: lm(idx, state=[(*pair, 0) for pair in state]), "expected a pair"),
            (lambda: lm(idx, first=torch.zeros_like(idx)), "is torch.int64; expected torch.bool"),
            (lambda: lm.generate(idx, 2.5), "n is 2.5"),
            (lambda: lm.generate(idx, 2, top_k=2.5), "top_k is 2.5"),
            (lambda: lm.generate(idx, 2, seed=1.5), "seed is 1.5"),
            (lambda: lm.generate([1, 2, 3], 2), "each a list of token ids"),
            (lambda: lm.generate("hello", 2), "the prompts are not token ids"),
            (lambda: lm.generate([[1], [70]], 2), "a prompt has the token id 70")):
        with pytest.raises(BadInput, match=re.escape(says)):
            call()


@pytest.mark.parametrize("block", ["gla", "mamba2"])
def test_no_tokens_of_packed_documents(block):
    idx = torch.zeros(2, 0, dtype=torch.long)
    logits, _, state = small(block)(idx, first=idx.bool())
    assert logits.shape == (2, 0, 61)
    assert small(block)(idx + 1, state=state, first=idx.bool())[0].shape == (2, 0, 61)


def test_options_of_a_config_that_are_no_numbers(tmp_path):
    for name, value in (("norm_eps", "x"), ("norm_eps", -1.0), ("expand_k", math.nan),
                        ("expand_k", "a"), ("expand_k", -0.5), ("expand_v", 0),
                        ("expand_v", 1e-9), ("tie_embeddings", "yes"), ("tokenizer", None)):
        with pytest.raises(BadInput):
            Config("gla", **{name: value})
    lm = small("gla")
    for config, weights in ((None, {}), ([1], {}), ({1: 2}, {}), ({}, None), ({}, [1])):
        torch.save({"config": config, "model": weights, "train": None}, tmp_path / "x.pt")
        with pytest.raises(BadInput):
            load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(AttributeError):             # what cannot be pickled leaves nothing behind
        save_checkpoint(tmp_path / "y.pt", lm, {"x": lambda: 0})
    assert os.listdir(tmp_path) == ["x.pt"]


# expand.py

def test_layers_and_numbers_that_are_none():
    lm = small("mamba2")
    for call in (dict(layers=[0.5]), dict(layers=[True]), dict(layers="0"), dict(layers=0),
                 dict(layers=None), dict(layers=[0], factor="2"), dict(layers=[0], factor=2.0),
                 dict(layers=[0], seed=None), dict(layers=[0], seed=1.5),
                 dict(layers=[0], init="inherit", noise=math.nan),
                 dict(layers=[0], init="inherit", noise=-1)):
        with pytest.raises(BadInput):
            expand(lm, **call)


# data/prepare.py

def test_tokenizers_and_wheels_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("text.txt", "w") as f:
        f.write("a line of text\n" * 500)
    with open("odd.tiktoken", "w") as f:                # 300 tokens of two bytes each
        for i in range(300):
            f.write(f"{base64.b64encode(bytes([i % 256, i // 256])).decode()} {i}\n")
    refused(prepare, "text.txt", "--out=o", "--tokenizer=odd.tiktoken", says="the 256 bytes")
    open("blank.txt", "w").close()
    refused(prepare, "blank.txt", "--out=o", "--train_bpe=new.tiktoken", says="no text in there")
    os.makedirs("folder.tiktoken")
    refused(prepare, "text.txt", "--out=o", "--train_bpe=folder.tiktoken", says="Is a directory")
    os.makedirs("wheels/a.whl")
    with open("wheels/b.whl", "w") as f:
        f.write("no wheel")
    with open("pins", "w") as f:
        f.write(f"b==1 --hash=sha256:{hashlib.sha256(b'no wheel').hexdigest()}\n")
    refused(prepare, "--packages=pins", "--wheels=wheels", "--out=o", says="1 wheels of pins")
    assert not [name for name in os.listdir() if name.endswith((".tmp", "new.tiktoken"))]
