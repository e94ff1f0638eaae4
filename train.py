"""One training loop for every phase, and the recipe that chains them.

    python train.py                         the recipe, for GLA
    python train.py --block=mamba2          the recipe, for Mamba2
    python train.py --plot=out/recipe-gla   the recipe's table and picture again

    python train.py --ckpt=scratch --d_model=512 --out_dir=out/run     one run, random weights
    python train.py --ckpt=out/expanded.pt --preset=paper-gla          one run from a checkpoint
    python train.py --ckpt=resume --out_dir=out/run                    go on with a run
    torchrun --nproc_per_node=8 train.py --ckpt=... --preset=...       the batch shared out

The recipe pre-trains a small model and post-trains it twice with the same tokens, order and
schedule: LPT (unchanged) and StateX (with a larger state).

A run writes out_dir/NAME.pt and out_dir/log.jsonl. A folder that holds a run goes on with it
if the options are the same, and is left alone if they are not. Ctrl-C, SIGTERM and a closed
terminal save and stop; kill -9 loses the steps since the last save.
"""
from data.options import (
    BadInput,
    command_line,
    number_list,
    one_line,
    option,
    out_of_memory,
    pick_device,
    run_script,
    write_file,
)

import collections
import concurrent.futures
import contextlib
import copy
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as sharded  # gathers what --shard cut
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:                     # Windows: no lock on out_dir, no peak of memory
    fcntl = resource = None

from data import prepare, recall
from data.report import ARMS, print_report
from expand import INITS, check_choice, choose_layers, describe, expand
from model import LM, SIZES, Config, load_checkpoint, map_state, save_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------
# options and presets


# From scratch: half a million tokens per step.
SCRATCH = dict(block_size=2048, batch_size=256, accumulate=16, recall_tokens=0, steps=30000,
               warmup=1000, weight_decay=0.1, compile=True)
# Post-training as in the paper, section 5.1: 10B tokens, 64K context, 512K tokens per step.
# The arms differ in --ckpt only: an expanded checkpoint, or for LPT the public one.
POST = dict(block_size=65536, batch_size=8, accumulate=8, recall_tokens=0, steps=20000, lr=3e-4,
            warmup=1000, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0, eval_interval=500,
            checkpoint_activations=True, compile=True)
PRESETS = {
    "gla-340m": SCRATCH | dict(block="gla", size="gla-340m", lr=1e-3),
    "gla-1.3b": SCRATCH | dict(block="gla", size="gla-1.3b", lr=5e-4, accumulate=64),
    "mamba2-370m": SCRATCH | dict(block="mamba2", size="mamba2-370m", lr=1e-3, accumulate=32),
    "mamba2-1.3b": SCRATCH | dict(block="mamba2", size="mamba2-1.3b", lr=5e-4, accumulate=64),
    "paper-gla": POST | dict(block="gla"),
    "paper-mamba2": POST | dict(block="mamba2"),
    "recipe-gla": dict(block="gla", curriculum=0.6, eval_interval=100, graph=True),
    "recipe-mamba2": dict(block="mamba2", tie_embeddings=True, lr=2e-2, pretrain_steps=1800,
                          steps=600, recall_tokens=1024, curriculum=0.8, eval_interval=100,
                          graph=True),
}


@dataclass
class Options:
    # what to run
    ckpt: str = option("", "scratch | resume | the checkpoint, folder or hub id to start from; "
                       "empty: the recipe", alias="init_from")
    preset: str = option("", "other values for the options below, listed above; the recipe takes "
                         "recipe-BLOCK", choices=tuple(PRESETS))
    block: str = option("gla", "of the recipe or from scratch", choices=("gla", "mamba2"))
    data: str = option(f"{HERE}/data/python", "folder of token files, see data/prepare.py")
    out_dir: str = option("", "empty: out/recipe-BLOCK for the recipe, out/run for one run")
    name: str = option("ckpt", "of the checkpoint that one run writes")
    overwrite: bool = option(False, "begin anew where out_dir holds a run")
    seed: int = option(0, "of the weights and of the data's order")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: the GPU if there is one")
    plot: str = option("", "make the table and the picture of the recipe in this folder, only")
    # the model, from scratch
    size: str = option("", f"a public shape: {', '.join(SIZES)}; empty: the shape below",
                       choices=("", *SIZES))
    vocab_size: int = option(0, "0: the corpus's")
    n_layer: int = option(2, "layers")
    d_model: int = option(64, "channels of the residual stream")
    tie_embeddings: bool = option(False, "one matrix for embeddings and output")
    norm_eps: float = option(1e-5, "of the norms")
    conv_size: int = option(4, "taps of the short convolution; GLA: 0 for none")
    n_head: int = option(4, "GLA: heads; a layer's state has d_k d_v / n_head elements")
    d_mlp: int = option(128, "GLA: width of the MLP; 0: the public rule")
    d_state: int = option(8, "Mamba2: a layer's state has 2 d_model d_state elements")
    headdim: int = option(16, "Mamba2: channels per head")
    # the data: text, and beside it sequences of multi-query recall (data/recall.py)
    batch_size: int = option(8, "text sequences per step, in all")
    block_size: int = option(128, "tokens per text sequence")
    recall_tokens: int = option(2048, "tokens of recall sequences per step; 0: text alone")
    pairs: str = option("2,4,8,16,32", "key-value pairs of a recall sequence, one of these a step")
    curriculum: float = option(0.0, "share of the steps over which these sizes join in; in the "
                               "recipe of pre-training")
    carry_state: bool = option(False, "read text in order, from the state of the slice before")
    documents: bool = option(False, "in training forget the state where a document ends")
    # the optimizer: AdamW, linear warm-up, cosine to 0
    steps: int = option(800, "optimizer steps; in the recipe, of each arm")
    lr: float = option(1e-2, "highest learning rate; in the recipe, of pre-training")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.1, "of all but vectors and gates")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient")
    gates_rate: float = option(1.0, "GLA's gates learn at this many times the rate")
    # speed and memory
    accumulate: int = option(1, "passes that a step is cut into, those of all processes")
    compile: bool = option(False, "torch.compile every layer: for GPUs, a minute at the start")
    graph: bool = option(False, "on one GPU: record every pass as a CUDA graph; small models "
                                "else wait for launches")
    checkpoint_activations: bool = option(False, "keep layers' inputs only, compute the rest again")
    shard: bool = option(False, "with torchrun: FSDP2 in place of DistributedDataParallel")
    bfloat16_residual: bool = option(False, "on a GPU, train with the residual stream in bfloat16, "
                                            "which changes results; it is scored in float32")
    # evaluation, saving, logging
    eval_interval: int = option(500, "steps between evaluations; each saves a checkpoint")
    tensorboard: bool = option(False, "beside log.jsonl")
    # the recipe
    pretrain_steps: int = option(1600, "of the small model")
    every: int = option(1, "StateX enlarges every n-th layer")
    layers: str = option("", "or these, such as 0,6,12")
    factor: int = option(0, "of the state; 0: GLA all heads of a layer, Mamba2 4")
    init: str = option("preserve", "the transplant, see expand.py", choices=INITS,
                       alias="expand_init")
    post_lr: float = option(1e-2, "highest learning rate of post-training, of both arms")

    @property
    def path(self):
        """Of the run's checkpoint."""
        return f"{self.out_dir}/{self.name}.pt"

    @property
    def cuda(self):
        return self.device.startswith("cuda")


# The shape of a model from scratch without --size.
SHAPE = ("block", "n_layer", "d_model", "tie_embeddings", "norm_eps", "conv_size", "n_head",
         "d_mlp", "d_state", "headdim")
OTHERS = {"gla": {"d_state", "headdim"}, "mamba2": {"n_head", "d_mlp"}}     # idle, by block


def check(options, processes):
    """Raises BadInput for options that cannot be run, before anything is written."""
    for name in ("steps", "pretrain_steps", "batch_size", "block_size", "accumulate",
                 "eval_interval", "n_layer", "d_model", "headdim"):
        if not getattr(options, name):
            raise BadInput(f"--{name}=0; expected 1 or more")
    if max(options.beta1, options.beta2) >= 1 or not options.clip:
        raise BadInput(f"beta1 {options.beta1} and beta2 {options.beta2} must be below 1, and "
                       f"clip {options.clip} above 0")
    if max(options.lr, options.post_lr) * max(1, options.gates_rate) > 1e30:
        raise BadInput(f"lr {options.lr:g}, post_lr {options.post_lr:g}, gates_rate "
                       f"{options.gates_rate:g}: the product is beyond float32, or near; take less")
    if (not options.name or os.path.basename(options.name) != options.name
            or options.name.startswith(".") or options.name.endswith(".pt")):
        raise BadInput(f"--name={options.name} is not a file's name; expected a word such as lpt: "
                       "the folder is --out_dir, and .pt is added")
    if len(os.fsencode(options.name)) > 200:
        raise BadInput(f"--name has {len(os.fsencode(options.name))} bytes; expected at most 200")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise BadInput("--tensorboard writes for TensorBoard: pip install tensorboard")
    parts = passes(options, processes) * processes.size
    if options.batch_size % parts:
        raise BadInput(f"batch_size {options.batch_size} cannot be shared out: accumulate "
                       f"{options.accumulate} on {processes.size} processes makes {parts} passes")
    if options.curriculum > 1:
        raise BadInput(f"--curriculum={options.curriculum:g}; expected a share, 0 to 1")
    if not options.pairs:
        raise BadInput("--pairs is empty; expected a list such as 2,4,8")
    largest = pair_sizes(options)[-1]
    if options.recall_tokens and -(-options.recall_tokens // (4 * largest)) < parts:
        raise BadInput(f"recall_tokens {options.recall_tokens} are fewer than {parts} sequences of "
                       f"{largest} pairs, one for each pass of a step")
    if options.shard and (processes.size == 1 or not options.ckpt):
        raise BadInput("--shard cuts one run over processes: start it with torchrun and --ckpt, "
                       "or let a run go on whole: --shard=false")
    if options.compile and options.device == "cpu":
        raise BadInput("--compile is for GPUs: on a CPU the first step takes minutes and the "
                       "others gain little")
    if options.bfloat16_residual and not options.cuda:
        raise BadInput("--bfloat16_residual is for a GPU, and a run that began with it goes on "
                       "with it")
    if options.graph and (not options.cuda or processes.size > 1 or options.carry_state):
        raise BadInput("--graph is for one GPU, without --carry_state")
    if os.path.exists(options.out_dir) and not os.path.isdir(options.out_dir):
        raise BadInput(f"out_dir {options.out_dir} is a file; expected a folder, or a free name")


def pair_sizes(options):
    return sorted(number_list("pairs", options.pairs))


# ---------------------------------------------------------------------------------------
# processes: one, or as many as torchrun starts; each does its share of every step


@dataclass(frozen=True)
class Processes:
    """This process among the others. The first one writes files and prints."""
    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self):
        return self.rank == 0


def join(device):
    """Take this process's place among those that torchrun started (gloo on CPUs, NCCL on
    GPUs). All but the first print nothing. -> (Processes, its device)"""
    if "RANK" not in os.environ:
        return Processes(), device
    try:
        processes = Processes(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if device.startswith("cuda"):
            device = f"cuda:{processes.local}"
            torch.cuda.set_device(processes.local)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as e:
        raise BadInput(f"RANK is set, which makes this one of several processes, and they cannot "
                       f"meet ({type(e).__name__}: {one_line(e)}); start them with torchrun, as "
                       "many as there are GPUs, or unset RANK") from e
    if not processes.first:
        sys.stdout = open(os.devnull, "w")
    return processes, device


def passes(options, processes):
    """Forward and backward passes per process and step."""
    return -(-options.accumulate // processes.size)


def say(line):
    """To the terminal, whatever else is being printed."""
    print(line, file=sys.stderr, flush=True)


class Stop:
    """Whether a signal asked to save and stop: Ctrl-C, SIGTERM, or a closed terminal."""

    def __init__(self):
        self.signal = 0                 # its number
        self.agreed = False             # all processes know and stop after this step

    def listen(self):
        """From now on note these signals. Python's handlers run in the main thread, which may be
        compiling or hang in a collective, so a thread reads the signals from a pipe. It ends
        the process at a second signal, or with torchrun (which kills soon after) where no step
        ends within 20 s."""
        ear, mouth = os.pipe()
        if hasattr(os, "set_blocking"):     # on Windows since Python 3.12, and not needed
            os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth)
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:      # as nohup sets it
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self.wait, args=(ear,), daemon=True).start()

    def wait(self, ear):
        self.signal = os.read(ear, 1)[0]
        if "RANK" not in os.environ:
            say("\ntrain.py: saving and stopping after the next step; once more to stop at once")
            os.read(ear, 1)
        else:
            time.sleep(20)
            if self.agreed:
                return
            say(f"train.py: process {os.environ['RANK']} waited 20 s for the others after "
                f"signal {self.signal} and ends; go on with --ckpt=resume")
        os._exit(128 + self.signal)


# ---------------------------------------------------------------------------------------
# the state of one run


@dataclass
class Run:
    """A model in training and how far it is."""
    lm: LM
    model: torch.nn.Module          # lm, or what wraps it for several processes
    optimizer: torch.optim.Optimizer
    options: Options
    corpus: prepare.Corpus
    processes: Processes
    stop: Stop
    each: Callable = map            # or that of two threads, see side_by_side
    end_of_text: int | None = None  # with --documents
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0            # of training
    evaluations: list = field(default_factory=list)     # [tokens, text loss, recall loss]
    start: str = ""                 # fingerprint of the weights it began with
    carried: dict = field(default_factory=dict)         # with --carry_state: {pass: state}
    pairs: int = 0                  # of the last step's recall sequences
    graphs: dict = field(default_factory=dict)          # with --graph, see replayed
    pool: tuple | None = None                           # the graphs' memory
    # of the last steps: (tokens, seconds)
    recent: collections.deque = field(default_factory=lambda: collections.deque(maxlen=20))


def start_run(lm, options, corpus, processes, stop):
    """A Run at step 0: lm on its device, compiled, and shared out over the processes."""
    lm.to(options.device).train()
    lm.checkpoint_activations = options.checkpoint_activations
    lm.bfloat16_residual = options.bfloat16_residual
    if options.compile:
        torch._dynamo.config.recompile_limit = 64   # one graph per shape of layer and of batch
        torch._dynamo.config.optimize_ddp = False   # the same graphs as in one process
        # What has up to six inputs (for four) is read where it is used, not written out first:
        # norms, gates and sums of gradients in fewer kernels. Measured for GLA only.
        inductor = {"realize_reads_threshold": 6} if lm.config.block == "gla" else None
        for layer in lm.layers:
            # layers of one shape share theirs
            layer.compile(dynamic=False, options=inductor)
        lm.slice_loss = torch.compile(lm.slice_loss)
    model = lm
    if options.shard:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        # layers return their states as views, which nothing writes to
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = dist.init_device_mesh(torch.device(options.device).type, (dist.get_world_size(),))
        for module in (*lm.layers, lm):     # weights are gathered once per pass, not twice
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(lm, "features")        # scores call it, not forward
    elif processes.size > 1:
        device_ids = [processes.local] if options.cuda else None
        model = torch.nn.parallel.DistributedDataParallel(
            lm, device_ids=device_ids, gradient_as_bucket_view=True)    # one copy less
    run = Run(lm, model, make_optimizer(lm, options), options, corpus, processes, stop)
    if options.device == "cpu" and processes.size == options.accumulate == 1:
        run.each = side_by_side(options)
    if options.graph:
        run.pool = torch.cuda.graph_pool_handle()
    if options.documents:
        run.end_of_text = corpus.meta["end_of_text"]
    return run


def side_by_side(options):
    """A `map` by two threads, one for text and one for recall sequences, where these take about as
    long: a small model's operations are too short to be shared by threads. Both add to the
    same gradients, where autograd holds a lock; the sum of two is the same in either order, that
    of more would not be."""
    threads = torch.get_num_threads() // 2
    text = options.batch_size * options.block_size
    alike = text <= options.recall_tokens <= 4 * text
    if not threads or options.compile or not alike:
        return map
    return concurrent.futures.ThreadPoolExecutor(
        2, initializer=torch.set_num_threads, initargs=(threads,)).map


def make_optimizer(lm, options):
    """AdamW without weight decay on vectors (norm gains, biases, A_log, D, dt_bias) and on
    GLA's gates."""
    learnt = [(name, p) for name, p in lm.named_parameters() if p.requires_grad]
    gates = [p for name, p in learnt if name.endswith("gates")]
    rest = [p for name, p in learnt if not name.endswith("gates")]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    if gates:
        groups.append({"params": gates, "weight_decay": 0.0, "times": options.gates_rate})
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2),
                             fused=options.cuda)


def precision(options):
    """bfloat16 matrix products on a GPU; parameters, norms, states and (see bfloat16_residual)
    the residual stream stay in float32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=options.cuda)


# ---------------------------------------------------------------------------------------
# one step


def share(run, n, k):
    """Of n rows, those of this process's k-th pass: every pass of every process gets a
    part, as equal as can be."""
    count = passes(run.options, run.processes)
    part = run.processes.rank * count + k
    parts = run.processes.size * count
    return slice(n * part // parts, n * (part + 1) // parts)


def batches(run, k):
    """What this process's k-th pass reads: a list of (idx, targets, first, share of the step's
    rows), where first says that a document begins here, or is None; text, then recall
    sequences of one size.

    The data depends on the seed and the step alone, so that both arms see the same tokens in
    the same order, any number of processes the same batch, and a resumed run goes on with
    what comes next."""
    options = run.options
    rng = np.random.default_rng([options.seed, run.step])
    data = [text_batch(run, rng, k)]
    if options.recall_tokens:
        data.append(recall_batch(run, rng, k))
    return [tuple(torch.from_numpy(x).to(options.device) if isinstance(x, np.ndarray) else x
                  for x in entry) for entry in data]


def text_batch(run, rng, k):
    """The entry of text, in NumPy."""
    options = run.options
    tokens = run.corpus.train
    if options.carry_state:                 # row r reads the r-th stretch of the text
        slices = slices_per_row(run)
        starts = (np.arange(options.batch_size) * slices + run.step % slices) * options.block_size
    else:
        starts = rng.integers(len(tokens) - options.block_size, size=options.batch_size)
    starts = starts[share(run, options.batch_size, k)]
    text = tokens[starts[:, None] + np.arange(options.block_size + 1)].astype(np.int64)
    first = None
    if options.documents:                   # a document begins after the end of one
        first = np.zeros((len(text), options.block_size), bool)
        first[:, 1:] = text[:, :-2] == run.end_of_text
        first[:, 0] = tokens[starts - 1] == run.end_of_text     # for a carried state
    return text[:, :-1], text[:, 1:], first, len(text) / options.batch_size


def recall_batch(run, rng, k):
    """The entry of recall sequences. With a curriculum the sizes join in one by one,
    from the smallest."""
    options = run.options
    sizes = pair_sizes(options)
    growing = options.curriculum * options.steps
    progress = run.step / growing if run.step < growing else 1.0
    joined = sizes[:1 + int(progress * len(sizes))]
    run.pairs = pairs = int(rng.choice(joined))
    n = -(-options.recall_tokens // (4 * pairs))
    rows = share(run, n, k)
    idx, targets = recall.mqar(rng, n, pairs, run.lm.config.vocab_size)
    return idx[rows], targets[rows], None, (rows.stop - rows.start) / n


def slices_per_row(run):
    """With --carry_state: steps until the text begins again."""
    return (len(run.corpus.train) - 1) // run.options.batch_size // run.options.block_size


def learning_rate(options, step):
    """Linear warm-up, then a cosine to 0. `steps` counts both."""
    if step < options.warmup:
        return options.lr * (step + 1) / (options.warmup + 1)
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


def forward_backward(run):
    """Add up the gradients of this step, of the mean loss of text plus that of recall.
    Returns a tensor: both losses, tokens, 1 if a signal asked to stop; each summed over
    the processes."""
    sums = torch.zeros(4, dtype=torch.float64, device=run.options.device)
    for k in range(passes(run.options, run.processes)):
        # text, and recall if any: map ends with the shorter list
        done = run.each(functools.partial(one_pass, run, k), (0, 1), batches(run, k))
        for i, (loss, tokens) in enumerate(done):
            sums[i] += loss
            sums[2] += tokens
    sums[3] += bool(run.stop.signal)
    if run.processes.size > 1:
        dist.all_reduce(sums)
    return sums


def one_pass(run, k, i, batch):
    """Forward and backward of what the k-th pass reads of text (i = 0) or of recall
    sequences (i = 1). -> its share of the loss, its tokens"""
    options = run.options
    idx, targets, first, weight = batch
    carries = options.carry_state and i == 0
    state = None
    if carries and run.step % slices_per_row(run):      # at 0 the text begins again
        state = run.carried.get(k)
    last_kind = 1 if options.recall_tokens else 0
    last = k == passes(options, run.processes) - 1 and i == last_kind
    if options.shard:                               # gradients are exchanged once per step
        run.model.set_requires_gradient_sync(last)
    elif run.processes.size > 1:
        run.model.require_backward_grad_sync = last     # what DDP's no_sync() sets
    if options.graph:
        loss = replayed(run, idx, targets, first, weight)
    else:
        loss, state = loss_and_gradients(run, idx, targets, first, weight, state)
    if carries:
        run.carried[k] = map_state(torch.Tensor.detach, state)
    return loss, idx.numel()


def loss_and_gradients(run, idx, targets, first, weight, state=None):
    """Forward and backward of one batch. -> its share of the loss, the state at its end"""
    with precision(run.options):
        _, loss, state = run.model(idx, targets, state, first)
    loss = loss * weight
    backward(loss * run.processes.size)         # DDP and FSDP average, where a sum is meant
    return loss.detach(), state


def backward(loss):
    """loss.backward() in this thread. To wake PyTorch's own thread for a GPU takes about 0.2 ms
    where the host is slow, which steps of small models feel (data/results/README.md)."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def replayed(run, *batch):
    """loss_and_gradients as a CUDA graph: one launch in place of hundreds. The first batch of a
    shape is computed as ever, which compiles the kernels; the second is recorded; from then on a
    batch is copied to where the graph reads. The graph adds to the gradients where they lie,
    and so they are set to 0 after a step, not given back. -> the batch's share of the loss"""
    key = tuple(x.shape if torch.is_tensor(x) else x for x in batch)
    if key not in run.graphs:
        run.graphs[key] = None
        return loss_and_gradients(run, *batch)[0]
    if run.graphs[key] is None:
        inputs = [x.clone() if torch.is_tensor(x) else x for x in batch]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=run.pool):    # one memory for all: they take turns
            loss, _ = loss_and_gradients(run, *inputs)
        run.graphs[key] = graph, inputs, loss
    graph, inputs, loss = run.graphs[key]
    for old, new in zip(inputs, batch, strict=True):
        if torch.is_tensor(old):
            old.copy_(new)
    graph.replay()
    return loss


def clip_and_step(run):
    """-> the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(run.lm.parameters(), run.options.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=not run.options.graph)
    return norm.full_tensor() if run.options.shard else norm


# ---------------------------------------------------------------------------------------
# evaluate, save, resume, log


@contextlib.contextmanager
def scoring(lm, options):
    """lm as it is scored: in training's precision, and not compiled, because scoring has many
    shapes."""
    lm.eval()
    with torch.no_grad(), precision(options), torch.compiler.set_stance("force_eager"):
        yield
    lm.train()


def evaluate(run):
    """-> the losses on held-out text, in windows of block_size but at most 8192 tokens, and on
    recall sequences, always the same ones, in nats per answer (0 without any). Appends both to
    run.evaluations."""
    options = run.options
    sizes = pair_sizes(options) if options.recall_tokens else []
    asked = 0.0
    with scoring(run.lm, options):
        text = recall.text_loss(run.lm, run.corpus.val, min(options.block_size, 8192))[0]
        for pairs in sizes:
            rng = np.random.default_rng([7, pairs])         # always the same sequences
            idx, targets = (torch.from_numpy(x).to(options.device)
                            for x in recall.mqar(rng, 64, pairs, run.lm.config.vocab_size))
            asked += run.lm(idx, targets)[1].item() / len(sizes)
    run.evaluations.append([run.tokens, text, asked])
    return text, asked


def save(run):
    """One whole model in run.options.path, however it is cut over processes."""
    full = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, optimizer = sharded.get_state_dict(run.lm, run.optimizer, options=full)
    carried = gather_carried(run)
    if run.processes.first:
        meta = run.corpus.meta
        entry = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds,
                 "evaluations": run.evaluations, "carried": carried,
                 # for readers of the file; nothing here asks for it
                 "best": min((text + asked for _, text, asked in run.evaluations), default=None),
                 "options": asdict(run.options), "optimizer": optimizer, "start": run.start,
                 "corpus": {"sha256": meta.get("sha256"), "tokenizer": meta.get("tokenizer")}}
        save_checkpoint(run.options.path, run.lm, entry, weights)
    if run.processes.size > 1:
        dist.barrier()


def gather_carried(run):
    """The carried states of all rows of the batch, in order, on the CPU; None without any."""
    if not run.carried:
        return None
    states = [map_state(torch.Tensor.cpu, state) for state in run.carried.values()]
    if run.processes.size > 1:
        gathered = [None] * run.processes.size
        dist.all_gather_object(gathered, states)
        states = [state for of_rank in gathered for state in of_rank]
    return map_state(lambda *parts: torch.cat(parts), *states)


def restore(run, held):
    """Put a run where its checkpoint's "train" entry says it was. Raises BadInput."""
    try:
        # What this torch's AdamW does not know is left out, and `fused` is this device's.
        kept = {key for group in run.optimizer.param_groups for key in group}
        saved = held["optimizer"]
        for group in saved["param_groups"]:
            for key in set(group) - kept:
                del group[key]
            group["fused"] = run.options.cuda
        full = sharded.StateDictOptions(full_state_dict=True)
        sharded.set_optimizer_state_dict(run.lm, run.optimizer, saved, options=full)
        run.step = held["step"]
        run.start = held.get("start", "")
        run.tokens = held["tokens"]
        run.seconds = held["seconds"]
        run.evaluations = [[tokens, text, asked] for tokens, text, asked in held["evaluations"]]
        if carried := held["carried"]:
            for k in range(passes(run.options, run.processes)):
                rows = share(run, run.options.batch_size, k)
                run.carried[k] = map_state(
                    lambda t, rows=rows: t[rows].to(run.options.device), carried)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise other_version(run.options.path, f"{type(e).__name__}: {one_line(e, 100)}") from e


def load_run(path):
    """-> (model, "train" entry) of a run that can go on. Raises BadInput for others."""
    lm, held = load_checkpoint(path)
    if held is None:
        raise BadInput(f"{path} holds a model and no run to go on with; start one from it by "
                       f"--ckpt={path}, in another --out_dir or by another --name, or --overwrite")
    kinds = {"options": dict, "optimizer": dict, "corpus": dict, "evaluations": list, "step": int,
             "tokens": int, "seconds": float}
    for name, kind in kinds.items():
        if not isinstance(held, dict) or type(held.get(name)) is not kind:
            raise other_version(path, f"its {name} is not of type {kind.__name__}")
    known = asdict(Options())
    for name, value in held["options"].items():
        kind = type(known.get(name, value))
        if type(value) is not kind and (kind, type(value)) != (float, int):     # such as lr=1
            raise other_version(path, f"its option {name} is {value!r}")
    steps = held["options"].get("steps", 0)
    if not 0 <= held["step"] <= steps or held["tokens"] < 0 or not held["seconds"] >= 0:
        raise other_version(path, f"it is at step {held['step']} of {steps}, after "
                                  f"{held['tokens']} tokens and {held['seconds']} s")
    return lm, held


def other_version(path, why):
    return BadInput(f"{path} was written by another version and cannot be resumed ({why}); "
                    f"start a run from its weights: --ckpt={path} with another --out_dir")


def flops_per_token(lm):
    """Of forward and backward: 6 per weight of a matrix product, 12 per element of state (2 to
    write it and 2 to read it, a product and a sum each, and twice that backward). What is
    computed twice to save memory is not counted."""
    in_layers = sum(p.numel() for p in lm.layers.parameters() if p.dim() == 2)
    weights = in_layers + lm.lm_head.weight.numel()
    return 6 * weights + 12 * lm.config.total_state()


def peak_memory(cuda):
    """MiB: on a GPU what this process's tensors took at most, without what --graph recorded; on
    a CPU the process itself."""
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10         # bytes; elsewhere KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


# FLOP/s in bfloat16, dense, of the SXM cards by NVIDIA's data sheets; for MFU
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def drop_later(path, name, step):
    """Drop the lines of a run after this step: it begins anew, or was killed since."""
    if not os.path.isfile(path):                        # none yet, or a device, without an end
        return
    kept = []
    with open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)                # a line that is none goes, too
                if entry["run"] != name or entry["step"] <= step:
                    kept.append(line)
    write_file(path, lambda file: file.write("".join(kept).encode()))


class Log:
    """log.jsonl, and on request TensorBoard; a progress bar in a terminal, lines elsewhere."""

    def __init__(self, run, until):
        options = run.options
        first = run.processes.first
        self.run = run
        path = f"{options.out_dir}/log.jsonl" if first else os.devnull
        drop_later(path, options.name, run.step)
        self.file = open(path, "a", buffering=1)
        self.board = None
        if options.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(options.out_dir)
        self.every = max(1, until // 8)     # steps from line to line, where there is no bar
        self.bar = tqdm(total=until, initial=run.step, desc=options.name, unit="step",
                        mininterval=1, dynamic_ncols=True,
                        disable=not first or not sys.stderr.isatty())
        card = torch.cuda.get_device_name() if options.cuda else ""
        peak = next((flops for name, flops in PEAK.items() if name in card), 0)
        self.peak_flops = peak * run.processes.size     # 0: not known
        self.work = flops_per_token(run.lm)

    def speed(self):
        """Of the last steps: tokens per second, and where it is known the share of the peak."""
        recent = self.run.recent
        rate = sum(tokens for tokens, _ in recent) / sum(seconds for _, seconds in recent)
        mfu = {"mfu": round(self.work * rate / self.peak_flops, 4)} if self.peak_flops else {}
        return {"tokens_per_s": round(rate), **mfu}

    def write(self, **line):
        """To log.jsonl and TensorBoard."""
        run = self.run
        per_step = sum(seconds for _, seconds in run.recent) / len(run.recent)
        line = {"run": run.options.name, "step": run.step, "tokens": run.tokens, **line,
                "seconds_left": round(per_step * (run.options.steps - run.step), 1)}
        self.file.write(json.dumps(line) + "\n")
        for key, value in line.items():
            if self.board and isinstance(value, (int, float)):
                self.board.add_scalar(f"{run.options.name}/{key}", value, run.step)

    def show(self, text_loss, recall_loss):
        """After every step: the bar in a terminal, elsewhere a line now and then."""
        run = self.run
        speed = self.speed()
        text = f"loss {text_loss:.3f}"
        if run.options.recall_tokens:
            text += f" recall loss {recall_loss:.3f} ({run.pairs} pairs)"
        text += f" {speed['tokens_per_s']:,} tokens/s"
        if "mfu" in speed:
            text += f" MFU {speed['mfu']:.0%}"
        self.bar.update()
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and run.processes.first and run.step % self.every == 0:
            say(f"{run.options.name}: step {run.step}  {text}")

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()


# ---------------------------------------------------------------------------------------
# the loop


def train(lm, options, corpus, held=None, until=None, processes=Processes(), stop=None):
    """Train lm in place, to the end or to step `until`. held: the "train" entry of the
    checkpoint to go on from. Saves out_dir/NAME.pt. Returns {"tokens", "tokens_per_s",
    "val_loss", "recall_loss", "peak_mem_mib", "evaluations"}. Raises BadInput."""
    corpus = prepare.Corpus(*corpus)
    start = "" if held else fingerprint(lm)         # before --shard cuts the weights
    run = start_run(lm, options, corpus, processes, stop or Stop())
    run.start = start
    if held:
        restore(run, held)
    until = until or options.steps
    log = Log(run, until)
    if options.cuda:
        torch.cuda.reset_peak_memory_stats()
    while run.step < until:
        begin = time.time()
        lr = learning_rate(options, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1.0)
        sums = forward_backward(run)
        norm = clip_and_step(run)
        text_loss, recall_loss, tokens, stopping, norm = torch.cat(
            (sums, norm.double()[None])).tolist()           # waits for the GPU
        if not math.isfinite(text_loss + recall_loss + norm):
            raise diverged(log, f"the loss is {text_loss + recall_loss:.4g} and the gradient's "
                                f"norm {norm:.4g}")
        run.step += 1
        seconds = time.time() - begin
        run.tokens += int(tokens)
        run.seconds += seconds
        run.recent.append((tokens, seconds))
        run.stop.agreed = bool(stopping)
        log.show(text_loss, recall_loss)
        if run.step % 10 == 0 or run.step == until:
            log.write(loss=text_loss, recall_loss=recall_loss, grad_norm=norm, lr=lr,
                      **log.speed())
        if run.step % options.eval_interval == 0 or run.step == until:
            val_loss, val_recall_loss = evaluate(run)
            if not math.isfinite(val_loss + val_recall_loss):
                raise diverged(log, "after it the held-out loss is "
                                    f"{val_loss + val_recall_loss:.4g}")
            log.write(val_loss=val_loss, val_recall_loss=val_recall_loss,
                      peak_mem_mib=peak_memory(options.cuda))
            save(run)
        elif stopping:
            save(run)
        if stopping and run.step < options.steps:
            log.close()
            print(f"stopped by a signal: {options.path} holds step {run.step}; the same command, "
                  "without --overwrite, goes on, or for this run alone --ckpt=resume "
                  f"--out_dir={shlex.quote(options.out_dir)} --name={shlex.quote(options.name)}",
                  flush=True)
            raise SystemExit(128 + (run.stop.signal or signal.SIGTERM))
    log.close()
    _, val_loss, val_recall_loss = run.evaluations[-1]
    return {"tokens": run.tokens, "tokens_per_s": round(run.tokens / max(run.seconds, 1e-9)),
            "val_loss": val_loss, "recall_loss": val_recall_loss,
            "peak_mem_mib": peak_memory(options.cuda), "evaluations": run.evaluations}


def diverged(log, what):
    """The BadInput of a run that came to an end by itself."""
    log.close()
    return BadInput(f"step {log.run.step}: {what}; what was saved before is kept; try a smaller "
                    "--lr or a longer --warmup (and a decay of your own: are its logs <= 0?)")


# ---------------------------------------------------------------------------------------
# folders, corpora, and what a run starts with


def open_folder(options, processes):
    """Make out_dir, keep other runs out of it while this process lives, and remove what a killed
    save left. -> what holds the lock"""
    try:
        os.makedirs(options.out_dir, exist_ok=True)
        if not processes.first:
            return None
        lock = open(f"{options.out_dir}/.lock", "w")
    except OSError as e:
        raise BadInput(f"cannot write in out_dir {options.out_dir}: {e.strerror}") from e
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise BadInput(f"another process is writing in {options.out_dir}; wait for it, or take "
                       "another --out_dir") from e
    except OSError as e:                    # some network file systems have no locks
        say(f"train.py: {options.out_dir} cannot be locked ({e.strerror}); see to it that no other "
            "process writes there")
        return lock
    for part in glob.glob(f"{glob.escape(options.out_dir)}/*.pt.*.tmp"):       # see write_file
        os.remove(part)
    return lock


# What --ckpt=resume may change. Nothing that is computed depends on it, but for `data`,
# which is then typed on purpose.
FREE = {"accumulate", "checkpoint_activations", "compile", "data", "device", "eval_interval",
        "graph", "shard", "tensorboard"}


def fingerprint(lm):
    """Of all weights: their shapes, and sums of their bits, however they are added up."""
    sums = [(name, tuple(t.shape), t.float().view(torch.int32).sum(dtype=torch.int64).item())
            for name, t in lm.state_dict().items()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def same_start(options, held, lm):
    """Raises BadInput where the held run began with other weights than lm's."""
    if held.get("start") and held["start"] != fingerprint(lm):
        raise BadInput(f"{options.path} holds a run that began with other weights: the checkpoint "
                       "or the transplant has changed since; remove it (and results.json), or take "
                       "another --out_dir, or --overwrite")


def held_run(options, meta):
    """The run in options.path with the same options and the corpus of this meta, to go on
    with. -> (its model, its "train" entry), or (None, None) for none. Raises BadInput for
    another run."""
    if options.overwrite or not os.path.exists(options.path):
        return None, None
    lm, held = load_run(options.path)
    kept = asdict(Options()) | held["options"]
    free = FREE | {"ckpt", "preset", "out_dir", "name", "overwrite", "plot"}
    if options.ckpt != "resume":            # the same command again: with the same start, too
        saved = held["corpus"].get("sha256")
        if not saved or saved != meta.get("sha256"):    # else the same text elsewhere will do
            free.discard("data")
        if kept["ckpt"] != "resume":        # a run once resumed does not say what it began with
            free.discard("ckpt")
        if not options.ckpt and options.name != "statex":
            free |= {"every", "layers", "factor", "init"}           # of StateX alone
    other = [name for name, value in asdict(options).items()
             if name not in free and kept[name] != value]
    if other:
        had = ", ".join(f"{name} = {kept[name]}" for name in other)
        how = "remove it (and results.json) to train that model again, or "
        if options.ckpt:
            how = (f"--ckpt=resume goes on with that and may change {', '.join(sorted(FREE))}; a "
                   f"run from its end on is --ckpt={shlex.quote(options.path)} in another "
                   "--out_dir; or ")
        raise BadInput(f"{options.path} holds a run with {had}; {how}take another --out_dir, or "
                       "--overwrite")
    if options.ckpt != "resume":
        same_text(held, options, meta)
    return lm, held


def same_text(held, options, meta):
    """Raises BadInput where the held run began with another text than is there now."""
    saved = held["corpus"].get("sha256")
    if saved and meta.get("sha256") != saved:
        raise BadInput(f"the text in {options.data} has changed since the run in {options.path} "
                       "began (another sha256); make it as it was, or go on with this one: "
                       f"--ckpt=resume --out_dir={shlex.quote(options.out_dir)} "
                       f"--data={shlex.quote(options.data)}")


def prepared(options, processes):
    """The corpus in options.data; the default one is made when it is missing."""
    default = os.path.abspath(Options().data)           # on Windows with its own slashes
    if os.path.abspath(options.data) == default and not os.path.exists(f"{default}/meta.json"):
        if processes.first:
            print("preparing the Python source on this machine")
            documents = prepare.read_documents(prepare.python_files())
            prepare.write_corpus(documents, default, "code4096")
        if processes.size > 1:
            dist.barrier()
    tokens, val, meta = corpus = prepare.load_corpus(options.data)
    if options.documents and "end_of_text" not in meta:
        raise BadInput(f"{options.data} is of an earlier version and does not say where documents "
                       "end; prepare it again")
    read = options.block_size * (options.batch_size if options.carry_state else 1)
    if len(tokens) <= read:
        raise BadInput(f"{options.data} has {len(tokens)} tokens to train on; expected more than "
                       f"{read}: block_size, of which --carry_state reads batch_size side by side")
    if len(val) < 64:
        raise BadInput(f"{options.data} has {len(val)} held-out tokens; expected at least 64")
    return corpus


def check_model(lm, options, meta):
    """Raises BadInput where the corpus' token ids mean nothing to the model, or where
    --gates_rate finds no gates in it."""
    c = lm.config
    prepare.check_tokenizer(c.tokenizer, meta)
    prepare.check_vocabulary(c, meta, options.data)
    half = min(recall.SYMBOLS, c.vocab_size) // 2
    if options.recall_tokens and pair_sizes(options)[-1] > half:
        raise BadInput(f"--pairs={options.pairs}; expected at most {half}, as a vocabulary of "
                       f"{c.vocab_size} has {2 * half} symbols for recall")
    if options.gates_rate != 1 and not any(name.endswith("gates") for name in lm.state_dict()):
        raise BadInput(f"--gates_rate={options.gates_rate:g} is for GLA whose heads share keys, "
                       "by expand.py --init=preserve; this model has no gates")


def new_model(options, meta, processes=None):
    """A model with random weights, by options.seed, for the corpus. Raises BadInput where
    training it on these processes takes more memory than there is."""
    if options.vocab_size and options.vocab_size < meta["vocab_size"]:
        raise BadInput(f"vocab_size {options.vocab_size} is less than the {meta['vocab_size']} "
                       f"token ids in {options.data}")
    vocab = dict(vocab_size=options.vocab_size or meta["vocab_size"], tokenizer=meta["tokenizer"])
    if options.size:
        config = replace(SIZES[options.size], **vocab)
    else:
        config = Config(**vocab, **{name: getattr(options, name) for name in SHAPE})
    if processes:
        check_memory(config, options, processes)
    torch.manual_seed(options.seed)
    return LM(config)


def check_memory(config, options, processes):
    """Raises BadInput where, on a CPU, weights, gradients and AdamW's two moments of all
    processes, 16 bytes per parameter, are more than the machine's memory."""
    if options.device != "cpu" or not hasattr(os, "sysconf"):       # Windows has none
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with torch.device("meta"):                      # its shapes alone
        params = sum(p.numel() for p in LM(config).parameters())
    copies = 1 if options.shard else processes.size
    needs = 16 * copies * params
    if needs > memory:
        what = f"{copies} models" if copies > 1 else "a model"
        less = " or --shard" if copies > 1 else ""
        raise BadInput(f"out of memory: to train {what} of this size takes {needs / 1e9:.0f} GB, "
                       f"this machine has {memory / 1e9:.0f}; it wants GPUs{less}")


def print_banner(lm, options, corpus, steps):
    """What is about to run, where, and how long so many steps of it take here."""
    c = lm.config
    params = sum(p.numel() for p in lm.parameters())
    where = options.device
    if options.cuda:
        where = torch.cuda.get_device_name(where)
    elif where == "cpu":
        where = f"a CPU, threads: {torch.get_num_threads()} (OMP_NUM_THREADS sets them)"
    print(f"{c.block}, {c.n_layer} layers, {params:,} parameters, {c.total_state():,} elements "
          f"of state per sequence\non {where}\n"
          f"text: {options.data}, {len(corpus.train):,} tokens to train on, {len(corpus.val):,} "
          f"held out, tokenizer {corpus.meta['tokenizer']}", flush=True)
    if options.warmup > options.steps:
        print(f"warmup is {options.warmup} steps of {options.steps}: the rate stays below --lr")
    if options.device == "cpu" and params > 1e8:
        print("this is a model for GPUs", flush=True)
    elif options.device == "cpu" and steps:
        expected = max(1, round(minutes(lm, options, corpus, steps)))
        text = f"{expected} minute{'s' * (expected > 1)}"
        if expected > 180:
            text = f"{round(expected / 60)} hours"
        print(f"about {text}", flush=True)


def minutes(lm, options, corpus, steps):
    """How long so many steps take, by a few on a copy of lm."""
    run = start_run(copy.deepcopy(lm), options, corpus, Processes(), Stop())
    forward_backward(run)
    begin = time.time()
    for _ in range(5):
        run.step += 1
        forward_backward(run)
        clip_and_step(run)
    return steps * (time.time() - begin) / 5 / 60


# ---------------------------------------------------------------------------------------
# one run


def one_run(options, processes, stop):
    """--ckpt=scratch, or from a checkpoint, or a run that is resumed."""
    # taken at once where the folder is there, else when nothing can be refused any more
    lock = open_folder(options, processes) if os.path.exists(options.out_dir) else None
    corpus = prepared(options, processes)
    lm, held = held_run(options, corpus.meta)
    trained = {}                                # the options of the run that made the checkpoint
    if held:
        if os.path.isfile(options.ckpt):        # else it is not needed any more
            same_start(options, held, LM.from_pretrained(options.ckpt))
    elif options.ckpt == "scratch":
        lm = new_model(options, corpus.meta, processes)
    else:
        lm, trained = recall.read_checkpoint(options.ckpt)
        if options.preset and lm.config.block != options.block:
            raise BadInput(f"{options.ckpt} holds a {lm.config.block} model, and --preset="
                           f"{options.preset} is for {options.block}; take that family's preset")
        if next(lm.parameters()).dtype in (torch.float16, torch.bfloat16):
            print(f"{options.ckpt} has weights of 16 bits; they are trained in float32")
            lm.float()                          # most steps are less than 16 bits can show
    check_model(lm, options, corpus.meta)
    check_memory(lm.config, options, processes)
    lock = lock or open_folder(options, processes)
    print_banner(lm, options, corpus, options.steps - (held["step"] if held else 0))
    if os.path.realpath(trained.get("data", options.data)) != os.path.realpath(options.data):
        print(f"before, the model was trained on {trained['data']}", flush=True)
    if held and held["step"] == options.steps:
        print("all steps are done already; the command that began them makes them anew with "
              f"--overwrite, --ckpt={shlex.quote(options.path)} in another --out_dir goes on")
    r = train(lm, options, corpus, held, processes=processes, stop=stop)
    print(f"{options.path}: {r['tokens']:,} tokens, val loss {r['val_loss']:.4f}, "
          f"{r['tokens_per_s']:,} tokens/s")
    del lock                                    # kept until here


def resumed(options, given):
    """The options of the run in options.path, and over them what was typed: held_run
    refuses later what may not change."""
    if not os.path.exists(options.path):
        others = glob.glob("*.pt", root_dir=options.out_dir)
        names = ", ".join(sorted(name.removesuffix(".pt") for name in others))
        how = f"--name is one of {names}" if names else (
            "--out_dir is the run's folder; a run that was killed before its first save is begun "
            "again by its first command")
        raise BadInput(f"no checkpoint at {options.path}; {how}")
    _, held = load_run(options.path)
    here = {"out_dir": options.out_dir, "name": options.name, "device": options.device,
            "overwrite": False}                     # the run may have begun with it
    try:
        options = Options(**held["options"] | given | here)
    except TypeError as e:                          # an option that this version does not know
        raise other_version(options.path, one_line(e)) from e
    if "data" not in given:
        if not os.path.exists(options.data):
            raise BadInput(f"the run in {options.path} was started with --data={options.data}, and "
                           "that is not here; name the folder of its text with --data")
        same_text(held, options, prepare.load_corpus(options.data).meta)
    return options


# ---------------------------------------------------------------------------------------
# the recipe


def recipe(options, processes, stop):
    """Pre-train a small model; LPT and StateX go on from it, alike in all but the state."""
    corpus = prepared(options, processes)
    layers = choose_layers(options.n_layer, options.every, options.layers)
    transplant = dict(factor=options.factor or None, init=options.init, seed=options.seed)
    if already_done(options, corpus.meta):          # unless expand.py has changed
        kept = [f"{options.out_dir}/{name}.pt" for name in ("pretrained", "statex")]
        if all(map(os.path.exists, kept)):
            larger, _ = expand(load_run(kept[0])[0], layers, **transplant)
            same_start(replace(options, name="statex"), load_run(kept[1])[1], larger)
        print_report(options.out_dir)
        return print(f"These are the results of an earlier run in {options.out_dir}. Remove its "
                     "results.json to score the models again (as after a change of recall.py), a "
                     "model's .pt too to train that one again; --overwrite trains all again (as "
                     "after a change of model.py)")
    small = new_model(options, corpus.meta, processes)
    check_model(expand(small, layers, **transplant)[0], options, corpus.meta)   # before training
    tokenizer = prepare.load_tokenizer(corpus.meta["tokenizer"])
    sizes = dict(pairs=pair_sizes(options), T=options.block_size)      # of what is scored
    if not options.recall_tokens:
        sizes |= recall.TEXT_ALONE
    recall.check_text(corpus.val, tokenizer, **sizes)
    lock = open_folder(options, processes)
    post = dict(seed=options.seed + 1, curriculum=0.0, lr=options.post_lr)     # new data
    phases = {name: replace(options, name=name, **post) for name in ARMS}
    phases["pretrained"] = replace(options, name="pretrained", steps=options.pretrain_steps)
    # an arm of your own is named in ARMS; here its options, such as phases["mine"].lr *= 2, and
    # its model in the last loop
    steps = 0
    for of_phase in phases.values():                # a run of other options is refused here
        _, held = held_run(of_phase, corpus.meta)
        steps += of_phase.steps - (held["step"] if held else 0)
    if options.overwrite and processes.first:       # stopped, it shall not end with the old ones
        for name in ("results.json", *(f"{arm}.pt" for arm in phases)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{options.out_dir}/{name}")
    print_banner(small, options, corpus, steps)

    def phase(lm, name):
        """Train lm, or go on where an earlier start of this recipe stopped. -> lm, its
        entry of results.json: what it cost and what it scores"""
        if name not in phases:
            raise BadInput(f"{name} is not among the ARMS of data/report.py; add it")
        of_phase = phases[name]
        held_lm, held = held_run(of_phase, corpus.meta)
        if held:
            same_start(of_phase, held, lm)
            lm = held_lm
        trained = train(lm, of_phase, corpus, held, processes=processes, stop=stop)
        with scoring(lm, of_phase):
            scores = recall.score(lm, corpus.val, tokenizer, **sizes)
        costs = {"params": sum(p.numel() for p in lm.parameters()),
                 "state_elements": lm.config.total_state(), "lr": of_phase.lr}
        return lm, costs | trained | scores             # val_loss is that of scores

    results = {}
    small, results["pretrained"] = phase(small, "pretrained")
    larger, report = expand(small, layers, **transplant)
    print(describe(report))
    for arm, lm in (("lpt", small), ("statex", larger)):
        _, results[arm] = phase(copy.deepcopy(lm), arm)     # training changes it
        results[arm]["tokens"] += results["pretrained"]["tokens"]
    results["config"] = recipe_of(options, corpus.meta)
    results["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__,
                           "numpy": np.__version__, "threads": torch.get_num_threads()}
    if processes.first:
        encoded = json.dumps(recall.without_nan(results), indent=1).encode()
        write_file(f"{options.out_dir}/results.json", lambda file: file.write(encoded))
        print_report(options.out_dir)
    del lock                                            # kept until here


def recipe_of(options, meta):
    """What a recipe is made of, as results.json has it: options and text."""
    return asdict(options) | {"overwrite": False, "corpus": meta}


def already_done(options, meta):
    """Whether out_dir holds the results of this very recipe, on this very text."""
    try:
        with open(f"{options.out_dir}/results.json") as f:
            config = json.load(f)["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not options.overwrite and config == recipe_of(options, meta)


# ---------------------------------------------------------------------------------------
# run as a script


# Of no use to one run.
RECIPE_ALONE = ("pretrain_steps", "every", "layers", "factor", "init", "post_lr")


def resolve(given):
    """The Options: defaults, then the preset, then what was typed. Raises BadInput."""
    check_choice(given)
    preset = given.get("preset")
    if given.get("ckpt") == "resume" and (preset or given.get("overwrite")):
        raise BadInput("--ckpt=resume goes on with a run as it is; --preset and --overwrite are "
                       "for a new one")
    if not given.get("ckpt"):
        preset = preset or f"recipe-{given.get('block', 'gla')}"
        if not preset.startswith("recipe-"):
            raise BadInput(f"--preset={preset} is of one run; add --ckpt=scratch, or the "
                           "checkpoint that it goes on from")
    options = Options(**PRESETS.get(preset, {}) | given)    # a block of your own has no preset
    if PRESETS.get(preset, {}).get("block", options.block) != options.block:
        raise BadInput(f"--preset={preset} is for another block than --block={options.block}; "
                       "take that one's preset, or no --block")
    of_recipe = [name for name in RECIPE_ALONE if name in given]
    if of_recipe and options.ckpt not in ("", "resume"):
        raise BadInput(f"--{of_recipe[0]} is for the recipe, and --ckpt asks for one run; "
                       "expand.py makes the checkpoint of an expanded model")
    if options.size and "block" in given and SIZES[options.size].block != options.block:
        raise BadInput(f"--size={options.size} is a {SIZES[options.size].block} model; take "
                       "another --size, or no --block")
    shaped = [name for name in SHAPE[1:] if name in given]
    if options.size and shaped:
        raise BadInput(f"--{shaped[0]} is part of the shape that --size={options.size} names; with "
                       "--size= a preset has none")
    idle = OTHERS.get(options.block, set()) & set(shaped)
    if options.ckpt in ("", "scratch") and idle:
        say(f"train.py: --{min(idle)} does nothing to a {options.block} model")
    if "name" in given and not options.ckpt:
        say("train.py: --name does nothing to the recipe, which has three checkpoints")
    shaped += [name for name in ("size", "block") if name in given]
    if shaped and options.ckpt not in ("", "scratch", "resume"):
        say(f"train.py: --{shaped[0]} is for a model from scratch; the one in {options.ckpt} keeps "
            "its shape")
    if not options.out_dir:
        options.out_dir = "out/run" if options.ckpt else f"out/recipe-{options.block}"
    options.device = pick_device(options.device)
    if options.ckpt == "resume":
        options = resumed(options, given)
    if options.device == "cpu" and "compile" not in given:
        options.compile = False             # a preset's, or that of a run begun on a GPU
    if "graph" not in given and (not options.cuda or "RANK" in os.environ or options.carry_state):
        options.graph = False               # likewise
    return options


def main(stop=None):
    presets = [textwrap.fill(" ".join([f"{name}:", *(f"{k}={v}" for k, v in preset.items())]), 90,
                             initial_indent="  ", subsequent_indent="      ",
                             break_on_hyphens=False) for name, preset in PRESETS.items()]
    options = resolve(command_line(Options, "\n".join([__doc__, "presets:", *presets])))
    if options.plot:
        return print_report(options.plot)
    processes, options.device = join(options.device)
    check(options, processes)
    try:
        if options.ckpt:
            one_run(options, processes, stop)
        else:
            recipe(options, processes, stop)
    except BrokenPipeError:                 # see run_script
        raise
    except OSError as e:
        raise BadInput(f"{e.filename or options.out_dir}: {e.strerror or e}; what was saved is "
                       "kept, and the same command goes on with it") from e
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise BadInput(f"out of memory on {options.device}; a smaller model, a larger "
                           "--accumulate or --checkpoint_activations takes less") from e
        if processes.size == 1:
            raise
        say(f"train.py: process {processes.rank} lost the others "
            f"({one_line(e, 120)}); they may have said why. If training had begun, go on with "
            "--ckpt=resume")
        os._exit(1)
    if processes.size > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)         # all is saved; a thread of torch's may abort an interpreter that ends


if __name__ == "__main__":
    stop_signals = Stop()
    stop_signals.listen()
    run_script(lambda: main(stop_signals))
