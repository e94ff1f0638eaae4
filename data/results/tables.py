"""The tables of README.md here, and the figures, from the runs: one run per line of *.jsonl.

    python data/results/tables.py            write the tables into README.md, and the figures
    python data/results/tables.py --check    say only whether both are in step with the runs

    runs.jsonl          natural text: the blocks that block.py made
    larger.jsonl        natural text, one step up (`run.sh larger`)
    pilot.jsonl         the models that the learning rates were chosen on
    pilot-later.jsonl   one more model of each family, after the blocks, with all rates
    recipe.jsonl        the recipe: results.json of train.py, with seed, threads and machine
    recipe-inits.jsonl  the recipe with other transplants, of an earlier version
    mixture.jsonl       25M parameters, half of the training made-up recall, of an earlier version

Statistics: the pre-trained model is the unit. A difference is that of two arms that went on
from the same model; +- is half of the 95 % interval by Student's t over models.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from data.options import BadInput, command_line, option, run_script, write_file

import hashlib
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass

from data.report import interval, t_within

HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = {"gla": "GLA", "mamba2": "Mamba2"}
PRIMARY = "preserve-x16"
FAST = "preserve-x16-fast"       # the same at `inherit`'s rate, with gates ten times as fast
BEST_RATE = 4e-3        # LPT's, by its loss on rare repeats, of those that all blocks ran


# ----------------------------------------------------------------------------------------
# statistics


def p_value(values):
    """Of the mean being 0, two-sided; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    if not error:
        return 0.0 if statistics.mean(values) else 1.0
    return 1 - t_within(abs(statistics.mean(values)) / error, len(values) - 1)


def holm(p_values):
    """{name: p} -> {name: p corrected for all being looked at, by Holm's method}."""
    corrected = {}
    largest = 0.0
    in_order = sorted(p_values, key=p_values.get)
    for i, name in enumerate(in_order):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return corrected


def cell(values, form="{:+.4f}"):
    """Mean and half interval as text; empty without values."""
    if not values:
        return ""
    mean, half = interval(values)
    text = form.format(mean)
    if not math.isnan(half):
        text += " ± " + form.replace("+", "").format(half)
    return text


# ----------------------------------------------------------------------------------------
# runs


@dataclass
class Model:
    """One pre-trained model and the runs that went on from it."""
    family: str
    seed: int
    phase: str
    lines: list

    def get(self, arm, lr=None):
        """The run of an arm at its own learning rate, or at `lr`; None where there is none."""
        for line in self.lines:
            wanted = line["own_rate"] if lr is None else line["lr"] == lr
            if line["arm"] == arm and wanted:
                return line
        return None


def read_lines(name):
    """The runs in a file: its path, or its name in this folder; [] without such a file."""
    try:
        with open(os.path.join(HERE, name)) as f:
            return [json.loads(line) for line in f if line.strip()]
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise BadInput(f"{name} is not one JSON object per line: {e}") from e


def models(name, phases=("block",)):
    """{family: [Model]} of a file's runs, in the order of their seeds."""
    found = {}
    for line in read_lines(name):
        if line["phase"] in phases:
            key = (line["family"], line["seed"], line["phase"], line["began"])
            found.setdefault(key, []).append(line)
    result = {family: [] for family in FAMILIES}
    for (family, seed, phase, _), lines in sorted(found.items()):
        result[family].append(Model(family, seed, phase, lines))
    return result


def group(name, measure):
    """A measure of rare_repeats, as a function of a run's line."""
    return lambda line: line["rare_repeats"]["groups"][name][measure]


def needle(length):
    return lambda line: line["needle_gain"][length]["gain"]


repeats_loss = group("repeats", "loss")
other_loss = group("other", "loss")


def differences(some, arm, measure, control="lpt", rate=None):
    """What an arm has more than the control, one number per model that has both. rate: the
    control's learning rate, or "same" for the arm's; None: the control's own."""
    result = []
    for model in some:
        line = model.get(arm)
        other = line and model.get(control, line["lr"] if rate == "same" else rate)
        if other:
            result.append(measure(line) - measure(other))
    return result


def best_control(model):
    """The lowest loss on rare repeats of a model's LPTs: of any rate, or for equal FLOPs."""
    return min(repeats_loss(line) for line in model.lines if line["arm"].startswith("lpt"))


def lines_of(some, arm):
    """The runs of an arm, of the models that have one."""
    return [line for line in (model.get(arm) for model in some) if line]


def values(some, arm, measure):
    return [measure(line) for line in lines_of(some, arm)]


def arms_of(some, start="pre"):
    """The arms of these models that go on from `start`, in the tables' order, without LPT."""
    found = dict.fromkeys(line["arm"] for model in some for line in model.lines
                          if line["start"] == start and line["arm"] != "lpt")
    order = ["preserve-x16", "preserve-x4", "preserve-x4-half", "preserve-x4-later", "inherit",
             "inherit-noise", "reinit", "reinit-keys", "reinit-same-state", "reinit-paper",
             "groups-x4", "lpt-equal-flops"]
    others = [arm for arm in found if arm not in order and not arm.endswith(("-quarter", "-long"))]
    return [arm for arm in order if arm in found] + others


# ----------------------------------------------------------------------------------------
# tables of natural text


def markdown(head, rows):
    """A table as text; empty without rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(str(entry) for entry in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def each_family(make, name="runs.jsonl", phases=("block",)):
    """make(name of a family, its models) for each family that has models."""
    parts = [make(FAMILIES[family], some) for family, some in models(name, phases).items() if some]
    return "\n\n".join(filter(None, parts))


def summary_table():
    """The main differences to LPT on rare repeats, families side by side."""
    blocks = models("runs.jsonl")
    fast = models("runs.jsonl", ("why",))
    long = models("runs.jsonl", ("long",))
    # row, of which models, arm, measure, the control (None: each model's best) and its rate
    entries = (
        ("x16, LPT at 1e-3: the primary comparison", blocks, PRIMARY, repeats_loss, "lpt", None),
        ("x16, LPT at 4e-3", blocks, PRIMARY, repeats_loss, "lpt", BEST_RATE),
        ("x16, the LPT of each model that reads rare repeats best", blocks, PRIMARY, repeats_loss,
         None, None),
        ("x16, LPT at 1e-3, all text but rare repeats", blocks, PRIMARY, other_loss, "lpt", None),
        ("x16, LPT at 4e-3, all text but rare repeats", blocks, PRIMARY, other_loss, "lpt",
         BEST_RATE),
        ("x16, LPT at 1e-3, both for three times as long", long, f"{PRIMARY}-long", repeats_loss,
         "lpt-long", None),
        ("x16 at 4e-3 with gates ten times as fast, LPT at 4e-3", fast, FAST, repeats_loss, "lpt",
         BEST_RATE),
        ("the same, both for three times as long", models("runs.jsonl", ("long-fast",)),
         f"{FAST}-long", repeats_loss, "lpt-fast-long", None),
        ("x4, LPT at 4e-3", blocks, "preserve-x4", repeats_loss, "lpt", BEST_RATE),
        ("inherit, LPT at the same rate", blocks, "inherit", repeats_loss, "lpt", "same"),
        ("reinit, LPT at the same rate", blocks, "reinit", repeats_loss, "lpt", "same"))
    rows = []
    for label, some, arm, measure, control, rate in entries:
        cells = []
        for family in FAMILIES:
            if control:
                more = differences(some[family], arm, measure, control, rate)
            else:
                more = [measure(model.get(arm)) - best_control(model) for model in some[family]]
            text = cell(more, "{:+.3f}") if len(more) != 2 else "{:+.3f}, {:+.3f}".format(*more)
            cells.append(f"{text} ({len(more)})" if more else "not run")
        rows.append([label, *cells])
    return markdown(["arm minus LPT, nats (models)", *FAMILIES.values()], rows)


def near_right(some, arm, lr=None):
    """How often an arm's likeliest token is right on near repeats, mean over models, as text."""
    lines = [line for line in (model.get(arm, lr) for model in some) if line]
    shares = map(group("near", "accuracy"), lines)
    return f"{100 * statistics.mean(shares):.1f} %" if lines else ""


def primary_table():
    """The primary comparison of both families, corrected for there being two."""
    blocks = models("runs.jsonl")
    found = {family: differences(some, PRIMARY, repeats_loss) for family, some in blocks.items()}
    p_values = {family: p_value(more) for family, more in found.items() if more}
    corrected = holm(p_values)
    rows = []
    for family, p in p_values.items():
        more = found[family]
        lpt = values(blocks[family], "lpt", repeats_loss)
        fairer = differences(blocks[family], PRIMARY, repeats_loss, rate=BEST_RATE)
        right = [near_right(blocks[family], arm, lr)
                 for arm, lr in (("lpt", None), ("lpt", BEST_RATE), (PRIMARY, None))]
        rows.append([FAMILIES[family], len(more), cell(lpt, "{:.4f}"), cell(more), f"{p:.1g}",
                     f"{corrected[family]:.1g}", f"{sum(x < 0 for x in more)} of {len(more)}",
                     cell(fairer), *right])
    if not rows:
        return ""
    table = markdown(["family", "models", "LPT, nats", f"{PRIMARY} - LPT", "p", "p, Holm",
                      "lower than LPT", f"{PRIMARY} - LPT at {BEST_RATE:g}",
                      "near repeats right: LPT", f"LPT at {BEST_RATE:g}", PRIMARY], rows)
    return f"{table}\n\n![Rare repeats, arm minus LPT, by post-training tokens](differences.png)"


MEASURES = {
    "everything else": other_loss,
    "as rare, new": group("new", "loss"),
    "near repeats right": group("near", "accuracy"),
    "in-context score": lambda line: line["icl_score"],
}


def arm_row(some, arm):
    first = lines_of(some, arm)[0]
    state = first["state_elements"] / some[0].get("lpt")["state_elements"]
    repeats = [differences(some, arm, repeats_loss, rate=rate)
               for rate in (None, "same", BEST_RATE)]
    others = [differences(some, arm, measure) for measure in MEASURES.values()]
    return [arm, f"{state:.2f}", f"{first['lr']:g}", *map(cell, repeats + others), len(repeats[0])]


def arms_table():
    """Every arm's differences to LPT."""
    def of_family(family, some):
        head = [f"{family}, more than LPT", "state x", "lr", "rare repeats, loss",
                "LPT at the arm's lr", f"LPT at {BEST_RATE:g}", *MEASURES, "models"]
        return markdown(head, [arm_row(some, arm) for arm in arms_of(some)])
    return each_family(of_family)


def levels_table():
    """The losses themselves, by distance, and what a model costs."""
    def of_family(family, some):
        rows = []
        for arm in ("pre", "lpt", *arms_of(some), "ceiling-x4"):
            lines = lines_of(some, arm)
            if not lines:
                continue
            cells = [f"{statistics.mean(values(some, arm, group(name, 'loss'))):.4f}"
                     for name in ("repeats", "near", "middle", "far", "new", "other")]
            rows.append([arm, f"{lines[0]['params'] / 1e6:.2f}", f"{lines[0]['state_bytes']:,}",
                         f"{lines[0]['flops'] / 1e15:.1f}",
                         f"{max(line['peak_mem_mib'] for line in lines) / 1024:.1f}", *cells])
        head = [f"{family}, loss", "M parameters", "state bytes", "PFLOPs", "peak GiB",
                "repeats", "under 512 ago", "512 to 2047", "2048 or more", "as rare, new",
                "everything else"]
        return markdown(head, rows)
    return each_family(of_family)


def gap_rows(some, arms, control, ceiling):
    """How far arms go from LPT to a model that had four times the state from the start."""
    rows = []
    for arm in arms:
        found = [[model.get(name) for name in (control, arm, ceiling)] for model in some]
        losses = [list(map(repeats_loss, lines)) for lines in found if all(lines)]
        if losses:
            rows.append([arm, cell([most - lpt for lpt, _, most in losses]),
                         cell([reached - lpt for lpt, reached, _ in losses]),
                         cell([(lpt - reached) / (lpt - most) for lpt, reached, most in losses],
                              "{:.2f}"), len(losses)])
    return rows


GAP_HEAD = ["ceiling - LPT, nats", "arm - LPT", "share of the way", "models"]


def gap_table():
    """Of the blocks: the ceiling at LPT's rate, the arms at their own."""
    arms = ("preserve-x4", "preserve-x4-half", "preserve-x4-later", PRIMARY, "inherit")
    return each_family(lambda family, some: markdown(
        [family, *GAP_HEAD], gap_rows(some, arms, "lpt", "ceiling-x4")))


def ceiling_table():
    """Where all are trained at one rate, GLA's gates at ten times that."""
    arms = (FAST, "preserve-x4-fast", PRIMARY, "preserve-x4", "inherit")
    return each_family(lambda family, some: markdown(
        [f"{family}, all at {BEST_RATE:g}", *GAP_HEAD],
        gap_rows(some, arms, "lpt-4x-rate", "ceiling-x4-4x-rate")), phases=("ceiling",))


def needle_table():
    """Needle gain by the length of the context."""
    def of_family(family, some):
        lengths = list(some[0].get("lpt")["needle_gain"])
        rows = [[arm, *(cell(values(some, arm, needle(n)), "{:.3f}") for n in lengths)]
                for arm in ("pre", "lpt", *arms_of(some))]
        head = [f"{family}, nats per digit", *(f"{int(n):,} tokens" for n in lengths)]
        return markdown(head, rows)
    return each_family(of_family)


def gates_table():
    """GLA's gates at higher learning rates than the rest of the model."""
    some = models("runs.jsonl", ("gates",))["gla"]
    rows = []
    for arm in (PRIMARY, *(f"{PRIMARY}-gates-{times}x" for times in (3, 10, 30))):
        more = [differences(some, arm, measure, control) if arm != control else []
                for control in ("lpt", PRIMARY) for measure in (repeats_loss, other_loss)]
        rows.append([arm, *map(cell, more), len(some)])
    head = ["GLA", "rare repeats, more than LPT", "everything else",
            f"rare repeats, more than {PRIMARY}", "everything else", "models"]
    return markdown(head, rows) if some else ""


def why_table():
    """What GLA's `inherit` has that `preserve` has not: every model's own numbers."""
    some = [model for model in models("runs.jsonl", ("why",))["gla"] if not model.get(FAST)]
    rows = []
    for arm in arms_of(some):
        lines = lines_of(some, arm)
        more = [differences(some, arm, repeats_loss), differences(some, arm, other_loss),
                differences(some, arm, repeats_loss, "inherit") if arm != "inherit" else []]
        rows.append([arm, len(lines[0]["expansion"]["layers"]), f"{lines[0]['lr']:g}",
                     *(", ".join(f"{value:+.3f}" for value in column) for column in more)])
    head = ["GLA, by model", "layers", "lr", "rare repeats, more than LPT", "everything else",
            "rare repeats, more than inherit"]
    return markdown(head, rows)


def compared(title, some, arms, columns):
    """A row per arm of what it has more than others. columns: (label, measure, control, rate),
    see differences."""
    rows = [[arm, *(cell(differences(some, arm, measure, control, rate)) if arm != control else ""
                    for _, measure, control, rate in columns), len(some)] for arm in arms]
    return markdown([title, *(label for label, *_ in columns), "models"], rows) if some else ""


def fast_table():
    """`preserve` at `inherit`'s learning rate and with fast gates, beside `inherit` and LPT."""
    some = [model for model in models("runs.jsonl", ("why",))["gla"] if model.get(FAST)]
    return compared("GLA, at 4e-3", some, ("inherit", FAST), [
        ("rare repeats, more than LPT", repeats_loss, "lpt", None),
        ("than LPT at 4e-3", repeats_loss, "lpt", "same"),
        ("everything else, than LPT", other_loss, "lpt", None),
        ("than LPT at 4e-3", other_loss, "lpt", "same"),
        ("from 2,048 tokens ago or more, than LPT at 4e-3", group("far", "loss"), "lpt", "same"),
        ("rare repeats, than inherit", repeats_loss, "inherit", None),
        ("everything else, than inherit", other_loss, "inherit", None)])


def long_fast_table():
    """The same after 100M tokens."""
    some = models("runs.jsonl", ("long-fast",))["gla"]
    lpt, inherit = "lpt-fast-long", "inherit-long"
    return compared("GLA, at 4e-3, 100.7M tokens", some, (inherit, f"{FAST}-long"), [
        ("rare repeats, more than LPT", repeats_loss, lpt, None),
        ("everything else", other_loss, lpt, None),
        ("from 2,048 tokens ago or more", group("far", "loss"), lpt, None),
        ("in-context score", MEASURES["in-context score"], lpt, None),
        ("rare repeats, than inherit", repeats_loss, inherit, None),
        ("everything else, than inherit", other_loss, inherit, None)])


def equal_table():
    """Mamba2's `inherit`, with and without noise, at `reinit`'s learning rate."""
    some = models("runs.jsonl", ("equal",))["mamba2"]
    inherit = "inherit-4x-rate"
    return compared("Mamba2, at 4e-3", some, (inherit, "inherit-noise-4x-rate", "reinit"), [
        ("rare repeats, more than LPT", repeats_loss, "lpt", "same"),
        ("everything else", other_loss, "lpt", "same"),
        ("in-context score", MEASURES["in-context score"], "lpt", "same"),
        ("rare repeats, than inherit", repeats_loss, inherit, None),
        ("everything else, than inherit", other_loss, inherit, None)])


def fine_tuned_table():
    """Made-up recall after the same short fine-tuning of every core arm: LPT, and what the
    others have more."""
    def of_family(family, some):
        some = [model for model in some if "mqar" in model.get("lpt")]
        if not some:
            return ""
        sizes = list(some[0].get("lpt")["mqar"])
        measures = [lambda line, size=size: line["mqar"][size] for size in sizes]
        rows = [["lpt", *(cell(values(some, "lpt", measure), "{:.3f}") for measure in measures)]]
        rows += [[arm, *(cell(differences(some, arm, measure), "{:+.3f}") for measure in measures)]
                 for arm in arms_of(some)
                 if all("mqar" in (model.get(arm) or {}) for model in some)]
        return markdown([f"{family}, {len(some)} models, share recalled",
                         *(f"of {n} pairs" for n in sizes)], rows)
    return each_family(of_family)


def by_tokens(family):
    """[(post-training tokens, differences of PRIMARY to LPT of as many tokens)]."""
    result = []
    for name, phases in (("-quarter", ("block",)), ("", ("block", "long")), ("-long", ("long",))):
        some = models("runs.jsonl", phases)[family]
        more = differences(some, PRIMARY + name, repeats_loss, "lpt" + name)
        if more:
            result.append((lines_of(some, "lpt" + name)[0]["tokens"], more))
    return result


def tokens_table():
    """`preserve` after less and more post-training of the same models."""
    rows = []
    for family, arm in itertools.product(FAMILIES, (PRIMARY, "preserve-x4")):
        for few, many, phase in (("-quarter", "", "block"), ("", "-long", "long")):
            some = models("runs.jsonl", (phase,))[family]
            some = [model for model in some if model.get(arm + few) and model.get(arm + many)]
            if not some:
                continue
            less, more = (differences(some, arm + length, repeats_loss, "lpt" + length)
                          for length in (few, many))
            others = differences(some, arm + many, other_loss, "lpt" + many)
            tokens = " to ".join(f"{some[0].get(arm + length)['tokens'] / 1e6:.1f}"
                                 for length in (few, many))
            growth = [y - x for x, y in zip(less, more, strict=True)]
            rows.append([f"{FAMILIES[family]}, {arm}", tokens, cell(less), cell(more), cell(growth),
                         cell(others), len(some)])
    head = ["more than LPT after as many tokens", "millions", "rare repeats, after fewer",
            "after more", "growth", "everything else, after more", "models"]
    if not rows:
        return ""
    return f"{markdown(head, rows)}\n\n![The same, by state bytes and FLOPs](costs.png)"


def larger_table():
    """One step up: a single model of each family, so that there are no intervals."""
    rows = []
    for line in read_lines("larger.jsonl"):
        cells = [""] * (1 + len(MEASURES))
        if "rare_repeats" in line:
            cells = [f"{measure(line):.4f}" for measure in (repeats_loss, *MEASURES.values())]
        rows.append([FAMILIES[line["family"]], f"{line['params'] / 1e6:.0f}",
                     f"{line['pretraining_tokens'] / 1e6:.0f}", line["arm"], f"{line['lr']:g}",
                     f"{line['state_elements']:,}", f"{line['loss']:.4f}", *cells])
    head = ["", "M parameters", "M tokens before", "arm", "lr", "state elements",
            "loss on all text", "rare repeats", *MEASURES]
    return markdown(head, rows)


def verdict(more, against=0.0):
    """What an interval says of a claim that the differences are below `against`."""
    if len(more) < 2:
        return "open: no interval"
    mean, half = interval(more)
    if mean + half < against:
        return "confirmed"
    return "refuted" if mean - half > against else "open"


def claims_table():
    """The paper's claims, by its own transplant and by ours."""
    def of_family(family, some):
        equal = models("runs.jsonl", ("equal",))[some[0].family]
        lpt_other = statistics.mean(values(some, "lpt", other_loss))
        gain = -statistics.mean(differences(some, "preserve-x4", repeats_loss) or [0.0])
        cases = [
            (f"{claim}: {arm} - lpt", arm, measure, "lpt", against)
            for claim, measure, against in (
                ("recall up, rare repeats", repeats_loss, 0.0),
                ("in-context learning up", MEASURES["in-context score"], 0.0),
                ("text at most 1 % worse, everything else", other_loss, 0.01 * lpt_other))
            for arm in ("reinit", PRIMARY)]
        cases.append(("reinit better than inherit, rare repeats, each at its rate",
                      "reinit", repeats_loss, "inherit", 0.0))
        cases += [(f"{claim}, all at {BEST_RATE:g}", "reinit", repeats_loss, arm, 0.0)
                  for claim, arm in (("the same", "inherit-4x-rate"),
                                     ("than inherit with noise", "inherit-noise-4x-rate"))]
        cases += [("few layers enough, at most a tenth of the gain less: "
                   f"{arm} - preserve-x4", arm, repeats_loss, "preserve-x4", 0.1 * gain)
                  for arm in ("preserve-x4-half", "preserve-x4-later")]
        rows = []
        for claim, arm, measure, control, against in cases:
            of = equal if control.endswith("4x-rate") else some
            more = differences(of, arm, measure, control)
            fairer = differences(some, arm, measure, "lpt", BEST_RATE) if control == "lpt" else []
            if more:
                rows.append([claim, cell(more), len(more), verdict(more, against),
                             cell(fairer), verdict(fairer, against) if fairer else ""])
        return markdown([f"{family}: the paper's claim", "mean ± 95 %", "models", "so",
                         f"less LPT at {BEST_RATE:g}", "so"], rows)
    return each_family(of_family)


def pilot_table():
    """Phase zero, and the loss on text by learning rate."""
    def of_family(family, some):
        zero = []
        for model in some:
            lines = [model.get("pre"), model.get("pre-x4")]
            if all(lines):
                small, large = map(repeats_loss, lines)
                zero.append([model.seed, f"{small:.4f}", f"{large:.4f}", f"{large - small:+.4f}"])
        first = markdown([f"{family}, rare repeats, seed", "small state",
                          "four times the state, from scratch", "difference"], zero)
        tried = {}
        for model in some:
            for line in model.lines:
                if line["start"]:
                    tried.setdefault(line["arm"], {}).setdefault(line["lr"], []).append(line)
        rates = sorted({lr for of_arm in tried.values() for lr in of_arm})
        rows = [[arm, *(" ".join(f"{line['loss']:.4f}" for line in of_arm.get(lr, []))
                        for lr in rates)] for arm, of_arm in tried.items()]
        second = markdown([f"{family}, loss on text, by model",
                           *(f"lr {lr:g}" for lr in rates)], rows)
        return "\n\n".join(filter(None, (first, second)))
    return each_family(of_family, "pilot.jsonl", ("pilot", "zero"))


def later_pilot_table():
    """One more model of each family: its losses on text and on rare repeats by learning rate."""
    def of_family(family, some):
        tried = [line for model in some for line in model.lines if line["start"]]
        rates = sorted({line["lr"] for line in tried})
        rows = []
        for arm in dict.fromkeys(line["arm"] for line in tried):
            of_arm = {line["lr"]: line for line in tried if line["arm"] == arm}
            best = min(of_arm.values(), key=lambda line: line["loss"])
            cells = []
            for lr in rates:
                line = of_arm.get(lr)
                text = f"{line['loss']:.4f}, {repeats_loss(line):.3f}" if line else ""
                cells.append(f"**{text}**" if line is best else text)
            rows.append([arm, *cells])
        return markdown([f"{family}, loss on text, on rare repeats",
                         *(f"lr {lr:g}" for lr in rates)], rows)
    return each_family(of_family, "pilot-later.jsonl", ("pilot",))


# ----------------------------------------------------------------------------------------
# tables of the recipe and of earlier runs


def of_recall(task, size):
    return lambda entry: entry["recall"][task][size]


def recipe_rows(lines):
    """A recipe's measures: LPT, StateX, and the difference, over models."""
    recall = lines[0]["lpt"]["recall"]
    measures = {"held-out text, nats": lambda entry: entry["val_loss"],
                "in-context score": lambda entry: entry["icl_score"]}
    measures |= {f"of {size} pairs": of_recall("mqar", size) for size in recall["mqar"]}
    measures |= {f"after {size} shots": of_recall("fewshot", size) for size in recall["fewshot"]}
    rows = []
    for what, measure in measures.items():
        means = [f"{statistics.mean(measure(line[arm]) for line in lines):.3f}"
                 for arm in ("pretrained", "lpt", "statex")]
        more = [measure(line["statex"]) - measure(line["lpt"]) for line in lines]
        rows.append([what, *means, cell(more, "{:+.3f}"),
                     f"{min(more):+.3f} to {max(more):+.3f}"])
    return rows


def recipe_table():
    """The recipe, by family, curriculum (today's first), number of threads and machine."""
    found = {}
    for line in read_lines("recipe.jsonl"):
        config = line["config"]
        key = (config["block"], -config["curriculum"], line["threads"], line.get("machine", ""))
        found.setdefault(key, []).append(line)
    parts = []
    for (family, curriculum, threads, machine), lines in sorted(found.items()):
        what = (f"{FAMILIES[family]}, curriculum {-curriculum:g}, {threads} "
                f"thread{'s' * (threads > 1)}, {machine}")
        head = [f"{what}, n = {len(lines)}", "pre-trained", "LPT", "StateX", "StateX - LPT",
                "range"]
        parts.append(markdown(head, recipe_rows(lines)))
    return "\n\n".join(parts)


def inits_table():
    """The recipe of an earlier version with each transplant: StateX - LPT."""
    found = {}
    for line in read_lines("recipe-inits.jsonl"):
        key = (line["family"], line["steps"], line["init"])
        found.setdefault(key, []).append(line)
    measures = {"held-out text, nats": lambda entry: entry["val_loss"],
                "of 16 pairs": of_recall("mqar", "16"), "of 32 pairs": of_recall("mqar", "32")}
    rows = []
    for (family, steps, init), lines in sorted(found.items()):
        cells = [cell([measure(line["statex"]) - measure(line["lpt"]) for line in lines],
                      "{:+.3f}") for measure in measures.values()]
        rows.append([f"{FAMILIES[family]}, {steps} steps", init, *cells, len(lines)])
    return markdown(["StateX - LPT", "init", *measures, "models"], rows)


def mixture_table():
    """25M parameters, half of the training made-up recall: differences to LPT of the same
    model, all at the rates that were chosen at seed 0."""
    lines = read_lines("mixture.jsonl")
    chosen = {("gla", "lpt"): 2e-3, ("gla", "reinit"): 6e-3, ("gla", "inherit"): 6e-3,
              ("mamba2", "lpt"): 2e-3, ("mamba2", "reinit"): 2e-3, ("mamba2", "preserve"): 6e-3}
    kept = {(line["start"], line["steps"], line["arm"]): line for line in lines
            if line["lr"] == chosen.get((line["family"], line["arm"]))}
    measures = {"held-out text, nats": lambda line: line["val_loss"],
                "of 64 pairs": lambda line: line["mqar"]["64"],
                "of 128 pairs": lambda line: line["mqar"]["128"]}
    rows = []
    for (family, arm), lr in chosen.items():
        for steps in (400, 800):
            pairs = [(line, kept[start, steps, "lpt"])
                     for (start, n, of_arm), line in kept.items()
                     if (line["family"], of_arm, n) == (family, arm, steps) and of_arm != "lpt"
                     and (start, steps, "lpt") in kept]
            if pairs:
                cells = [cell([measure(line) - measure(lpt) for line, lpt in pairs], "{:+.3f}")
                         for measure in measures.values()]
                rows.append([FAMILIES[family], steps, arm, f"{lr:g}", *cells, len(pairs)])
    return markdown(["arm - LPT", "steps", "init", "lr", *measures, "models"], rows)


def rates_table():
    """The price of a learning rate: the same model at two, LPT and inherit."""
    rows = [[line["start"], line["arm"], f"{line['lr']:g}", f"{line['val_loss']:.3f}",
             f"{line['mqar']['128']:.3f}"]
            for line in read_lines("mixture.jsonl")
            if line["arm"] in ("lpt", "inherit", "reinit") and line["steps"] == 400
            and line["family"] == "gla" and line["seed"] == 0]
    return markdown(["GLA, from the model", "arm", "lr", "held-out text, nats", "of 128 pairs"],
                    sorted(rows))


SECTIONS = {
    "summary": summary_table, "primary": primary_table, "arms": arms_table,
    "gates": gates_table, "why": why_table, "fast": fast_table,
    "long-fast": long_fast_table, "equal": equal_table, "tokens": tokens_table,
    "gap": gap_table, "ceiling": ceiling_table, "fine-tuned": fine_tuned_table,
    "claims": claims_table, "larger": larger_table, "pilot": pilot_table,
    "later pilot": later_pilot_table, "levels": levels_table, "needle": needle_table,
    "recipe": recipe_table, "inits": inits_table, "mixture": mixture_table,
    "rates": rates_table,
}


def updated(text):
    """README.md with every table between its marks made anew. Raises BadInput for a mark that
    names no table."""
    def make(mark):
        name = mark[1]
        if name not in SECTIONS:
            raise BadInput(f"README.md has a mark for the table {name!r}; there are "
                           f"{', '.join(SECTIONS)}")
        return f"<!-- table: {name} -->\n\n{SECTIONS[name]() or 'No runs yet.'}\n\n<!-- end -->"
    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", make, text, flags=re.S)


# ----------------------------------------------------------------------------------------
# figures


COLORS = {"gla": "tab:blue", "mamba2": "tab:red"}


def pyplot():
    try:
        import matplotlib
    except ImportError as e:
        raise BadInput("the figures need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def digest(name):
    """Of the runs in a file of this folder."""
    with open(f"{HERE}/{name}", "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def save(figure, path, runs):
    """With the digest of the runs that it shows among its texts, for --check."""
    figure.savefig(path, dpi=130, metadata={"Source": digest(runs)})
    pyplot().close(figure)


def bar(more):
    """The mean and half of its interval; of fewer than three models, whose interval would hide
    the others, no interval."""
    mean, half = interval(more)
    return mean, half if len(more) > 2 else 0.0


def draw_differences(path):
    """Paired differences to LPT, every arm, both families; and against post-training tokens."""
    plt = pyplot()
    found = {family: some for family, some in models("runs.jsonl").items() if some}
    columns = len(found) + 1
    figure, axes = plt.subplots(1, columns, figsize=(4.2 * columns, 3.8), layout="constrained")
    for axis, (family, some) in zip(axes, found.items(), strict=False):
        rows = {arm: differences(some, arm, repeats_loss) for arm in arms_of(some)}
        rows[FAST] = differences(models("runs.jsonl", ("why",))[family], FAST, repeats_loss)
        arms = [arm for arm in rows if rows[arm]][::-1]
        for place, arm in enumerate(arms):
            more = rows[arm]
            mean, half = bar(more)
            axis.plot(more, [place] * len(more), "o", ms=3, color="0.7")
            axis.errorbar(mean, place, xerr=half, fmt="o", ms=5, capsize=3, color=COLORS[family])
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set_yticks(range(len(arms)), arms)
        axis.set(title=FAMILIES[family], xlabel="loss on rare repeats, arm - LPT, nats")
    axis = axes[-1]
    for family in found:
        points = [(0, [0.0]), *by_tokens(family)]       # it starts as the same function
        means = [bar(more) for _, more in points]
        for tokens, more in points:
            axis.plot([tokens / 1e6] * len(more), more, "o", ms=3, color="0.7")
        axis.errorbar([tokens / 1e6 for tokens, _ in points], [mean for mean, _ in means],
                      [half for _, half in means], marker="o", ms=4, capsize=3,
                      color=COLORS[family], label=FAMILIES[family])
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set(title=f"{PRIMARY} - LPT", xlabel="post-training tokens, millions", xlim=(-1, None))
    axis.legend(fontsize=8)
    save(figure, path, "runs.jsonl")


MARKERS = {"lpt-equal-flops": "x", "preserve-x4-half": "v", "preserve-x4-later": "^",
           "preserve-x4": "o", "preserve-x16": "s", "inherit": "D", "reinit": "*"}


def draw_costs(path):
    """The difference to LPT against the state's bytes and the post-training's FLOPs."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained")
    for family, some in models("runs.jsonl").items():
        for arm, marker in MARKERS.items():
            more = differences(some, arm, repeats_loss)
            if not more:
                continue
            line = lines_of(some, arm)[0]
            mean, half = bar(more)
            for axis, cost in zip(axes, (line["state_bytes"], line["flops"]), strict=True):
                axis.errorbar(cost, mean, half, marker=marker, ms=5, capsize=3, ls="",
                              color=COLORS[family], label=f"{FAMILIES[family]}, {arm}")
    for axis, what in zip(axes, ("bytes of state per sequence", "post-training FLOPs"),
                          strict=True):
        axis.axhline(0, color="0.4", lw=0.8)
        axis.set(xlabel=what)
    axes[0].set(xscale="log", ylabel="loss on rare repeats, arm - LPT, nats")
    axes[0].minorticks_off()
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path, "runs.jsonl")


def draw_recipe(path):
    """Recall of the recipe's three models by the number of pairs, with today's curriculum:
    means over the seeds, and thin lines for the seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lines = read_lines("recipe.jsonl")
    for axis, (family, title) in zip(axes, FAMILIES.items(), strict=True):
        some = [line for line in lines if line["config"]["block"] == family]
        if not some:
            continue
        today = max(line["config"]["curriculum"] for line in some)
        some = [line for line in some if line["config"]["curriculum"] == today]
        sizes = list(lines[0]["lpt"]["recall"]["mqar"])
        for arm, (label, color) in ARMS_OF_RECIPE.items():
            runs = [[line[arm]["recall"]["mqar"][size] for size in sizes] for line in some]
            for run in runs:
                axis.plot(sizes, run, color=color, lw=0.6, alpha=0.5)
            means = [statistics.mean(of_size) for of_size in zip(*runs, strict=True)]
            axis.plot(sizes, means, color=color, marker="o", ms=4, label=label)
        axis.plot(sizes, [1 / int(size) for size in sizes], color="0.4", ls=":", label="chance")
        axis.set(title=f"{title}, {len(some)} pre-trained models", xlabel="key-value pairs",
                 ylabel="share recalled", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    save(figure, path, "recipe.jsonl")


ARMS_OF_RECIPE = {"pretrained": ("pre-trained", "0.6"),
                  "lpt": ("LPT: trained longer as it is", "tab:blue"),
                  "statex": ("StateX: trained longer with 4 times the state", "tab:red")}


FIGURES = {"recipe.png": ("recipe.jsonl", draw_recipe),      # each with the runs that it shows
           "differences.png": ("runs.jsonl", draw_differences),
           "costs.png": ("runs.jsonl", draw_costs)}


# ----------------------------------------------------------------------------------------


@dataclass
class Options:
    check: bool = option(False, "write nothing; status 2 where something is not in step")
    recipe: str = option("", "first append the recipe in this folder to recipe.jsonl")
    machine: str = option("", "where it ran, in words")


def append_recipe(folder, machine):
    """results.json of a recipe, without the scores of single sequences, as one line."""
    try:
        with open(f"{folder}/results.json") as f:
            results = json.load(f)
    except (OSError, ValueError) as e:
        raise BadInput(f"no results.json in {folder} ({type(e).__name__})") from e
    try:
        for arm in ARMS_OF_RECIPE:
            results[arm].pop("samples")
        config = {name: value for name, value in results["config"].items()
                  if name not in ("data", "out_dir", "plot")}
        line = {"seed": config["seed"], "threads": results["versions"]["threads"],
                "machine": machine, **results, "config": config}
    except (KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"{folder}/results.json is not a recipe's ({type(e).__name__})") from e
    with open(f"{HERE}/recipe.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def main():
    options = Options(**command_line(Options, __doc__))
    path = f"{HERE}/README.md"
    if options.check and options.recipe:
        raise BadInput("--check writes nothing, and --recipe appends; name one of them")
    if options.recipe:
        append_recipe(options.recipe, options.machine)
    with open(path) as f:
        before = f.read()
    after = updated(before)
    if options.check:
        if after != before:
            raise BadInput("README.md is not what the runs say; run python data/results/tables.py")
        for figure, (runs, _) in FIGURES.items():
            with open(f"{HERE}/{figure}", "rb") as f:
                if digest(runs).encode() not in f.read():
                    raise BadInput(f"{figure} is not of today's {runs}; run python "
                                   "data/results/tables.py")
        return print("README.md and the figures are in step with the runs")
    write_file(path, lambda file: file.write(after.encode()))
    drawn = {figure: draw for figure, (runs, draw) in FIGURES.items() if read_lines(runs)}
    for figure, draw in drawn.items():
        draw(f"{HERE}/{figure}")
    print(f"{path}; figures: {', '.join(drawn) or 'none, for there are no runs yet'}")


if __name__ == "__main__":
    run_script(main)
