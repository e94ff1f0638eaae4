"""How fast a model trains on one GPU, or with --generate reads and writes, beside the peers.

    python data/results/throughput.py                           the 340M and 370M, base and expanded
    python data/results/throughput.py --models=gla-340m --batch_size=32
    python data/results/throughput.py --models=gla-1.3b-expanded --batch_size=1 --T=65536
                                      --checkpoint_activations --peers=false    (one command)
    python data/results/throughput.py --models=gla-1.3b,gla-1.3b-expanded --generate

A training step is forward, backward, clipping and AdamW, on random tokens. Ours is train.py's:
its optimizer, its precision, its compiled layers. The peers, where they can be imported, are
flash-linear-attention's GLAForCausalLM with its fused norm, SwiGLU and cross-entropy, and
mamba_ssm's Mamba2 blocks between RMSNorms (with causal_conv1d where that is installed, else
PyTorch's conv1d). They get the same autocast, clipping and optimizer, and are not compiled.

Models: a name of model.SIZES, NAME-expanded (the paper's layers and factor: GLA every 6th layer
with one head, Mamba2 every 12th with 4 N) or NAME-preserve (the same layers by `preserve`); or
evidence-FAMILY-ARM, an arm of block.py, such as evidence-gla-preserve-x16.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.options import BadInput, command_line, option, run_script

import importlib.util
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from expand import enlarged
from model import LM, SIZES

WARM_UP = 3             # steps before the timed ones: they compile, or record
PROMPT = 8192           # tokens read in --generate
WRITTEN = 64            # tokens written in --generate
BATCHES = (1, 64)       # of --generate


@dataclass
class Options:
    models: str = option("gla-340m,gla-340m-expanded,mamba2-370m,mamba2-370m-expanded",
                         "names, see above")
    batch_size: int = option(16, "sequences per step")
    T: int = option(2048, "tokens per sequence")
    vocab_size: int = option(32000, "token ids")
    steps: int = option(12, "timed steps")
    lr: float = option(1e-3, "highest learning rate; at 1e-2 a model of this size falls apart, "
                             "GLA's decays become steep, and its kernels take a slower way")
    warmup: int = option(1000, "steps of linear warm-up")
    compile: bool = option(True, "torch.compile every layer of ours")
    graph: bool = option(False, "record ours as a CUDA graph; its memory is not in the peak")
    checkpoint_activations: bool = option(False, "keep layers' inputs only")
    bfloat16_residual: bool = option(False, "ours with the residual stream in bfloat16")
    peers: bool = option(True, "the peers too")
    generate: bool = option(False, "read and write instead, in bfloat16; random weights")


def shape(name, vocab_size):
    """The Config of a name. Raises BadInput."""
    if name.startswith("evidence-"):
        return evidence(name, vocab_size)
    size, _, kind = name.rpartition("-")
    if kind not in ("expanded", "preserve"):
        size, kind = name, ""
    if size not in SIZES:
        raise BadInput(f"no model {name!r}; there are {', '.join(SIZES)}, each also as "
                       "NAME-expanded and NAME-preserve, and evidence-FAMILY-ARM")
    config = replace(SIZES[size], vocab_size=vocab_size)
    if not kind:
        return config
    layers = range(0, config.n_layer, 6 if config.block == "gla" else 12)
    init = "preserve" if kind == "preserve" else "reinit"
    return enlarged(config, layers, None, init, same_state=False)


def evidence(name, vocab_size):
    """The Config of an arm of block.py. Raises BadInput."""
    from data.results import block
    family, _, arm = name.removeprefix("evidence-").partition("-")
    if family not in block.SHAPES or arm not in block.ARMS:
        raise BadInput(f"no arm {name!r}; expected evidence-FAMILY-ARM, with one of "
                       f"{', '.join(block.SHAPES)} and of {', '.join(block.ARMS)}")
    options = block.Options(family=family)
    job = block.arm_job(arm, block.ARMS[arm], lr=0.0, options=options)
    with torch.device("meta"):
        return block.random_model(job, options, "code4096", vocab_size).config


# ----------------------------------------------------------------------------------------
# models: each function gives (the model, forward and backward as a function of idx and targets
# (B,T) that returns the loss)


def ours(config, options):
    lm = LM(config)
    run = train.start_run(lm, options, (None, None, {}), train.Processes(), train.Stop())
    if options.graph:
        return lm, lambda idx, targets: train.replayed(run, idx, targets, None, 1.0)
    return lm, lambda idx, targets: train.loss_and_gradients(run, idx, targets, None, 1.0)[0]


def of_peer(loss, options):
    """The same for a peer, from its loss as a function of idx and targets."""
    def forward_backward(idx, targets):
        with train.precision(options):
            value = loss(idx, targets)
        train.backward(value)
        return value.detach()
    return forward_backward


def fla_gla(config, options):
    from fla.layers.gla import GatedLinearAttention
    from fla.models.gla import GLAConfig, GLAForCausalLM
    heads = max(config.n_head)
    lm = GLAForCausalLM(GLAConfig(
        hidden_size=config.d_model, num_hidden_layers=config.n_layer, num_heads=heads,
        vocab_size=config.vocab_size, use_short_conv=False, fuse_norm=True, fuse_swiglu=True,
        fuse_cross_entropy=True))
    for i, n_head in enumerate(config.n_head):
        if n_head != heads:
            lm.model.layers[i].attn = GatedLinearAttention(
                hidden_size=config.d_model, num_heads=n_head, use_short_conv=False, layer_idx=i)
    lm.to(options.device).train()
    # it shifts the labels by itself
    return lm, of_peer(lambda idx, targets: lm(idx, labels=idx, use_cache=False).loss, options)


class MambaSSM(nn.Module):
    """A language model of mamba_ssm's blocks. idx, targets (B,T) -> the mean cross-entropy."""

    def __init__(self, config):
        super().__init__()
        from mamba_ssm.modules.mamba2 import Mamba2
        fast_conv = importlib.util.find_spec("causal_conv1d") is not None
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = nn.RMSNorm(config.d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(config.d_model) for _ in range(config.n_layer))
        self.mixers = nn.ModuleList(
            Mamba2(config.d_model, d_state=N, headdim=config.headdim, use_mem_eff_path=fast_conv)
            for N in config.d_state)
        nn.init.normal_(self.embeddings.weight, std=0.02)

    def forward(self, idx, targets):
        x = self.embeddings(idx)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        logits = F.linear(self.norm(x), self.embeddings.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def mamba_ssm(config, options):
    lm = MambaSSM(config).to(options.device).train()
    return lm, of_peer(lm, options)


# ----------------------------------------------------------------------------------------
# a training step


def step_time(lm, forward_backward, options):
    """Full steps on one batch of random tokens. -> (median seconds of a step, seconds until the
    first timed step, peak GiB)"""
    begin = time.time()
    optimizer = train.make_optimizer(lm, options)
    tokens = torch.randint(options.vocab_size, (options.batch_size, options.block_size + 1),
                           device=options.device)
    idx = tokens[:, :-1].contiguous()
    targets = tokens[:, 1:].contiguous()
    times = []
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            ready = time.time() - begin
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(options, step)
        value = forward_backward(idx, targets)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not options.graph)
        value.item()                                        # waits for the GPU
        times.append(time.time() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return statistics.median(times[WARM_UP:]), ready, peak


def print_training(options):
    training = train.Options(
        block_size=options.T, device="cuda", ckpt="scratch", batch_size=options.batch_size,
        vocab_size=options.vocab_size, steps=options.steps, lr=options.lr, warmup=options.warmup,
        compile=options.compile, graph=options.graph,
        checkpoint_activations=options.checkpoint_activations,
        bfloat16_residual=options.bfloat16_residual)
    card = torch.cuda.get_device_name()
    peak_flops = next((f for name, f in train.PEAK.items() if name in card), math.nan)
    print("| model | whose | tokens/s | MFU | peak GiB | ready after, s |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.models.split(","):
        config = shape(name, options.vocab_size)
        with torch.device("meta"):
            work = train.flops_per_token(LM(config))
        peer = fla_gla if config.block == "gla" else mamba_ssm
        for whose, make in (("ours", ours), ("peer", peer)):
            if whose == "peer" and (not options.peers or name.endswith("-preserve")):
                continue
            torch.manual_seed(0)
            how = training if whose == "ours" else replace(training, graph=False)
            print(f"| {name} | {whose} | {measured(make, config, how, work / peak_flops)} |",
                  flush=True)
            torch.cuda.empty_cache()


def measured(make, config, training, share):
    """The cells of one row. share: of the card's peak that a token per second takes."""
    try:
        with torch.device(training.device):
            lm, forward_backward = make(config, training)
        seconds, ready, peak = step_time(lm, forward_backward, training)
    except ImportError as e:
        return f"not importable: {e.name} | | | "
    except torch.OutOfMemoryError:
        return "out of memory | | | "
    rate = training.batch_size * training.block_size / seconds
    return f"{rate:,.0f} | {share * rate:.1%} | {peak:.1f} | {ready:.0f}"


# ----------------------------------------------------------------------------------------
# reading and writing


def in_bfloat16(lm):
    """lm converted in place; A_log, dt_bias and D stay in float32."""
    exact = {name: p.data.float() for name, p in lm.named_parameters()
             if name.endswith(("A_log", "dt_bias", ".D"))}
    lm.bfloat16()
    for name, p in lm.named_parameters():
        p.data = exact.get(name, p.data)
    return lm


def median_seconds(f):
    """Of three calls, after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.time()
        f()
        torch.cuda.synchronize()
        times.append(time.time() - start)
    return statistics.median(times[1:])


def print_generating(options):
    head = ["model", "state bytes per sequence", f"prefill of {PROMPT}, tokens/s",
            *(f"ms per token, batch {batch}" for batch in BATCHES)]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    for name in options.models.split(","):
        config = shape(name, options.vocab_size)
        torch.manual_seed(0)
        with torch.device("cuda"):
            lm = in_bfloat16(LM(config)).eval()
        prompt = torch.randint(config.vocab_size, (max(BATCHES), PROMPT), device="cuda")
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            reading = median_seconds(lambda lm=lm, prompt=prompt: lm.features(prompt[:1]))
        cells = []
        for batch in BATCHES:
            start = prompt[:batch, :1]
            writing = median_seconds(lambda lm=lm, start=start: lm.generate(start, WRITTEN))
            cells.append(f"{1000 * writing / WRITTEN:.2f}")
        print(f"| {name} | {4 * config.total_state():,} | {PROMPT / reading:,.0f} | "
              f"{' | '.join(cells)} |", flush=True)
        del lm
        torch.cuda.empty_cache()


def main():
    options = Options(**command_line(Options, __doc__))
    if not torch.cuda.is_available():
        raise BadInput("this measures a GPU and there is none here; train.py's log has tokens/s on "
                       "any machine")
    if not options.steps or not options.batch_size or not options.T:
        raise BadInput("--steps, --batch_size and --T must be at least 1")
    for name in options.models.split(","):
        shape(name, options.vocab_size)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, vocabulary "
          f"{options.vocab_size}", flush=True)
    if options.generate:
        return print_generating(options)
    print(f"batch {options.batch_size}, T {options.T}\n")
    print_training(options)


if __name__ == "__main__":
    run_script(main)
