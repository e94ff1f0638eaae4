"""A recurrent language model of GLA or Mamba2 blocks, its checkpoints, generation.

Every layer carries a state of fixed size through time. How large it is may differ from
layer to layer, and that is what expand.py changes:

    GLA      d_k d_v / n_key_head elements (d_k, d_v: channels of all heads together)
    Mamba2   d_inner d_state elements

The blocks are the public ones, tensor for tensor: GLA as flash-linear-attention's
GLAForCausalLM, Mamba2 as mamba_ssm's. What is ours alone is GLA's `gates` (see GLA).

    python model.py --ckpt=out/recipe-gla/statex.pt --prompt="def read("    generate
    python model.py --ckpt=out/run/ckpt.pt --export=FOLDER      write a public format

A checkpoint to read is a .pt file of ours, a folder in a public format, or a hub id.
"""
from data.options import (
    BadInput,
    command_line,
    one_line,
    option,
    pick_device,
    run_script,
    write_file,
)

import collections
import contextlib
import glob
import math
import numbers
import os
import re
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import public
from data.prepare import load_tokenizer
from kernels import conv_fits, gla, short_conv, ssd


@dataclass
class Config:
    """The shape of a model. n_head, n_key_head and d_state take a number or a list with
    one per layer, and become a list. Raises BadInput for what cannot be built."""
    block: str = "gla"               # "gla" or "mamba2"
    vocab_size: int = 4096
    n_layer: int = 24
    d_model: int = 1024
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    conv_size: int | None = None     # taps of the convolution; None: GLA 0, Mamba2 4
    pad_vocab: int = 1               # embedding rows are a multiple of this
    tokenizer: str = ""              # of the ids, by data/prepare.py's name; "": unknown
    # GLA
    n_head: int | list = 4
    n_key_head: int | list | None = None    # heads of keys; None: n_head; fewer: heads share
    expand_k: float = 0.5            # key channels over d_model
    expand_v: float = 1.0            # value channels over d_model
    d_mlp: int = 0                   # 0: 8/3 d_model, rounded up to a multiple of 256
    # Mamba2
    d_state: int | list = 128
    headdim: int = 64                # inner channels of a head
    expand: int = 2                  # inner channels over d_model (mamba_ssm's name)
    n_groups: int = 1                # heads of a group share B and C
    norm_groups: int = 0             # of the gated norm; 0: n_groups (public models)

    def __post_init__(self):
        if self.block not in ("gla", "mamba2"):
            raise BadInput(f"block is {self.block!r}; expected 'gla' or 'mamba2'")
        if self.conv_size is None:
            self.conv_size = 0 if self.block == "gla" else 4
        for name in ("vocab_size", "n_layer", "d_model", "headdim", "expand", "n_groups",
                     "norm_groups", "pad_vocab", "conv_size", "d_mlp"):
            value = getattr(self, name)
            least = 0 if name in ("conv_size", "d_mlp", "norm_groups") else 1
            if type(value) is not int or value < least:
                raise BadInput(f"{name} is {value!r}; expected a whole number from {least} up")
        for name in ("norm_eps", "expand_k", "expand_v"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise BadInput(f"{name} is {value!r}; expected a number above 0")
        for name, kind in (("tie_embeddings", bool), ("tokenizer", str)):
            if not isinstance(getattr(self, name), kind):
                raise BadInput(f"{name} is {getattr(self, name)!r}; expected a {kind.__name__}")
        if self.n_key_head is None:
            self.n_key_head = self.n_head
        for name in ("n_head", "n_key_head", "d_state"):
            value = getattr(self, name)
            values = [value] * self.n_layer if type(value) is int else value
            if (not isinstance(values, (list, tuple)) or len(values) != self.n_layer
                    or not all(type(x) is int and x > 0 for x in values)):
                raise BadInput(f"{name} is {value!r}; expected a positive number, or a list of "
                               f"{self.n_layer}, one per layer")
            setattr(self, name, list(values))
        if self.block == "gla":
            self.check_gla()
        elif self.block == "mamba2":
            self.check_mamba2()

    def check_gla(self):
        if not self.d_mlp:
            self.d_mlp = math.ceil(int(self.d_model * 8 / 3) / 256) * 256
        if not self.d_k * self.d_v:
            raise BadInput(f"expand_k {self.expand_k} and expand_v {self.expand_v} leave no "
                           f"channel of d_model {self.d_model}")
        for heads, key_heads in zip(self.n_head, self.n_key_head, strict=True):
            if self.d_k % heads or self.d_v % heads:
                raise BadInput(f"n_head {heads} does not divide the {self.d_k} key and "
                               f"{self.d_v} value channels; choose a common divisor")
            if heads % key_heads:
                raise BadInput(f"n_key_head {key_heads} does not divide the {heads} heads")

    def check_mamba2(self):
        heads = self.d_inner // self.headdim
        if self.d_inner % self.headdim:
            raise BadInput(f"headdim {self.headdim} does not divide the {self.d_inner} "
                           "inner channels")
        if heads % self.n_groups:
            raise BadInput(f"n_groups {self.n_groups} does not divide the {heads} heads")
        if not self.norm_groups:
            self.norm_groups = self.n_groups
        if self.d_inner % self.norm_groups:
            raise BadInput(f"norm_groups {self.norm_groups} does not divide the "
                           f"{self.d_inner} inner channels")
        if self.conv_size < 1:
            raise BadInput("conv_size is 0; Mamba2 needs its convolution, of 4 taps in every "
                           "public model")

    @property
    def d_k(self):
        return channels(self.d_model, self.expand_k)

    @property
    def d_v(self):
        return channels(self.d_model, self.expand_v)

    @property
    def d_inner(self):
        return self.d_model * self.expand

    def state_elements(self, layer):
        """Elements of a layer's recurrent state, per sequence. (The convolution's last
        inputs, a few per channel, are not counted.)"""
        if self.block == "gla":
            return self.d_k * self.d_v // self.n_key_head[layer]
        if self.block == "mamba2":
            return self.d_inner * self.d_state[layer]
        raise BadInput(f"Config.state_elements does not say how large the state of {self.block} is")

    def total_state(self):
        """Elements of state per sequence, of all layers."""
        return sum(self.state_elements(layer) for layer in range(self.n_layer))


def channels(d_model, ratio):
    """d_model ratio, rounded down; but 1000 x 0.57 = 569.99... are 570, as in
    flash-linear-attention."""
    exact = d_model * ratio
    nearest = round(exact)
    return nearest if math.isclose(exact, nearest) else int(exact)


# The public checkpoints' shapes.
SIZES = {
    "gla-340m": Config("gla", 32000, 24, 1024, norm_eps=1e-6),
    "gla-1.3b": Config("gla", 32000, 24, 2048, norm_eps=1e-6),
    "mamba2-370m": Config("mamba2", 50277, 48, 1024, tie_embeddings=True, pad_vocab=16),
    "mamba2-1.3b": Config("mamba2", 50277, 48, 2048, tie_embeddings=True, pad_vocab=16),
}


# ---------------------------------------------------------------------------------------
# the mixers: where a token meets the state


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_conv(x, weight, bias, before, sizes, first=None):
    """Depthwise convolution over time, then silu.

    x (B,T,D); weight (D,1,taps); bias (D,) or None; before (B,taps-1,D): the inputs before
    x, None for zeros; first (B,T) bool: a packed document begins here and sees nothing of
    what came before, None for one document. Returns y (B,T,D) split into channels of
    `sizes`, and the next call's `before`. Raises BadInput where before does not fit.

    On a GPU each part of y is made by one kernel, not cut from y. For a single
    token, and on a CPU, y is a sum of shifted copies: faster there than conv1d."""
    batch, T, D = x.shape
    taps = weight.shape[-1]
    if before is not None:
        if before.shape != (batch, taps - 1, D):
            raise BadInput(f"the convolution's state has shape {tuple(before.shape)}; expected "
                           f"{(batch, taps - 1, D)}")
        x = torch.cat((before.to(x.dtype), x), dim=1)
    start = max(0, x.shape[1] - taps + 1)
    last = x[:, start:]                 # the next `before`; zeros for other documents
    document = None                     # of each input, the number of its document
    if first is not None:
        document = F.pad(first.cumsum(1), (x.shape[1] - T, 0))
        last = last * (document[:, start:] == document[:, -1:])[..., None]
    last = F.pad(last, (0, 0, taps - 1 - last.shape[1], 0))

    if T > 1 and conv_fits(x):
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = zip(x.split(sizes, dim=-1), weight.split(sizes), biases, strict=True)
        return [short_conv(*part, document)[:, -T:] for part in parts], last
    if before is None:
        x = F.pad(x, (0, 0, taps - 1, 0))
    shifted = [x[:, i:i + T] for i in range(taps)]
    if document is not None:
        document = F.pad(document, (x.shape[1] - document.shape[1], 0))
        own = document[:, taps - 1:]
        shifted = [shifted[i] * (document[:, i:i + T] == own)[..., None] for i in range(taps)]
    y = sum(shifted[i] * weight[:, 0, i] for i in range(taps))
    if bias is not None:
        y = y + bias
    return F.silu(y).to(x.dtype).split(sizes, dim=-1), last


class GLA(nn.Module):
    """Gated linear attention (arXiv 2312.06635, section 4.4).

    A head has K channels of queries and keys and V of values.
    By their public names gk_proj makes the log decays g, g_proj the gate of the output,
    and g_norm_swish_gate is the norm of each head's output.

    Where n_key_head < n_head, groups of f = n_head / n_key_head neighbouring heads share
    their keys: a group has one key and one decay of f K channels, those of its f heads
    side by side. Each head stores its own values under all of them, and reads them
    through `gates` (see kernels.gla). With gates the identity it reads those under its
    own key: the layer without sharing (`preserve` starts there)."""

    def __init__(self, c, layer):
        super().__init__()
        self.n_head = c.n_head[layer]
        self.n_key_head = c.n_key_head[layer]
        self.q_proj = nn.Linear(c.d_model, c.d_k, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.d_k, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.d_v, bias=False)
        self.g_proj = nn.Linear(c.d_model, c.d_v, bias=False)
        self.gk_proj = nn.Sequential(                           # of rank 16
            nn.Linear(c.d_model, 16, bias=False), nn.Linear(16, c.d_k))
        self.g_norm_swish_gate = nn.RMSNorm(c.d_v // self.n_head, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.d_v, c.d_model, bias=False)
        self.conv_size = c.conv_size
        if c.conv_size:
            for name, d in (("q_conv1d", c.d_k), ("k_conv1d", c.d_k), ("v_conv1d", c.d_v)):
                self.add_module(name, nn.Conv1d(d, d, c.conv_size, groups=d, bias=False))
        self.gates = None                       # every head has its own keys
        if self.n_key_head < self.n_head:
            f = self.n_head // self.n_key_head
            self.gates = nn.Parameter(torch.empty(self.n_key_head, f, f))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        for module in self.children():
            if module is not self.gk_proj:
                module.reset_parameters()
        # as nn.Linear does; nn.Sequential has no reset_parameters
        nn.init.kaiming_uniform_(self.gk_proj[0].weight, a=5 ** 0.5)
        nn.init.kaiming_uniform_(self.gk_proj[1].weight, a=5 ** 0.5)
        nn.init.zeros_(self.gk_proj[1].bias)
        if self.gates is not None:
            self.gates.copy_(torch.eye(self.gates.shape[-1]))

    def log_decays(self, x):
        """x (B,T,d_model) -> g (B,T,d_k), <= 0 and near 0, in float32 or float64."""
        return F.logsigmoid(at_least_float32(self.gk_proj(x))) / 16   # tau of arXiv 2312.06635

    def forward(self, x, state=None, first=None):
        """x (B,T,d_model); state: (S (B,H,f K,V), causal_conv's `before`) or None;
        first (B,T) bool: a document begins here. Returns (B,T,d_model), new state."""
        S, before = state or (None, None)
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        if self.conv_size:
            weight = torch.cat((self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight))
            sizes = (q.shape[-1], k.shape[-1], v.shape[-1])
            (q, k, v), before = causal_conv(
                torch.cat((q, k, v), dim=-1), weight, None, before, sizes, first)
        g = self.log_decays(x)
        q = q.unflatten(-1, (self.n_head, -1))                          # (B,T,H,K)
        k = k.unflatten(-1, (self.n_key_head, -1))                      # (B,T,G,f K)
        v = v.unflatten(-1, (self.n_head, -1))                          # (B,T,H,V)
        g = g.unflatten(-1, (self.n_key_head, -1))
        if first is not None:
            g = g.masked_fill(first[..., None, None], -math.inf)        # the state is forgotten
        o, S = gla(q, k, v, g, state=S, gates=self.gates)
        gain = self.g_norm_swish_gate.weight.to(o.dtype)
        o = F.rms_norm(o, o.shape[-1:], gain, self.g_norm_swish_gate.eps)
        # head by head: torch.compile then makes one kernel of the norm and the gate
        o = o * F.silu(self.g_proj(x).unflatten(-1, (self.n_head, -1)))
        return self.o_proj(o.flatten(-2)), (S, before)


class Mamba2(nn.Module):
    """Mamba2 (arXiv 2405.21060, section 7)."""

    def __init__(self, c, layer):
        super().__init__()
        self.d_inner = c.d_inner
        self.headdim = c.headdim
        self.n_groups = c.n_groups
        self.norm_groups = c.norm_groups
        self.d_state = c.d_state[layer]
        self.n_layer = c.n_layer
        heads = c.d_inner // c.headdim
        d_conv = c.d_inner + 2 * c.n_groups * self.d_state
        # rows of in_proj: z (the output's gate), x, B, C, dt; of conv1d: x, B, C
        self.in_proj = nn.Linear(c.d_model, c.d_inner + d_conv + heads, bias=False)
        self.conv1d = nn.Conv1d(d_conv, d_conv, c.conv_size, groups=d_conv)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(c.d_inner, eps=c.norm_eps)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        for module in self.children():
            module.reset_parameters()
        # as mamba_ssm: decays of many speeds, steps dt of many lengths
        self.out_proj.weight /= math.sqrt(self.n_layer)
        self.D.fill_(1.0)
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))       # softplus(dt_bias) = dt

    def forward(self, x, state=None, first=None):
        """As GLA's; state: (S (B,H,P,N), causal_conv's `before`) or None."""
        S, before = state or (None, None)
        width = self.n_groups * self.d_state                # of B, and of C
        sizes = (self.d_inner, width, width)
        z, xBC, dt = self.in_proj(x).split((self.d_inner, sum(sizes), len(self.D)), dim=-1)
        (x, B, C), before = causal_conv(
            xBC, self.conv1d.weight, self.conv1d.bias, before, sizes, first)
        x = x.unflatten(-1, (-1, self.headdim))                         # (B,T,H,P)
        B = B.unflatten(-1, (self.n_groups, -1))                        # (B,T,G,N)
        C = C.unflatten(-1, (self.n_groups, -1))
        dt = F.softplus(at_least_float32(dt) + self.dt_bias)
        A = -at_least_float32(self.A_log).exp()             # dt A is the log decay per head
        y, S = ssd(x, dt, A, B, C, self.D, state=S, first=first)
        y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (self.norm_groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y), (S, before)


# ---------------------------------------------------------------------------------------
# the blocks around the mixers
#
# What they compute is x = x + mixer(norm(x)), and in GLA then x = x + mlp(norm(x)). But the
# last sum of a block is left to the next one: it takes the residual stream x and `update`,
# what the block before adds to it (None for nothing), and returns its own update not added
# yet. train.py compiles block by block: one kernel then adds the update and takes the
# next norm, a pass over memory less in every layer.


class GLABlock(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.attn = GLA(c, layer)
        self.mlp_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.d_model, c.d_mlp, bias=False),
            "up_proj": nn.Linear(c.d_model, c.d_mlp, bias=False),
            "down_proj": nn.Linear(c.d_mlp, c.d_model, bias=False)})

    def forward(self, x, update=None, state=None, first=None):
        """x (B,T,d_model); update as x, of the block before, not added yet, or None. Returns x,
        this block's update, which the next one adds, and the new state."""
        if update is not None:
            x = x + update
        update, state = self.attn(self.attn_norm(x), state, first)
        x = x + update
        y = self.mlp_norm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x, self.mlp["down_proj"](y), state


class Mamba2Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.mixer = Mamba2(c, layer)

    def forward(self, x, update=None, state=None, first=None):
        """As GLABlock's."""
        if update is not None:
            x = x + update
        update, state = self.mixer(self.norm(x), state, first)
        return x, update, state


# ---------------------------------------------------------------------------------------
# the loss, without the (tokens, vocabulary) table of logits
#
# PyTorch 2.13 has torch.nn.functional.linear_cross_entropy for this, 2.11, with which GPUs
# are also used, has not. Ours leaves out, on a CPU, the rows that are not counted: most of
# a recall sequence's.


def slice_loss(logits, targets, count):
    """logits (n,vocab_size), which may be overwritten; targets (n,1), -100 where not
    counted; count: a scalar tensor. Returns the summed cross-entropy, in nats, and the
    gradient of that sum / count in the logits."""
    counted = targets != -100
    targets = targets.clamp(min=0)
    p = at_least_float32(logits)
    p = p.sub_(p.amax(1, keepdim=True))     # in place: fresh memory costs a CPU more than this
    right = p.gather(1, targets)
    p = p.exp_()
    z = p.sum(1, keepdim=True)
    loss = (z.log() - right).masked_fill(~counted, 0)
    # (softmax - onehot) / count, and 0 where not counted
    dlogits = p.div_((z * count).masked_fill(~counted, math.inf)).to(logits.dtype)
    one = (counted / -count).to(logits.dtype)
    return loss.sum(), dlogits.scatter_add_(1, targets, one)


def add_product(total, a, b):
    """total (m,n) += a (m,k) @ b (k,n), in place. Factors in bfloat16 on a GPU are added up
    in total's float32, not rounded in between."""
    if total.is_cuda and a.dtype == torch.bfloat16:
        with torch.autocast("cuda", enabled=False):
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class SlicedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, in nats.

    x (n,d); weight (V,d), V >= vocab_size; targets (n,), where -100 is not counted.
    A slice of tokens at a time, the forward pass computes the logits, the loss, and at once
    the gradient (softmax - onehot) / count, which goes straight into x's and weight's
    gradients; the backward pass only scales them. Of the logits one slice is held,
    `slice_elements` of them. Without any target that counts the loss is 0."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, slice_elements, part_loss=slice_loss):
        dtype = weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        w = weight[:vocab_size].to(dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(x) if need_x else None
        exact = torch.promote_types(dtype, torch.float32)
        dw = torch.zeros_like(weight, dtype=exact) if need_w else None
        total = x.new_zeros((), dtype=exact)
        count = (targets != -100).sum().clamp(min=1).to(exact)
        at_once = max(1, slice_elements // vocab_size)
        for start in range(0, len(targets), at_once):
            tokens = slice(start, start + at_once)
            xs = x[tokens].to(dtype)
            part, dlogits = part_loss(xs @ w.T, targets[tokens, None], count)
            total = total + part
            if need_x:
                dx[tokens] = (dlogits @ w).to(x.dtype)
            if need_w:
                add_product(dw[:vocab_size], dlogits.T, xs)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative (create_graph=True); take "
                               "F.cross_entropy of the logits for one")
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx * grad.to(dx.dtype)
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None


# ---------------------------------------------------------------------------------------
# the language model


class LM(nn.Module):
    """The model of a Config, untrained. `from_pretrained` reads a trained one."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint_activations = False     # whether backward keeps layers' inputs only
        self.bfloat16_residual = False          # in training, keep the residual stream in it
        self.slice_loss = slice_loss            # train.py puts a compiled one here
        rows = math.ceil(c.vocab_size / c.pad_vocab) * c.pad_vocab
        Block = {"gla": GLABlock, "mamba2": Mamba2Block}[c.block]
        self.embeddings = nn.Embedding(rows, c.d_model)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.d_model, rows, bias=False)
        # Embeddings that are not tied stay N(0,1): with std 0.02 what the first mixer
        # adds leaves little of them, and GLA learns bigrams and recall late.
        if c.tie_embeddings:
            nn.init.normal_(self.embeddings.weight, std=0.02)
            self.lm_head.weight = self.embeddings.weight

    def forward(self, idx, targets=None, state=None, first=None):
        """idx, targets (B,T) int64 or int32; targets of -100 are not counted. state:
        what an earlier call returned, None at the start. first (B,T) bool or None: a
        packed document begins at this token and sees nothing of what came before.

        Returns logits (B,T,vocab_size), loss (a scalar, mean nats per counted target) and
        state, one entry per layer. Without targets loss is None; with them logits is None,
        so that they are computed only where a target counts. All sequences of a batch have
        the same length: there is no padding mask (`generate` takes prompts of any lengths).
        Raises BadInput for what does not fit."""
        if targets is not None:
            device = self.embeddings.weight.device
            check_ids("targets", targets, self.config.vocab_size, device, not_counted=-100)
            if not torch.is_tensor(idx) or targets.shape != idx.shape:
                raise BadInput(f"targets {kind_of(targets)}; expected the shape of idx, which "
                               f"{kind_of(idx)}")
        x, state = self.features(idx, state, first)
        if targets is None:
            return self.lm_head(x)[..., :self.config.vocab_size], None, state
        return None, self.loss(x, targets), state

    def features(self, idx, state=None, first=None):
        """idx (B,T) -> the residual stream after the final norm (B,T,d_model), and the
        state after the last token. For the rest see forward."""
        device = self.embeddings.weight.device
        check_ids("idx", idx, self.config.vocab_size, device)
        check_state(state, self.config.n_layer, len(idx), device)
        if first is not None and not (torch.is_tensor(first) and first.dtype == torch.bool
                                      and first.shape == idx.shape and first.device == device):
            raise BadInput(f"first {kind_of(first)}; expected torch.bool of idx's shape, "
                           f"{tuple(idx.shape)}, on {device}")
        x = self.embeddings(idx)
        dtype = x.dtype
        if self.bfloat16_residual and self.training:
            x = x.bfloat16()
        update = None
        states = []
        for i, layer in enumerate(self.layers):
            before = None if state is None else state[i]
            if self.checkpoint_activations and self.training:
                x = x if update is None else x + update     # one tensor to keep, not two
                x, update, after = checkpoint(layer, x, None, before, first, use_reentrant=False,
                                              preserve_rng_state=False)     # no dropout
            else:
                x, update, after = layer(x, update, before, first)
            states.append(after)
        return self.norm((x + update).to(dtype)), states

    def loss(self, x, targets):
        """Mean cross-entropy, in nats, of features x (B,T,d_model) where targets (B,T) are
        not -100."""
        x = x.flatten(0, -2)
        targets = targets.flatten().long()
        if not x.is_cuda:                       # a GPU would have to be waited for
            counted = (targets != -100).nonzero()[:, 0]
            x = x.index_select(0, counted)
            targets = targets[counted]
        slice_elements = 1 << (28 if x.is_cuda else 20)     # logits at once; a CPU has a cache
        weight = self.lm_head.weight
        if not torch.is_grad_enabled():         # else its gradient would be made all the same
            weight = weight.detach()
        return SlicedCrossEntropy.apply(x, weight, targets, self.config.vocab_size,
                                        slice_elements, self.slice_loss)

    def generate(self, idx, n, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
        """Continue prompts by at most n tokens each; see `stream` for the options.

        idx: (B,T) token ids, returned as (B,T+n), shorter where all have met `stop`; or
        a list of prompts of any lengths (lists of ids or 1-D tensors), for which a list
        of 1-D tensors comes back, each cut after its `stop`. Either way a prompt is
        continued as it would be alone, prompt i with seed + i. Raises BadInput."""
        new = list(self.stream(idx, n, temperature, top_k, top_p, stop, seed))
        if torch.is_tensor(idx):
            return torch.cat([idx, *(token[:, None].to(idx) for token in new)], dim=1)
        continued = []
        for i, prompt in enumerate(idx):
            ids = [token[i].item() for token in new]
            if stop in ids:
                ids = ids[:ids.index(stop) + 1]
            prompt = torch.as_tensor(prompt)
            continued.append(torch.cat((prompt, prompt.new_tensor(ids))))
        return continued

    @torch.no_grad()
    def stream(self, idx, n, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
        """Yield up to n times the next token of every prompt, (B,). idx: as in `generate`.

        temperature: 0 takes the likeliest token. top_k: draw among the k likeliest. top_p:
        among the likeliest that together have this probability. stop: a token id; a prompt
        that has reached it is filled up with it, and when all have, the stream ends. seed:
        prompt i draws as it would alone with seed + i; None draws from torch's generator.
        A step carries the state and one token, no more. Raises BadInput at the first token."""
        check_sampling(n, temperature, top_k, top_p, stop, seed)
        x, state = self.read_prompts(idx)
        if not x.isfinite().all():
            raise BadInput("the model makes no numbers of this prompt: its weights are not finite, "
                           "or their products overflow")
        chances = random_numbers(len(x), n, seed).to(x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        step = None
        for i in range(n):
            logits = self.lm_head(x)[:, :self.config.vocab_size]
            token = choose(logits, temperature, top_k, top_p, chances[:, i])
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if i == n - 1 or stop is not None and done.all():
                return
            # A step launches several hundred kernels, which takes longer than running them:
            # on a GPU a long continuation is recorded once, as a CUDA graph, after a step
            # that has loaded the kernels. Nothing may compile meanwhile.
            eager = contextlib.nullcontext()
            if x.is_cuda:
                eager = torch.compiler.set_stance("force_eager")
            with eager:
                if step is None and x.is_cuda and i and n - i > 16:
                    step = self.recorded_step(token, state)
                if step is not None:
                    x = step(token)
                else:
                    x, state = self.features(token[:, None], state)
                    x = x[:, -1]

    def read_prompts(self, idx):
        """idx as in `generate` -> features of every prompt's last token (B,d_model), and
        the state after it."""
        if torch.is_tensor(idx):
            batches = [idx]
        elif isinstance(idx, (list, tuple)) and not any(isinstance(p, (int, str)) for p in idx):
            try:
                batches = [torch.as_tensor(prompt)[None] for prompt in idx]
            except (TypeError, ValueError, RuntimeError) as e:      # no numbers, or too large ones
                raise BadInput(f"a prompt is no list of token ids: {e}") from e
        else:
            raise BadInput("the prompts are not token ids; expected a tensor (batch, length), or a "
                           "list of prompts, each a list of token ids")
        if not batches:
            raise BadInput("there are no prompts; expected at least one")
        if any(0 in batch.shape[1:] for batch in batches):
            raise BadInput("a prompt is empty; begin at least with the end-of-text token")
        for batch in batches:                                       # while they are on a CPU
            check_ids("a prompt", batch, self.config.vocab_size, batch.device)
        device = self.embeddings.weight.device
        read = [self.features(batch.to(device)) for batch in batches]
        state = map_state(lambda *parts: torch.cat(parts), *(state for _, state in read))
        return torch.cat([x[:, -1] for x, _ in read]), state

    def recorded_step(self, token, state):
        """The step of one token after `state` as a CUDA graph: a function of the tokens (B,)
        that returns the features (B,d_model) and moves its own copy of the state on."""
        token = token.clone()
        state = map_state(torch.clone, state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(token), torch.cuda.graph(graph):
            x, new_state = self.features(token[:, None], state)
            x = x[:, -1]
            map_state(torch.Tensor.copy_, state, new_state)

        def step(t, held=state):        # held: kept, for the graph reads and writes it
            token.copy_(t)
            graph.replay()
            return x
        return step

    @classmethod
    def from_pretrained(cls, name):
        """The model in a checkpoint of ours (a .pt file), in a folder in a public format, or
        under a hub id such as "fla-hub/gla-1.3B-100B" (through huggingface_hub), in train
        mode. Raises BadInput."""
        name = str(name)
        a_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".pt")
        runs = sorted(glob.glob("*.pt", root_dir=name)) if os.path.isdir(name) else []
        if runs and not os.path.exists(f"{name}/config.json"):
            raise BadInput(f"{name} is the folder of a run; name a file in it: {', '.join(runs)}")
        if os.path.isdir(name) or a_hub_id and not os.path.exists(name):
            return build(*public.read_folder(name), name)
        return load_checkpoint(name)[0]


def kind_of(value):
    """What a message says of an argument."""
    if torch.is_tensor(value):
        return f"has shape {tuple(value.shape)} and is {value.dtype} on {value.device}"
    return f"is of type {type(value).__name__}"


def check_ids(name, ids, vocab_size, device, not_counted=None):
    """Raises BadInput unless ids are token ids (B,T) on that device, or not_counted. Values are
    looked at on a CPU only: a GPU would have to be waited for."""
    if not torch.is_tensor(ids) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise BadInput(f"{name} {kind_of(ids)}; expected token ids, (batch, length) integers")
    if ids.device != device:
        raise BadInput(f"{name} {kind_of(ids)}; expected {device}, where the model is")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    known = (ids >= 0) & (ids < vocab_size)
    if not_counted is not None:
        known |= ids == not_counted
    if not known.all():
        raise BadInput(f"{name} has the token id {ids[~known][0].item()}; expected 0 to "
                       f"{vocab_size - 1}, the model's vocabulary")


def check_state(state, n_layer, batch, device):
    """Raises BadInput unless state is a list of pairs of tensors for so many sequences; any
    of these may be None. The mixers look at the other sizes."""
    if state is None:
        return
    if not isinstance(state, (list, tuple)):
        raise BadInput(f"state {kind_of(state)}; expected a list, one entry per layer")
    if len(state) != n_layer:
        raise BadInput(f"state has {len(state)} entries; expected {n_layer}, one per layer")
    for layer in state:
        if layer is not None and (not isinstance(layer, (list, tuple)) or len(layer) != 2):
            raise BadInput(f"a layer's state {kind_of(layer)}; expected a pair, as an earlier "
                           "call returned it")
        for part in layer or ():
            if part is not None and not (torch.is_tensor(part) and part.is_floating_point()
                                         and part.device == device):
                raise BadInput(f"a part of a layer's state {kind_of(part)}; expected a floating "
                               f"dtype on {device}, or None")
            if part is not None and part.shape[:1] != (batch,):
                raise BadInput(f"a part of a layer's state {kind_of(part)}; expected {batch} "
                               "sequences, as idx has")


def map_state(function, *states):
    """The state whose tensors are function(the same tensor of each of the states). None,
    such as `before` without a convolution, stays None."""
    return [tuple(None if tensors[0] is None else function(*tensors)
                  for tensors in zip(*layers, strict=True))
            for layers in zip(*states, strict=True)]


def check_sampling(n, temperature, top_k, top_p, stop, seed):
    for name, value in (("n", n), ("top_k", top_k), ("stop", stop), ("seed", seed)):
        if value is not None and (not isinstance(value, numbers.Integral)
                                  or not -2**63 <= value < 2**63):
            raise BadInput(f"{name} is {value!r}; expected a whole number below 2^63")
    if n is None or n < 0:
        raise BadInput(f"n is {n}; expected a number of tokens, 0 or more")
    if not isinstance(temperature, numbers.Real) or not 0 <= temperature < math.inf:
        raise BadInput(f"temperature is {temperature!r}; expected 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise BadInput(f"top_k is {top_k}; expected 1 or more, or None for no limit")
    if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
        raise BadInput(f"top_p is {top_p!r}; expected a probability above 0, 1 (or None) for no "
                       "limit")


def random_numbers(batch, n, seed):
    """(batch,n) in [0,1), in float64; row i from a generator seeded with
    seed + i; seed None: all from torch's."""
    if seed is None:
        return torch.rand(batch, n, dtype=torch.float64)
    chances = torch.empty(batch, n, dtype=torch.float64)
    for i in range(batch):
        torch.rand(n, generator=torch.Generator().manual_seed(int(seed) + i), out=chances[i])
    return chances


def choose(logits, temperature, top_k, top_p, chance):
    """logits (B,vocab_size) -> one token per row (B,); chance (B,): uniform in [0,1)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p, token = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        likelier = p.cumsum(-1) - p                         # the probability of those before it
        p[likelier >= top_p * p.sum(-1, keepdim=True)] = 0
    upto = p.cumsum(-1)
    drawn = torch.searchsorted(upto, chance[:, None] * upto[:, -1:], right=True)
    return token.gather(1, drawn.clamp_max(p.shape[-1] - 1))[:, 0]


# ---------------------------------------------------------------------------------------
# checkpoints: {"config": dict, "model": state_dict, "train": dict or None}


def plain(value):
    """Whether torch.load(weights_only=True) reads it from a checkpoint."""
    if type(value) in (dict, collections.OrderedDict):
        return all(plain(key) and plain(entry) for key, entry in value.items())
    if type(value) in (list, tuple, set):
        return all(map(plain, value))
    return torch.is_tensor(value) or type(value) in (str, int, float, bool, bytes, type(None))


def as_lm(lm):
    """lm, or where it is torch.compile(lm) what was compiled. Raises BadInput for others."""
    lm = getattr(lm, "_orig_mod", lm)
    if not isinstance(lm, LM):
        raise BadInput(f"this is of type {type(lm).__name__}; expected an LM (of a wrapper around "
                       "one its .module)")
    return lm


def save_checkpoint(path, lm, train=None, weights=None):
    """Write a checkpoint (see write_file). train: a dict that a run goes on from, or None.
    weights: the model's state_dict, where lm holds only a part of it. Raises BadInput, also
    for a train that holds other things than plain containers, numbers, text and tensors."""
    lm = as_lm(lm)
    if not plain(train):
        raise BadInput(f"cannot write {path}: train holds other things than plain containers, "
                       "numbers, text and tensors")
    entries = {"config": asdict(lm.config), "model": weights or lm.state_dict(), "train": train}
    write_file(path, lambda file: torch.save(entries, file))


def load_checkpoint(path):
    """-> (lm, train). Raises BadInput for a file that is missing, cut short or not ours."""
    if not os.path.isfile(path):
        raise BadInput(f"no checkpoint at {path}; train.py and expand.py write them")
    try:
        open(path, "rb").close()
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from e
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                  # whatever unpickling meets in a file of another kind
        raise BadInput(f"{path} is not a whole checkpoint ({type(e).__name__}); it may be cut "
                       "short, damaged or of another format") from e
    if not isinstance(entries, dict) or set(entries) != {"config", "model", "train"}:
        raise BadInput(f"{path} is not a StateX checkpoint; expected config, model and train in it")
    return build(entries["config"], entries["model"], path), entries["train"]


def build(config, weights, path):
    """An LM from a dict of Config's fields and a state_dict, whose tensors it takes.
    Raises BadInput, which names path, where these do not fit each other."""
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise BadInput(f"{path} is not a StateX checkpoint; expected config and model to be dicts")
    odd = [name for name, x in weights.items() if not (
        isinstance(name, str) and torch.is_tensor(x) and x.is_floating_point()
        and x.layout == torch.strided)]
    if odd:
        raise BadInput(f"{path} is not a StateX checkpoint: {odd[0]!r} in it is no tensor of real "
                       "numbers with a name")
    unknown = set(config) - {field.name for field in fields(Config)}
    if unknown:
        raise BadInput(f"{path} has options that this version does not know: "
                       f"{', '.join(sorted(map(str, unknown)))}")
    try:
        config = Config(**config)
        with torch.device("meta"):
            lm = LM(config)
    except (TypeError, OverflowError, RuntimeError) as e:
        raise BadInput(f"{path} has sizes of which no model can be made: {one_line(e)}") from e
    if config.tie_embeddings and "embeddings.weight" in weights:
        weights["lm_head.weight"] = weights["embeddings.weight"]
    try:
        lm.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise BadInput(f"{path} does not fit the model that its config makes here (was model.py "
                       f"changed since?): {one_line(e, 300)}") from e
    if config.tie_embeddings:
        lm.lm_head.weight = lm.embeddings.weight
    return lm


def export(lm, folder):
    """Write a folder that flash-linear-attention's GLAForCausalLM or transformers'
    Mamba2ForCausalLM reads (see data/public.py). Raises BadInput."""
    lm = as_lm(lm)
    public.write_folder(asdict(lm.config), lm.state_dict(), str(folder))


# ---------------------------------------------------------------------------------------
# run as a script: generate, or export


@dataclass
class Options:
    ckpt: str = option("", "the model: a .pt file, a folder in a public format, or a hub id",
                       alias="init_from")
    prompt: str = option("", "text to continue; empty: a new document")
    n: int = option(200, "tokens at most")
    temperature: float = option(0.8, "0 takes the likeliest token")
    top_k: int = option(50, "draw among the k likeliest tokens; 0: no limit")
    top_p: float = option(1.0, "draw among the likeliest that have this probability together")
    seed: int = option(0, "of the draws")
    export: str = option("", "write the model to this new folder in a public format instead")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: the GPU if there is one")


def main():
    options = Options(**command_line(Options, __doc__))
    if not options.ckpt:
        raise BadInput("name a checkpoint: --ckpt=out/recipe-gla/statex.pt")
    if options.export and options.prompt:
        raise BadInput("--export writes the model and --prompt generates; name one of them")
    device = pick_device(options.device)
    lm = LM.from_pretrained(options.ckpt).eval()
    if options.export:
        export(lm, options.export)
        needs = "; transformers reads it after `import fla`" if lm.config.block == "gla" else ""
        print(f"{options.export}: a folder in the public format{needs}")
        if not glob.glob("tokenizer*", root_dir=options.export):
            print(f"without a tokenizer: {lm.config.tokenizer or 'it is unknown'} is not to be had "
                  "here; copy its files into the folder")
        return
    if not lm.config.tokenizer:
        raise BadInput(f"{options.ckpt} does not say what its token ids mean (tokenizer is empty)")
    tokenizer = load_tokenizer(lm.config.tokenizer)
    # ids beyond the tokenizer's have no text, and are not drawn
    lm.config.vocab_size = min(lm.config.vocab_size, tokenizer.n_vocab)
    ids = tokenizer.encode_ordinary(options.prompt)
    prompt = torch.tensor([ids or [tokenizer.eot_token]])
    tokens = lm.to(device).stream(prompt, options.n, options.temperature, options.top_k or None,
                                  options.top_p, tokenizer.eot_token, options.seed)
    # A character may take several tokens: what does not decode yet waits for the next one.
    text = tokenizer.decode(ids)
    printed = ""
    for token in tokens:
        try:
            text = tokenizer.decode([*ids, token.item()])
        except KeyError:                        # some tokenizers' ids have gaps: no text
            continue
        ids.append(token.item())
        if not text.endswith("\ufffd"):
            print(text[len(printed):], end="", flush=True)
            printed = text
    print(text[len(printed):])


if __name__ == "__main__":
    run_script(main)
