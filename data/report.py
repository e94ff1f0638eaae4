"""The recipe's table, closing sentence and picture, from the results.json that train.py writes.

    python train.py --plot=out/recipe-gla
"""
from data.options import BadInput, one_line, write_file

import json
import math
import statistics

# In the table and the picture; an arm of your own in train.py's `recipe` goes here, too.
ARMS = {"pretrained": "pre-trained", "lpt": "LPT", "statex": "StateX"}
COLORS = {"pretrained": "0.6", "lpt": "tab:blue", "statex": "tab:red"}
TASKS = {"mqar": "of {} pairs recalled", "fewshot": "few-shot, right after {}"}


def print_report(folder):
    """Print the table and the closing sentence; draw folder/recipe.png where matplotlib is
    there. Raises BadInput where folder/results.json is missing or another version's."""
    try:
        with open(f"{folder}/results.json") as f:
            results = json.load(f)
    except OSError as e:
        raise BadInput(f"no results.json in {folder} ({e.strerror}); `python train.py` writes one "
                       "when it has ended") from e
    except ValueError as e:
        raise BadInput(f"{folder}/results.json is damaged ({one_line(e)}); without it the recipe "
                       "scores its models again") from e
    try:
        for arm in ARMS:
            if arm not in results:
                print(f"{folder}/results.json has no arm {arm}; if it is in the last loop of "
                      "train.py's `recipe`, remove results.json, and it is trained")
        print(f"\n{table(results)}\n\n{closing(results)}\n")
        print(f"{folder}/results.json{picture(results, folder)}")
    except BadInput:                            # the picture cannot be written
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise BadInput(f"{folder}/results.json is not one of this version's, or report.py was "
                       f"changed ({type(e).__name__} {one_line(e, 60)}); without it the recipe "
                       "scores its models again") from e


def t_within(t, df):
    """The probability that Student's t with df degrees of freedom is within -t and t
    (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = df % 2
    angle = math.atan(t / math.sqrt(df))
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (i - 1) / i
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series


def t_quantile(df, level=0.95):
    """How many standard errors an interval of this level has on either side."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if t_within(middle, df) < level:
            low = middle
        else:
            high = middle
    return high


def interval(values):
    """-> (mean, half of the 95 % interval by Student's t); the half is NaN for one value."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), t_quantile(len(values) - 1) * error


def difference(results, task, size=None):
    """StateX - LPT, paired by sequence of a task and size, or by window of "text": see interval."""
    samples = [results[arm]["samples"][task] for arm in ("statex", "lpt")]
    if size is not None:
        samples = [of_task[size] for of_task in samples]
    return interval([a - b for a, b in zip(*samples, strict=True)])


def with_error(mean, half, digits=3):
    """mean ± half as text; a dash for the half that one value has not."""
    return f"{mean:+.{digits}f} ± " + ("-" if math.isnan(half) else f"{half:.{digits}f}")


def table(results):
    """The models side by side, as a Markdown table."""
    labels = {arm: label for arm, label in ARMS.items() if arm in results}
    arms = [results[arm] for arm in labels]
    rows = [["", *labels.values(), "StateX - LPT", "chance"]]

    def row(label, form, values, more="", chance=""):
        rows.append([label, *map(form.format, values), more, chance])
    row("parameters", "{:,}", [arm["params"] for arm in arms])
    row("state elements per sequence", "{:,}", [arm["state_elements"] for arm in arms])
    row("tokens, millions", "{:.1f}", [arm["tokens"] / 1e6 for arm in arms])
    row("learning rate", "{:g}", [arm["lr"] for arm in arms])
    row("held-out text, nats per token", "{:.3f}", [arm["val_loss"] for arm in arms],
        with_error(*difference(results, "text")))
    for task, of_task in results["lpt"]["chance"].items():
        for size, chance in of_task.items():
            row(TASKS.get(task, task + " {}").format(size), "{:.3f}",
                [arm["recall"][task][size] for arm in arms],
                with_error(*difference(results, task, size)), f"{chance:.3f}")
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |"
             for line in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in width) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def closing(results):
    """What was seen, what the intervals are of, and whether the model could recall at all."""
    lpt = results["lpt"]
    statex = results["statex"]
    more_loss = with_error(*difference(results, "text"))
    text = f"Held-out text, StateX - LPT: {more_loss} nats per token."
    sizes = list(statex["recall"]["mqar"])
    if not sizes:                               # trained on text alone
        return f"{text} (± is the 95 % interval over windows.)"
    size = sizes[-1]
    more_recall = with_error(*(100 * x for x in difference(results, "mqar", size)), digits=1)
    times = statex["state_elements"] / lpt["state_elements"]
    share, lpt_share = (arm["recall"]["mqar"][size] for arm in (statex, lpt))
    learnt = results["pretrained"]["recall"]["mqar"].get("4", 1.0)     # 1: not asked
    remark = ""
    if learnt < 0.6:
        remark = (f"\nThe pre-trained model had not learnt to recall yet ({learnt:.1%} of 4 pairs) "
                  "and has little use for a larger state: more --pretrain_steps or another --seed, "
                  "in another --out_dir, may help.")
    elif lpt["recall"].get("fewshot", {}).get("4", 1.0) < 0.125:
        remark = ("\nFew-shot far below chance is a habit from recall sequences, where every value "
                  "occurs once.")
    config = results["config"]
    return (f"With {times:.3g} times the state ({config['init']}, seed {config['seed']}) StateX "
            f"recalls {share:.1%} of {size} pairs, LPT {lpt_share:.1%}: {more_recall} "
            "points.\n"
            f"{text}\n(± is the 95 % interval over the sequences asked or windows read; another "
            f"seed makes another model.){remark}")


def picture(results, folder):
    """folder/recipe.png: recall by the number of pairs, and held-out text over post-training.
    Returns what to print of it."""
    try:
        import matplotlib
    except ImportError:
        return f"   (no picture: pip install matplotlib, then python train.py --plot={folder})"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = list(results["lpt"]["recall"]["mqar"])
    colors = {arm: COLORS.get(arm, f"C{i + 1}") for i, arm in enumerate(ARMS)}
    labels = {arm: label for arm, label in ARMS.items() if arm in results}
    for arm, label in labels.items():
        scores = [results[arm]["recall"]["mqar"][size] for size in sizes]
        halves = [interval(results[arm]["samples"]["mqar"][size])[1] for size in sizes]
        left.errorbar(range(len(sizes)), scores, halves, color=colors[arm], marker="o", ms=4,
                      capsize=3, label=label)
    chance = [results["lpt"]["chance"]["mqar"][size] for size in sizes]
    left.plot(range(len(sizes)), chance, color="0.4", ls=":", label="chance")
    left.set(title="recall (bars: 95 % over sequences)", xlabel="key-value pairs",
             ylabel="accuracy", ylim=(0, 1.02))
    left.set_xticks(range(len(sizes)), sizes)
    left.legend(fontsize=8)
    labels.pop("pretrained")
    for arm, label in labels.items():
        seen = [tokens / 1e6 for tokens, _, _ in results[arm]["evaluations"]]
        losses = [text for _, text, _ in results[arm]["evaluations"]]
        right.plot(seen, losses, color=colors[arm], marker="o", ms=4, label=label)
    right.axhline(results["pretrained"]["val_loss"], color=COLORS["pretrained"],
                  label="pre-trained")
    right.set(title="held-out text", xlabel="post-training tokens, millions",
              ylabel="nats per token")
    right.legend(fontsize=8)
    path = f"{folder}/recipe.png"
    write_file(path, lambda file: figure.savefig(file, dpi=150))
    plt.close(figure)
    return f" and {path}"
