"""StateX against LPT on one GPU: the runs, and the tables and figures made of them.

    python data/results/evidence.py --run           every run that has no JSON yet in data/results/runs/, several at a time
    python data/results/evidence.py --run --only=gla-s0-lpt-lr0.002      one of them, done or not
    python data/results/evidence.py                 tables.md and the figures from the JSONs, whatever is there

Text: this machine's Python source with every installed package (`data/prepare.py --site-packages`); half of the tokens of a
step are text, half multi-query recall of 2 to 128 pairs, which join in one after the other in the first half of pre-training.
For each family and seed a small model is pre-trained; each arm goes on from it with the same tokens in the same order and
schedule. Learning rates: seed 0 tries the whole grid for each arm, the lower held-out loss (text + recall) is kept for the
other seeds and the sweeps. A killed run is done again from its start. Pre-trained models are not kept in the repository: one that is
needed again is pre-trained again. A run that is done again and comes out differently (other kernels or another GPU round differently)
is kept beside the first, as ...-2. Each run says which pre-trained model it went on from; the paired tables compare those from the same.
What a seed has several of counts as their mean; errors are over seeds.

    lpt         the same model goes on
    reinit, inherit, preserve                     with a larger state in layers 0 and 3, see expand.py
    ...-steps800                                  lpt, reinit and the best arm with twice the tokens, every seed
    ...-layersX  ...-factorX  ...-stepsX          sweeps of one setting of the best arm, seed 0; at stepsX `lpt` too
    ceiling     the large state from scratch, for all the tokens
    cost        reading, writing and training speed, alone on the GPU
"""
import contextlib, gc, itertools, json, math, os, subprocess, sys, time, traceback
from concurrent import futures
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)
from data.prepare import BadInput, command_line, load_corpus, load_tokenizer, main_line

RUNS, WORK, CORPUS = f"{HERE}/runs", f"{ROOT}/out/evidence", f"{ROOT}/data/python-all"
SEEDS, LAYERS, GRID = (0, 1, 2), "0,3", (2e-3, 6e-3)
PAIRS, LENGTHS, SHOTS = (4, 8, 16, 32, 64, 128), (512, 1024, 2048, 4096), (1, 2, 4, 8, 16)        # what is scored
COMMON = dict(data=CORPUS, n_layer=6, conv_size=4, block_size=512, batch_size=16, recall_tokens=8192, pairs="2,8,32,128", warmup=50,
              eval_interval=10**9, compile=True)
PRE, POST = dict(steps=1200, lr=4e-3, curriculum=0.5), dict(steps=400)
FAMILIES = {"gla": dict(block="gla", d_model=512, n_head=16, d_mlp=0),
            "mamba2": dict(block="mamba2", d_model=768, d_state=16, headdim=64, tie_embeddings=True)}
ARMS = {"gla": ("lpt", "reinit", "inherit"), "mamba2": ("lpt", "reinit", "inherit", "preserve")}
FACTOR = {"gla": 16, "mamba2": 4}
SWEEPS = {"gla": ("layers0", "layers0,2,4", "layers0,1,2,3,4,5", "steps100", "steps800", "factor4"),
          "mamba2": ("layers0", "layers0,2,4", "layers0,1,2,3,4,5", "steps100", "steps800", "factor2")}
LONG = "steps800"                                                   # the sweep that is done for every seed
RECIPES = ("gla", "gla-3200-reinit", "gla-3200-inherit", "mamba2", "mamba2-inherit", "mamba2-preserve")    # of train.py, on a CPU


def read(name):
    """The result of a run, None before it is done."""
    try:
        with open(f"{RUNS}/{name}.json") as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def best(family, arm):
    """(learning rate, result) of an arm at seed 0, None before the grid is done."""
    tried = {lr: read(f"{family}-s0-{arm}-lr{lr:g}") for lr in GRID}
    if all(tried.values()):
        return min(tried.items(), key=lambda x: x[1]["held_out_loss"])


def plan():
    """Yields every run as a dict, those first that others wait for; a run whose learning rate is not known yet is left out."""
    for seed in SEEDS:
        for family in FAMILIES:
            yield dict(name=f"{family}-s{seed}-pre", family=family, seed=seed, arm="pre", **PRE)
    chosen = {}
    for family in FAMILIES:
        for arm in ARMS[family]:
            for lr in GRID:
                yield dict(name=f"{family}-s0-{arm}-lr{lr:g}", family=family, seed=0, arm=arm, lr=lr, **POST)
            chosen[family, arm] = best(family, arm)
    for family in FAMILIES:
        yield dict(name=f"{family}-s0-ceiling", family=family, seed=0, arm="ceiling", **PRE | dict(steps=PRE["steps"] + POST["steps"]))
    for (family, arm), found in chosen.items():
        for seed in SEEDS[1:] if found else ():
            yield dict(name=f"{family}-s{seed}-{arm}", family=family, seed=seed, arm=arm, lr=found[0], **POST)
    for family in FAMILIES:
        larger = winner(family)
        for sweep in SWEEPS[family] if larger else ():
            arms = dict.fromkeys(("lpt", "reinit", larger)) if sweep == LONG else ("lpt", larger) if "steps" in sweep else (larger,)
            for seed in SEEDS if sweep == LONG else SEEDS[:1]:
                for arm in arms:
                    yield dict(name=f"{family}-s{seed}-{arm}-{sweep}", family=family, seed=seed, arm=arm, lr=chosen[family, arm][0],
                               **POST | varied(sweep))


def varied(sweep):
    """The option that a sweep changes: "steps800" -> {"steps": 800}, "factor4" -> {"factor": 4}, "layers0,2" -> {"layers": "0,2"}."""
    name = sweep.rstrip("0123456789,")
    value = sweep[len(name):]
    return {name: value if name == "layers" else int(value)}


def winner(family):
    """The StateX arm whose seed 0 has the lowest held-out loss: the one that the sweeps vary."""
    found = {arm: best(family, arm) for arm in ARMS[family] if arm != "lpt"}
    if all(found.values()) and best(family, "lpt"):
        return min(found, key=lambda a: found[a][1]["held_out_loss"])


def start(job):
    """The checkpoint that a run starts from, None for scratch."""
    return None if job["arm"] in ("pre", "ceiling") else f"{WORK}/{job['family']}-s{job['seed']}-pre.pt"


def versions(name):
    """Yields name, name-2, name-3, ...: what the results of a run are called that was done again and came out differently."""
    yield name
    yield from (f"{name}-{i}" for i in itertools.count(2))


def version(name, held_out_loss):
    """The version of a run that has this result, or the first that is free for it."""
    return next(v for v in versions(name) if read(v) is None or read(v)["held_out_loss"] == held_out_loss)


def results_of(name):
    """The results of all versions of a run, in order."""
    return list(itertools.takewhile(bool, map(read, versions(name))))


def enlarge(lm, job):
    from expand import choose_layers, expand
    init = {"ceiling": "reinit"}.get(job["arm"], job["arm"])
    return expand(lm, choose_layers(6, 1, job.get("layers", LAYERS)), job.get("factor", FACTOR[job["family"]]), init, job["seed"])[0]


def options(job):
    import train
    changes = {k: v for k, v in job.items() if k in train.DEFAULTS}
    later = 0 if start(job) is None else 100                        # post-training reads other sequences than pre-training
    return SimpleNamespace(**train.DEFAULTS | COMMON | FAMILIES[job["family"]] | changes
                           | dict(seed=job["seed"] + later, name=job["name"], out_dir=WORK))


def run(job, small):
    """One run: train, score, write its JSON. small: options over those above, for a quick look on a CPU."""
    import torch, train
    from data import recall
    from model import load_checkpoint
    o = options(job)
    vars(o).update(small)
    corpus = load_corpus(o.data)
    lm, trained = load_checkpoint(start(job)) if start(job) else (train.new_model(o, corpus[2]), None)
    if job["arm"] not in ("pre", "lpt"):
        lm = enlarge(lm, job)
    t0 = time.time()
    r = train.train(lm, o, corpus)
    t1 = time.time()
    with train.scoring(lm, o):
        scores = recall.score(lm, corpus[1], load_tokenizer(corpus[2]["tokenizer"]), pairs=PAIRS, lengths=LENGTHS, shots=SHOTS,
                              T=o.block_size, n=small.get("n", 128))
    held_out_loss = r["val_loss"] + r["recall_loss"]
    if job["arm"] != "pre":
        os.remove(f"{WORK}/{job['name']}.pt")
    c = lm.config
    numbers = sum(c.state_numbers(i) for i in range(c.n_layer))
    write(version(job["name"], held_out_loss),
          {**job, "start": version(f"{job['family']}-s{job['seed']}-pre", trained["best"]) if trained else None,
           "params": sum(p.numel() for p in lm.parameters()), "state_numbers": numbers, "state_bytes": 4 * numbers, "tokens": r["tokens"],
           "held_out_loss": held_out_loss, "recall_loss": r["recall_loss"], **scores,
           "curve": [[n, round(a, 4), round(b, 4)] for n, a, b in r["curve"][::3]], "seconds": round(t1 - t0),
           "scoring_seconds": round(time.time() - t1), "corpus": corpus[2]["sha256"],
           "versions": {"torch": torch.__version__, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}})


def cost(family):
    """Speeds of the small and of the expanded model, alone on the GPU: training as above, reading 8192 tokens, writing."""
    import torch, train
    from model import speed
    result = {}
    for arm in ("lpt", "reinit"):
        job = dict(name=f"{family}-cost", family=family, seed=0, arm=arm, lr=1e-3, steps=60)
        o = options(job)
        corpus = load_corpus(o.data)
        lm = train.new_model(o, corpus[2])
        lm = lm if arm == "lpt" else enlarge(lm, job)
        train.train(lm, o, corpus)
        with open(f"{WORK}/log.jsonl") as f:
            lines = [json.loads(line) for line in f]
        last = [line for line in lines if line["run"] == o.name and "tokens_per_s" in line][-1]        # of the last 20 steps
        peak = torch.cuda.max_memory_allocated() / 2**20
        result[arm] = {"train_tokens_per_s": last["tokens_per_s"], "peak_mem_mib": round(peak), **speed(lm.eval())}
        os.remove(f"{WORK}/{o.name}.pt")
    write(f"{family}-cost", result)


def write(name, result):
    with open(f"{RUNS}/{name}.json.tmp", "w") as f:
        json.dump(result, f, indent=1)
    os.replace(f"{RUNS}/{name}.json.tmp", f"{RUNS}/{name}.json")


def run_logged(job, small):
    """`run` in a process of the pool, its output in out/evidence/NAME.txt. -> whether it ended well. Layers of one shape are compiled
    once in a process, so a pool of processes that take run after run saves most of the compilation."""
    with open(f"{WORK}/{job['name']}.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            run(job, small)
            return True
        except Exception:
            traceback.print_exc()
            return False
        finally:
            gc.collect()


def one_thread():
    import torch
    torch.set_num_threads(1)


def due(busy):
    """Yields the runs to start now: without a result, and the model that they go on from is there and not among `busy`, the names of
    the runs under way. Also the pre-training of a model whose checkpoint is gone, where a run without a result needs it."""
    jobs = list(plan())
    needed = {start(job) for job in jobs if not read(job["name"])}
    for job in jobs:
        model, checkpoint = start(job), f"{WORK}/{job['name']}.pt"
        done = read(job["name"]) and (checkpoint not in needed or os.path.exists(checkpoint))
        if not done and (model is None or os.path.exists(model) and f"{job['family']}-s{job['seed']}-pre" not in busy):
            yield job


def run_all(o, small):
    """Every run that has no result, o.jobs processes at a time, starting none after o.minutes."""
    t0, running, tried = time.time(), {}, set()
    print(f"{'run':32s} {'at':>5s} {'seconds':>7s}  text   recall  mqar by pairs", flush=True)
    with futures.ProcessPoolExecutor(o.jobs, get_context("spawn"), one_thread) as pool:
        while True:
            for job in due(running.values()):                  # a view: it sees what this loop starts
                if job["name"] not in tried and len(running) < o.jobs and time.time() - t0 < 60 * o.minutes:
                    running[pool.submit(run_logged, job, small)] = job["name"]
                    tried.add(job["name"])
            if not running:
                break
            for future in futures.wait(running, return_when="FIRST_COMPLETED").done:
                name = running.pop(future)
                r = read(name) if future.result() else None
                line = f"failed, see out/evidence/{name}.txt"
                if r:
                    line = f"{r['seconds']:7d}  {r['val_loss']:.3f}  {r['recall_loss']:.3f}   " + " ".join(f"{a:.3f}" for a in r["recall"]["mqar"].values())
                print(f"{name:32s} {time.time() - t0:5.0f} {line}", flush=True)
    for family in FAMILIES:
        if read(f"{family}-cost") is None and time.time() - t0 < 60 * o.minutes and not small:
            cost(family)


# ---------------------------------------------------------------------------------------------------------------------
# tables and figures


def seeds_of(family, arm, sweep=""):
    """The results of an arm at its chosen learning rate: a list of versions for each seed that has any; of "pre" the models that LPT
    went on from."""
    if arm == "pre":
        return [[read(name) for name in dict.fromkeys(r["start"] for r in group)] for group in seeds_of(family, "lpt", sweep)]
    chosen = best(family, arm)
    names = (f"{family}-s{s}-{arm}" + (f"-{sweep}" if sweep else f"-lr{chosen[0]:g}" if chosen and s == 0 else "") for s in SEEDS)
    return [group for group in map(results_of, names) if group]


def arm_name(arm):
    return {"pre": "pre-trained", "lpt": "LPT"}.get(arm, f"StateX, {arm}")


def mean(groups, get):
    """groups: for each seed its results -> mean and standard error over seeds, of which each counts as the mean of its results."""
    x = np.array([np.mean([get(r) for r in group]) for group in groups])
    return x.mean(), x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else math.nan


def cell(groups, get, form="{:.3f} ± {:.3f}"):
    """Mean and standard error as text; one seed has no error."""
    return form.format(*mean(groups, get)).replace(" ± nan", "")


def markdown(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def measures(sizes):
    """Yields label, score of a result, for all but the passkey; sizes: those of mqar and fewshot."""
    yield "val loss", lambda r: r["val_loss"]
    yield "in-context score", lambda r: r["icl_score"]
    for task, unit in (("mqar", "pairs"), ("fewshot", "shots")):
        for size in sizes[task]:
            yield f"{task}, {size} {unit}", lambda r, task=task, size=size: r["recall"][task][str(size)]


def table(family, sweep=""):
    found = {a: seeds_of(family, a, sweep) for a in ("pre", *ARMS[family])}
    arms = [a for a in found if found[a]]
    rows = []

    def row(label, *how):
        rows.append([label, *(cell(found[a], *how) for a in arms)])
    row("parameters, millions", lambda r: r["params"] / 1e6, "{:.2f}")
    row("state numbers", lambda r: r["state_numbers"], "{:,.0f}")
    row("learning rate", lambda r: r["lr"], "{:g}")
    rows.append(["seeds", *(str(len(found[a])) for a in arms)])
    rows.append(["runs", *(str(sum(map(len, found[a]))) for a in arms)])
    for label, get in measures({"mqar": PAIRS, "fewshot": SHOTS}):
        row(label, get, *["{:.4f} ± {:.4f}"] * (label == "val loss"))
    for size in LENGTHS:
        row(f"passkey, {size} tokens", lambda r: r["recall"]["passkey"][str(size)])
    return markdown([family + (f", {sweep[5:]} steps" if sweep else ""), *map(arm_name, arms)], rows)


def paired_table(family, sweep=""):
    """What each StateX arm has more than LPT from the same pre-trained model, over all models that both went on from: the models differ
    more than the arms do."""
    lpt = {r["start"]: r for group in seeds_of(family, "lpt", sweep) for r in group}
    pairs = {a: [[(r, lpt[r["start"]]) for r in group if r["start"] in lpt] for group in seeds_of(family, a, sweep)] for a in ARMS[family][1:]}
    pairs = {a: [group for group in pairs[a] if group] for a in pairs}
    arms = [a for a in pairs if pairs[a]]
    rows = [["seeds", *(str(len(pairs[a])) for a in arms)],
            ["models", *(str(len({r["start"] for group in pairs[a] for r, _ in group})) for a in arms)]]
    for label, get in measures({"mqar": PAIRS[-4:], "fewshot": SHOTS[-3:]}):
        rows.append([label, *(cell(pairs[a], lambda p: get(p[0]) - get(p[1]), "{:+.3f} ± {:.3f}") for a in arms)])
    return markdown([family + (f", {sweep[5:]} steps" if sweep else "") + ", more than LPT from the same model", *map(arm_name, arms)], rows)


def sweep_table(family):
    larger, (pairs, hard) = winner(family), map(str, PAIRS[-2:])
    found = [("LPT", best(family, "lpt")[1]), (f"{larger}, as above", best(family, larger)[1])]
    for sweep in SWEEPS[family]:
        (what, value), = varied(sweep).items()
        for arm in ("lpt", larger):
            found.append((f"{arm}, {'post-training ' if what == 'steps' else ''}{what} {value}", read(f"{family}-s0-{arm}-{sweep}")))
    for again, r in enumerate(results_of(f"{family}-s0-ceiling")):
        found.append(("large from scratch, all the tokens" + (", done again" if again else ""), r))
    rows = []
    for label, r in found:
        if r:
            label += "" if r["start"] in (None, found[0][1]["start"]) else f", from {r['start']}"
            spent = r["tokens"] / 1e6 if r["arm"] != "ceiling" else 0
            rows.append([label, f"{r['state_numbers']:,}", f"{spent:.1f}", *(f"{r['recall']['mqar'][p]:.3f}" for p in (pairs, hard)), f"{r['val_loss']:.4f}"])
    return markdown([f"{family}, seed 0", "state numbers", "tokens after pre-training, millions", f"mqar, {pairs} pairs", f"{hard} pairs", "val loss"], rows)


def recipe_table(name):
    """train.py's recipe on a CPU, over seeds: data/results/recipe-NAME-seedN.json is the results.json of --seed=N."""
    runs = []
    for seed in SEEDS:
        with open(f"{os.path.dirname(RUNS)}/recipe-{name}-seed{seed}.json") as f:
            runs.append([json.load(f)])
    rows = []
    for label, get in measures(runs[0][0]["lpt"]["recall"]):
        more = cell(runs, lambda r: get(r["statex"]) - get(r["lpt"]), "{:+.3f} ± {:.3f}")
        rows.append([label, *(cell(runs, lambda r: get(r[arm])) for arm in ("pretrained", "lpt", "statex")), more])
    return markdown([f"{name}, recipe, {len(runs)} seeds", "pretrained", "LPT", "StateX", "StateX - LPT, paired"], rows)


def cost_table():
    rows = []
    for family in FAMILIES:
        for arm, r in (read(f"{family}-cost") or {}).items():
            whole = (r[k] for k in ("state_bytes", "train_tokens_per_s", "peak_mem_mib", "prefill_tokens_per_s"))
            rows.append([f"{family}, {'LPT' if arm == 'lpt' else 'StateX'}", *(f"{n:,}" for n in whole), *(f"{r['ms_per_token'][b]:.2f}" for b in ("1", "64"))])
    return markdown(["model", "state bytes a sequence", "training, tokens/s", "peak MiB", "prefill of 8192, tokens/s", "ms a token, batch 1", "batch 64"], rows)


COLORS = {"pre": "0.6", "lpt": "tab:blue", "reinit": "tab:red", "inherit": "tab:orange", "preserve": "tab:green"}


def figures(families):
    try:
        import matplotlib
    except ImportError:
        raise BadInput("the figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(families), 4, figsize=(15, 3.4 * len(families)), layout="constrained", squeeze=False)
    for row, family in zip(axes, families):
        for ax, task, sweep in zip(row, ("mqar", "mqar", "fewshot"), ("", LONG, LONG)):
            for arm in ("pre", *ARMS[family]):
                groups = seeds_of(family, arm, sweep)
                if groups:
                    x = list(groups[0][0]["recall"][task])
                    y, e = np.array([mean(groups, lambda r: r["recall"][task][s]) for s in x]).T
                    ax.errorbar(range(len(x)), y, e, color=COLORS[arm], marker="o", ms=4, capsize=3, label=arm_name(arm))
                    for group in groups:                           # thin: one seed
                        ax.plot(range(len(x)), [mean([group], lambda r: r["recall"][task][s])[0] for s in x], color=COLORS[arm], lw=0.6, alpha=0.6)
            ax.set_xticks(range(len(x)), x)
            ax.set(title=f"{family}: {task}, {sweep[5:] or POST['steps']} steps", xlabel="key-value pairs" if task == "mqar" else "shots",
                   ylabel="accuracy", ylim=(-0.02, 1.02))
        for arm in ("pre", *ARMS[family]):
            found = [groups for sweep in ("", LONG) if (groups := seeds_of(family, arm, sweep))]
            points = [(groups[0][0]["steps"] if arm != "pre" else 0, *mean(groups, lambda r: r["val_loss"])) for groups in found]
            if points:
                row[3].errorbar(*zip(*points), color=COLORS[arm], marker="o", ms=4, capsize=3, ls=":", label=arm_name(arm))
        row[3].set(title=f"{family}: held-out text", xlabel="post-training steps", ylabel="nats a token")
        row[0].legend(fontsize=8)
    fig.savefig(f"{HERE}/evidence.png", dpi=130)
    fig, axes = plt.subplots(len(families), 3, figsize=(12, 3.4 * len(families)), layout="constrained", squeeze=False)
    for row, family in zip(axes, families):
        larger, hard = winner(family), str(PAIRS[-1])
        if larger is None:
            continue
        lpt, main = best(family, "lpt")[1], best(family, larger)[1]
        def swept(what, arm=larger):
            """The values that a sweep gives the option, with the results."""
            found = [(varied(sweep)[what], read(f"{family}-s0-{arm}-{sweep}")) for sweep in SWEEPS[family] if what in sweep]
            return [(value, r) for value, r in found if r]
        layers = [(0, lpt), (2, main)] + [(len(value.split(",")), r) for value, r in swept("layers")]
        factors = [(1, lpt), (FACTOR[family], main)] + swept("factor")
        for ax, label, points in zip(row, ("layers expanded", "factor of the state, in two layers"), (layers, factors)):
            points = sorted((x, r["recall"]["mqar"][hard]) for x, r in points)
            ax.plot(*zip(*points), color=COLORS[larger], marker="o", ms=4)
            ax.set(xlabel=label)
        row[1].set_xscale("log", base=2)
        for arm, middle in (("lpt", lpt), (larger, main)):
            points = sorted((r["tokens"] / 1e6, r["recall"]["mqar"][hard]) for r in (middle, *(r for _, r in swept("steps", arm))))
            row[2].plot(*zip(*points), color=COLORS[arm], marker="o", ms=4, label=arm_name(arm))
        row[2].set(xlabel="post-training tokens, millions", xlim=(0, None))
        ceiling = read(f"{family}-s0-ceiling")
        for ax in row:
            if ceiling:
                ax.axhline(ceiling["recall"]["mqar"][hard], color="0.4", ls=":", label="large from scratch, all tokens")
            ax.set(ylabel=f"mqar accuracy, {hard} pairs", ylim=(-0.02, 1.02), title=f"{family}, {larger}")
        row[2].legend(fontsize=8)
    fig.savefig(f"{HERE}/sweeps.png", dpi=130)


def main():
    o = command_line(__doc__, run=False, only="", jobs=8, minutes=1e9, small="")
    try:
        small = {k: int(v) for k, v in (item.split("=") for item in o.small.split(",") if item)}
    except ValueError:
        raise BadInput(f"--small={o.small} is not a list of options with whole numbers, such as steps=2,n=4")
    if not o.jobs:
        raise BadInput("--jobs must be at least 1")
    os.makedirs(RUNS, exist_ok=True)
    os.makedirs(WORK, exist_ok=True)
    if not o.run:
        families = [f for f in FAMILIES if seeds_of(f, "pre")]
        if not families:
            raise BadInput(f"no results in {RUNS}; add --run to make them")
        parts = [make(f, sweep) for f in families for sweep in ("", LONG) if seeds_of(f, "lpt", sweep) for make in (table, paired_table)]
        parts += [sweep_table(f) for f in families if winner(f)]
        parts += [cost_table()] * any(read(f"{f}-cost") for f in FAMILIES) + [recipe_table(name) for name in RECIPES]
        with open(f"{HERE}/tables.md", "w") as f:
            f.write("\n\n".join(parts) + "\n")
        print("\n\n".join(parts))
        figures(families)
        return
    if not os.path.exists(f"{CORPUS}/meta.json"):
        subprocess.run([sys.executable, f"{ROOT}/data/prepare.py", "--site-packages"], check=True)
    if not o.only:
        return run_all(o, small)
    if o.only.endswith("-cost"):
        return cost(o.only[:-5])
    job = next((j for j in plan() if j["name"] == o.only), None)
    if job is None:
        raise BadInput(f"no run {o.only}; there are {', '.join(j['name'] for j in plan())}")
    run(job, small)


if __name__ == "__main__":
    main_line(main)
