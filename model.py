"""A recurrent language model: GLA or Mamba2 blocks, the LM around them, checkpoints, generation.

The blocks are the public ones, parameter for parameter: GLA as in flash-linear-attention's GLAForCausalLM, Mamba2 as in
mamba_ssm. Both carry a state of fixed size through time. How large it is can differ from layer to layer (that is what
expand.py changes): `n_head` sets it for GLA (d_k d_v / n_head numbers a layer), `d_state` for Mamba2 (d_inner d_state).

    python model.py --ckpt=out/recipe-gla/statex.pt --prompt="def read("      generate (--ckpt also takes a folder or hub id)
    python model.py --ckpt=out/run/ckpt.pt --export=FOLDER                    write it in the public format
"""
import json, math, os, pickle, re, time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.prepare import BadInput, command_line, load_tokenizer, main_line
from kernels import conv_fits, gla, short_conv, ssd


@dataclass
class Config:
    """The shape of a model. Lengths are counted in channels, `n_head` and `d_state` are one number or one per layer."""
    block: str = "gla"               # "gla" or "mamba2"
    vocab_size: int = 4096
    n_layer: int = 24
    d_model: int = 1024
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    conv_size: int = 0               # taps of the causal convolution; GLA: 0 for none, Mamba2: 4
    # GLA
    n_head: int | list = 4
    expand_k: float = 0.5            # key channels over d_model
    expand_v: float = 1.0            # value channels over d_model
    d_mlp: int = 0                   # width of the MLP; 0: 2/3 * 4 * d_model, rounded up to a multiple of 256
    # Mamba2
    d_state: int | list = 128
    headdim: int = 64
    expand: int = 2                  # inner channels over d_model
    n_groups: int = 1                # heads of a group share B and C
    pad_vocab: int = 1               # rows of the embedding are rounded up to a multiple of this
    # what the token ids mean: an encoding that data/prepare.py knows, "" when unknown
    tokenizer: str = ""

    def __post_init__(self):
        if self.block not in ("gla", "mamba2"):
            raise BadInput(f"block is {self.block!r}; expected 'gla' or 'mamba2'")
        for name in ("n_head", "d_state"):                 # one number becomes one per layer
            value = getattr(self, name)
            value = [value] * self.n_layer if isinstance(value, int) else list(value)
            if len(value) != self.n_layer or not all(isinstance(x, int) and x > 0 for x in value):
                raise BadInput(f"{name} is {value}; expected a positive number, or {self.n_layer} of them, one per layer")
            setattr(self, name, value)
        if self.block == "gla":
            self.d_mlp = self.d_mlp or -(-int(self.d_model * 4 * 2 / 3) // 256) * 256
            for h in set(self.n_head):
                if self.d_k % h or self.d_v % h:
                    raise BadInput(f"n_head {h} does not divide the {self.d_k} key and {self.d_v} value channels; "
                                   "choose a common divisor")
        else:
            if self.d_inner % self.headdim:
                raise BadInput(f"headdim {self.headdim} does not divide the {self.d_inner} inner channels")
            if (self.d_inner // self.headdim) % self.n_groups:
                raise BadInput(f"n_groups {self.n_groups} does not divide the {self.d_inner // self.headdim} heads")
            if self.conv_size < 1:
                raise BadInput("conv_size is 0; Mamba2 needs its convolution, of 4 taps in every public model")

    d_k = property(lambda self: int(self.d_model * self.expand_k))
    d_v = property(lambda self: int(self.d_model * self.expand_v))
    d_inner = property(lambda self: self.d_model * self.expand)

    def state_numbers(self, layer):
        """Numbers in one layer's recurrent state, for one sequence (the few of the convolution not counted)."""
        return self.d_k * self.d_v // self.n_head[layer] if self.block == "gla" else self.d_inner * self.d_state[layer]


# The public checkpoints' shapes.
SIZES = {
    "gla-340m": Config("gla", 32000, 24, 1024, norm_eps=1e-6),
    "gla-1.3b": Config("gla", 32000, 24, 2048, norm_eps=1e-6),
    "mamba2-370m": Config("mamba2", 50277, 48, 1024, tie_embeddings=True, conv_size=4, pad_vocab=16),
    "mamba2-1.3b": Config("mamba2", 50277, 48, 2048, tie_embeddings=True, conv_size=4, pad_vocab=16),
}


def causal_conv(x, weight, bias, before, sizes):
    """Depthwise convolution over time, then silu. x (B,T,D), weight (D,1,taps), before (B,taps-1,D): the inputs
    before x, None for zeros. Returns y (B,T,D) cut into channels of `sizes`, and the inputs that the next call needs before its own.

    On a GPU one kernel a cut, so that nothing is copied. Of one token, and on a CPU, a sum of shifted copies, in the weights'
    precision: faster there than conv1d."""
    taps, T = weight.shape[-1], x.shape[1]
    if T > 1 and conv_fits(x):
        x = x if before is None else torch.cat((before.to(x.dtype), x), dim=1)
        last = x[:, max(0, x.shape[1] - taps + 1):]
        cuts = zip(x.split(sizes, dim=-1), weight.split(sizes), [None] * len(sizes) if bias is None else bias.split(sizes))
        return [short_conv(*cut)[:, -T:] for cut in cuts], F.pad(last, (0, 0, taps - 1 - last.shape[1], 0))
    x = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat((before.to(x.dtype), x), dim=1)
    y = sum(x[:, i:i + T] * weight[:, 0, i] for i in range(taps))
    return F.silu(y if bias is None else y + bias).to(x.dtype).split(sizes, dim=-1), x[:, T:]


class GLA(nn.Module):
    """Gated linear attention (arXiv 2312.06635, section 4.4). State: S (B,H,K,V) and the convolution's inputs."""

    def __init__(self, c, layer):
        super().__init__()
        self.n_head = c.n_head[layer]
        self.q_proj = nn.Linear(c.d_model, c.d_k, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.d_k, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.d_v, bias=False)
        self.g_proj = nn.Linear(c.d_model, c.d_v, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(c.d_model, 16, bias=False), nn.Linear(16, c.d_k))
        self.g_norm_swish_gate = nn.RMSNorm(c.d_v // self.n_head, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.d_v, c.d_model, bias=False)
        if c.conv_size:
            for name, d in (("q_conv1d", c.d_k), ("k_conv1d", c.d_k), ("v_conv1d", c.d_v)):
                self.add_module(name, nn.Conv1d(d, d, c.conv_size, groups=d, bias=False))
        self.conv_size = c.conv_size
        self.reset_parameters()

    def reset_parameters(self):
        for m in self.children():
            if m is not self.gk_proj:
                m.reset_parameters()
        nn.init.kaiming_uniform_(self.gk_proj[0].weight, a=5 ** 0.5)
        nn.init.kaiming_uniform_(self.gk_proj[1].weight, a=5 ** 0.5)
        nn.init.zeros_(self.gk_proj[1].bias)

    def forward(self, x, state=None):
        S, before = state or (None, None)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv_size:
            weight = torch.cat((self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight))
            (q, k, v), before = causal_conv(torch.cat((q, k, v), dim=-1), weight, None, before, (q.shape[-1], k.shape[-1], v.shape[-1]))
        g = F.logsigmoid(self.gk_proj(x).float()) / 16                                  # log decay, one per key channel
        q, k, v, g = (t.unflatten(-1, (self.n_head, -1)) for t in (q, k, v, g))         # (B,T,H,K or V)
        o, S = gla(q, k, v, g, state=S)
        o = F.rms_norm(o, o.shape[-1:], self.g_norm_swish_gate.weight.to(o.dtype), self.g_norm_swish_gate.eps)
        o = o * F.silu(self.g_proj(x)).unflatten(-1, (self.n_head, -1))                 # by heads: compiled, one kernel with the norm
        return self.o_proj(o.flatten(-2)), (S, before)


class Mamba2(nn.Module):
    """Mamba2 (arXiv 2405.21060, section 7). State: S (B,H,P,N) and the convolution's inputs."""

    def __init__(self, c, layer):
        super().__init__()
        self.d_inner, self.headdim, self.n_groups, self.d_state = c.d_inner, c.headdim, c.n_groups, c.d_state[layer]
        self.n_layer, H = c.n_layer, c.d_inner // c.headdim
        d_conv = c.d_inner + 2 * c.n_groups * self.d_state
        self.in_proj = nn.Linear(c.d_model, c.d_inner + d_conv + H, bias=False)         # rows: z, x, B, C, dt
        self.conv1d = nn.Conv1d(d_conv, d_conv, c.conv_size, groups=d_conv)             # channels: x, B, C
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = nn.RMSNorm(c.d_inner, eps=c.norm_eps)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        for m in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            m.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(self.n_layer)
            self.D.fill_(1.0)
            self.A_log.uniform_(1, 16).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))                       # softplus(dt_bias) = dt

    def forward(self, x, state=None):
        S, before = state or (None, None)
        N = self.n_groups * self.d_state
        z, xBC, dt = self.in_proj(x).split((self.d_inner, self.d_inner + 2 * N, len(self.D)), dim=-1)
        (x, B, C), before = causal_conv(xBC, self.conv1d.weight, self.conv1d.bias, before, (self.d_inner, N, N))
        x = x.unflatten(-1, (-1, self.headdim))                                         # (B,T,H,P)
        B, C = (t.unflatten(-1, (self.n_groups, -1)) for t in (B, C))                   # (B,T,G,N)
        dt = F.softplus(dt.float() + self.dt_bias)
        y, S = ssd(x, dt, -self.A_log.float().exp(), B, C, self.D, state=S)
        y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y), (S, before)


class GLABlock(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.attn = GLA(c, layer)
        self.mlp_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(c.d_model, c.d_mlp, bias=False),
                                  "up_proj": nn.Linear(c.d_model, c.d_mlp, bias=False),
                                  "down_proj": nn.Linear(c.d_mlp, c.d_model, bias=False)})

    def forward(self, x, y=None, state=None):
        """x (B,T,d_model) and what the layer before adds to it, None for nothing -> x and what this one adds, not added yet, so that
        under torch.compile one kernel adds it and takes the next norm; and the state."""
        x = x if y is None else x + y
        y, state = self.attn(self.attn_norm(x), state)
        x = x + y
        y = self.mlp_norm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x, self.mlp["down_proj"](y), state


class Mamba2Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.mixer = Mamba2(c, layer)

    def forward(self, x, y=None, state=None):
        """As GLABlock's."""
        x = x if y is None else x + y
        y, state = self.mixer(self.norm(x), state)
        return x, y, state


def slice_loss(logits, targets, n):
    """logits (rows,vocab_size), targets (rows,1) -> the summed cross-entropy and its gradient in the logits over n."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = p - p.amax(1, keepdim=True)
    right = p.gather(1, targets)
    p = p.exp_()
    z = p.sum(1, keepdim=True)
    dlogits = p.div_(z * n).to(logits.dtype)
    return (z.log() - right).sum(), dlogits.scatter_add_(1, targets, dlogits.new_full((1, 1), -1 / n).expand_as(targets))


def add_product(total, a, b):
    """total (m,n) += a (m,k) @ b (k,n), in place. bfloat16 factors on a GPU add up in total's float32, not rounded in between."""
    if total.is_cuda and a.dtype == torch.bfloat16:
        with torch.autocast("cuda", enabled=False):
            total.copy_(torch.addmm(total, a, b, out_dtype=total.dtype))
    else:
        total += a @ b


class SlicedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, without the (tokens, vocabulary) table of logits.

    x (n,d), weight (rows,d), targets (n,), those of -100 not counted, vocab_size <= rows. A slice of tokens at a time, the forward
    pass computes the logits, the loss, and at once the gradient (softmax - onehot) / count, which goes straight into x's and weight's
    gradients; the backward pass only scales them. Peak memory is one slice's logits."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, slice_numbers, slice_loss=slice_loss):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        w, counted = weight[:vocab_size].to(dtype), (targets != -100).nonzero()[:, 0]
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32)) if need_w else None
        total = 0.0
        for rows in counted.split(max(1, slice_numbers // vocab_size)):
            xs = x[rows].to(dtype)
            part, dlogits = slice_loss(xs @ w.T, targets[rows, None], len(counted))
            total = total + part
            if need_x:
                dx[rows] = (dlogits @ w).to(x.dtype)
            if need_w:
                add_product(dw[:vocab_size], dlogits.T, xs)
        ctx.save_for_backward(dx, dw)
        ctx.dtypes = x.dtype, weight.dtype
        return total / len(counted)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return (None if dx is None else dx * grad.to(dx.dtype), None if dw is None else (dw * grad).to(ctx.dtypes[1]),
                None, None, None, None)


class LM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpoint_activations = False                              # keep only the layers' inputs for the backward pass
        self.slice_loss = slice_loss                                     # train.py puts a compiled one here
        rows = -(-c.vocab_size // c.pad_vocab) * c.pad_vocab
        self.embeddings = nn.Embedding(rows, c.d_model)
        self.layers = nn.ModuleList((GLABlock if c.block == "gla" else Mamba2Block)(c, i) for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.d_model, rows, bias=False)
        if c.tie_embeddings:                                             # else N(0,1): of rows of 0.02, what the first mixer adds
            nn.init.normal_(self.embeddings.weight, std=0.02)            # leaves little, and GLA learns bigrams and recall late
            self.lm_head.weight = self.embeddings.weight

    def features(self, idx, state=None):
        """idx (B,T) -> the last layer's output (B,T,d_model) after the final norm, and the state after token T."""
        x, y, states = self.embeddings(idx), None, []
        for i, layer in enumerate(self.layers):
            s = None if state is None else state[i]
            if self.checkpoint_activations and self.training:
                x = x if y is None else x + y                            # one tensor to keep
                x, y, s = checkpoint(layer, x, None, s, use_reentrant=False)
            else:
                x, y, s = layer(x, y, s)
            states.append(s)
        return self.norm(x + y), states

    def forward(self, idx, targets=None, state=None):
        """idx, targets (B,T) int64; targets of -100 are not counted. state: what an earlier call returned, or None.

        Returns logits (B,T,vocab_size), loss (a scalar) and state, one entry a layer. Without targets loss is None;
        with them logits is None, so that they are only computed where a target counts."""
        x, state = self.features(idx, state)
        if targets is None:
            return self.lm_head(x)[..., :self.config.vocab_size], None, state
        return None, self.loss(x, targets), state

    def loss(self, x, targets):
        """Mean cross-entropy, in nats, of features x (B,T,d_model) where targets (B,T) are not -100."""
        slice_numbers = 1 << (28 if x.is_cuda else 22)                    # logits in memory at a time
        return SlicedCrossEntropy.apply(x.flatten(0, -2), self.lm_head.weight, targets.flatten(), self.config.vocab_size,
                                        slice_numbers, self.slice_loss)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None):
        """Continue idx (B,T) by n tokens, returned as (B,T+n). Memory does not grow with n: each step carries the
        state and one token. temperature 0 takes the likeliest token; top_k keeps only the k likeliest."""
        out, step = [idx], None
        with torch.compiler.set_stance("force_eager") if idx.is_cuda else nullcontext():          # nothing can compile while a graph is recorded
            for i in range(n):
                if i == 0:
                    x, state = self.features(idx)
                elif step:
                    x = step(out[-1])
                else:
                    x, state = self.features(out[-1], state)
                    if x.is_cuda and n - i > 16:                              # worth a recording
                        step = self.recorded_step(out[-1], state)
                logits = self.lm_head(x[:, -1])[:, :self.config.vocab_size].float()
                if temperature == 0:
                    token = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None:
                        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                        logits = logits.masked_fill(logits < kth, -torch.inf)
                    token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
                out.append(token)
        return torch.cat(out, dim=1)

    def recorded_step(self, token, state):
        """The one-token step after `state` as a CUDA graph: a function of token (B,1) that returns the features (B,1,d_model)
        and moves its own copy of the state on. Launching a step's several hundred kernels takes longer than running them."""
        token, state = token.clone(), [(S.clone(), None if before is None else before.clone()) for S, before in state]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x, new = self.features(token, state)
            for (S, before), (new_S, new_before) in zip(state, new):
                S.copy_(new_S)
                if before is not None:
                    before.copy_(new_before)

        def step(t, held=state):                                          # the graph reads and writes these tensors
            token.copy_(t)
            graph.replay()
            return x
        return step

    @classmethod
    def from_pretrained(cls, name, block=None):
        """The model in a checkpoint of ours (a .pt file), in a folder in a public format, or under a hub id such as
        "fla-hub/gla-1.3B-100B", "state-spaces/mamba2-1.3b" (through huggingface_hub). Raises BadInput, also where the
        model is not of the block type asked for."""
        if os.path.isdir(name) or not os.path.exists(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).endswith(".pt"):
            lm = load_public(name)
        else:
            lm = load_checkpoint(name)[0]
        if block and lm.config.block != block:
            raise BadInput(f"{name} holds a {lm.config.block} model; expected {block}, so use --block={lm.config.block}")
        return lm


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: {"config": dict, "model": state_dict, "train": dict or None}


def save_checkpoint(path, lm, train=None, weights=None):
    """Write to a temporary file, flush it to the disk, rename: a kill at any moment leaves the old file or the new.
    weights: the whole model's state_dict, where lm holds only a part of it."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save({"config": asdict(lm.config), "model": weights or lm.state_dict(), "train": train}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                       # a full disk reaches us as either
        if os.path.exists(tmp):
            os.remove(tmp)
        raise BadInput(f"cannot save {path}: {e}; the last checkpoint is untouched")


def load_checkpoint(path):
    """-> (lm, train). Raises BadInput for a file that is missing, cut short or not ours."""
    if not os.path.isfile(path):
        raise BadInput(f"no checkpoint at {path}; train.py and expand.py write them")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as e:
        raise BadInput(f"{path} is not a whole checkpoint ({type(e).__name__}); it may be cut short or another format")
    if not isinstance(ckpt, dict) or set(ckpt) != {"config", "model", "train"}:
        raise BadInput(f"{path} is not a StateX checkpoint; expected config, model and train in it")
    unknown = set(ckpt["config"]) - {f.name for f in fields(Config)}
    if unknown:
        raise BadInput(f"{path} has options that this version does not know: {', '.join(sorted(unknown))}")
    config = Config(**ckpt["config"])
    with torch.device("meta"):
        lm = LM(config)
    if config.tie_embeddings:
        ckpt["model"]["lm_head.weight"] = ckpt["model"]["embeddings.weight"]
    try:
        lm.load_state_dict(ckpt["model"], assign=True)
    except RuntimeError as e:
        raise BadInput(f"{path} does not fit its own config: {' '.join(str(e).split())[:300]}")
    if config.tie_embeddings:
        lm.lm_head.weight = lm.embeddings.weight
    return lm, ckpt["train"]


# ---------------------------------------------------------------------------------------------------------------------
# public checkpoints: flash-linear-attention's GLA, state-spaces' Mamba2, transformers' Mamba2

# In a config: options that change nothing here (how others initialise, store, fuse or chunk), and options of which only
# one value is built. Everything else is read below, or refused by name.
NO_MATTER = set("""architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id
    eos_token_id pad_token_id max_position_embeddings attn_mode fuse_norm fuse_swiglu fuse_cross_entropy
    fuse_linear_cross_entropy use_l2warp chunk_size residual_in_fp32 rescale_prenorm_residual time_step_rank time_step_min
    time_step_max time_step_floor fused_add_norm layer_types""".split())
ONLY = {
    "gla": {"num_kv_heads": (None, "num_heads"), "feature_map": (None,), "use_output_gate": (True,), "clamp_min": (None,),
            "hidden_act": ("swish", "silu"), "elementwise_affine": (True,), "use_gk": (True,), "use_gv": (False,), "attn": (None,),
            "attnres_block_size": (None,), "share_conv_kernel": (False,)},
    "mamba2": {"hidden_act": ("silu", "swish"), "use_bias": (False,), "use_conv_bias": (True,), "rms_norm": (True,),
               "norm_before_gate": (False,), "time_step_limit": ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None), "d_intermediate": (0,),
               "attn_layer_idx": ([], None), "attn_cfg": ({}, None)},
}


def load_public(name):
    """The model in a folder in a public format, or under a hub id; its weights in float32."""
    folder = str(name)
    if not os.path.isdir(folder):
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise BadInput(f"no file or folder {name}; to fetch it from the hub: pip install huggingface_hub")
        try:
            folder = snapshot_download(folder, allow_patterns=["*.json", "*.safetensors", "*.bin", "tokenizer*"])
        except Exception as e:                                 # whatever the network or the hub answers
            raise BadInput(f"no file or folder {name}, and the hub did not give it ({type(e).__name__})")
    try:
        with open(f"{folder}/config.json") as f:
            public = json.load(f)
    except (OSError, ValueError) as e:
        raise BadInput(f"{folder} has no readable config.json ({type(e).__name__}); expected a checkpoint folder")
    ours = public.pop("statex_tokenizer", None)                # `export` writes it, other formats ship their tokenizer beside the weights
    config = read_config(public, folder)
    config.tokenizer = ours or ("hf:EleutherAI/gpt-neox-20b" if "ssm_cfg" in public else f"hf:{name}")      # state-spaces ships none
    with torch.device("meta"):
        lm = LM(config)
    want, have, wrong = lm.state_dict(), {}, []
    for key, tensor in read_weights(folder):
        ours = our_name(key)
        if ours.endswith("mlp.gate_proj.weight") and tensor.shape[0] == 2 * config.d_mlp:        # older: gate and up in one
            have[ours], have[ours.replace("gate_proj", "up_proj")] = (t.float().clone() for t in tensor.chunk(2))
        elif ours not in want or ours in have:
            wrong.append(f"unexpected {key}")
        elif tensor.shape != want[ours].shape:
            wrong.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(want[ours].shape)}")
        else:
            have[ours] = tensor.float()
    if config.tie_embeddings and "embeddings.weight" in have:
        have["lm_head.weight"] = have["embeddings.weight"]
    wrong += [f"missing {key}" for key in want if key not in have and not any(our_name(w.split()[0]) == key for w in wrong)]
    if wrong:
        raise BadInput(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong[:8])}" + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
    lm.load_state_dict(have, assign=True)
    if config.tie_embeddings:
        lm.lm_head.weight = lm.embeddings.weight
    return lm.requires_grad_()


def read_config(public, folder):
    """Our Config from a public config.json; every option in it is used, known not to matter, or refused by name."""
    left = {k: v for k, v in public.items() if k not in NO_MATTER and not k.startswith("_")}
    take = lambda key, default=None: left.pop(key, default)
    kind = "state-spaces" if "ssm_cfg" in public else public.get("model_type")
    if kind == "gla":
        d, ratio = take("hidden_size"), take("hidden_ratio", 4) or 4
        conv, taps, heads = take("use_short_conv", False), take("conv_size", 4), take("num_heads")
        if not conv or left.get("share_conv_kernel") is None:
            take("share_conv_kernel")
        if left.get("num_kv_heads") == heads:
            take("num_kv_heads")
        shape = dict(block="gla", d_model=d, n_layer=take("num_hidden_layers"), n_head=heads, expand_k=take("expand_k", 0.5),
                     expand_v=take("expand_v", 1.0), conv_size=taps if conv else 0, norm_eps=take("norm_eps", 1e-6),
                     d_mlp=take("intermediate_size") or -(-int(d * ratio * 2 / 3) // 256) * 256,
                     vocab_size=take("vocab_size"), tie_embeddings=take("tie_word_embeddings", False))
    elif kind == "mamba2":
        shape = dict(block="mamba2", d_model=take("hidden_size"), n_layer=take("num_hidden_layers"), d_state=take("state_size", 128),
                     headdim=take("head_dim", 64), expand=take("expand", 2), n_groups=take("n_groups", 8), conv_size=take("conv_kernel", 4),
                     norm_eps=take("layer_norm_epsilon", 1e-5), vocab_size=take("vocab_size"),
                     tie_embeddings=take("tie_word_embeddings", False))
        heads = take("num_heads")
        if heads is not None and heads * shape["headdim"] != shape["d_model"] * shape["expand"]:
            raise BadInput(f"{folder}/config.json: num_heads {heads} x head_dim {shape['headdim']} is not expand x hidden_size")
    elif kind == "state-spaces":
        ssm = dict(take("ssm_cfg"))
        if ssm.pop("layer", "Mamba1") != "Mamba2":
            raise BadInput(f"{folder}/config.json: ssm_cfg's layer is not Mamba2; only Mamba2 is built")
        shape = dict(block="mamba2", d_model=take("d_model"), n_layer=take("n_layer"), d_state=ssm.pop("d_state", 128),
                     headdim=ssm.pop("headdim", 64), expand=ssm.pop("expand", 2), n_groups=ssm.pop("ngroups", 1),
                     conv_size=ssm.pop("d_conv", 4), vocab_size=take("vocab_size"), pad_vocab=take("pad_vocab_size_multiple", 8),
                     tie_embeddings=take("tie_embeddings", True))
        left |= {f"ssm_cfg.{k}": v for k, v in ssm.items() if k != "chunk_size"}
    else:
        raise BadInput(f"{folder}/config.json: model_type is {kind!r}; expected gla, mamba2, or state-spaces' ssm_cfg")
    only = ONLY[shape["block"]]
    refused = [f"{k} = {v!r}" for k, v in left.items() if k not in only or v not in only[k]]
    if refused:
        raise BadInput(f"{folder}/config.json asks for what is not built: {', '.join(refused)}")
    missing = [k for k, v in shape.items() if v is None]
    if missing:
        raise BadInput(f"{folder}/config.json lacks {', '.join(missing)}")
    return Config(**shape)


def our_name(key):
    """A public parameter's name here."""
    key = re.sub(r"^(model|backbone)\.", "", key)
    return re.sub(r"^norm_f\.", "norm.", re.sub(r"^embedding\.", "embeddings.", key))


def read_weights(folder):
    """Yields name, tensor from model.safetensors, its shards, or pytorch_model.bin (never unpickling anything but tensors), one
    at a time, so that the file and a float32 copy of it are not in memory together."""
    names = [f"{folder}/model.safetensors"]
    try:
        if os.path.exists(f"{folder}/model.safetensors.index.json"):
            with open(f"{folder}/model.safetensors.index.json") as f:
                names = sorted({f"{folder}/{n}" for n in json.load(f)["weight_map"].values()})
        elif not os.path.exists(names[0]):
            weights = torch.load(f"{folder}/pytorch_model.bin", map_location="cpu", weights_only=True)
            for key in list(weights):
                yield key, weights.pop(key)
            return
        try:
            from safetensors import safe_open
        except ImportError:
            raise BadInput("this checkpoint is in safetensors format: pip install safetensors")
        for n in names:
            with safe_open(n, "pt") as f:
                keys = list(f.keys())
            for key in keys:
                with safe_open(n, "pt") as f:                  # anew for each: what was read of the file leaves memory
                    tensor = f.get_tensor(key)
                yield key, tensor
    except BadInput:
        raise
    except Exception as e:                                     # a missing shard, a cut file, a pickle of something else
        raise BadInput(f"cannot read the weights in {folder}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")


def export(lm, folder):
    """Write config.json and model.safetensors as flash-linear-attention's GLAForCausalLM and transformers'
    Mamba2ForCausalLM read them. Raises BadInput for layers that differ: those formats have one size for all."""
    c = lm.config
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise BadInput("--export writes safetensors: pip install safetensors")
    sizes = c.n_head if c.block == "gla" else c.d_state
    if len(set(sizes)) > 1:
        raise BadInput(f"this model's layers differ ({'n_head' if c.block == 'gla' else 'd_state'} is {sizes}); the public format holds one size for all layers")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise BadInput(f"{folder} exists; --export names a new folder")
    rows = lm.embeddings.weight.shape[0]
    if c.block == "gla":
        public = {"architectures": ["GLAForCausalLM"], "model_type": "gla", "hidden_size": c.d_model, "num_hidden_layers": c.n_layer,
                  "num_heads": sizes[0], "expand_k": c.expand_k, "expand_v": c.expand_v, "use_short_conv": c.conv_size > 0,
                  "conv_size": c.conv_size or 4, "norm_eps": c.norm_eps, "intermediate_size": c.d_mlp, "hidden_act": "swish"}
        rename = lambda k: k if k.startswith("lm_head") else f"model.{k}"
    else:
        public = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_size": c.d_model, "num_hidden_layers": c.n_layer,
                  "num_heads": c.d_inner // c.headdim, "head_dim": c.headdim, "state_size": sizes[0], "expand": c.expand,
                  "n_groups": c.n_groups, "conv_kernel": c.conv_size, "layer_norm_epsilon": c.norm_eps, "hidden_act": "silu",
                  "use_bias": False, "use_conv_bias": True}
        rename = lambda k: k if k.startswith("lm_head") else f"backbone.{re.sub('^norm', 'norm_f', k)}"
    public |= {"vocab_size": rows, "tie_word_embeddings": c.tie_embeddings, "torch_dtype": "float32", "statex_tokenizer": c.tokenizer or None}
    weights = {rename(k): v.contiguous() for k, v in lm.state_dict().items() if not (c.tie_embeddings and k == "lm_head.weight")}
    os.makedirs(folder, exist_ok=True)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with open(f"{folder}/config.json", "w") as f:
        json.dump(public, f, indent=1)


def speed(lm, prompt=8192, n=64):
    """How fast lm reads a prompt and writes n tokens on the device it is on, in bfloat16 on a GPU (A_log, dt_bias and D stay
    in float32; lm is converted in place). Returns {"state_bytes" a sequence, "prefill_tokens_per_s", "ms_per_token": {batch: ms}}."""
    device, c = lm.embeddings.weight.device, lm.config
    if device.type == "cuda":
        exact = {k: p.data.float() for k, p in lm.named_parameters() if k.endswith(("A_log", "dt_bias", ".D"))}
        lm.bfloat16()
        for k, p in lm.named_parameters():
            p.data = exact.get(k, p.data)

    def seconds(f):
        f()
        times = []
        for _ in range(3):
            t0 = time.time()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.time() - t0)
        return sorted(times)[1]

    idx = torch.randint(c.vocab_size, (64, prompt), device=device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        read = seconds(lambda: lm.features(idx[:1]))
    write = {b: seconds(lambda: lm.generate(idx[:b, :1], n)) / n * 1e3 for b in (1, 64)}
    return {"state_bytes": 4 * sum(c.state_numbers(i) for i in range(c.n_layer)), "prefill_tokens_per_s": round(prompt / read),
            "ms_per_token": write}


def main():
    o = command_line(__doc__, ckpt="", prompt="", n=200, temperature=0.8, top_k=50, seed=0, export="",
                     device="cuda" if torch.cuda.is_available() else "cpu")
    if not o.ckpt:
        raise BadInput("name a checkpoint: --ckpt=out/recipe-gla/statex.pt")
    lm = LM.from_pretrained(o.ckpt).to(o.device).eval()
    if o.export:
        export(lm.cpu(), o.export)
        return print(f"{o.export}: config.json and model.safetensors")
    tokenizer = load_tokenizer(lm.config.tokenizer)
    ids = tokenizer.encode_ordinary(o.prompt) or [0]
    torch.manual_seed(o.seed)
    idx = torch.tensor([ids], device=o.device)
    print(tokenizer.decode(lm.generate(idx, o.n, o.temperature, o.top_k or None)[0].tolist()))


if __name__ == "__main__":
    main_line(main)
