"""Tests of data/results: the statistics, the tables in README.md, and whole blocks or nothing."""
import json
import math
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "results"))

from data.options import BadInput

import block
import numpy as np
import pytest
import tables

ROOT = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------
# data/results/tables.py


def test_t_quantiles_are_those_of_a_table():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228, 30: 2.042}
    for df, expected in known.items():
        assert tables.t_quantile(df) == pytest.approx(expected, abs=6e-4)
    assert tables.t_quantile(7, 0.99) == pytest.approx(3.499, abs=6e-4)


def test_an_interval_and_its_p_value_agree():
    values = [0.1, 0.3, 0.2, 0.4]
    mean, half = tables.interval(values)
    assert mean == pytest.approx(0.25)
    assert half == pytest.approx(3.182 * 0.0645497, abs=1e-4)
    at_the_edge = [x - mean + half for x in values]
    assert tables.p_value(at_the_edge) == pytest.approx(0.05, abs=1e-6)
    assert math.isnan(tables.interval([0.1])[1]) and tables.cell([0.1]) == "+0.1000"


def test_holm_corrects_the_smaller_p_by_two_and_keeps_the_order():
    assert tables.holm({"gla": 0.01, "mamba2": 0.04}) == {"gla": 0.02, "mamba2": 0.04}
    assert tables.holm({"gla": 0.03, "mamba2": 0.03}) == {"gla": 0.06, "mamba2": 0.06}


def test_readme_is_in_step_with_the_runs():
    with open(f"{ROOT}/data/results/README.md") as f:
        text = f.read()
    assert tables.updated(text) == text
    marked = [line[len("<!-- table: "):-len(" -->")] for line in text.splitlines()
              if line.startswith("<!-- table: ")]
    assert sorted(marked) == sorted(tables.SECTIONS)
    with pytest.raises(BadInput, match="no-such"):
        tables.updated("<!-- table: no-such -->\n<!-- end -->")


def made_up_line(seed, arm, repeats, lr=2e-3, own_rate=True):
    groups = {name: {"tokens": 9, "loss": repeats, "accuracy": 0.5}
              for name in ("near", "middle", "far", "repeats", "new", "other")}
    return {"began": "then", "family": "gla", "seed": seed, "phase": "block", "arm": arm, "lr": lr,
            "start": "" if arm == "pre" else "pre", "own_rate": own_rate, "tokens": 10,
            "rare_repeats": {"groups": groups}, "icl_score": -0.1, "state_elements": 4,
            "needle_gain": {"4096": {"gain": 0.1}}, "params": 1, "state_bytes": 16, "flops": 1,
            "peak_mem_mib": 1}


@pytest.fixture
def made_up_runs(tmp_path, monkeypatch):
    """Two models; LPT at two rates, of which the second is another arm's."""
    lines = []
    for seed, gain in ((0, 0.1), (1, 0.3)):
        lines += [made_up_line(seed, "pre", 3.0), made_up_line(seed, "lpt", 2.5, 4e-3, False),
                  made_up_line(seed, "lpt", 2.0 + seed),
                  made_up_line(seed, "preserve-x16", 2.0 + seed - gain),
                  made_up_line(seed, "reinit-paper", 2.4, 4e-3)]
    with open(tmp_path / "runs.jsonl", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    monkeypatch.setattr(tables, "HERE", str(tmp_path))
    return tables.models("runs.jsonl")["gla"]


def test_differences_are_to_lpt_of_the_same_model(made_up_runs):
    more = tables.differences(made_up_runs, "preserve-x16", tables.repeats_loss)
    assert more == pytest.approx([-0.1, -0.3])
    more = tables.differences(made_up_runs, "reinit-paper", tables.repeats_loss)
    assert more == pytest.approx([0.4, -0.6])
    more = tables.differences(made_up_runs, "reinit-paper", tables.repeats_loss, equal=True)
    assert more == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize("name", list(tables.SECTIONS))
def test_every_table_is_made_of_whatever_is_there(made_up_runs, name):
    table = tables.SECTIONS[name]()
    if name in ("primary", "arms", "claims"):
        assert "-0.2000" in table


# ---------------------------------------------------------------------------------------
# data/results/block.py


def test_the_plan_has_every_arm_and_the_control_at_every_rate(tmp_path):
    pilot = tmp_path / "pilot.jsonl"
    with open(pilot, "w") as f:
        for seed in (100, 101):
            for arm in block.TUNED:
                for lr in (1e-3, 2e-3, 4e-3):
                    best = 4e-3 if arm == "reinit" else 1e-3
                    line = {"family": "gla", "phase": "pilot", "start": "pre", "seed": seed,
                            "arm": arm, "lr": lr, "loss": abs(lr - best)}
                    f.write(json.dumps(line) + "\n")
            # a rate that one of the models did not try is not chosen
        f.write(json.dumps(line | {"arm": "lpt", "lr": 3e-3, "loss": -1.0}) + "\n")
    jobs = block.plan(block.Options(family="gla", pilot=str(pilot)))
    assert [job.name for job in jobs if job.arm == "lpt"] == ["lpt-lr0.001", "lpt-lr0.004"]
    assert [job.own_rate for job in jobs if job.arm == "lpt"] == [True, False]
    assert {job.arm for job in jobs} == {"pre", "pre-x4", *(
        name for name, arm in block.ARMS.items() if arm.family != "mamba2")}
    assert next(job for job in jobs if job.arm == "reinit").training["lr"] == 4e-3
    assert all(job.tokens >= 33.5e6 for job in jobs if job.core and job.start)


def test_the_pilot_goes_on_where_the_best_rate_is_at_an_end():
    options = block.Options(family="gla", phase="pilot")
    jobs = [job for job in block.plan(options) if job.arm == "lpt"]
    results = [{"arm": "lpt", "start": "pre", "lr": lr, "loss": lr} for lr in (2e-3, 4e-3)]
    assert not block.one_more(jobs[0], results, options)
    results.append({"arm": "lpt", "start": "pre", "lr": 1e-3, "loss": 1e-3})
    assert [job.training["lr"] for job in block.one_more(jobs[0], results, options)] == [5e-4]
    results.append({"arm": "lpt", "start": "pre", "lr": 5e-4, "loss": 1.0})
    assert not block.one_more(jobs[0], results, options)


def run_block(folder, *arguments):
    command = [sys.executable, f"{ROOT}/data/results/block.py", "--tiny", "--jobs=2",
               "--device=cpu", f"--data={folder}", f"--out={folder}/runs.jsonl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)})


@pytest.fixture
def small_corpus(tmp_path):
    rng = np.random.default_rng(0)
    tokens = {"train": rng.integers(4096, size=20_000), "val": rng.integers(4096, size=3_000)}
    tokens["val"][1500:] = tokens["val"][:1500]         # so that bigrams come again
    for name, ids in tokens.items():
        ids.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    meta = {"tokenizer": "code4096", "vocab_size": 4096, "dtype": "uint16", "sha256": "0",
            "train_tokens": 20_000, "val_tokens": 3_000}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_a_block_is_appended_whole(small_corpus, family):
    ended = run_block(small_corpus, f"--family={family}", "--phase=zero")
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in open(small_corpus / "runs.jsonl")]
    assert {line["arm"] for line in lines} == {"pre", "pre-x4"}
    assert lines[0]["began"] == lines[1]["began"]
    states = {line["arm"]: line["state_elements"] for line in lines}
    assert states["pre-x4"] == 4 * states["pre"]


@pytest.mark.slow
def test_a_block_without_time_appends_nothing(small_corpus):
    ended = run_block(small_corpus, "--minutes=0.02")
    assert ended.returncode == 2 and "not whole" in ended.stderr
    assert not os.path.exists(small_corpus / "runs.jsonl")
