"""Tests of data/prepare.py; to move into test_statex.py."""
from data.options import BadInput

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from data import options, prepare

HERE = os.path.dirname(os.path.abspath(__file__))
FOX = "the quick brown fox jumps over the lazy dog. "


def cli(*args):
    """Run prepare.py in this process. -> (exit status, stdout, stderr)"""
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = [prepare.__file__, *map(str, args)]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            options.run_script(prepare.main)
        status = 0
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def refused(*args, says):
    status, _, err = cli(*args)
    assert status == 2 and says in err and err.count("\n") == 1, err


def texts(folder):
    """What the training and the held-out tokens spell."""
    train, val, meta = prepare.load_corpus(folder)
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    return tokenizer.decode(train.tolist()), tokenizer.decode(val.tolist())


def fill(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# ----------------------------------------------------------------------------------------
# your own text


def test_one_file_gives_its_last_twentieth(tmp_path):
    fill(tmp_path, {"a.txt": FOX * 400})
    assert cli(tmp_path / "a.txt", f"--out={tmp_path}/out")[0] == 0
    train, val, meta = prepare.load_corpus(f"{tmp_path}/out")
    assert "".join(texts(f"{tmp_path}/out")) == FOX * 400 + "<|endoftext|>"
    assert len(val) == (len(train) + len(val)) // 20
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))


def test_every_20th_document_is_held_out(tmp_path):
    folder = fill(tmp_path / "many", {f"{i:02d}.txt": f"file {i}. {FOX * 90}" for i in range(45)})
    assert cli(folder, f"--out={tmp_path}/out")[0] == 0
    train, val = texts(f"{tmp_path}/out")
    assert "file 19." in val and "file 39." in val and val.count("file") == 2
    assert train.count("file") == 43


@pytest.mark.parametrize("n_small", (5, 60))
def test_one_huge_file_among_small_ones_is_neither_all_held_out_nor_all_trained_on(
        tmp_path, n_small):
    files = {f"{i:02d}.txt": f"small {i}. {FOX * 20}" for i in range(n_small)}
    files["19.txt"] = "huge " * 100_000
    assert cli(fill(tmp_path / "text", files), f"--out={tmp_path}/out")[0] == 0
    train, val = texts(f"{tmp_path}/out")
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.07
    assert "huge" in train and "huge" in val and "fox" in train and "fox" in val


def test_what_is_not_text_is_named_and_left_out(tmp_path):
    folder = fill(tmp_path / "text", {
        "a.txt": FOX * 400, "latin.txt": b"caf\xe9 " * 1000, "blank.txt": " \n" * 9,
        ".hidden.txt": "secret " * 999, ".git/config.txt": "secret " * 999})
    status, out, err = cli(folder, f"--out={tmp_path}/out")
    assert status == 0 and "1 documents" in out
    assert f"left out, not UTF-8: {folder}/latin.txt" in err and "not UTF-8: 1" in err
    assert "secret" not in "".join(texts(f"{tmp_path}/out"))


def test_endings_choose_among_the_files_of_a_folder(tmp_path):
    folder = fill(tmp_path / "text", {
        "a.md": "markdown " * 900, "b/c.RST": "restructured " * 900, "d.csv": "1,2,3,4\n" * 900})
    assert cli(folder, "--ext=.md,.rst", f"--out={tmp_path}/out")[0] == 0
    train, _ = texts(f"{tmp_path}/out")
    assert "markdown" in train and "restructured" in train and "1,2" not in train
    refused(folder, "--ext=.tex", f"--out={tmp_path}/none", says="no files that end in .tex")


def test_text_that_cannot_be_used(tmp_path):
    fill(tmp_path, {"empty.txt": "  \n", "short.txt": "three short words", "file": "x",
                    "latin.txt": b"caf\xe9 " * 1000, "kept/notes.md": "mine"})
    out = f"--out={tmp_path}/tokens"
    short = tmp_path / "short.txt"
    refused(tmp_path / "empty.txt", out, says="every file is empty")
    refused(tmp_path / "latin.txt", out, says="not UTF-8")
    refused(short, out, says="too short a text")
    refused(tmp_path / "none.txt", out, says="no file or folder")
    refused("--ext=.md", out, says="--ext chooses among")
    refused("fineweb", out, says="did you mean fineweb-edu?")
    refused(short, "--site-packages", out, says="name one source")
    refused(short, out, "--tokenizer=gpt3", says="no tokenizer 'gpt3'")
    refused(short, f"--out={tmp_path}/file", says="is a file")
    refused(short, f"--out={tmp_path}/file/tokens", says="cannot write")
    refused(short, f"--out={tmp_path}/kept", says="holds other files")
    assert (tmp_path / "kept/notes.md").read_text() == "mine"
    assert not any(name.startswith("tokens") for name in os.listdir(tmp_path))


def test_two_runs_prepare_a_folder_at_once(tmp_path):
    fill(tmp_path, {"text.txt": FOX * 400})
    command = [sys.executable, prepare.__file__, f"{tmp_path}/text.txt", f"--out={tmp_path}/text"]
    runs = [subprocess.Popen(command) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "text")) == ["meta.json", "train.bin", "val.bin"]
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(70, dtype=np.uint16).tofile(tmp_path / "val.bin")
    meta = {"tokenizer": "code4096", "vocab_size": 4096, "dtype": "uint16", "documents": 2,
            "train_tokens": 100, "val_tokens": 70, "sha256": "0"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    train, val, found = prepare.load_corpus(tmp_path)
    assert len(train) == 100 and len(val) == 70 and found == meta
    np.arange(60, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(BadInput, match="cut short"):
        prepare.load_corpus(tmp_path)
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(BadInput, match="no token files"):
        prepare.load_corpus(tmp_path)


# ----------------------------------------------------------------------------------------
# tokenizers


def test_tokenizer_round_trip():
    tokenizer = prepare.load_tokenizer("code4096")
    with open(prepare.__file__) as f:
        source = f.read()
    for text in ("def f(x):\n    return x**2  # é, 漢字, \t\x00\n", "", source):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.n_vocab == 4096 and tokenizer.eot_token == 4095


@pytest.mark.parametrize("blank", (" ", "\n", "\r\n", " \t"))
def test_a_million_blanks(blank):
    tokenizer = prepare.load_tokenizer("code4096")
    documents = [("x = 1\n", 0), ("a" + blank * 1_100_000 + "b", 0), (FOX * 9999, 0)]
    ids = [ids for ids, _ in prepare.encoded(documents, tokenizer)]
    assert [tokenizer.decode(x) for x in ids] == [text for text, _ in documents]
    assert ids[0] == tokenizer.encode_ordinary("x = 1\n")
    assert ids[2] == tokenizer.encode_ordinary(FOX * 9999)      # long, but nothing to cut


def save_hf(folder, step=1, letters="abcdefgh ", **special):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<unk>": 0, "</s>": 1} | {c: (i + 2) * step for i, c in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("step, dtype", ((1, "uint16"), (3, "uint16"), (9000, "uint32")))
def test_hugging_face_ids_may_have_gaps(tmp_path, step, dtype):
    name = save_hf(tmp_path / "hf", step, eos_token="</s>")
    fill(tmp_path, {"a.txt": "abcdefgh " * 2000})
    assert cli(tmp_path / "a.txt", f"--tokenizer={name}", f"--out={tmp_path}/out")[0] == 0
    train, val, meta = prepare.load_corpus(f"{tmp_path}/out")
    assert max(train.max(), val.max()) < meta["vocab_size"] == 10 * step + 1
    assert meta["dtype"] == dtype and val[-1] == meta["end_of_text"] == 1


def test_hugging_face_tokenizers_that_cannot_be_used(tmp_path):
    fill(tmp_path, {"a.txt": "abcdefgh " * 2000, "broken/tokenizer.json": "{"})
    text, out = tmp_path / "a.txt", f"--out={tmp_path}/out"
    refused(text, f"--tokenizer={save_hf(tmp_path / 'hf')}", out, says="no end-of-text token")
    refused(text, f"--tokenizer=hf:{tmp_path}/broken", out, says="no tokenizer at")
    assert not os.path.exists(tmp_path / "out")


def test_special_tokens_spelled_in_a_text_are_text(tmp_path):
    name = save_hf(tmp_path / "hf", letters="abcdefgh </s>", eos_token="</s>")
    assert 1 not in prepare.load_tokenizer(name).encode_ordinary("ab</s>c")
    tokenizer = prepare.load_tokenizer("code4096")
    assert tokenizer.eot_token not in tokenizer.encode_ordinary("a<|endoftext|>b")


def test_the_tokenizer_of_a_model_and_of_a_text(tmp_path):
    name = save_hf(tmp_path / "hf", eos_token="</s>")
    fill(tmp_path, {"a.txt": "abcdefgh " * 2000})
    assert cli(tmp_path / "a.txt", f"--tokenizer={name}", f"--out={tmp_path}/out")[0] == 0
    meta = prepare.load_corpus(f"{tmp_path}/out")[2]
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    for same in (name, f"hf:{tmp_path}/copy", ""):
        prepare.same_tokenizer(same, meta)
    with pytest.raises(BadInput, match="the model's tokenizer is code4096, .* with hf:"):
        prepare.same_tokenizer("code4096", meta)
    with pytest.raises(BadInput, match=f"the model's tokenizer is hf:{tmp_path}/none"):
        prepare.same_tokenizer(f"hf:{tmp_path}/none", meta)
    prepare.same_tokenizer("code4096", {"tokenizer": "code4096"})       # an older corpus
    save_hf(tmp_path / "hf", letters="hgfedcba ", eos_token="</s>")
    with pytest.raises(BadInput, match="has changed"):
        prepare.same_tokenizer(name, meta)


def test_ids_beyond_the_vocabulary_are_not_written(tmp_path, monkeypatch):
    tokenizer = prepare.load_tokenizer("code4096")
    tokenizer.max_token_value = 99          # n_vocab is one more
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: tokenizer)
    with pytest.raises(BadInput, match="its vocabulary has 100"):
        prepare.write_corpus([(FOX * 99, 0.05)], f"{tmp_path}/out", "code4096")
    assert os.listdir(tmp_path) == []


def test_a_bpe_learned_from_your_own_text(tmp_path):
    pytest.importorskip("tokenizers")
    fill(tmp_path, {"a.txt": "словоформа и словоформы; " * 3000})
    bpe = f"{tmp_path}/mine.tiktoken"
    assert cli(tmp_path / "a.txt", f"--train_bpe={bpe}", f"--out={tmp_path}/out")[0] == 0
    train, val, meta = prepare.load_corpus(f"{tmp_path}/out")
    assert meta["tokenizer"] == bpe and len(train) + len(val) < 3000 * 10
    assert "".join(texts(f"{tmp_path}/out")).startswith("словоформа и словоформы; " * 3000)
    refused(tmp_path / "a.txt", "--train_bpe=x.bpe", says="does not end in .tiktoken")
    refused(tmp_path / "a.txt", f"--tokenizer={tmp_path}/no.tiktoken", says="no tokenizer in")


# ----------------------------------------------------------------------------------------
# pinned packages


def save_wheel(folder, package, files):
    """A wheel as pip takes it. -> its line in the list"""
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{package}/{name}", text)
        info = f"{package}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA",
                       f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{package}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def pins(tmp_path):
    """Four packages; of their names' hashes only that of `manim` is in the first twentieth."""
    shared = f"# {FOX}\n" * 50
    packages = {name: {"a.py": f"# {name} {FOX}\n" * 90, "z.py": shared}
                for name in ("manim", "dask", "keras", "sympy")}
    packages["dask"] |= {
        "tests/a.py": "# hidden\n", "test_b.py": "# hidden\n", "c_test.py": "# hidden\n",
        "d.txt": "hidden", "e.py": b"# caf\xe9 hidden", "f.py": "# hidden, DO NOT EDIT\n",
        "g.py": "# hidden" * 200, "h.py": "hidden = [0.125, 0.25, 3.75, 4.875, 5.125]",
        "i.py": "# hidden\n" * 200_000, "crlf.py": "# kept\r\n# as well\r\n"}
    lines = [save_wheel(tmp_path / "index", name, files) for name, files in packages.items()]
    (tmp_path / "pins.txt").write_text("# packages\n\n" + "".join(lines))
    return tmp_path / "pins.txt"


def test_pinned_packages(pins, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    args = [f"--packages={pins}", f"--wheels={tmp_path}/wheels"]
    status, out, _ = cli(*args, f"--out={tmp_path}/out")
    assert status == 0 and "fetching 4 wheels" in out
    train, val = texts(f"{tmp_path}/out")
    assert val.count("manim") == 90 and "manim" not in train
    assert val.count(f"\n# {FOX}") == 49 and f"\n# {FOX}" not in train      # counted once
    assert "hidden" not in train + val and "# kept\n# as well\n" in train
    # without a network: the same bytes, and fewer tokens are the beginning of more
    shutil.rmtree(tmp_path / "index")
    whole = prepare.load_corpus(f"{tmp_path}/out")
    for tokens in (0, 1500):
        status, out, _ = cli(*args, f"--tokens={tokens}", f"--out={tmp_path}/again")
        assert status == 0 and "fetching" not in out
        train, val, meta = prepare.load_corpus(f"{tmp_path}/again")
        assert (meta == whole[2]) == (tokens == 0)
        assert (train == whole[0][:len(train)]).all() and (val == whole[1]).all()
    assert 1500 <= len(train) < len(whole[0])


def test_wheels_that_are_not_the_pinned_ones(pins, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    args = [f"--packages={pins}", f"--wheels={tmp_path}/wheels", f"--out={tmp_path}/out"]
    refused(*args, says="4 wheels of")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    save_wheel(tmp_path / "index", "keras", {"a.py": "import this"})
    status, _, err = cli(*args)
    assert status == 2 and "HASHES" in err.upper()
    pins.write_text("dask==1.0\n")
    refused(*args, says="'dask==1.0' in")
    pins.write_text("# nothing\n")
    refused(*args, says="no text in there")
    refused(f"--packages={tmp_path}/none.txt", *args[1:], says="cannot read the list")
    assert not any(name.startswith("out") for name in os.listdir(tmp_path))


def test_the_list_of_packages():
    """Every line is a pin, no package is twice in it, and some are held out."""
    with open(f"{HERE}/data/packages.txt") as f:
        lines = [line for line in f if not line.startswith("#")]
    names = [line.split("==")[0] for line in lines]
    assert lines == sorted(lines) and len(set(names)) == len(names)
    held_out = [name for name in names if hashlib.sha256(name.encode()).digest()[0] < 256 / 20]
    assert len(held_out) == 7


# ----------------------------------------------------------------------------------------
# data sets


def test_a_data_set_streams(tmp_path, monkeypatch):
    class Library:
        @staticmethod
        def load_dataset(path, subset, split, streaming):
            assert split == "train" and streaming
            yield from ({"text": f"row {i}. {FOX * 20}"} for i in range(100))
            raise RuntimeError("the connection\nis lost")

    monkeypatch.setitem(sys.modules, "datasets", Library)
    refused("fineweb-edu", f"--out={tmp_path}/out", says="cannot read HuggingFaceFW/fineweb-edu: "
            "the connection is lost")
    assert cli("fineweb-edu", "--tokens=9000", f"--out={tmp_path}/out")[0] == 0
    train, val, meta = prepare.load_corpus(f"{tmp_path}/out")
    assert 9000 <= len(train) < 9500 and "row 19." in texts(f"{tmp_path}/out")[1]
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("slimpajama", f"--out={tmp_path}/out", says="pip install datasets")
    assert len(prepare.load_corpus(f"{tmp_path}/out")[0]) == len(train)     # still there
