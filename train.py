"""One training loop for every phase, and the recipe that chains them.

    python train.py                                  the whole recipe on this machine: pre-train small, then post-train
    python train.py --block=mamba2                   (a) LPT: unchanged and (b) StateX: with a larger state; same tokens,
                                                     order and schedule -> a table, results.json and a picture
    python train.py --init_from=scratch --d_model=512 ...             one run from random weights
    python train.py --init_from=out/expanded.pt --preset=paper-gla    one run from a checkpoint
    python train.py --init_from=resume --out_dir=out/run              go on with the run in out_dir

A run writes out_dir/NAME.pt and appends to out_dir/log.jsonl; the last number of every line is the seconds left.
"""
import contextlib, json, math, os, resource, sys, time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from data import prepare, recall
from data.prepare import BadInput, command_line, load_corpus, load_tokenizer, main_line
from expand import choose_layers, describe, expand
from model import LM, Config, load_checkpoint, save_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))

DEFAULTS = dict(
    # what to run
    init_from="",                  # "" the recipe | scratch | resume | a checkpoint
    preset="",                     # a name of PRESETS: other values for the options below
    block="gla",                   # gla | mamba2
    data=f"{HERE}/data/python",    # token files, see data/prepare.py
    out_dir="",                    # "" out/recipe-BLOCK for the recipe, out/run for one run
    name="ckpt",                   # of the checkpoint that a run writes
    seed=0,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # the model, when from scratch
    n_layer=2, d_model=64, tie_embeddings=False, norm_eps=1e-5, conv_size=4,
    n_head=4,                      # GLA: heads; the state of a layer is d_k d_v / n_head numbers
    d_mlp=128,                     # GLA: width of the MLP; 0 for the public rule, 2/3 * 4 * d_model in multiples of 256
    d_state=8, headdim=16,         # Mamba2: the state of a layer is 2 d_model d_state numbers
    # the data: text, and sequences of multi-query recall (data/recall.py) beside it
    batch_size=8,                  # text sequences a step, in all
    block_size=128,                # tokens of a text sequence
    recall_tokens=2048,            # tokens of recall sequences a step; 0 for text alone
    pairs="2,4,8,16,32",           # key-value pairs of a recall sequence: one of these a step
    curriculum=0.0,                # share of pre-training over which the sizes above join in, one after the other
    # the optimizer: AdamW, linear warm-up, cosine to 0
    steps=800, lr=1e-2, warmup=50, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0,
    accumulate=1,                  # a step's text is split into this many forward and backward passes
    # evaluation and saving
    eval_interval=500,             # steps between evaluations; each saves a checkpoint
    # the recipe
    pretrain_steps=1600,           # of `steps`, for the small model
    every=1, layers="", factor=0, expand_init="reinit",     # the transplant, as in expand.py
    lr_grid="1e-2,2e-2",           # both arms try each of these; see `recipe` for the rule
)

PRESETS = {
    # post-training as in the paper, section 5.1: 10B tokens, 64K context, 512K tokens a batch, lr 3e-4 -> 0
    "paper-gla": dict(block="gla", block_size=65536, batch_size=8, accumulate=8, recall_tokens=0, steps=20000, lr=3e-4,
                      warmup=1000, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0, eval_interval=500, every=6),
    # the recipe. GLA: in its 800 steps a fresh mixer only catches up with LPT; `inherit`, the paper's ablation, shows the effect
    "recipe-gla": dict(expand_init="inherit", factor=2, curriculum=0.4),
    "recipe-mamba2": dict(block="mamba2", tie_embeddings=True, lr=2e-2, pretrain_steps=1800, steps=900, lr_grid="1e-2,3e-2"),
}


# ---------------------------------------------------------------------------------------------------------------------
# one run


def batches(tokens, o, vocab_size, step, part):
    """One part of a step's data: a list of (idx, targets), text first, then recall sequences of one size. It depends on
    nothing but the seed, the step and the part, so both arms see the same tokens in the same order, and a resumed run
    goes on with what comes next."""
    rng = np.random.default_rng([o.seed, step, part])
    starts = rng.integers(len(tokens) - o.block_size, size=o.batch_size // o.accumulate)
    text = np.stack([tokens[s:s + o.block_size + 1] for s in starts]).astype(np.int64)
    data = [(text[:, :-1], text[:, 1:])]
    if o.recall_tokens:
        grown = step / (o.curriculum * o.steps) if step < o.curriculum * o.steps else 1.0
        pairs = int(rng.choice(sizes(o)[:1 + int(grown * len(sizes(o)))]))
        data.append(recall.mqar(rng, -(-o.recall_tokens // (4 * pairs * o.accumulate)), pairs, vocab_size))
    return [tuple(torch.from_numpy(a).to(o.device) for a in pair) for pair in data]


def sizes(o):
    return [int(p) for p in o.pairs.split(",")]


def make_optimizer(lm, o):
    """AdamW without decay on vectors: norm gains, biases, A_log, D, dt_bias."""
    params = [p for p in lm.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": o.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=o.device.startswith("cuda"))


def learning_rate(o, step):
    if step < o.warmup:
        return o.lr * (step + 1) / (o.warmup + 1)
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - o.warmup) / max(1, o.steps - o.warmup)))


def held_out(lm, o, val):
    """Loss on held-out text, and on recall sequences that training never draws, in nats an answer."""
    lm.eval()
    text = recall.text_loss(lm, val, min(o.block_size, len(val) - 1))[0]
    asked = 0.0
    if o.recall_tokens:
        with torch.no_grad():
            for p in sizes(o):
                idx, targets = (torch.from_numpy(a).to(o.device) for a in
                                recall.mqar(np.random.default_rng([7, p]), 64, p, lm.config.vocab_size))
                asked += lm(idx, targets)[1].item() / len(sizes(o))
    lm.train()
    return text, asked


def train(lm, o, corpus, resume=None, until=None):
    """Train lm in place by the options o, to the end or to step `until`; resume is the "train" entry of the checkpoint to
    go on from.
    Returns {"tokens", "tokens_per_s", "val_loss", "recall_loss", "peak_mem_mib", "curve"}."""
    tokens, val, _ = corpus
    lm.to(o.device).train()
    optimizer = make_optimizer(lm, o)
    step, seen, curve, spent = 0, 0, [], 0.0
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
        step, seen, curve, spent = resume["step"], resume["tokens"], resume["curve"], resume["seconds"]
    path = f"{o.out_dir}/{o.name}.pt"
    log = open(f"{o.out_dir}/log.jsonl", "a", buffering=1)
    bf16 = torch.autocast("cuda", torch.bfloat16) if o.device.startswith("cuda") else contextlib.nullcontext()
    if o.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()

    def save():
        save_checkpoint(path, lm, {"step": step, "tokens": seen, "seconds": spent, "curve": curve, "options": vars(o),
                                   "optimizer": optimizer.state_dict()})

    bar = tqdm(total=o.steps, initial=step, desc=o.name, mininterval=1, disable=None if sys.stderr.isatty() else False,
               unit="step", dynamic_ncols=True)
    text, asked = None, None
    until = until or o.steps
    while step < until:
        t0 = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        optimizer.zero_grad(set_to_none=True)
        loss = [0.0, 0.0]                                          # of text and of recall
        for part in range(o.accumulate):
            for i, (idx, targets) in enumerate(batches(tokens, o, lm.config.vocab_size, step, part)):
                with bf16:
                    part_loss = lm(idx, targets)[1] / o.accumulate
                part_loss.backward()
                loss[i] += part_loss.item()
                seen += idx.numel()
        text_loss, recall_loss = loss
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), o.clip).item()
        if not math.isfinite(text_loss + recall_loss + norm):
            bar.close()
            kept = f"{path} holds the last good step" if os.path.exists(path) else "nothing was saved yet"
            raise BadInput(f"step {step}: the loss is {text_loss + recall_loss:.4g} and the gradient's norm {norm:.4g}; {kept}; "
                           "try a smaller --lr or a longer --warmup")
        optimizer.step()
        step += 1
        spent += time.time() - t0
        rate, left = seen / spent, spent / step * (o.steps - step)
        bar.update()
        bar.set_postfix_str(f"loss {text_loss:.3f} recall {recall_loss:.3f} {rate:,.0f} tokens/s", refresh=False)
        if step % 10 == 0 or step == until:
            curve.append([seen, text_loss, recall_loss])
            log.write(json.dumps({"run": o.name, "step": step, "loss": text_loss, "recall_loss": recall_loss,
                                  "grad_norm": norm, "lr": learning_rate(o, step - 1), "tokens": seen,
                                  "tokens_per_s": round(rate), "seconds_left": round(left, 1)}) + "\n")
        if step % o.eval_interval == 0 or step == until:
            text, asked = held_out(lm, o, val)
            log.write(json.dumps({"run": o.name, "step": step, "val_loss": text, "val_recall_loss": asked,
                                  "tokens": seen, "seconds_left": round(left, 1)}) + "\n")
            save()
    bar.close()
    log.close()
    if text is None:                                               # resumed after its last step
        text, asked = held_out(lm, o, val)
    peak = torch.cuda.max_memory_allocated() / 2**20 if o.device.startswith("cuda") else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"tokens": seen, "tokens_per_s": round(seen / spent), "val_loss": text, "recall_loss": asked,
            "peak_mem_mib": round(peak), "curve": curve}


def new_model(o, meta):
    torch.manual_seed(o.seed)
    shape = {k: getattr(o, k) for k in ("block", "n_layer", "d_model", "tie_embeddings", "norm_eps", "conv_size",
                                        "n_head", "d_mlp", "d_state", "headdim")}
    return LM(Config(vocab_size=meta["vocab_size"], tokenizer=meta["tokenizer"], **shape))


def prepared(o):
    """The corpus in o.data; the default one is made when it is missing."""
    if o.data == DEFAULTS["data"] and not os.path.exists(f"{o.data}/meta.json"):
        print("preparing the Python source on this machine")
        prepare.write_corpus(prepare.read_documents(prepare.python_files(), False), o.data, "code4096")
    corpus = load_corpus(o.data)
    if len(corpus[0]) <= o.block_size or len(corpus[1]) < 64:
        raise BadInput(f"{o.data} has {len(corpus[0])} tokens to train on; expected more than block_size = {o.block_size}")
    return corpus


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot make out_dir {path}: {e.strerror}")


def check(o):
    if o.steps < 1 or o.batch_size < 1 or o.block_size < 1 or o.accumulate < 1 or o.eval_interval < 1:
        raise BadInput("steps, batch_size, block_size, accumulate and eval_interval must be at least 1")
    if o.batch_size % o.accumulate:
        raise BadInput(f"accumulate {o.accumulate} does not divide batch_size {o.batch_size}")
    if not all(p.isdigit() and 0 < int(p) <= recall.SYMBOLS // 2 for p in o.pairs.split(",")):
        raise BadInput(f"--pairs={o.pairs} is not a list of pairs; expected numbers from 1 to {recall.SYMBOLS // 2}, such as 4,8,16")
    if os.path.exists(o.out_dir) and not os.path.isdir(o.out_dir):
        raise BadInput(f"out_dir {o.out_dir} is a file; expected a folder, or a name that is free")


def one_run(o):
    resume = None
    if o.init_from == "resume":
        lm, resume = load_checkpoint(f"{o.out_dir}/{o.name}.pt")
        if resume is None:
            raise BadInput(f"{o.out_dir}/{o.name}.pt holds no run to resume; start one with --init_from={o.out_dir}/{o.name}.pt")
        o = SimpleNamespace(**{**vars(o), **resume["options"], "out_dir": o.out_dir, "device": o.device, "init_from": "resume"})
    elif o.init_from != "scratch":
        lm = LM.from_pretrained(o.init_from, o.block)
    corpus = prepared(o)
    if o.init_from == "scratch":
        lm = new_model(o, corpus[2])
    elif corpus[2]["vocab_size"] > lm.config.vocab_size:
        raise BadInput(f"{o.data} has {corpus[2]['vocab_size']} token ids, the model {lm.config.vocab_size}; "
                       "prepare the text with the model's tokenizer")
    make_folder(o.out_dir)
    r = train(lm, o, corpus, resume)
    print(f"{o.out_dir}/{o.name}.pt: {r['tokens']:,} tokens, val loss {r['val_loss']:.4f}, {r['tokens_per_s']:,} tokens/s")


# ---------------------------------------------------------------------------------------------------------------------
# the recipe


def recipe(o):
    corpus = prepared(o)
    make_folder(o.out_dir)
    tokenizer = load_tokenizer(corpus[2]["tokenizer"])

    def run(lm, name, resume=None, until=None, **changes):
        return train(lm, SimpleNamespace(**{**vars(o), "name": name, **changes}), corpus, resume, until)

    small = new_model(o, corpus[2])
    results = {"pretrained": report(small, run(small, "pretrained", steps=o.pretrain_steps), o, corpus, tokenizer)}
    larger, transplant = expand(small, choose_layers(o.n_layer, o.every, o.layers), o.factor or None, o.expand_init, o.seed)
    print(describe(transplant))
    curves = {}
    for arm, start in (("lpt", small), ("statex", larger)):
        # The first quarter of the run at every learning rate of the grid; the one with the lower held-out loss goes on.
        # Another seed than pre-training's, so that the data is new.
        tried = {}
        for lr in (float(x) for x in o.lr_grid.split(",")):
            lm = LM(start.config).to(o.device)
            lm.load_state_dict(start.state_dict())
            r = run(lm, f"{arm}-lr{lr:g}", lr=lr, seed=o.seed + 1, curriculum=0.0, until=max(1, o.steps // 4))
            tried[f"{lr:g}"] = r["val_loss"] + r["recall_loss"]
        lr = min(tried, key=tried.get)
        lm, resume = load_checkpoint(f"{o.out_dir}/{arm}-lr{lr}.pt")
        r = run(lm, arm, lr=float(lr), seed=o.seed + 1, curriculum=0.0, resume=resume)
        curves[arm] = r["curve"]
        results[arm] = report(lm, r, o, corpus, tokenizer)
        results[arm]["tokens"] += results["pretrained"]["tokens"]
        results[arm] |= {"lr": float(lr), "held_out_loss_by_lr_after_a_quarter": tried}
    results["config"] = {k: v for k, v in vars(o).items() if k not in ("data", "out_dir", "init_from")} | {"corpus": corpus[2]}
    results["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                           "threads": torch.get_num_threads()}
    with open(f"{o.out_dir}/results.json.tmp", "w") as f:
        json.dump(results, f, indent=1)
    os.replace(f"{o.out_dir}/results.json.tmp", f"{o.out_dir}/results.json")
    print("\n" + table(results))
    print(f"\n{o.out_dir}/results.json" + picture(results, curves, f"{o.out_dir}/recipe.png"))


def report(lm, run, o, corpus, tokenizer):
    """One arm's entry of results.json: what it cost and what it scores."""
    c = lm.config
    numbers = sum(c.state_numbers(i) for i in range(c.n_layer))
    lm.eval()
    scores = recall.score(lm, corpus[1], tokenizer, pairs=sizes(o), T=o.block_size)
    lm.generate(torch.zeros(1, 1, dtype=torch.long, device=o.device), 8)
    t0 = time.time()
    lm.generate(torch.zeros(1, 1, dtype=torch.long, device=o.device), 64)
    decode = (time.time() - t0) / 64 * 1e3
    lm.train()
    return {"params": sum(p.numel() for p in lm.parameters()), "state_numbers": numbers, "state_bytes": 4 * numbers,
            "tokens": run["tokens"], **scores, "tokens_per_s": run["tokens_per_s"],
            "decode_ms_per_token": round(decode, 3), "peak_mem_mib": run["peak_mem_mib"]}


def table(results):
    """The three models side by side, as a Markdown table."""
    arms = {"pretrained": "pretrained", "lpt": "LPT", "statex": "StateX"}
    rows = [[""] + list(arms.values())]
    put = lambda name, f: rows.append([name] + [f(results[a]) for a in arms])
    put("parameters", lambda r: f"{r['params']:,}")
    put("state numbers", lambda r: f"{r['state_numbers']:,}")
    put("tokens", lambda r: f"{r['tokens'] / 1e6:.1f}M")
    put("val loss", lambda r: f"{r['val_loss']:.3f} ± {r['val_loss_se']:.3f}")
    put("in-context score", lambda r: f"{r['icl_score']:+.3f}")
    for task, unit in (("mqar", "pairs"), ("passkey", "tokens"), ("fewshot", "shots")):
        for size in results["lpt"]["recall"][task]:
            put(f"{task}, {size} {unit}", lambda r: f"{r['recall'][task][size]:.3f} ± {r['recall_se'][task][size]:.3f}")
    put("tokens/s in training", lambda r: f"{r['tokens_per_s']:,}")
    put("ms a generated token", lambda r: f"{r['decode_ms_per_token']:.2f}")
    width = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def picture(results, curves, path):
    """Training loss and recall of the arms, where matplotlib is installed. Returns what to print of it."""
    try:
        import matplotlib
    except ImportError:
        return "   (no picture: pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colors = {"pretrained": "0.6", "lpt": "tab:blue", "statex": "tab:red"}
    for arm, curve in curves.items():
        seen, text, asked = np.array(curve).T
        smooth = lambda x: np.convolve(x, np.ones(9) / 9, "valid")
        left.plot(smooth(seen) / 1e6, smooth(asked), color=colors[arm], label=f"{arm}, recall")
        left.plot(smooth(seen) / 1e6, smooth(text), color=colors[arm], ls=":", label=f"{arm}, text")
    left.set(xlabel="post-training tokens, millions", ylabel="training loss, nats")
    for arm, color in colors.items():
        y, e = ([results[arm][k]["mqar"][p] for p in results[arm]["recall"]["mqar"]] for k in ("recall", "recall_se"))
        right.errorbar(range(len(y)), y, e, color=color, marker="o", ms=4, capsize=3, label=arm)
    right.set(xlabel="key-value pairs", ylabel="recall accuracy", ylim=(0, 1.02))
    right.set_xticks(range(len(y)), results["lpt"]["recall"]["mqar"])
    left.legend(fontsize=8), right.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    return f" and {path}"


def main():
    given = command_line(__doc__, **DEFAULTS)
    if given.preset and given.preset not in PRESETS:
        raise BadInput(f"no preset {given.preset!r}; there are {', '.join(PRESETS)}")
    typed = {a[2:].partition("=")[0].replace("-", "_") for a in sys.argv[1:] if a.startswith("--")}
    preset = PRESETS.get(given.preset or (f"recipe-{given.block}" if not given.init_from else ""), {})
    o = SimpleNamespace(**{**vars(given), **{k: v for k, v in preset.items() if k not in typed}})
    o.out_dir = o.out_dir or (f"out/recipe-{o.block}" if not o.init_from else "out/run")
    check(o)
    one_run(o) if o.init_from else recipe(o)


if __name__ == "__main__":
    main_line(main)
