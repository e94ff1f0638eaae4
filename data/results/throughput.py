"""How fast a full training step is on one GPU: forward, backward, clipping and AdamW, on random tokens, ours beside the peers.

    python data/results/throughput.py                                         GLA-340M and Mamba2-370M, base and expanded
    python data/results/throughput.py --models=gla-340m --batch_size=32
    python data/results/throughput.py --models=gla-1.3b-expanded --batch_size=1 --T=65536 --checkpoint_activations --peers=0

Ours is train.py's: its optimizer, precision and compiled layers. The peers, where they can be imported: flash-linear-attention's
GLAForCausalLM with its fused norm, SwiGLU and cross-entropy; mamba_ssm's Mamba2 blocks (with causal_conv1d where that is installed,
else PyTorch's conv1d) between RMSNorms. They get the same autocast, clipping and optimizer, and are not compiled.
The learning rate starts as in train.py's presets: at 1e-2 models of this size fall apart within ten steps, GLA's decays become
steep, and its kernels take their slower way.
"""
import copy, importlib.util, math, os, statistics, sys, time
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import train
from data.prepare import BadInput, command_line, main_line
from model import LM, SIZES


def shape(name, vocab_size):
    """The Config of a public size, or of NAME-expanded: every 6th layer with one head (GLA), every 12th with 4 N (Mamba2)."""
    size, expanded, _ = name.partition("-expanded")
    if size not in SIZES:
        raise BadInput(f"no model {name!r}; there are {', '.join(SIZES)}, each also as NAME-expanded")
    c = copy.deepcopy(SIZES[size])
    c.vocab_size = vocab_size
    if expanded:
        c.n_head[::6] = [1] * len(c.n_head[::6])
        c.d_state[::12] = [4 * n for n in c.d_state[::12]]
    return c


def ours(c, o):
    """-> the model of Config c and its loss, a function of idx and targets (B,T); the peers below likewise."""
    lm = LM(c)
    train.wrap(lm, o)
    return lm, lambda x, y: lm(x, y)[1]


def fla_gla(c, o):
    from fla.layers.gla import GatedLinearAttention
    from fla.models.gla import GLAConfig, GLAForCausalLM
    lm = GLAForCausalLM(GLAConfig(hidden_size=c.d_model, num_hidden_layers=c.n_layer, num_heads=max(c.n_head), vocab_size=c.vocab_size,
                                  use_short_conv=False, fuse_norm=True, fuse_swiglu=True, fuse_cross_entropy=True))
    for i, heads in enumerate(c.n_head):
        if heads != max(c.n_head):
            lm.model.layers[i].attn = GatedLinearAttention(hidden_size=c.d_model, num_heads=heads, use_short_conv=False, layer_idx=i)
    lm.to(o.device).train()
    return lm, lambda x, y: lm(x, labels=x, use_cache=False).loss              # it shifts the labels by itself


class MambaSSM(nn.Module):
    """A language model of mamba_ssm's blocks. idx, targets (B,T) -> the mean cross-entropy."""

    def __init__(self, c):
        super().__init__()
        from mamba_ssm.modules.mamba2 import Mamba2
        fast_conv = importlib.util.find_spec("causal_conv1d") is not None
        self.embeddings, self.norm = nn.Embedding(c.vocab_size, c.d_model), nn.RMSNorm(c.d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(c.d_model) for _ in range(c.n_layer))
        self.mixers = nn.ModuleList(Mamba2(c.d_model, d_state=n, headdim=c.headdim, use_mem_eff_path=fast_conv) for n in c.d_state)
        nn.init.normal_(self.embeddings.weight, std=0.02)

    def forward(self, idx, targets):
        x = self.embeddings(idx)
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))
        return F.cross_entropy(F.linear(self.norm(x), self.embeddings.weight).flatten(0, 1).float(), targets.flatten())


def mamba_ssm(c, o):
    lm = MambaSSM(c).to(o.device).train()
    return lm, lm


def step_time(lm, loss, o):
    """Full steps on one batch of random tokens. -> (median seconds of o.steps steps, seconds until the third step, peak GiB)."""
    optimizer, t0 = train.make_optimizer(lm, o), time.time()
    tokens = torch.randint(o.vocab_size, (o.batch_size, o.T + 1), device=o.device)
    idx, targets, times = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), []
    for step in range(2 + o.steps):
        if step == 2:
            ready = time.time() - t0
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(o, step)
        optimizer.zero_grad(set_to_none=True)
        with train.precision(o):
            value = loss(idx, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), o.clip)
        optimizer.step()
        value.item()                                                           # waits for the GPU
        times.append(time.time() - start)
    return statistics.median(times[2:]), ready, torch.cuda.max_memory_allocated() / 2**30


def main():
    o = command_line(__doc__, models="gla-340m,gla-340m-expanded,mamba2-370m,mamba2-370m-expanded", batch_size=16, T=2048, vocab_size=32000,
                     steps=12, lr=1e-3, warmup=1000, compile=True, checkpoint_activations=False, peers=True)
    if not torch.cuda.is_available():
        raise BadInput("this measures a GPU and there is none here; train.py's log has tokens/s on any machine")
    o = SimpleNamespace(**train.DEFAULTS | vars(o) | dict(device="cuda"))
    peak_flops = next((f for card, f in train.PEAK.items() if card in torch.cuda.get_device_name()), math.nan)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {o.batch_size}, T {o.T}, vocabulary {o.vocab_size}\n")
    print("| model | whose | tokens/s | MFU | peak GiB | ready after, s |\n|---|---|---|---|---|---|", flush=True)
    for name in o.models.split(","):
        c = shape(name, o.vocab_size)
        with torch.device("meta"):
            work = train.flops_per_token(LM(c))
        for whose, make in (("ours", ours), ("peer", fla_gla if c.block == "gla" else mamba_ssm)):
            if whose == "peer" and not o.peers:
                continue
            torch.manual_seed(0)
            try:
                with torch.device(o.device):
                    lm, loss = make(c, o)
                seconds, ready, peak = step_time(lm, loss, o)
                rate = o.batch_size * o.T / seconds
                print(f"| {name} | {whose} | {rate:,.0f} | {work * rate / peak_flops:.1%} | {peak:.1f} | {ready:.0f} |", flush=True)
            except ImportError as e:
                print(f"| {name} | {whose} | not importable: {e.name} | | | |", flush=True)
            except torch.OutOfMemoryError:
                print(f"| {name} | {whose} | out of memory | | | |", flush=True)
            lm = loss = None
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main_line(main)
