"""Transplant a model into one with a larger state (StateX, arXiv 2509.22630, sec. 4).

Every layer that is not chosen is kept bit for bit. The state of a chosen one becomes f
times as large. In GLA a head's state has K x V elements: f heads that share their keys
have f K x V each, f heads that become one have f K x f V. What becomes of the weights:

    init         GLA                                   Mamba2
    preserve     groups of f heads share their keys:   d_state N -> f N: new rows of B
                 gates, at the start the identity      random, new rows of C zero
    inherit      f heads become one; norm gains tiled  rows of B and C tiled
    reinit       f heads become one; mixer and         A_log, dt_bias, gated norm and
                 pre-norm start afresh                 all rows of B and C afresh
    reinit-keys  as inherit, but q, k, gk afresh       all rows of B and C afresh
    groups                                             n_groups x f, B and C tiled: more
                                                       parameters, the same state

`preserve` (ours, the default) leaves the function as it was, up to the rounding of
longer sums. GLA's gates and Mamba2's new rows of C learn from the first step, B's new
rows from the second, when C's are no longer zero; `train.py --gates_rate` lets gates
learn faster. `reinit` is the paper's choice, `inherit` its ablation. In Mamba2 tiled
rows get equal gradients for ever: `inherit` can use its larger state only where --noise
breaks the tie.

Other factors for other layers: expand the result again.

An init of your own: (1) its name in INITS, (2) how sizes grow, in `enlarged` (Mamba2:
by d_state; GLA: heads share keys, or they merge), (3) what every parameter is made of,
in `plan_gla` (where keys are shared, gates start as the identity) or `plan_mamba2` (rows
of B and C: `plan_rows`), (4) a case in `make` if that is a new way, and (5) `check`, if
your init takes --noise (of all that is tiled), --paper or --same_state (none is in
train.py). `python train.py --init=NAME --out_dir=out/NAME` runs it, for Mamba2 with
--block=mamba2; it trains StateX alone where you copied pretrained.pt and lpt.pt of an
otherwise equal recipe to out/NAME.

    python expand.py --ckpt=out/recipe-gla/pretrained.pt --every=1 --out=out/expanded.pt
    python expand.py --ckpt=gla-1.3b --every=6 --dry-run    the report for a public size
"""
from data.options import BadInput, command_line, option, run_script

import math
import os
import zipfile
from dataclasses import dataclass, replace

import torch

from model import LM, SIZES, as_lm, load_checkpoint, save_checkpoint

INITS = ("preserve", "inherit", "reinit", "reinit-keys", "groups")


def expand(lm, layers, factor=None, init="preserve", seed=0, noise=0.0, same_state=False,
           paper=False):
    """A copy of lm with a larger state in `layers` (a list of indices).

    factor: how many times as large; GLA: a divisor of the layer's n_key_head (None: all
    of it), Mamba2: a whole number from 2 up (None: 4). init: see above. seed: of what
    starts afresh and of noise. noise: of tiled rows of B and C, over their standard
    deviation. same_state: reinit or reinit-keys without a larger state, as a control.
    paper: start afresh as the paper does, not as our models start (see paper_init).

    Returns (lm, report): the copy, on the same device and in the same dtypes, all of it to
    be trained, and what `describe` makes a text of. Raises BadInput."""
    lm = as_lm(lm)
    check(lm.config, layers, factor, init, seed, noise, same_state, paper)
    layers = sorted(set(layers))
    config = enlarged(lm.config, layers, factor, init, same_state)
    with torch.device("meta"):
        new = LM(config)
    plan = {name: plan_tensor(name, lm.config, config, layers, init) for name in new.state_dict()}
    if lm.embeddings.weight.device.type != "meta":
        fresh = fresh_layers(new, layers, seed, paper)
        carry_out(plan, lm, new, fresh, noise, seed)
    new.train(lm.training)
    return new, changes(lm, new, plan, layers, init, seed)


def check(config, layers, factor, init, seed, noise, same_state, paper):
    if not isinstance(layers, (list, tuple, set, range)) or any(type(i) is not int for i in layers):
        raise BadInput(f"layers is {layers!r}; expected a list of layers' indices")
    if type(factor) not in (int, type(None)) or type(seed) is not int or not 0 <= seed < 2**63:
        raise BadInput(f"factor is {factor!r} and seed {seed!r}; expected whole numbers, of which "
                       "seed is from 0 up and below 2^63")
    if type(noise) not in (int, float) or not 0 <= noise < math.inf:
        raise BadInput(f"noise is {noise!r}; expected a number from 0 up")
    if init not in INITS:
        raise BadInput(f"init is {init!r}; expected one of {', '.join(INITS)}")
    if config.block not in ("gla", "mamba2"):
        raise BadInput(f"expand knows gla and mamba2, not {config.block}: teach `enlarged` and "
                       "`plan_tensor`")
    if not layers or min(layers) < 0 or max(layers) >= config.n_layer:
        raise BadInput(f"layers {layers} are out of range; this model has layers 0 to "
                       f"{config.n_layer - 1}")
    if init == "groups" and config.block == "gla":
        raise BadInput("init groups is a control for Mamba2; GLA has no groups of heads that "
                       "share B and C")
    if init == "groups" and len(set(layers)) < config.n_layer:
        raise BadInput("init groups takes every layer, because n_groups is one number for all: "
                       "--every=1")
    if noise and (init != "inherit" or config.block == "gla"):
        raise BadInput("noise is for Mamba2's tiled rows: --init=inherit")
    if (same_state or paper) and not init.startswith("reinit"):
        raise BadInput("same_state and paper are about what starts afresh: --init=reinit or "
                       "--init=reinit-keys")


def enlarged(config, layers, factor, init, same_state):
    """The new Config."""
    new = replace(config)               # with lists of its own
    gla = config.block == "gla"
    for i in layers:
        f = factor or (new.n_key_head[i] if gla else 4)
        expected = f"a whole number, 2 to {1 << 16:,}"
        if gla:
            expected = f"a divisor of its {new.n_key_head[i]} heads of keys, above 1"
            if new.n_key_head[i] == 1:
                raise BadInput(f"layer {i} has one head of keys already, and cannot share or merge "
                               "more")
        if not 2 <= f <= 1 << 16 or gla and new.n_key_head[i] % f:
            raise BadInput(f"factor {f} cannot enlarge layer {i}; expected {expected}")
        if same_state:
            continue                    # a control: nothing grows
        if init == "groups":
            new.n_groups = config.n_groups * f          # one number for all layers
        elif config.block == "mamba2":
            new.d_state[i] *= f
        elif init == "preserve":
            new.n_key_head[i] //= f
        elif init not in ("inherit", "reinit", "reinit-keys"):
            raise BadInput(f"`enlarged` does not say how a GLA layer grows by init {init}")
        elif new.n_key_head[i] < new.n_head[i]:
            raise BadInput(f"layer {i} shares keys already, so that its heads cannot become one; "
                           "take --init=preserve, or the model before it was expanded")
        else:
            new.n_head[i] //= f
            new.n_key_head[i] //= f
    return replace(new)                 # checks it


# ---------------------------------------------------------------------------------------
# the plan: for every tensor of the new model, what it is made of


@dataclass
class Piece:
    """Some rows (along the first dimension) of a tensor of the new model.

    how: kept (rows of the old tensor), tiled (those, repeated), fresh, zero, or
    identity (GLA's gates). what: its name in the report. rows: how many, None for all.
    old: which rows of the old tensor, None for all."""
    how: str
    what: str
    rows: int | None = None
    old: slice | None = None


def plan_tensor(name, config, new_config, layers, init):
    """The pieces of the tensor `name` (as in the state_dict), in order."""
    if not name.startswith(tuple(f"layers.{i}." for i in layers)):
        return [Piece("kept", "everything outside the chosen layers")]
    _, layer, part = name.split(".", 2)                 # "layers", "0", "attn.gates"
    planner = plan_gla if config.block == "gla" else plan_mamba2
    return planner(part, config, new_config, int(layer), init)


def plan_gla(part, config, new_config, layer, init):
    """The pieces of one parameter of a chosen GLA layer."""
    if part == "attn.gates":
        shared = config.n_key_head[layer] < config.n_head[layer]
        return [Piece("kept" if shared else "identity", part)]
    afresh = {"preserve": (), "inherit": (), "reinit": ("attn.", "attn_norm."),
              "reinit-keys": ("attn.q_", "attn.k_", "attn.gk_proj")}
    if init not in afresh:
        raise BadInput(f"plan_gla does not say what becomes of a layer by init {init}")
    if part.startswith(afresh[init]):
        return [Piece("fresh", part)]
    merged = new_config.n_head[layer] < config.n_head[layer]
    if part == "attn.g_norm_swish_gate.weight" and merged:
        return [Piece("tiled", part)]
    return [Piece("kept", part)]


def plan_mamba2(part, config, new_config, layer, init):
    """The pieces of one parameter of a chosen Mamba2 layer."""
    if part.startswith(("mixer.in_proj", "mixer.conv1d")):
        return plan_rows(part, config, new_config, layer, init)
    if init == "reinit" and part in ("mixer.A_log", "mixer.dt_bias", "mixer.norm.weight"):
        return [Piece("fresh", part)]
    return [Piece("kept", part)]


def plan_rows(part, config, new_config, layer, init):
    """The pieces of in_proj (rows z, x, B, C, dt) or of the convolution (channels x, B, C).

    B and C are groups of N rows each. A group's new rows follow its old ones."""
    groups = config.n_groups
    N = config.d_state[layer]
    new_rows = new_config.d_state[layer] * new_config.n_groups // groups    # per old group
    heads = config.d_inner // config.headdim
    before = 2 * config.d_inner if "in_proj" in part else config.d_inner    # z, x or x
    after = heads if "in_proj" in part else 0                               # dt or nothing
    end = before + 2 * groups * N
    pieces = [Piece("kept", f"{part}, other rows", before, slice(0, before))]
    for letter, start in (("B", before), ("C", before + groups * N)):
        what = f"{part}, {letter}"
        for group in range(groups):
            old = slice(start + group * N, start + (group + 1) * N)
            if init in ("reinit", "reinit-keys"):
                pieces.append(Piece("fresh", what, new_rows))
            elif init == "preserve":
                # C = silu(conv(in_proj(x)) + bias) must be 0 and still learn: its rows of
                # in_proj and its biases are zero, the taps are not. (Were B's zero as well,
                # neither would ever get a gradient.)
                how = "zero" if letter == "C" and part != "mixer.conv1d.weight" else "fresh"
                pieces += [Piece("kept", what, N, old), Piece(how, what, new_rows - N)]
            elif init in ("inherit", "groups"):
                pieces.append(Piece("tiled", what, new_rows, old))
            else:
                raise BadInput(f"plan_rows does not say what becomes of B and C by init {init}")
    return [*pieces, Piece("kept", f"{part}, other rows", after, slice(end, end + after))]


# ---------------------------------------------------------------------------------------
# carrying it out


def fresh_layers(new, layers, seed, paper):
    """The parameters of the chosen layers as a new model of this shape would start, by their
    names in the state_dict. (What this leaves in `new` carry_out replaces. Mamba2's out_proj,
    which no init draws anew, is not scaled here as the mixer's constructor does it.)"""
    fresh = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for i in layers:
            layer = new.layers[i].to_empty(device="cpu")
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            if new.config.block == "gla":
                layer.attn.reset_parameters()   # again: its parts overwrote gk_proj
            if paper:
                paper_init(layer)
            for name, tensor in layer.state_dict().items():
                fresh[f"layers.{i}.{name}"] = tensor
    return fresh


@torch.no_grad()
def paper_init(layer):
    """What thunlp's StateX starts afresh, as it does. GLA: Xavier's uniform with a gain of
    2^-2.5 (biases are zero already). Mamba2: dt_bias 1 and A = -1, -2, ..., -H."""
    if hasattr(layer, "mixer"):
        layer.mixer.dt_bias.fill_(1.0)
        layer.mixer.A_log.copy_(torch.arange(1, len(layer.mixer.A_log) + 1).log())
        return
    for module in layer.attn.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight, gain=2 ** -2.5)


def carry_out(plan, lm, new, fresh, noise, seed):
    """Give `new` its tensors by the plan, on lm's device and in its dtypes."""
    old = lm.state_dict()
    made = {}
    rng = torch.Generator().manual_seed(seed)
    for name, pieces in plan.items():
        if name not in fresh:
            made[name] = old[name].clone()
            continue
        before = old.get(name)                  # GLA's first gates have none
        like = old["embeddings.weight"] if before is None else before
        if name.endswith("attn.gates") and before is not None:
            groups = before.chunk(len(fresh[name]))     # old groups that become one: no head
                                                        # reads another old one's keys yet
            before = torch.stack([torch.block_diag(*group) for group in groups])
        made[name] = torch.cat(list(make(pieces, before, fresh[name].to(like), noise, rng)))
        if made[name].shape != fresh[name].shape:
            raise BadInput(f"{name}: the plan makes {tuple(made[name].shape)} of it, the layer "
                           f"has {tuple(fresh[name].shape)}; see plan_gla and plan_mamba2")
    new.load_state_dict(made, assign=True)
    if new.config.tie_embeddings:
        new.lm_head.weight = new.embeddings.weight


def make(pieces, old, fresh, noise, rng):
    """Yield the rows of each piece; old and fresh are the whole tensors."""
    at = 0
    for piece in pieces:
        rows = len(fresh) if piece.rows is None else piece.rows
        source = old if piece.old is None else old[piece.old]
        if piece.how == "kept":
            yield source
        elif piece.how == "zero":
            yield torch.zeros_like(fresh[at:at + rows])
        elif piece.how in ("fresh", "identity"):        # GLA's gates start as the identity
            yield fresh[at:at + rows]
        elif piece.how == "tiled":
            tiled = torch.cat([source] * (rows // len(source)))
            if noise:
                draws = torch.randn(tiled.shape, generator=rng).to(tiled)
                draws[:len(source)] = 0                 # the first copy stays as it is
                spread = source.std() if source.numel() > 1 else 0.0
                tiled = tiled + noise * spread * draws
            yield tiled
        else:
            raise BadInput(f"`make` does not know rows that are {piece.how}")
        at += rows


# ---------------------------------------------------------------------------------------
# the report


def changes(lm, new, plan, layers, init, seed):
    """What changed, as a dict of numbers: elements by (how, what), parameters, state."""
    elements = {}
    for name, tensor in new.named_parameters():         # tied ones once
        for piece in plan[name]:
            key = (piece.how, piece.what)
            rows = len(tensor) if piece.rows is None else piece.rows
            elements[key] = elements.get(key, 0) + rows * tensor[0].numel()
    by_layer = [(lm.config.state_elements(i), new.config.state_elements(i))
                for i in range(new.config.n_layer)]
    return {"block": new.config.block, "init": init, "seed": seed, "layers": layers,
            "elements": elements,
            "params_before": sum(p.numel() for p in lm.parameters()),
            "params_after": sum(p.numel() for p in new.parameters()),
            "state_elements_before": lm.config.total_state(),
            "state_elements_after": new.config.total_state(),
            "state_elements_by_layer": by_layer}


def describe(r):
    """The report of `expand` as text."""
    by_layer = r["state_elements_by_layer"]
    lines = [f"{r['block']}, init {r['init']}, seed {r['seed']}: "
             f"{len(r['layers'])} of {len(by_layer)} layers expanded",
             "", f"{'':8s}{'elements':>14s}  tensors"]
    kept_first = sorted(r["elements"].items(), key=lambda item: (item[0][0] != "kept", item[0]))
    for (how, what), count in kept_first:
        lines.append(f"{how:8s}{count:14,d}  {what}")
    lines += ["", "layer   state elements per sequence"]
    for i, (old, new) in enumerate(by_layer):
        lines.append(f"{i:5d}   {old:,d}" + (f" -> {new:,d}" if new != old else ""))
    params = r["params_before"]
    more = r["params_after"] - params
    before = r["state_elements_before"]
    after = r["state_elements_after"]
    lines += ["",
              f"parameters      {millions(params)} -> {millions(r['params_after'])}   "
              f"{more:+,d} ({100 * more / params:+.4f} %)",
              f"state elements  {millions(before)} -> {millions(after)}   x {after / before:.2f}",
              f"state bytes     {4 * before:,d} -> {4 * after:,d} per sequence, in float32"]
    return "\n".join(lines)


def millions(n):
    return f"{n / 1e6:,.2f}M" if n >= 1e6 else f"{n:,d}"


# ---------------------------------------------------------------------------------------
# run as a script


@dataclass
class Options:
    ckpt: str = option("", f"the model to expand, or with --dry-run one of {', '.join(SIZES)}",
                       alias="init_from")
    every: int = option(6, "expand every n-th layer, from layer 0 on")
    layers: str = option("", "or these, such as 0,6,12")
    factor: int = option(0, "of the state; 0: GLA all heads of a layer, Mamba2 4")
    init: str = option("preserve", ", ".join(INITS), choices=INITS)
    seed: int = option(0, "of what starts afresh")
    noise: float = option(0.0, "of tiled rows, over their standard deviation (Mamba2 inherit)")
    same_state: bool = option(False, "reinit without a larger state, as a control")
    paper: bool = option(False, "start afresh as the paper does")
    out: str = option("out/expanded.pt", "the checkpoint to write")
    dry_run: bool = option(False, "report only")


def choose_layers(n_layer, every, listed):
    """Layer indices: those listed ("0,5,7"), or if "" every n-th from layer 0 on."""
    if listed:
        try:
            return [int(x) for x in listed.split(",")]
        except ValueError as e:
            raise BadInput(f"--layers={listed} is not a list of layers; expected numbers such "
                           "as 0,6,12") from e
    if every < 1:
        raise BadInput(f"--every={every} chooses no layers; expected 1 or more")
    return list(range(0, n_layer, every))


def check_choice(given):
    """Raises BadInput where the command line chooses layers twice."""
    if given.get("layers") and "every" in given:
        raise BadInput("--layers and --every both choose layers; name one of them")


def is_run(path):
    """Whether this checkpoint holds training, or may, being of another version; any other file
    may be overwritten."""
    try:
        return load_checkpoint(path)[1] is not None
    except BadInput:
        return zipfile.is_zipfile(path)


def main():
    given = command_line(Options, __doc__)
    check_choice(given)
    options = Options(**given)
    if not options.ckpt:
        raise BadInput("name a checkpoint to expand: --ckpt=out/recipe-gla/pretrained.pt, or "
                       f"one of {', '.join(SIZES)} with --dry-run")
    if not options.out.endswith(".pt") and not options.dry_run:
        raise BadInput(f"--out={options.out}; expected a checkpoint's name, which ends in .pt")
    if not options.dry_run and is_run(options.out):
        raise BadInput(f"{options.out} holds a trained run, or a checkpoint of another version; "
                       "name another file with --out")
    if os.path.realpath(options.out) == os.path.realpath(options.ckpt) and not options.dry_run:
        raise BadInput(f"{options.ckpt} is the model to expand; name another file with --out")
    if options.ckpt in SIZES:
        if not options.dry_run:
            raise BadInput(f"{options.ckpt} is a size, not a checkpoint; add --dry-run, or name "
                           "a checkpoint")
        with torch.device("meta"):
            lm = LM(SIZES[options.ckpt])
    else:
        lm = LM.from_pretrained(options.ckpt)
    layers = choose_layers(lm.config.n_layer, options.every, options.layers)
    new, report = expand(lm, layers, options.factor or None, options.init, options.seed,
                          options.noise, options.same_state, options.paper)
    print(describe(report))
    if options.dry_run:
        print("\nnothing written (dry run)")
        return
    try:
        os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot make the folder of {options.out}: {e.strerror}") from e
    save_checkpoint(options.out, new)
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    run_script(main)
