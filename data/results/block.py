"""One block of the evidence: one pre-trained model and every arm that goes on from it, on one GPU.

    python data/results/block.py --family=gla --seed=0 --dry-run         the plan
    python data/results/block.py --family=gla --seed=0                   run it
    python data/results/block.py --family=gla --seed=100 --phase=pilot   the learning rates
    python data/results/block.py --family=gla --seed=0 --phase=long      more post-training
    python data/results/block.py --family=gla --seed=0 --phase=zero      a larger state alone
    python data/results/block.py --family=gla --seed=0 --phase=gates     GLA's gates, faster
    python data/results/block.py --family=gla --seed=0 --phase=why       and `inherit`'s lead
    python data/results/block.py --family=gla --seed=0 --phase=long-fast and both for longer
    python data/results/block.py --family=mamba2 --seed=0 --phase=equal  all at one rate
    python data/results/block.py --family=gla --seed=0 --phase=ceiling   from scratch, at one rate

A small model is pre-trained on text, and each arm goes on from it with the same tokens in the
same order and schedule. Nothing made up is in training, but for a last short one that is there
for one score. The runs stand side by side on one GPU, --jobs at a time. When all that have to
be there are, every run is appended to --out as one line of JSON; a block that was killed or had
no time to end appends nothing. The arms' learning rates come from the pilot's lines, of models
that no block uses.

tables.py makes tables and figures of the lines. What is measured is said in README.md here.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.options import BadInput, command_line, one_line, option, pick_device, run_script

import concurrent.futures
import contextlib
import fcntl
import gc
import hashlib
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace

# Several processes compile at once: a few helpers each are enough. Read when torch is loaded.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")

import numpy as np
import torch

import train
from data import recall
from data.prepare import load_corpus, load_tokenizer
from data.results.tables import read_lines
from expand import expand
from model import load_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


# ----------------------------------------------------------------------------------------
# what is run


# The models: GLA 31.6M parameters, Mamba2 21.3M, with the tokenizer code4096.
SHAPES = {
    "gla": dict(block="gla", n_layer=8, d_model=512, d_mlp=0, n_head=16, conv_size=4),
    "mamba2": dict(block="mamba2", n_layer=12, d_model=512, headdim=64, d_state=16, conv_size=4,
                   tie_embeddings=True),
}
# 65,536 tokens per step: 105M tokens of pre-training, 33.6M of post-training.
STEP = dict(recall_tokens=0, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0,
            eval_interval=10**9)
PRE = STEP | dict(block_size=1024, batch_size=64, steps=1600, lr=4e-3, warmup=100)
POST = STEP | dict(block_size=4096, batch_size=16, steps=512, warmup=32)
# After it is scored, a core arm is trained on made-up recall for a short time, the same for all,
# for its score on that.
FINE_TUNE = STEP | dict(block_size=1024, batch_size=2, steps=200, lr=3e-3, warmup=20,
                        recall_tokens=16384, pairs="8,16,32,64,128", curriculum=0.5)
NEEDLES = (4096, 8192, 32768)       # tokens of context, to 8 times that of training
# The same with everything small: the way through, on a CPU.
TINY_SHAPES = {
    "gla": dict(SHAPES["gla"], n_layer=4, d_model=64),
    "mamba2": dict(SHAPES["mamba2"], n_layer=4, d_model=32, headdim=16, d_state=4),
}
TINY = dict(steps=3, batch_size=2, block_size=128, warmup=1)


@dataclass(frozen=True)
class Arm:
    """How a model goes on. The state of `layers` becomes `factor` times as large by `init`."""
    init: str = ""              # of expand.py; empty: nothing changes (LPT)
    layers: str = "all"         # see layers_of
    factor: int = 4             # 0: the family's own, as in the paper (see expand.py)
    more: dict = field(default_factory=dict)    # other arguments of expand; gates: see expanded
    start: str = "pre"          # the model that it goes on from
    length: float = 1.0         # post-training steps over the usual; 0: as many FLOPs as x16
    like: str = ""              # it takes this arm's learning rate; empty: its own
    rate: float = 1.0           # its learning rate over that one
    gates_rate: float = 1.0     # GLA's gates: their learning rate over the arm's
    core: bool = False          # a block without it is not whole
    family: str = ""            # the only one; empty: both


# In the order in which they are started. Those that are not core run if time is left.
ARMS = {
    "lpt": Arm(core=True),
    "preserve-x16": Arm("preserve", factor=16, core=True),
    "preserve-x4": Arm("preserve", core=True),
    "inherit": Arm("inherit", "last quarter", 0, core=True),
    "reinit": Arm("reinit", "last quarter", 0, core=True),
    # if time is left; first a quarter of the post-training
    "lpt-quarter": Arm(length=0.25, like="lpt"),
    "preserve-x16-quarter": Arm("preserve", factor=16, length=0.25, like="preserve-x16"),
    "lpt-half-rate": Arm(like="lpt", rate=0.5),
    "lpt-8x-rate": Arm(like="lpt", rate=8),
    "preserve-x4-later": Arm("preserve", "later half", like="preserve-x4"),
    "reinit-paper": Arm("reinit", "four", 0, {"paper": True}, like="reinit"),
    "ceiling-x4": Arm(start="pre-x4", like="lpt"),
    "reinit-same-state": Arm("reinit", "last quarter", 0, {"same_state": True}, like="reinit"),
    "preserve-x4-half": Arm("preserve", "every second", like="preserve-x4"),
    "groups-x4": Arm("groups", like="preserve-x4", family="mamba2"),
    "inherit-noise": Arm("inherit", "last quarter", 0, {"noise": 0.1}, like="inherit",
                         family="mamba2"),
    "lpt-equal-flops": Arm(length=0, like="lpt"),       # as many FLOPs as preserve-x16
    "reinit-keys": Arm("reinit-keys", "last quarter", 0, like="reinit"),
    "inherit-4x-rate": Arm("inherit", "last quarter", 0, like="inherit", rate=4, family="mamba2"),
}
# --phase=long: the control and `preserve`, for 100M tokens.
LONG_ARMS = {
    "lpt-long": Arm(length=3, like="lpt", core=True),
    "preserve-x16-long": Arm("preserve", factor=16, length=3, like="preserve-x16", core=True),
    "preserve-x4-long": Arm("preserve", length=3, like="preserve-x4", core=True),
    "lpt": ARMS["lpt"],
    "preserve-x16": ARMS["preserve-x16"],
    "preserve-x4": ARMS["preserve-x4"],
}
# --phase=gates: GLA's gates at higher learning rates.
GATES_ARMS = {
    "lpt": ARMS["lpt"],
    "preserve-x16": ARMS["preserve-x16"],
    "preserve-x16-gates-10x": Arm("preserve", factor=16, like="preserve-x16", gates_rate=10,
                                  core=True, family="gla"),
    "preserve-x16-gates-30x": Arm("preserve", factor=16, like="preserve-x16", gates_rate=30,
                                  core=True, family="gla"),
    "preserve-x16-gates-3x": Arm("preserve", factor=16, like="preserve-x16", gates_rate=3,
                                 core=True, family="gla"),
    "preserve-x4-gates-10x": Arm("preserve", like="preserve-x4", gates_rate=10, family="gla"),
    "inherit": replace(ARMS["inherit"], core=False),
}
# --phase=why: what makes GLA's `inherit` better than `preserve`. Its layers, rate and fast gates;
# and all heads' keys read in full from the start, as a merged head does, with a norm per head.
WHY_ARMS = {
    "lpt": ARMS["lpt"],
    "inherit": ARMS["inherit"],
    "preserve-x16-fast": Arm("preserve", factor=16, like="inherit", gates_rate=10, core=True,
                             family="gla"),
    "preserve-x16": replace(ARMS["preserve-x16"], core=False),
    "preserve-last-ones": Arm("preserve", "last quarter", 0, {"gates": 1.0}, like="inherit",
                              family="gla"),
    "preserve-last": Arm("preserve", "last quarter", 0, like="inherit", gates_rate=10,
                         family="gla"),
}
# --phase=long-fast: the same, and the control at their rate, for 100M tokens.
LONG_FAST_ARMS = {
    "lpt-fast-long": Arm(length=3, like="inherit", core=True),
    "preserve-x16-fast-long": Arm("preserve", factor=16, length=3, like="inherit", gates_rate=10,
                                  core=True, family="gla"),
    "inherit-long": Arm("inherit", "last quarter", 0, length=3, like="inherit", core=True),
}
# --phase=equal: Mamba2's `inherit` at `reinit`'s rate, and with noise, which breaks the tie.
EQUAL_ARMS = {
    "lpt": ARMS["lpt"],
    "reinit": ARMS["reinit"],
    "inherit-4x-rate": replace(ARMS["inherit-4x-rate"], core=True),
    "inherit-noise-4x-rate": Arm("inherit", "last quarter", 0, {"noise": 0.1}, like="inherit",
                                 rate=4, core=True, family="mamba2"),
}
# --phase=ceiling: a larger state from scratch, and what reaches for it, at 4 times the control's
# rate, which is that of GLA's `inherit` and of Mamba2's `preserve`.
CEILING_ARMS = {
    "lpt-4x-rate": Arm(like="lpt", rate=4, core=True),
    "ceiling-x4-4x-rate": Arm(start="pre-x4", like="lpt", rate=4, core=True),
    "preserve-x16-fast": WHY_ARMS["preserve-x16-fast"],
    "inherit": replace(ARMS["inherit"], core=False, family="gla"),
    "preserve-x4-fast": Arm("preserve", like="inherit", gates_rate=10, family="gla"),
    "preserve-x16": replace(ARMS["preserve-x16"], family="mamba2"),
    "preserve-x4": replace(ARMS["preserve-x4"], family="mamba2"),
}
PHASES = {"block": ARMS, "long": LONG_ARMS, "gates": GATES_ARMS, "why": WHY_ARMS,
          "long-fast": LONG_FAST_ARMS, "equal": EQUAL_ARMS, "ceiling": CEILING_ARMS}
# Pre-trained models; one that others need is started first.
STARTS = {"pre": 1, "pre-x4": 4}        # times the state

# --phase=pilot: each tuned arm tries these rates for half of the steps; where the best is at
# an end, one more beyond it. What there is no time for is left out.
RATES = (2e-3, 4e-3, 1e-3)
PILOT_LENGTH = 0.5
TUNED = [name for name, arm in ARMS.items() if not arm.like]
# Before there is a pilot.
DEFAULT_RATE = 2e-3


def layers_of(choice, n_layer):
    """The layers that a word of ARMS stands for."""
    chosen = {"all": range(n_layer),
              "every second": range(1, n_layer, 2),
              "later half": range(n_layer // 2, n_layer),
              "last quarter": range(n_layer - n_layer // 4, n_layer),
              "four": range(0, n_layer, n_layer // 4)}      # evenly spaced, as in the paper
    return list(chosen[choice])


@dataclass
class Options:
    family: str = option("gla", "gla or mamba2", choices=tuple(SHAPES))
    seed: int = option(0, "of the pre-trained model")
    phase: str = option("block", "which runs", choices=("zero", "pilot", *PHASES))
    data: str = option(f"{ROOT}/data/packages", "folder of token files, see data/prepare.py")
    out: str = option("", "file that the lines are appended to; empty: runs.jsonl here, of the "
                          "pilot and phase zero pilot.jsonl")
    pilot: str = option(f"{HERE}/pilot.jsonl", "the pilot's lines, for the learning rates")
    minutes: float = option(9.5, "after which nothing is waited for")
    optional_minutes: float = option(9.5, "for the runs that a block need not have, from the start")
    optional: str = option("", "which of the runs that a block need not have, in this order, such "
                               "as ceiling-x4,reinit-paper; empty: all")
    jobs: int = option(3, "runs side by side; one takes up to 28 GB")
    speed: float = option(1.2e6, "tokens per second of all runs together, for the prediction")
    device: str = option("", "cpu, cuda, cuda:1, ...; empty: the GPU if there is one")
    share: float = option(1.0, "of all steps, to try it in less time")
    tiny: bool = option(False, "the same with everything small, to try it on a CPU")
    dry_run: bool = option(False, "print the plan only")


# ----------------------------------------------------------------------------------------
# the plan


@dataclass(frozen=True)
class Job:
    """One run."""
    name: str
    arm: str                    # of ARMS, LONG_ARMS or STARTS
    phase: str
    training: dict              # options of train.py that are this run's own
    start: str = ""             # the job that it goes on from; empty: scratch
    expansion: dict | None = None       # arguments of expand
    core: bool = True
    own_rate: bool = True       # the arm's learning rate; False: LPT at that of another arm

    @property
    def tokens(self):
        t = self.training
        return t["steps"] * t["batch_size"] * t["block_size"]

    @property
    def fine_tuned(self):
        """Whether it is trained on made-up recall at last."""
        return self.phase == "block" and self.core and bool(self.start) and self.own_rate

    @property
    def tried(self):
        """Whether it is here for its learning rate only."""
        return self.phase == "pilot" and bool(self.start)


def plan(options):
    """The Jobs of a block, in the order in which they are started. Raises BadInput."""
    starts = [pre_job(name, options) for name in STARTS]
    if options.phase == "zero":
        return starts
    if options.phase == "pilot":
        if options.seed % 2 == 0:           # phase zero is in every second pilot
            starts = starts[:1]
        return starts + [arm_job(name, ARMS[name], lr, options, PILOT_LENGTH)
                         for lr in RATES for name in TUNED]
    arms = {name: arm for name, arm in PHASES[options.phase].items()
            if arm.family in ("", options.family)}
    families = {arm.family for arm in PHASES[options.phase].values() if arm.core and arm.family}
    if families and options.family not in families:
        raise BadInput(f"--phase={options.phase} is for --family={families.pop()}")
    if options.optional:
        arms = {name: arm for name, arm in arms.items() if arm.core} | named(options, arms)
    chosen = chosen_rates(options)
    rates = {name: arm.rate * chosen[arm.like or name] for name, arm in arms.items()}
    jobs = []
    for name, arm in arms.items():
        if arm.start not in {job.name for job in jobs}:
            jobs.append(pre_job(arm.start, options))
        jobs.append(arm_job(name, arm, rates[name], options))
    if options.phase in ("block", "why", "equal"):      # the control at the rate of every core arm
        others = {rates[name] for name, arm in arms.items() if arm.core} - {rates["lpt"]}
        at = next((i for i, job in enumerate(jobs) if not job.core and job.start), len(jobs))
        jobs[at:at] = [replace(arm_job("lpt", ARMS["lpt"], lr, options), own_rate=False)
                       for lr in sorted(others)]
    return jobs


def named(options, arms):
    """{name: arm} of --optional. Raises BadInput."""
    names = options.optional.split(",")
    for name in names:
        if name not in arms or arms[name].core:
            can = ", ".join(other for other, arm in arms.items() if not arm.core)
            raise BadInput(f"--optional={options.optional}: {name!r} is not one of {can or 'none'}")
    return {name: arms[name] for name in names}


def pre_job(name, options):
    """A model from scratch."""
    shape = dict((TINY_SHAPES if options.tiny else SHAPES)[options.family])
    if options.family == "gla":
        shape["n_head"] //= STARTS[name]
    else:
        shape["d_state"] *= STARTS[name]
    training = shape | PRE | dict(seed=options.seed) | (TINY if options.tiny else {})
    training["steps"] = max(1, round(training["steps"] * options.share))
    core = name == "pre" or options.phase in ("zero", "ceiling")
    return Job(name, name, options.phase, training, core=core)


def arm_job(name, arm, lr, options, length=None):
    """A run that goes on from a pre-trained model, with other text than that was trained on."""
    shape = (TINY_SHAPES if options.tiny else SHAPES)[options.family]
    training = POST | (TINY if options.tiny else {})
    length = options.share * (length or arm.length or equal_flops(options))
    training |= dict(steps=max(1, round(training["steps"] * length)), lr=lr,
                     seed=options.seed + 1000, gates_rate=arm.gates_rate)
    expansion = None
    if arm.init:
        expansion = dict(layers=layers_of(arm.layers, shape["n_layer"]), init=arm.init,
                         factor=arm.factor or None, seed=options.seed, **arm.more)
    core = arm.core and (options.phase != "pilot" or lr == RATES[0])
    return Job(f"{name}-lr{lr:g}", name, options.phase, training, arm.start, expansion, core)


def equal_flops(options):
    """Steps of LPT over those of preserve-x16 that cost as many FLOPs."""
    job = pre_job("pre", options)
    with torch.device("meta"):
        lm = random_model(job, options, "code4096", 4096)
        larger, _ = expand(lm, list(range(lm.config.n_layer)), 16)
    return train.flops_per_token(larger) / train.flops_per_token(lm)


def chosen_rates(options):
    """{tuned arm: learning rate}: the one with the lowest loss on held-out text, compared with
    the first of RATES on the pilot models of the family that tried both."""
    losses = {}
    for line in read_lines(os.path.abspath(options.pilot)):
        if line["family"] == options.family and line["phase"] == "pilot" and line["start"]:
            losses[line["arm"], line["lr"], line["seed"]] = line["loss"]
    rates = {}
    for name in TUNED:
        against = {}                    # rate: losses against that of the first rate
        for (arm, lr, seed), loss in losses.items():
            if arm == name and (name, RATES[0], seed) in losses:
                against.setdefault(lr, []).append(loss - losses[name, RATES[0], seed])
        means = {lr: sum(of_models) / len(of_models) for lr, of_models in against.items()}
        rates[name] = min(means, key=means.get, default=DEFAULT_RATE)
    return rates


def one_more(job, results, options):
    """The pilot's further Jobs after `job` has ended: beyond the end of the rates tried, where
    the best is there."""
    tried = {r["lr"]: r["loss"] for r in results if r["arm"] == job.arm and r["start"]}
    if len(tried) < len(RATES):
        return []
    best = min(tried, key=tried.get)
    further = {min(tried): best / 2, max(tried): best * 2}.get(best)
    return [arm_job(job.arm, ARMS[job.arm], further, options, PILOT_LENGTH)] if further else []


def print_plan(jobs, options):
    print(f"{'run':28s} {'goes on from':12s} {'layers':26s} {'lr':>6s} {'Mtokens':>8s}")
    for job in jobs:
        layers = job.expansion["layers"] if job.expansion else ""
        mark = "" if job.core else "  if time is left"
        print(f"{job.name:28s} {job.start:12s} {str(layers):26s} {job.training['lr']:6g} "
              f"{job.tokens / 1e6:8.1f}{mark}")
    for what, some in (("core", [job for job in jobs if job.core]), ("all", jobs)):
        tokens = sum(job.tokens for job in some)
        print(f"{what}: {len(some)} runs, {tokens / 1e6:.0f}M tokens, about "
              f"{predicted(some, options.speed):.0f} s at {options.speed:,.0f} tokens per second")


# To start a run, to score it; seconds of the GPU's time, nothing of what runs beside.
SECONDS_PER_RUN = 8
SECONDS_AT_START = 45


def predicted(jobs, speed):
    return SECONDS_AT_START + sum(job.tokens / speed + SECONDS_PER_RUN for job in jobs)


# ----------------------------------------------------------------------------------------
# one run, in a process of its own


def run_job(job, options, folder):
    """Train and score. Returns the run's line. Its output goes to folder/NAME/log.txt."""
    place = f"{folder}/{job.name}"
    os.makedirs(place, exist_ok=True)
    with (open(f"{place}/log.txt", "a") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            return train_and_score(job, options, folder, place)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            gc.collect()
            torch.cuda.empty_cache()        # the others need the room


def train_and_score(job, options, folder, place):
    corpus = load_corpus(options.data)
    training = train.Options(**job.training, ckpt="scratch", name="ckpt", out_dir=place,
                             data=options.data, device=options.device,
                             compile=options.device.startswith("cuda"))
    if job.start:
        lm, _ = load_checkpoint(f"{folder}/{job.start}/ckpt.pt")
        lm = expanded(lm, job.expansion)
    else:
        lm = train.new_model(training, corpus.meta)
    begin = time.time()
    trained = train.train(lm, training, corpus)
    seconds = time.time() - begin
    scores = score(lm, job, training, corpus, options)
    if job.fine_tuned:
        scores["mqar"] = fine_tune(lm, training, corpus, options)
    if job.start:
        os.remove(f"{place}/ckpt.pt")
    elements = lm.config.total_state()
    device = "cpu"
    if options.device.startswith("cuda"):
        device = torch.cuda.get_device_name(options.device)
    return {
        "family": options.family, "seed": options.seed, "phase": job.phase, "arm": job.arm,
        "lr": training.lr, "steps": training.steps, "tokens": trained["tokens"],
        "start": job.start, "expansion": job.expansion, "core": job.core,
        "own_rate": job.own_rate, **scores,
        "params": sum(p.numel() for p in lm.parameters()), "state_elements": elements,
        "state_bytes": 4 * elements, "flops": train.flops_per_token(lm) * trained["tokens"],
        "peak_mem_mib": trained["peak_mem_mib"], "tokens_per_s": trained["tokens_per_s"],
        "jobs": options.jobs, "seconds": round(seconds, 1),
        "scoring_seconds": round(time.time() - begin - seconds, 1),
        "gates_rate": training.gates_rate, "corpus": corpus.meta.get("sha256"),
        "code": code_version(), "torch": torch.__version__, "device": device}


def code_version():
    """A name for the code that a run was made by, whatever is committed: equal code, equal name."""
    code = hashlib.sha256()
    for name in ("kernels.py", "model.py", "expand.py", "train.py", "data/recall.py"):
        with open(f"{ROOT}/{name}", "rb") as f:
            code.update(f.read())
    return code.hexdigest()[:12]


def expanded(lm, expansion):
    """lm after a Job's expansion, None for none. Its `gates` is what GLA's gates start at, where
    that is not the identity."""
    if not expansion:
        return lm
    arguments = dict(expansion)
    gates = arguments.pop("gates", None)
    lm, _ = expand(lm, **arguments)
    if gates is not None:
        for i in arguments["layers"]:
            torch.nn.init.constant_(lm.layers[i].attn.gates, gates)
    return lm


def score(lm, job, training, corpus, options):
    """The measures of one run (see README.md), on held-out text. Pre-trained models have the
    repeats also in windows as long as they were trained on."""
    tokens, text, meta = corpus
    tokenizer = load_tokenizer(meta["tokenizer"])
    counts = recall.bigram_counts(options.data, tokens, meta)
    lengths = NEEDLES
    T = POST["block_size"]
    windows = 512
    sequences = 16
    if options.tiny:
        T, lengths, windows, sequences = 256, (128, 256), 8, 2
    if job.tried:
        windows = min(windows, 256)
    with train.scoring(lm, training):
        repeats = recall.rare_repeats(lm, text, counts, tokenizer.eot_token, T, windows)
        result = {"loss": mean_loss(repeats), "rare_repeats": repeats}
        if job.tried:
            return result
        if not job.start:
            short = training.block_size
            result["rare_repeats_short"] = recall.rare_repeats(
                lm, text, counts, tokenizer.eot_token, short, windows)
        result["icl_score"] = recall.text_loss(lm, text, T, 8 * sequences)[2]
        result["needle_gain"] = {
            str(length): recall.needle_gain(lm, text, tokenizer, length, sequences)
            for length in lengths}
    return recall.without_nan(result)


def fine_tune(lm, training, corpus, options):
    """Train lm on made-up recall for a short time. -> {pairs of a sequence: share recalled}"""
    changes = FINE_TUNE | (TINY | dict(recall_tokens=64, pairs="2,4") if options.tiny else {})
    training = replace(training, **changes, name="fine-tuned", compile=False)
    train.train(lm, training, corpus)
    os.remove(f"{training.out_dir}/fine-tuned.pt")
    shares = {}
    with train.scoring(lm, training):
        for pairs in train.pair_sizes(training):
            rng = np.random.default_rng(pairs)
            idx, targets = recall.mqar(rng, 256, pairs, lm.config.vocab_size)
            shares[str(pairs)] = recall.answered(lm, idx, targets).mean().item()
    return shares


def mean_loss(repeats):
    """Of all tokens, from a result of rare_repeats."""
    parts = [repeats["groups"][name] for name in ("repeats", "other")
             if name in repeats["groups"]]
    total = sum(part["tokens"] for part in parts)
    return sum(part["tokens"] * part["loss"] for part in parts) / total


def layer_kinds(job, options):
    """The shapes of state in a job's model: layers alike in them are compiled once."""
    with torch.device("meta"):
        lm = random_model(job, options, "code4096", 4096)
    config = lm.config
    shapes = zip(config.n_head, config.n_key_head, config.d_state, strict=True)
    return {(*shape, config.n_groups) for shape in shapes}


def random_model(job, options, tokenizer, vocab_size):
    """A model of the job's shape, with random weights."""
    shape = train.Options(**pre_job("pre", options).training)
    lm = train.new_model(shape, {"vocab_size": vocab_size, "tokenizer": tokenizer})
    return expanded(lm, job.expansion)


def warm(job, options, folder):
    """Compile what a later job needs, with random weights and little text: two steps."""
    training = dict(job.training, steps=2, warmup=1)
    corpus = load_corpus(options.data)
    short = corpus._replace(val=corpus.val[:job.training["block_size"] + 1])
    place = f"{folder}/warm-{job.name}"
    os.makedirs(place, exist_ok=True)
    training = train.Options(**training, name="ckpt", out_dir=place, data=options.data,
                             device=options.device, compile=options.device.startswith("cuda"))
    lm = random_model(job, options, corpus.meta["tokenizer"], corpus.meta["vocab_size"])
    with (open(f"{place}/log.txt", "w") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        train.train(lm, training, short)
    if job.fine_tuned:                  # each length of recall sequences has kernels of its own
        rng = np.random.default_rng(0)
        for pairs in map(int, FINE_TUNE["pairs"].split(",")):
            idx, targets = map(torch.from_numpy, recall.mqar(rng, 2, pairs, lm.config.vocab_size))
            with train.precision(training), torch.compiler.set_stance("force_eager"):
                lm(idx.to(options.device), targets.to(options.device))[1].backward()
    del lm
    shutil.rmtree(place)
    gc.collect()
    torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------
# all runs, side by side


class Block:
    """The runs of one block: which wait, which are under way, what came of them."""

    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.begin = time.time()
        self.began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self.waiting = plan(options)
        self.running = {}               # future: job
        self.results = []
        self.failed = []                # names of those tried once in vain
        self.done = set()               # names
        self.trained = 0                # tokens

    def seconds(self):
        return time.time() - self.begin

    def seconds_left(self):
        return 60 * self.options.minutes - self.seconds()

    def run(self):
        """Run all there is time for. -> whether every core run has ended."""
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
                self.options.jobs, context, torch.set_num_threads, (1,)) as pool:
            try:
                return self.run_in(pool)
            finally:
                if self.running:                # out of time
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in multiprocessing.active_children():
                        process.kill()

    def run_in(self, pool):
        core = [job for job in self.waiting if job.core]
        self.start_jobs(pool)
        if self.options.device.startswith("cuda"):
            self.start_warming(pool)
        while self.running and self.seconds_left() > 0:
            ended, _ = concurrent.futures.wait(
                self.running, max(0, self.seconds_left()), concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                job = self.running.pop(future)
                if job is not None and not self.end_job(job, future):
                    return False
            self.start_jobs(pool)
        return all(job.name in self.done for job in core)

    def start_jobs(self, pool):
        """As many as there is room for: the first that are ready. What need not be there
        begins when all else is under way, and if it ends in time."""
        while len(self.running) < self.options.jobs:
            core_waits = any(job.core for job in self.waiting)
            ready = [job for job in self.waiting if not job.start or job.start in self.done]
            ready = [job for job in ready if job.core or not core_waits and self.fits(job)]
            if not ready:
                return
            job = ready[0]
            self.waiting.remove(job)
            self.running[pool.submit(run_job, job, self.options, self.folder)] = job

    def fits(self, job):
        """Whether a run that need not be there would end in time, at the speed so far, with as
        many beside it."""
        speed = self.trained / self.seconds() if self.trained else self.options.speed
        under_way = [other for other in self.running.values() if other is not None]
        alone = job.tokens * (1 + len(under_way)) / speed
        minutes = min(self.options.minutes, self.options.optional_minutes)
        return alone + 4 * SECONDS_PER_RUN < 60 * minutes - self.seconds()

    def start_warming(self, pool):
        """While models are pre-trained, the free processes compile what comes next: jobs that
        have every kind of layer between them."""
        compiled = set()
        for job in self.waiting:
            kinds = layer_kinds(job, self.options) if job.start == "pre" else set()
            if kinds - compiled:
                compiled |= kinds
                self.running[pool.submit(warm, job, self.options, self.folder)] = None

    def end_job(self, job, future):
        """Note the result. A run that failed is tried once more. -> whether to go on."""
        try:
            line = future.result()
        except Exception as e:
            say(f"{self.seconds():4.0f} s  {job.name}: {type(e).__name__}: "
                f"{one_line(e, 300)}; see {self.folder}/{job.name}/log.txt")
            if job.name in self.failed:
                return not job.core
            self.failed.append(job.name)
            self.waiting.insert(0, job)
            return True
        self.results.append({"began": self.began, **line})
        self.done.add(job.name)
        self.trained += job.tokens
        repeats = line["rare_repeats"]["groups"].get("repeats", {"loss": float("nan")})
        say(f"{self.seconds():4.0f} s  {job.name:28s} loss {line['loss']:.4f}  rare repeats "
            f"{repeats['loss']:.4f}  {line['tokens_per_s']:,} tokens/s  {line['seconds']:.0f} + "
            f"{line['scoring_seconds']:.0f} s  {line['peak_mem_mib']:,} MiB")
        if job.tried:
            self.waiting += one_more(job, self.results, self.options)
        return True


def say(line):
    print(line, flush=True)


def append(path, lines):
    """All lines at the end of the file, or none: in one write, while no other block writes."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        with open(path, "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror}") from e


def main():
    options = Options(**command_line(Options, __doc__))
    if not options.jobs or not options.minutes or not options.speed:
        raise BadInput("--jobs, --minutes and --speed must be above 0")
    if options.dry_run:
        return print_plan(plan(options), options)
    options.device = pick_device(options.device)
    name = "pilot" if options.phase in ("zero", "pilot") else "runs"
    if options.tiny and not options.out:
        raise BadInput("--tiny makes no results to keep: name a file of your own with --out")
    options.out = options.out or f"{HERE}/{name}.jsonl"
    if os.path.isdir(options.out) or not os.path.isdir(os.path.dirname(options.out) or "."):
        raise BadInput(f"--out={options.out}; expected a file in a folder that is there")
    tokens, _, meta = load_corpus(options.data)
    load_tokenizer(meta["tokenizer"])
    folder = tempfile.mkdtemp(prefix=f"block-{options.family}-{options.seed}-")
    say(f"{options.family} seed {options.seed}, {options.phase}, on {options.device}; logs in "
        f"{folder}")
    block = Block(options, folder)
    # What the runs' scores need is counted once, while the first of them train.
    threading.Thread(target=recall.bigram_counts, args=(options.data, tokens, meta)).start()
    whole = block.run()
    if not whole:
        raise BadInput(f"the block is not whole after {block.seconds():.0f} s and nothing is "
                       f"appended; logs are in {folder}; take more --minutes or fewer arms")
    append(options.out, block.results)
    say(f"{block.seconds():4.0f} s  {len(block.results)} runs appended to {options.out}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
