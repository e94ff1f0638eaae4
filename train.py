"""One training loop for every phase, and the recipe that chains them.

    python train.py                                  the whole recipe on this machine: pre-train small, then post-train
    python train.py --block=mamba2                   (a) LPT: unchanged and (b) StateX: with a larger state; same tokens,
                                                     order and schedule -> a table, results.json and a picture
    python train.py --init_from=scratch --d_model=512 ...             one run from random weights
    python train.py --init_from=out/expanded.pt --preset=paper-gla    one run from a checkpoint
    python train.py --init_from=resume --out_dir=out/run              go on with the run in out_dir
    torchrun --nproc_per_node=8 train.py --init_from=... --preset=... [--shard]       on 8 GPUs: the same batch, shared out

A run writes out_dir/NAME.pt and appends to out_dir/log.jsonl; the last number of every line is the seconds left.
"""
import collections, contextlib, json, math, os, resource, signal, sys, threading, time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
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
    vocab_size=0,                  # 0 for the corpus's
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
    accumulate=1,                  # a process's share of a step is split into this many forward and backward passes
    carry_state=False,             # text in order, each slice starting from the state after the one before (truncated backpropagation)
    # speed and memory; none of these changes what is computed
    compile=False,                 # torch.compile every layer; a minute at the start
    checkpoint_activations=False,  # keep each layer's input only, compute the rest again in the backward pass
    shard=False,                   # with torchrun: cut parameters, gradients and optimizer over the processes (FSDP2)
    # evaluation, saving, logging
    eval_interval=500,             # steps between evaluations; each saves a checkpoint
    tensorboard=False,             # beside log.jsonl
    # the recipe
    pretrain_steps=1600,           # of `steps`, for the small model
    every=1, layers="", factor=0, expand_init="reinit",     # the transplant, as in expand.py
    lr_grid="1e-2,2e-2",           # both arms try each of these; see `recipe` for the rule
)

# From scratch, half a million tokens a step; the shapes are those of model.py's SIZES.
SCRATCH = dict(block_size=2048, batch_size=256, accumulate=16, recall_tokens=0, steps=30000, warmup=1000, weight_decay=0.1, compile=True)
# Post-training as in the paper, section 5.1: 10B tokens, 64K context, 512K tokens a batch, lr 3e-4 -> 0. The arms differ in
# --init_from only: an expanded checkpoint or, for LPT, the public one.
POST = dict(block_size=65536, batch_size=8, accumulate=8, recall_tokens=0, steps=20000, lr=3e-4, warmup=1000, weight_decay=0.1,
            beta1=0.9, beta2=0.95, clip=1.0, eval_interval=500, checkpoint_activations=True, compile=True)
GLA_SHAPE = dict(block="gla", n_layer=24, n_head=4, d_mlp=0, norm_eps=1e-6, conv_size=0)
MAMBA2_SHAPE = dict(block="mamba2", n_layer=48, d_state=128, headdim=64, tie_embeddings=True)
PRESETS = {
    "gla-340m": SCRATCH | GLA_SHAPE | dict(d_model=1024, lr=1e-3),
    "gla-1.3b": SCRATCH | GLA_SHAPE | dict(d_model=2048, lr=5e-4, accumulate=64),
    "mamba2-370m": SCRATCH | MAMBA2_SHAPE | dict(d_model=1024, lr=1e-3, accumulate=32),
    "mamba2-1.3b": SCRATCH | MAMBA2_SHAPE | dict(d_model=2048, lr=5e-4, accumulate=64),
    "paper-gla": POST | dict(block="gla"),
    "paper-mamba2": POST | dict(block="mamba2"),
    # the recipe. GLA: `inherit`, the paper's ablation, because 800 steps are few for a fresh mixer (README has `reinit` too)
    "recipe-gla": dict(expand_init="inherit", factor=2, curriculum=0.4),
    "recipe-mamba2": dict(block="mamba2", tie_embeddings=True, lr=2e-2, pretrain_steps=1800, steps=900, lr_grid="1e-2,3e-2"),
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}            # FLOP/s in bfloat16, dense, of the SXM cards; for MFU


# ---------------------------------------------------------------------------------------------------------------------
# processes: one, or as many as torchrun starts; each does its share of every batch, the first one writes


class World:
    """This process among the others. Set once, by `join`."""
    rank, size, local, stopping = 0, 1, 0, False


def join(o):
    """Take this process's place among those that torchrun started (gloo on CPUs, NCCL on GPUs)."""
    if "RANK" not in os.environ:
        return
    World.rank, World.size, World.local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if o.device.startswith("cuda"):
        o.device = f"cuda:{World.local}"
        torch.cuda.set_device(World.local)
    dist.init_process_group("nccl" if o.device.startswith("cuda") else "gloo")


signals = []                              # SIGINT or SIGTERM that came: save and stop after this step


def listen():
    """Note SIGINT and SIGTERM in `signals`. A thread hears of them through a pipe, even while the main one hangs in a collective."""
    ear, mouth = os.pipe()

    def wait():
        signals.append(os.read(ear, 1)[0])
        if World.size > 1:                                         # torchrun sends SIGTERM when another process has died
            time.sleep(20)
            if World.stopping:
                return
            print(f"train.py: process {World.rank} waited 20 s for the others after signal {signals[0]} and ends; "
                  "go on with --init_from=resume", file=sys.stderr, flush=True)
        else:
            os.read(ear, 1)                                        # a second one: at once
        os._exit(128 + signals[0])
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=wait, daemon=True).start()


def wrap(lm, o):
    """lm ready to train: on its device, compiled, and as DistributedDataParallel or, with --shard, cut by fully_shard."""
    lm.to(o.device).train()
    lm.checkpoint_activations = o.checkpoint_activations
    if o.compile:
        torch._dynamo.config.recompile_limit = 64                  # one graph for each shape of layer and of batch
        torch._dynamo.config.optimize_ddp = False                  # and the same one with DistributedDataParallel, not cut at its buckets
        for layer in lm.layers:                                    # layers of one shape share theirs
            layer.compile(dynamic=False)
        lm.slice_loss = torch.compile(lm.slice_loss, dynamic=True)
    if o.shard:
        from torch.distributed.fsdp import fully_shard
        for layer in (*lm.layers, lm):
            fully_shard(layer)
        return lm
    if World.size > 1:
        return torch.nn.parallel.DistributedDataParallel(lm, device_ids=[World.local] if o.device.startswith("cuda") else None)
    return lm


def precision(o):
    """bfloat16 matrix products on a GPU; parameters, residuals, norms and states stay in float32."""
    return torch.autocast("cuda", torch.bfloat16) if o.device.startswith("cuda") else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# one run


def batches(tokens, o, vocab_size, step, part, parts):
    """Part `part` of `parts` of a step's data: a list of (idx, targets, share of the step's rows), text first, then recall
    sequences of one size. The step's data depends on nothing but the seed and the step, so both arms see the same tokens in
    the same order, any number of processes the same batch, and a resumed run goes on with what comes next."""
    rng = np.random.default_rng([o.seed, step, 0])
    T = o.block_size
    if o.carry_state:                                              # row r reads the r-th stretch of the text, slice by slice
        slices = (len(tokens) - 1) // o.batch_size // T
        starts = np.arange(o.batch_size) * slices * T + step % slices * T
    else:
        starts = rng.integers(len(tokens) - T, size=o.batch_size)
    text = np.stack([tokens[s:s + T + 1] for s in starts[share(o.batch_size, part, parts)]]).astype(np.int64)
    data = [(text[:, :-1], text[:, 1:], len(text) / o.batch_size)]
    if o.recall_tokens:
        grown = step / (o.curriculum * o.steps) if step < o.curriculum * o.steps else 1.0
        pairs = int(rng.choice(sizes(o)[:1 + int(grown * len(sizes(o)))]))
        n = -(-o.recall_tokens // (4 * pairs))
        rows = share(n, part, parts)
        idx, targets = recall.mqar(rng, n, pairs, vocab_size)
        data.append((idx[rows], targets[rows], (rows.stop - rows.start) / n))
    return [(torch.from_numpy(a).to(o.device), torch.from_numpy(b).to(o.device), w) for a, b, w in data]


def share(n, part, parts):
    """The rows of part `part` when n rows are cut into `parts` parts, as equal as can be."""
    return slice(n * part // parts, n * (part + 1) // parts)


def sizes(o):
    return [int(p) for p in o.pairs.split(",")]


def rates(o):
    """The recipe's learning rates. Raises BadInput."""
    try:
        return [float(x) for x in o.lr_grid.split(",")]
    except ValueError:
        raise BadInput(f"--lr_grid={o.lr_grid} is not a list of learning rates; expected numbers such as 1e-2,2e-2")


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


def flops_per_token(lm):
    """Of forward and backward: 6 for every weight of a matrix product, 12 for every number of state (2 to decay and write
    it, 2 to read it, and twice that backward). What is computed twice to save memory is not counted."""
    weights = sum(p.numel() for n, p in lm.named_parameters() if p.dim() == 2 and not n.startswith("embeddings"))
    if lm.config.tie_embeddings:
        weights += lm.embeddings.weight.numel()
    return 6 * weights + 12 * sum(lm.config.state_numbers(i) for i in range(lm.config.n_layer))


@contextlib.contextmanager
def scoring(lm, o):
    """lm as it is scored: in training's precision, and not compiled, because scoring has many shapes."""
    lm.eval()
    with torch.no_grad(), precision(o), torch.compiler.set_stance("force_eager"):
        yield
    lm.train()


def held_out(lm, o, val):
    """Loss on held-out text, in windows of block_size but at most 8192 tokens, and on recall sequences that training never
    draws, in nats an answer."""
    asked = 0.0
    with scoring(lm, o):
        text = recall.text_loss(lm, val, min(o.block_size, 8192, len(val) - 1))[0]
        for p in sizes(o) if o.recall_tokens else ():
            idx, targets = (torch.from_numpy(a).to(o.device) for a in
                            recall.mqar(np.random.default_rng([7, p]), 64, p, lm.config.vocab_size))
            asked += lm(idx, targets)[1].item() / len(sizes(o))
    return text, asked


def train(lm, o, corpus, resume=None, until=None):
    """Train lm in place by the options o, to the end or to step `until`; resume is the "train" entry of the checkpoint to
    go on from.
    Returns {"tokens", "tokens_per_s", "val_loss", "recall_loss", "peak_mem_mib", "curve"}."""
    from torch.distributed.checkpoint import state_dict as whole   # of parameters by name, however they are cut
    tokens, val, _ = corpus
    cuda, first, parts = o.device.startswith("cuda"), World.rank == 0, o.accumulate * World.size
    work, peak_flops = flops_per_token(lm), next((f for name, f in PEAK.items() if cuda and name in torch.cuda.get_device_name()), None)
    model = wrap(lm, o)
    optimizer = make_optimizer(lm, o)
    full = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
    step, seen, curve, spent, best, carried = 0, 0, [], 0.0, math.inf, [None] * o.accumulate
    if resume:
        whole.set_optimizer_state_dict(lm, optimizer, resume["optimizer"], options=whole.StateDictOptions(full_state_dict=True))
        step, seen, curve, spent, best = (resume[k] for k in ("step", "tokens", "curve", "seconds", "best"))
        if o.carry_state and resume["carried"]:
            mine = resume["carried"][World.rank * o.accumulate:(World.rank + 1) * o.accumulate]
            carried = [on(o.device, s) for s in mine] if len(resume["carried"]) == parts else carried
    path = f"{o.out_dir}/{o.name}.pt"
    log = open(f"{o.out_dir}/log.jsonl" if first else os.devnull, "a", buffering=1)
    board = tensorboard(o) if o.tensorboard and first else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def write(**line):
        left = sum(s for _, s in recent) / len(recent) * (o.steps - step)
        log.write(json.dumps({"run": o.name, "step": step, "tokens": seen, **line, "seconds_left": round(left, 1)}) + "\n")
        for k, v in line.items() if board else ():
            board.add_scalar(f"{o.name}/{k}", v, step)

    def save():
        weights, states = whole.get_state_dict(lm, optimizer, options=full)
        every = [on("cpu", s) for s in carried] if o.carry_state else None
        if o.carry_state and World.size > 1:
            ranks = [None] * World.size
            dist.all_gather_object(ranks, every)
            every = [s for r in ranks for s in r]
        if first:
            save_checkpoint(path, lm, {"step": step, "tokens": seen, "seconds": spent, "curve": curve, "best": best, "carried": every,
                                       "options": vars(o), "optimizer": states}, weights)
        if World.size > 1:
            dist.barrier()

    bar = tqdm(total=o.steps, initial=step, desc=o.name, mininterval=1, disable=not first or (None if sys.stderr.isatty() else False),
               unit="step", dynamic_ncols=True)
    text, asked, recent = None, None, collections.deque(maxlen=20)           # tokens and seconds of the last steps
    until = until or o.steps
    while step < until:
        t0 = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64, device=o.device)       # loss of text, loss of recall, tokens, asked to stop
        fresh = o.carry_state and step % ((len(tokens) - 1) // o.batch_size // o.block_size) == 0
        for k in range(o.accumulate):
            data = batches(tokens, o, lm.config.vocab_size, step, World.rank * o.accumulate + k, parts)
            for i, (idx, targets, weight) in enumerate(data):
                last = k == o.accumulate - 1 and i == len(data) - 1       # gradients are exchanged once a step
                quiet = model.no_sync() if World.size > 1 and not o.shard and not last else contextlib.nullcontext()
                if o.shard:
                    model.set_requires_gradient_sync(last)
                with quiet:
                    with precision(o):
                        _, part_loss, state = model(idx, targets, carried[k] if o.carry_state and i == 0 and not fresh else None)
                    part_loss = part_loss * weight
                    (part_loss * World.size).backward()                   # they are averaged over the processes
                if o.carry_state and i == 0:
                    carried[k] = [(S.detach(), None if before is None else before.detach()) for S, before in state]
                sums[i] += part_loss.detach()
                sums[2] += idx.numel()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), o.clip)
        sums[3] += len(signals)
        if World.size > 1:
            dist.all_reduce(sums)
        optimizer.step()
        *sums, norm = torch.cat((sums, (norm.full_tensor() if o.shard else norm).double()[None])).tolist()      # waits for the GPU
        text_loss, recall_loss, count, stopping = sums
        World.stopping = stopping > 0
        if not math.isfinite(text_loss + recall_loss + norm):
            bar.close()
            kept = f"{path} holds the last good step" if os.path.exists(path) else "nothing was saved yet"
            raise BadInput(f"step {step}: the loss is {text_loss + recall_loss:.4g} and the gradient's norm {norm:.4g}; {kept}; "
                           "try a smaller --lr or a longer --warmup")
        step, seen = step + 1, seen + int(count)
        recent.append((count, time.time() - t0))
        spent += recent[-1][1]
        rate = sum(n for n, _ in recent) / sum(s for _, s in recent)
        mfu = {"mfu": round(work * rate / World.size / peak_flops, 4)} if peak_flops else {}
        bar.update()
        bar.set_postfix_str(f"loss {text_loss:.3f} recall {recall_loss:.3f} {rate:,.0f} tokens/s" + (f" MFU {mfu['mfu']:.0%}" if mfu else ""), refresh=False)
        if step % 10 == 0 or step == until:
            curve.append([seen, text_loss, recall_loss])
            write(loss=text_loss, recall_loss=recall_loss, grad_norm=norm, lr=learning_rate(o, step - 1), tokens_per_s=round(rate), **mfu)
        if step % o.eval_interval == 0 or step == until:
            text, asked = held_out(lm, o, val)
            best = min(best, text + asked)
            write(val_loss=text, val_recall_loss=asked, best=best, peak_mem_mib=peak_memory(cuda))
            save()
        elif stopping:
            save()
        if stopping and step < o.steps:
            bar.close()
            if first:
                print(f"stopped by a signal: {path} holds step {step}; " + (f"go on with --init_from=resume --out_dir={o.out_dir} --name={o.name}"
                      if o.init_from else "the recipe starts from its beginning again"), flush=True)
            raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    bar.close()
    log.close()
    if text is None:                                               # resumed after its last step
        text, asked = held_out(lm, o, val)
    return {"tokens": seen, "tokens_per_s": round(seen / spent), "val_loss": text, "recall_loss": asked,
            "peak_mem_mib": peak_memory(cuda), "curve": curve}


def peak_memory(cuda):
    """MiB: on a GPU what this process's tensors took at most, on a CPU the process itself."""
    return round(torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def on(device, states):
    """The states of all layers, or None, on a device."""
    return states and [tuple(t if t is None else t.to(device) for t in s) for s in states]


def tensorboard(o):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard writes for TensorBoard: pip install tensorboard")
    return SummaryWriter(o.out_dir)


def new_model(o, meta):
    torch.manual_seed(o.seed)
    shape = {k: getattr(o, k) for k in ("block", "n_layer", "d_model", "tie_embeddings", "norm_eps", "conv_size",
                                        "n_head", "d_mlp", "d_state", "headdim")}
    if o.vocab_size and o.vocab_size < meta["vocab_size"]:
        raise BadInput(f"vocab_size {o.vocab_size} is less than the {meta['vocab_size']} token ids in {o.data}")
    return LM(Config(vocab_size=o.vocab_size or meta["vocab_size"], tokenizer=meta["tokenizer"], **shape))


def prepared(o):
    """The corpus in o.data; the default one is made when it is missing."""
    if World.rank:
        dist.barrier()                                             # the first process prepares
    if o.data == DEFAULTS["data"] and not os.path.exists(f"{o.data}/meta.json"):
        print("preparing the Python source on this machine")
        prepare.write_corpus(prepare.read_documents(prepare.python_files(), False), o.data, "code4096")
    if World.size > 1 and not World.rank:
        dist.barrier()
    corpus = load_corpus(o.data)
    if len(corpus[0]) <= o.block_size or len(corpus[1]) < 64:
        raise BadInput(f"{o.data} has {len(corpus[0])} tokens to train on; expected more than block_size = {o.block_size}")
    if o.carry_state and len(corpus[0]) <= o.batch_size * o.block_size:
        raise BadInput(f"{o.data} has {len(corpus[0])} tokens; --carry_state reads batch_size x block_size = {o.batch_size * o.block_size} at a step")
    return corpus


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot make out_dir {path}: {e.strerror}")


def check(o):
    if not min(o.steps, o.pretrain_steps, o.batch_size, o.block_size, o.accumulate, o.eval_interval):
        raise BadInput("steps, pretrain_steps, batch_size, block_size, accumulate and eval_interval must be at least 1")
    if not min(o.n_layer, o.d_model, o.headdim):
        raise BadInput("n_layer, d_model and headdim must be at least 1")
    if max(o.beta1, o.beta2) >= 1 or not o.clip:
        raise BadInput(f"beta1 {o.beta1} and beta2 {o.beta2} must be below 1, and clip {o.clip} above 0")
    if not o.name or os.path.basename(o.name) != o.name:
        raise BadInput(f"--name={o.name} is not a file's name; the folder is --out_dir")
    rates(o)
    parts = o.accumulate * World.size
    if o.batch_size % parts:
        raise BadInput(f"accumulate {o.accumulate}" + (f" x {World.size} processes" if World.size > 1 else "") + f" does not divide batch_size {o.batch_size}")
    if not all(p.isdigit() and 0 < int(p) <= recall.SYMBOLS // 2 for p in o.pairs.split(",")):
        raise BadInput(f"--pairs={o.pairs} is not a list of pairs; expected numbers from 1 to {recall.SYMBOLS // 2}, such as 4,8,16")
    if o.recall_tokens and -(-o.recall_tokens // (4 * max(sizes(o)))) < parts:
        raise BadInput(f"recall_tokens {o.recall_tokens} are fewer than {parts} sequences of {max(sizes(o))} pairs, one for each part of a step")
    if o.shard and (World.size == 1 or not o.init_from):
        raise BadInput("--shard cuts one run over processes: start it with torchrun and --init_from")
    if os.path.exists(o.out_dir) and not os.path.isdir(o.out_dir):
        raise BadInput(f"out_dir {o.out_dir} is a file; expected a folder, or a name that is free")


def one_run(o):
    resume = None
    if o.init_from == "resume":
        lm, resume = load_checkpoint(f"{o.out_dir}/{o.name}.pt")
        if resume is None:
            raise BadInput(f"{o.out_dir}/{o.name}.pt holds no run to resume; start one with --init_from={o.out_dir}/{o.name}.pt")
        kept, path = resume["options"], f"{o.out_dir}/{o.name}.pt"
        free = {"accumulate", "compile", "checkpoint_activations", "shard", "tensorboard", "eval_interval", "data"}
        other = [k for k in typed() - free - {"init_from", "out_dir", "name", "device"} if getattr(o, k) != kept.get(k, getattr(o, k))]
        if other:
            raise BadInput(f"the run in {path} has {', '.join(f'{k} = {kept[k]}' for k in sorted(other))} and goes on with that; resume can change "
                           f"{', '.join(sorted(free))}. For another run from its weights: --init_from={path}")
        new = {k: getattr(o, k) for k in typed() & free}
        o = SimpleNamespace(**{**vars(o), **kept, **new, "out_dir": o.out_dir, "device": o.device, "init_from": "resume"})
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
    tokenizer = load_tokenizer(corpus[2]["tokenizer"])

    def run(lm, name, resume=None, until=None, **changes):
        return train(lm, SimpleNamespace(**{**vars(o), "name": name, **changes}), corpus, resume, until)

    def enlarge():
        return expand(small, choose_layers(o.n_layer, o.every, o.layers), o.factor or None, o.expand_init, o.seed)

    small = new_model(o, corpus[2])
    enlarge()                                                      # what cannot be enlarged stops here, not after pre-training
    make_folder(o.out_dir)
    results = {"pretrained": report(small, run(small, "pretrained", steps=o.pretrain_steps), o, corpus, tokenizer)}
    larger, transplant = enlarge()
    print(describe(transplant))
    curves = {}
    for arm, start in (("lpt", small), ("statex", larger)):
        # The first quarter of the run at every learning rate of the grid; the one with the lower held-out loss goes on.
        # Another seed than pre-training's, so that the data is new.
        tried = {}
        for lr in rates(o):
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
    if World.rank:
        return
    with open(f"{o.out_dir}/results.json.tmp", "w") as f:
        json.dump(results, f, indent=1)
    os.replace(f"{o.out_dir}/results.json.tmp", f"{o.out_dir}/results.json")
    print("\n" + table(results))
    print(f"\n{o.out_dir}/results.json" + picture(results, curves, f"{o.out_dir}/recipe.png"))


def report(lm, run, o, corpus, tokenizer):
    """One arm's entry of results.json: what it cost and what it scores."""
    c = lm.config
    numbers = sum(c.state_numbers(i) for i in range(c.n_layer))
    with scoring(lm, o):
        scores = recall.score(lm, corpus[1], tokenizer, pairs=sizes(o), T=o.block_size)
        lm.generate(torch.zeros(1, 1, dtype=torch.long, device=o.device), 8)
        t0 = time.time()
        lm.generate(torch.zeros(1, 1, dtype=torch.long, device=o.device), 64)
        decode = (time.time() - t0) / 64 * 1e3
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


def typed():
    """Names of the options on the command line."""
    return {a[2:].partition("=")[0].replace("-", "_") for a in sys.argv[1:] if a.startswith("--")}


def main():
    given = command_line(__doc__, **DEFAULTS)
    if given.preset and given.preset not in PRESETS:
        raise BadInput(f"no preset {given.preset!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS.get(given.preset or (f"recipe-{given.block}" if not given.init_from else ""), {})
    o = SimpleNamespace(**{**vars(given), **{k: v for k, v in preset.items() if k not in typed()}})
    o.out_dir = o.out_dir or (f"out/recipe-{o.block}" if not o.init_from else "out/run")
    join(o)
    if World.rank:
        sys.stdout = open(os.devnull, "w")
    check(o)
    try:
        one_run(o) if o.init_from else recipe(o)
    except RuntimeError as e:
        if World.size == 1 or isinstance(e, torch.OutOfMemoryError):
            raise
        print(f"train.py: process {World.rank} lost the others ({' '.join(str(e).split())[:120]}); go on with --init_from=resume",
              file=sys.stderr, flush=True)
        os._exit(1)
    if World.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    listen()
    main_line(main)
