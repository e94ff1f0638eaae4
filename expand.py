"""Transplant a trained model into one with a larger state (StateX, Shen et al., arXiv 2509.22630, section 4).

GLA: the heads of a chosen layer are merged (all H into one by default): d_k d_v / H numbers of state become d_k d_v. No
projection changes its shape, only the per-head norm has more gains. Mamba2: a chosen layer's d_state grows by a factor
(4 by default): B and C grow. What happens to the parameters of a chosen layer:

    reinit     GLA: the mixer and its pre-norm start afresh. Mamba2: A_log, dt_bias, the gated norm and all rows of B and
               C start afresh; z, x and dt rows, x channels of the convolution, D and out_proj are kept. The paper's choice.
    inherit    everything is kept; the per-head norm (GLA) or the rows of B and C (Mamba2) are tiled.
    preserve   Mamba2 only: new rows of B are random, new rows of C are zero, so the function does not change and
               gradients still reach C. (Were both zero, neither would ever get a gradient.)

Every other layer is kept bit for bit.

    python expand.py --init_from=out/recipe-gla/pretrained.pt --every=2 --out=out/expanded.pt
    python expand.py --init_from=gla-1.3b --every=6 --dry-run          the report for a public size, without weights
    python expand.py --init_from=gla-1.3b --every=6 --speed            reading and writing before and after; random weights for a size
"""
import copy, os
from dataclasses import replace

import torch

from data.prepare import BadInput, command_line, main_line
from model import LM, SIZES, save_checkpoint, speed


def expand(lm, layers, factor=None, init="reinit", seed=0):
    """lm with a larger state in `layers` (a list of indices). The model passed in is left as it is.

    factor: GLA, how many heads become one, a divisor of H (None: all of them); Mamba2, d_state grows by it (None: 4).
    init: "reinit", "inherit" or "preserve".  seed: of the fresh parameters.
    Returns (lm, report); report is a dict that `describe` prints. Raises BadInput."""
    c = lm.config
    gla = c.block == "gla"
    if init not in ("reinit", "inherit", "preserve"):
        raise BadInput(f"init is {init!r}; expected 'reinit', 'inherit' or 'preserve'")
    if gla and init == "preserve":
        raise BadInput("preserve is for Mamba2: a merged GLA head reads across the old heads' blocks, so no exact map exists; use reinit or inherit")
    layers = sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] >= c.n_layer:
        raise BadInput(f"layers {layers} are out of range; this model has layers 0 to {c.n_layer - 1}")
    n_head, d_state = list(c.n_head), list(c.d_state)
    for i in layers:
        f = factor or (n_head[i] if gla else 4)
        if f < 2 or gla and n_head[i] % f:
            raise BadInput(f"factor {f} cannot enlarge layer {i}; expected " + (
                f"a divisor of its {n_head[i]} heads, above 1" if gla else "a whole number above 1"))
        if gla:
            n_head[i] //= f
        else:
            d_state[i] *= f

    new_config = replace(c, n_head=n_head, d_state=d_state)
    with torch.device("meta"):
        new = LM(new_config)
    groups = {}                                        # (what, where) -> numbers, for the report
    count = lambda how, where, t: groups.__setitem__((how, where), groups.get((how, where), 0) + t.numel())
    device = lm.embeddings.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, (old_layer, new_layer) in enumerate(zip(lm.layers, new.layers)):
            if device.type == "meta" or i not in layers:
                continue
            new_layer.to_empty(device="cpu")
            for m in new_layer.modules():              # the standard initialisation, as a model of this shape starts
                if hasattr(m, "reset_parameters"):
                    m.reset_parameters()
            if gla:
                new_layer.attn.reset_parameters()
    old, state = lm.state_dict(), new.state_dict()
    for name, fresh in state.items():
        where = name.split(".")
        chosen = where[0] == "layers" and int(where[1]) in layers
        if not chosen:
            state[name] = old[name].clone()
            if name != "lm_head.weight" or not c.tie_embeddings:
                count("kept", "everything outside the chosen layers", old[name])
            continue
        part = ".".join(where[2:])
        how = (gla_part if gla else mamba2_part)(part, init)
        if how == "split":                             # rows z, x | B, C | dt, of in_proj and of the convolution
            state[name] = mamba2_rows(old[name], fresh, c, new_config, int(where[1]), init, part, count)
        else:
            if how == "tiled":
                state[name] = old[name].repeat(fresh.shape[0] // old[name].shape[0])
            elif how == "kept":
                state[name] = old[name].clone()
            else:
                state[name] = fresh.to(device=device, dtype=old[name].dtype)
            count(how, part, state[name])
    new.load_state_dict(state, assign=True)
    if c.tie_embeddings:
        new.lm_head.weight = new.embeddings.weight
    new.train(lm.training)

    numbers = lambda c: [c.state_numbers(i) for i in range(c.n_layer)]
    params = lambda m: sum(p.numel() for p in m.parameters())
    return new, {"block": c.block, "init": init, "seed": seed, "layers": layers, "groups": groups,
                 "params_before": params(lm), "params_after": params(new),
                 "state_numbers_before": sum(numbers(c)), "state_numbers_after": sum(numbers(new_config)),
                 "state_numbers_by_layer": list(zip(numbers(c), numbers(new_config)))}


def gla_part(part, init):
    """What becomes of a parameter of a chosen GLA layer."""
    if init == "reinit":
        return "fresh" if part.startswith(("attn.", "attn_norm.")) else "kept"
    return "tiled" if part == "attn.g_norm_swish_gate.weight" else "kept"


def mamba2_part(part, init):
    """What becomes of a parameter of a chosen Mamba2 layer; "split": it holds rows of B and C."""
    if part.startswith(("mixer.in_proj", "mixer.conv1d")):
        return "split"
    return "fresh" if init == "reinit" and part in ("mixer.A_log", "mixer.dt_bias", "mixer.norm.weight") else "kept"


def mamba2_rows(old, fresh, c, new_config, layer, init, part, count):
    """The new in_proj or conv1d tensor of a chosen layer, put together along its first dimension.

    in_proj has rows z, x, B, C, dt; the convolution has channels x, B, C. B and C are G groups of N rows each, and each
    group's new rows follow its old ones: (G, N, ...) -> (G, f N, ...)."""
    G, N, M = c.n_groups, c.d_state[layer], new_config.d_state[layer]
    lead = 2 * c.d_inner if "in_proj" in part else c.d_inner                # z, x or x
    tail = old.shape[0] - lead - 2 * G * N                                  # dt or nothing
    fresh = fresh.to(device=old.device, dtype=old.dtype)
    head, old_B, old_C, end = old.split((lead, G * N, G * N, tail))
    _, new_B, new_C, _ = fresh.split((lead, G * M, G * M, tail))
    made = []
    for letter, o, n in (("B", old_B, new_B), ("C", old_C, new_C)):
        o, n = o.unflatten(0, (G, N)), n.unflatten(0, (G, M)).clone()       # (G,N,...), (G,M,...)
        if init == "inherit":
            n = o.repeat(1, M // N, *[1] * (o.dim() - 2))
            count("tiled", f"{part}, {letter}", n)
        elif init == "preserve":
            n[:, :N] = o
            # C = silu(conv(in_proj(x)) + bias) must be 0 and still learn: the projection and the bias are zero, the
            # convolution's taps are not.
            if letter == "C" and part != "mixer.conv1d.weight":
                n[:, N:] = 0
            count("kept", f"{part}, {letter}", o)
            count("fresh", f"{part}, {letter}" + (", zero" if letter == "C" and part != "mixer.conv1d.weight" else ""), n[:, N:])
        else:
            count("fresh", f"{part}, {letter}", n)
        made.append(n.flatten(0, 1))
    count("kept", f"{part}, other rows", torch.cat((head, end)))
    return torch.cat((head, *made, end))


def describe(r):
    """The report as text."""
    million = lambda n: f"{n / 1e6:,.2f}M" if n >= 1e6 else f"{n:,d}"
    more, before, after = r["params_after"] - r["params_before"], r["state_numbers_before"], r["state_numbers_after"]
    lines = [f"{r['block']}, init {r['init']}, seed {r['seed']}: {len(r['layers'])} of {len(r['state_numbers_by_layer'])} layers expanded",
             "", f"{'':7s}{'numbers':>14s}  tensors"]
    for (how, where), n in sorted(r["groups"].items(), key=lambda x: ("kept tiled fresh".index(x[0][0]), x[0][1])):
        lines.append(f"{how:7s}{n:14,d}  {where}")
    lines += ["", "layer   state numbers a sequence"]
    for i, (b, a) in enumerate(r["state_numbers_by_layer"]):
        lines.append(f"{i:5d}   {b:,d}" + (f" -> {a:,d}" if a != b else ""))
    lines += ["", f"parameters     {million(r['params_before'])} -> {million(r['params_after'])}   "
                  f"+{more / 1e6:.1f}M ({more:,d}, {100 * more / r['params_before']:+.4f} %)",
              f"state numbers  {million(before)} -> {million(after)}   x {after / before:.2f}",
              f"state bytes    {4 * before:,d} -> {4 * after:,d} a sequence, in float32"]
    return "\n".join(lines)


def choose_layers(n_layer, every, listed):
    """Layer indices from --layers=0,5,7 if given, else every n-th from layer 0."""
    if listed:
        try:
            return [int(x) for x in str(listed).split(",")]
        except ValueError:
            raise BadInput(f"--layers={listed} is not a list of layers; expected numbers such as 0,6,12")
    if every < 1:
        raise BadInput(f"--every={every} chooses no layers; expected 1 or more")
    return list(range(0, n_layer, every))


def speeds(name, lm, new):
    """Reading and writing before and after the expansion, as a Markdown table."""
    lines = ["| model | state bytes a sequence | prefill, tokens/s | ms a token, batch 1 | batch 64 |", "|---|---|---|---|---|"]
    for which, model in (("before", lm), ("expanded", new)):
        r = speed(model.eval())
        lines.append(f"| {name}, {which} | {r['state_bytes']:,} | {r['prefill_tokens_per_s']:,} | {r['ms_per_token'][1]:.2f} | {r['ms_per_token'][64]:.2f} |")
    return "\n".join(lines)


def main():
    o = command_line(__doc__, init_from="", every=6, layers="", factor=0, init="reinit", seed=0, out="out/expanded.pt", dry_run=False,
                     speed=False, device="cuda" if torch.cuda.is_available() else "cpu")
    if o.speed and o.dry_run:
        raise BadInput("--speed runs the models and --dry-run makes none; give one of the two")
    if o.init_from in SIZES:
        if not o.dry_run and not o.speed:
            raise BadInput(f"{o.init_from} is a size, not a checkpoint; add --dry-run or --speed, or name a checkpoint")
        with torch.device("meta" if o.dry_run else o.device):
            lm = LM(copy.deepcopy(SIZES[o.init_from]))
    elif o.init_from:
        lm = LM.from_pretrained(o.init_from)
    else:
        raise BadInput(f"name a checkpoint to expand: --init_from=out/recipe-gla/pretrained.pt, or one of {', '.join(SIZES)} with --dry-run")
    new, report = expand(lm, choose_layers(lm.config.n_layer, o.every, o.layers), o.factor or None, o.init, o.seed)
    if o.speed:
        print(speeds(o.init_from, lm.to(o.device), new.to(o.device)))
        return
    if not o.dry_run:
        if os.path.isdir(o.out):
            raise BadInput(f"{o.out} is a folder; --out names the file to write")
        os.makedirs(os.path.dirname(os.path.abspath(o.out)), exist_ok=True)
        save_checkpoint(o.out, new)
    print(describe(report))
    print(f"\n{'nothing written (dry run)' if o.dry_run else 'written: ' + o.out}")


if __name__ == "__main__":
    main_line(main)
