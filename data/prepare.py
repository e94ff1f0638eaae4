"""Text to token files.

    python data/prepare.py                     this Python's standard library -> data/python
    python data/prepare.py --site-packages     and all packages installed here -> data/python-all
    python data/prepare.py --packages=data/packages.txt     pinned packages -> data/packages
    python data/prepare.py FILE_OR_FOLDER... [--ext=.md,.rst]      your own text -> data/text
    python data/prepare.py fineweb-edu --tokens=1e9     or slimpajama, by the library `datasets`

A folder of token files holds train.bin and val.bin (token ids one after another, uint16, or
uint32 for a vocabulary of more than 65,536) and meta.json (tokenizer, counts, sha256 of all
ids). Each document ends with the end-of-text token; one whose end is held out does so in both
files. The pinned packages give the same files on every machine; data/packages-larger.txt is a
second list (--packages=LIST,LIST).

About a twentieth is held out: every 20th document, whole. A file longer than a tenth of
all text gives its own last twentieth instead, and so do all where there are fewer than
20 shorter ones. Of pinned packages, about every 20th package is held out, whole.

--tokenizer is code4096 (data/code4096.tiktoken, 4,095 byte-level BPE tokens that --train_bpe
learned from the standard library), a tiktoken encoding (gpt2, cl100k_base), hf:NAME for a
Hugging Face id or folder, or a file that --train_bpe wrote.
"""
import base64
import contextlib
import difflib
import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.options import (
    BadInput,
    command_line,
    one_line,
    option,
    run_script,
    temporary_folder,
    why,
    write_file,
)

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
# How a byte-level BPE of ours cuts text into words: no token crosses their ends.
WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
         r"|\s+(?!\S)|\s+")
DATASETS = {            # name here -> the hub's name, subset
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT"),
    "slimpajama": ("cerebras/SlimPajama-627B", None),
}


@dataclass
class Options:
    words: tuple = option((), "files and folders, or fineweb-edu or slimpajama", words=True)
    ext: str = option("", "of the folders, only files that end so: .md,.rst")
    site_packages: bool = option(False, "also the packages installed here")
    packages: str = option("", "lists of pinned wheels, such as data/packages.txt, with commas")
    wheels: str = option(f"{HERE}/wheels", "where the wheels are kept; those missing are fetched")
    out: str = option("", "folder to write; data/ and a name of the source where not given")
    tokenizer: str = option("code4096", "what cuts text into tokens, see above")
    tokens: int = option(0, "stop when there are so many tokens to train on; 0: take all text")
    train_bpe: str = option("", "first learn 4,095 tokens from this text, into this file "
                                "(NAME.tiktoken), and cut the text with them")


# ----------------------------------------------------------------------------------------
# tokenizers


def load_tokenizer(name):
    """The tokenizer of that name (see --tokenizer above), with n_vocab, eot_token,
    encode_ordinary(text), encode_ordinary_batch(texts) and decode(ids). Every id is below
    n_vocab. Raises BadInput."""
    if name.startswith("hf:"):
        return HuggingFace(name)
    try:
        import tiktoken
    except ImportError as e:
        raise BadInput("tokenizers other than hf: need tiktoken: pip install tiktoken") from e
    if name == "code4096" or name.endswith(".tiktoken"):
        ranks = read_ranks(f"{HERE}/code4096.tiktoken" if name == "code4096" else name)
        return tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    known = tiktoken.list_encoding_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0)[0]
        raise BadInput(f"no tokenizer {name!r}; expected code4096, hf:NAME, a file that ends in "
                       f".tiktoken, or an encoding of tiktoken (the nearest is {nearest})")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:          # tiktoken fetches it: any error of a network ends here
        raise BadInput(f"tiktoken could not fetch {name!r} ({type(e).__name__}); without a "
                       "network use --tokenizer=code4096") from e


def read_ranks(path):
    """{token: id} of a file of lines `base64 of the token's bytes, id`, the ids from 0 up."""
    try:
        with open(path) as f:
            pairs = [line.split() for line in f]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as e:
        raise BadInput(f"no tokenizer in {path} ({type(e).__name__}); --train_bpe={path} "
                       "makes one") from e
    single_bytes = {bytes([byte]) for byte in range(256)}
    if sorted(ranks.values()) != list(range(len(ranks))) or not single_bytes <= set(ranks):
        raise BadInput(f"{path} does not number its tokens from 0 up, the 256 bytes among them")
    return ranks


class HuggingFace:
    """A Hugging Face tokenizer with tiktoken's method names."""

    def __init__(self, name):
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError as e:
            raise BadInput("hf: tokenizers need transformers: pip install transformers") from e
        self.name = name
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()       # it warns of a model, such as GLA, that it has not
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name.removeprefix("hf:"))
        except Exception as e:      # whatever a folder's files, or the network, lead it to
            raise BadInput(f"no tokenizer at {name!r}: {one_line(e)}") from e
        finally:
            logging.set_verbosity(verbosity)
        self.decode = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        self.vocabulary = self.tokenizer.get_vocab()
        # without a tokenizer's files transformers may make one by the model's type
        if set(self.vocabulary) <= set(self.tokenizer.get_added_vocab()):
            raise BadInput(f"no tokenizer at {name!r}: it has no tokens but special ones; are the "
                           "tokenizer's files there?")
        # ids may have gaps, so that their number is no bound
        self.n_vocab = max(self.vocabulary.values(), default=0) + 1
        self.eot_token = self.tokenizer.eos_token_id
        if self.eot_token is None:
            self.eot_token = self.vocabulary.get("<|endoftext|>")
        if self.eot_token is None:
            raise BadInput(f"the tokenizer {name} has no end-of-text token (eos_token), and each "
                           "document ends with one; set it, or choose another tokenizer")

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        """Special tokens that are spelled out in a text are text (but not for a Unigram
        tokenizer whose pieces they are)."""
        try:
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                                  verbose=False)["input_ids"]
        except Exception as e:      # such as a letter out of the vocabulary, with no unk_token
            raise BadInput(f"the tokenizer {self.name} cannot encode the text: "
                           f"{one_line(e)}") from e


def fingerprint(tokenizer):
    """sha256 of what decides a text's ids: the vocabulary, and the ids of a line that
    contains most of what tokenizers treat unlike."""
    if isinstance(tokenizer, HuggingFace):
        vocabulary = tokenizer.vocabulary
    else:
        vocabulary = {token.hex(): rank for token, rank in tokenizer._mergeable_ranks.items()}
    line = "def f(x_1, y):\n\n    return 'It\\'s' + x[1234567]  # naïve,\tÅngström: 漢字 🙂  \n"
    try:
        ids = tokenizer.encode_ordinary(line)
    except BadInput:        # it has no id for a letter of the line, nor one for unknown letters
        ids = []
    facts = [sorted(vocabulary.items()), tokenizer.eot_token, ids]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_tokenizer(name, meta):
    """Raises BadInput unless the tokenizer `name`, a model's, gives the ids of the corpus
    that `meta` tells of. Other names of the same tokenizer are the same, such as those of two
    copies of a folder; "" is a tokenizer that nobody knows, and passes."""
    prepared = meta["tokenizer"]
    expected = meta.get("tokenizer_sha256")     # corpora of earlier versions have none
    if not name or (name == prepared and not expected):
        return
    try:
        same = fingerprint(load_tokenizer(name)) == expected
    except BadInput:                # it cannot be loaded here
        same = name == prepared
    if same:
        return
    if name == prepared:
        raise BadInput(f"the tokenizer {name} has changed since the text was prepared with it; "
                       "prepare the text again")
    raise BadInput(f"the model's tokenizer is {name}, the text was prepared with {prepared}; "
                   f"prepare it with --tokenizer={name}")


def check_vocabulary(config, meta, folder):
    """Raises BadInput where the model has no embedding for ids of the text that `meta` tells of,
    whose tokenizer is the model's (see check_tokenizer). Such a tokenizer may have more ids than
    its model: tokens that were added, for padding say, and that no text contains."""
    ids = meta["vocab_size"]
    if config.tokenizer and "largest_id" in meta:       # corpora of earlier versions have none
        ids = meta["largest_id"] + 1
    if ids > config.vocab_size:
        hint = "prepare the text with the model's tokenizer"
        if config.tokenizer:
            hint = "its tokenizer has tokens that it has no embedding for, and the text has them"
        raise BadInput(f"{folder} has {ids} token ids, the model {config.vocab_size}; {hint}")


def byte_letters():
    """How byte-level tokenizers spell each byte as one printable character: those of latin-1
    as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def train_bpe(documents, path):
    """Learn 4,095 byte-level BPE tokens from documents (see below), and write them to
    path, as `read_ranks` reads them. Raises BadInput."""
    if not path.endswith(".tiktoken"):
        raise BadInput(f"--train_bpe={path} does not end in .tiktoken, by which --tokenizer "
                       "knows such a file")
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise BadInput(f"--train_bpe={path}: it is a folder, or there is none that it can be in")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as e:
        raise BadInput("--train_bpe needs tokenizers: pip install tokenizers") from e
    learner = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    alphabet = sorted(byte_of)
    trainer = trainers.BpeTrainer(vocab_size=4095, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator((text for text, _ in documents), trainer)
    if learner.get_vocab_size() == len(alphabet):
        raise BadInput("no text in there to learn tokens from: every file is empty or not UTF-8")
    lines = []
    for token, rank in sorted(learner.get_vocab().items(), key=lambda item: item[1]):
        spelling = base64.b64encode(bytes(byte_of[letter] for letter in token))
        lines.append(f"{spelling.decode()} {rank}\n")
    write_file(path, lambda file: file.write("".join(lines).encode()))


# ----------------------------------------------------------------------------------------
# documents: (text, share), where share, 0 to 1, is how much of its end is held out


def python_files(site_packages=False):
    """Paths of the Python source on this machine, sorted, tests left out."""
    folders = [sysconfig.get_paths()["stdlib"]]
    if site_packages:
        folders += [*site.getsitepackages(), sysconfig.get_paths()["purelib"]]
    found = set()
    for folder in folders:
        for path in files_below(folder):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            # packages, which may be below the standard library and are asked for apart
            installed = name.startswith(("site-packages/", "dist-packages/"))
            if is_source(name) and not installed:
                found.add(path)
    return sorted(found)


def is_source(name):
    """Whether a file is Python source and no test. name: its path, with /, below the
    folder that packages are in."""
    if not name.endswith(".py") or name.endswith(("_test.py", "conftest.py")):
        return False
    parts = name.replace("-", "_").lower().split("/")
    folders = {"test", "tests", "idle_test", "testing"}
    return not any(part in folders or part.startswith("test_") for part in parts)


def files_below(folder):
    """Paths of a folder's files, sorted, without those and the folders that are hidden, and
    without virtual environments. Raises BadInput for a folder that cannot be read."""
    def refuse(e):
        if not isinstance(e, FileNotFoundError):        # it has gone since it was listed
            raise BadInput(f"cannot read {e.filename}: {e.strerror}") from e

    found = []
    seen = set()
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(root) in seen:              # by a link
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")
                      and not os.path.exists(f"{root}/{name}/pyvenv.cfg")]
        found += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return sorted(filter(os.path.isfile, found))


def text_files(words, endings, made=()):
    """The files named, and of the folders named the files with one of these endings, or
    all where there are none. made: files and folders of ours, which are left out.
    Raises BadInput for what is not there."""
    made = [os.path.realpath(path) for path in made if path]

    def ours(path):
        path = os.path.realpath(path)
        return any(path == place or path.startswith(place + os.sep) for place in made)

    found = []
    for word in words:
        if os.path.isdir(word):
            found += [path for path in files_below(word)
                      if (not endings or path.lower().endswith(endings)) and not ours(path)]
        elif os.path.isfile(word):
            found.append(word)
        else:
            nearest = difflib.get_close_matches(word, DATASETS, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            if word in DATASETS:
                hint = "; the data set of this name is read when nothing else is named"
            raise BadInput(f"no file or folder {word}{hint}")
    if not found:
        kind = f" that end in {' or '.join(endings)}" if endings else ""
        raise BadInput(f"no files{kind} in {' '.join(words)}")
    unique = {}
    for path in found:                      # a file read twice might also be held out
        unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def read_documents(paths, left_out=None):
    """Yield the files' texts as documents. A file that is not UTF-8 is left out, its
    path added to the list `left_out`, if given; one without text is left out silently.
    Each is read twice: what is held out depends on how much text there is in all."""
    lengths = {}
    for path in paths:
        text = read_text(path)
        if text is None and left_out is not None:
            left_out.append(path)
        if text and not text.isspace():
            lengths[path] = len(text)
    total = sum(lengths.values())
    shorter = [path for path, length in lengths.items() if 10 * length <= total]
    shares = dict.fromkeys(lengths, 1 / 20)
    if len(shorter) >= 20:
        shares |= dict.fromkeys(shorter, 0)
        shares |= dict.fromkeys(shorter[19::20], 1)
    for path, share in shares.items():
        text = read_text(path)
        if text:
            yield text, share


def read_text(path):
    """A file's text, None where it is not UTF-8. Its line ends become \\n. Raises
    BadInput where it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as f:     # without the mark that Windows puts first
            return f.read()
    except UnicodeDecodeError:
        return None
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from e


def download(name):
    """Yield the documents of a public data set, as they come."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise BadInput(f"{name} comes through the library datasets: pip install datasets") from e
    path, subset = DATASETS[name]
    try:
        rows = load_dataset(path, subset, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield row["text"], int(number % 20 == 0)
    except Exception as e:      # of the library, of the network's library or of the format's
        raise BadInput(f"cannot read {path}: {one_line(e)}") from e


# ----------------------------------------------------------------------------------------
# pinned packages: the same documents on every machine


def fetch_wheels(pins, folder):
    """{package: path of its wheel} of a list in pip's format of requirements, a line
    `name==version --hash=sha256:...` for each package. The wheels are in the folder, or pip
    fetches them there: it checks the hashes, installs nothing and runs nothing of them."""
    try:
        with open(pins, encoding="utf-8-sig") as f:
            lines = [line.partition("#")[0].strip() for line in f]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the list of packages {pins} ({type(e).__name__})") from e
    digests = {}
    for line in filter(None, lines):
        pin = re.fullmatch(r"([\w.-]+)==[\w.!+-]+ +--hash=sha256:([0-9a-f]{64})", line)
        if not pin or pin[1] in digests:
            raise BadInput(f"{line!r} in {pins} is not name==version --hash=sha256:..., or names "
                           "a package again")
        digests[pin[1]] = pin[2]
    if not digests:
        raise BadInput(f"{pins} names no packages")
    wheels = wheels_by_digest(folder)
    missing = set(digests.values()) - set(wheels)
    if missing:
        print(f"fetching {len(missing)} wheels into {folder}", flush=True)
        # wheels for any platform, whichever Python this is
        command = [sys.executable, "-m", "pip", "download", "--quiet", f"--requirement={pins}",
                   "--require-hashes", "--no-deps", "--only-binary=:all:", "--platform=any",
                   "--implementation=py", "--abi=none", "--python-version=3.13",
                   "--ignore-requires-python", f"--dest={folder}"]
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as e:
            raise BadInput(f"cannot write the wheels into {folder}: {e.strerror}") from e
        pip = subprocess.run(command, capture_output=True, text=True)
        wheels = wheels_by_digest(folder)
        missing = set(digests.values()) - set(wheels)
        if missing:
            said = pip.stderr or "it said nothing"
            errors = [line for line in said.splitlines() if line.startswith("ERROR")]
            raise BadInput(f"{len(missing)} wheels of {pins} are not in {folder}, and pip did not "
                           f"fetch them: {one_line(errors[0] if errors else said)}")
    return {package: wheels[digest] for package, digest in digests.items()}


def wheels_by_digest(folder):
    """{sha256: path} of the wheels in a folder."""
    found = {}
    for path in filter(zipfile.is_zipfile, glob.glob(f"{glob.escape(folder)}/*.whl")):
        with open(path, "rb") as f:
            found[hashlib.sha256(f.read()).hexdigest()] = path
    return found


def wheel_documents(lists, folder):
    """Yield the Python files of pinned wheels as documents, one list of pins after the other.
    A list's packages come in the order of their names' hash, which is as good as a random
    one, and the first twentieth of the hashes is held out. So of one list the held-out text
    does not depend on --tokens, and few tokens to train on are the beginning of many. A file
    that several wheels contain is counted once."""
    seen = set()
    for wheels in [fetch_wheels(pins, folder) for pins in lists]:       # all of them first
        place = {name: hashlib.sha256(name.encode()).digest() for name in wheels}
        for package in sorted(wheels, key=place.get):
            held_out = place[package][0] < 256 / 20
            for text in wheel_texts(wheels[package]):
                digest = hashlib.sha256(text.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield text, int(held_out)


def wheel_texts(path):
    """Yield the texts of a wheel's Python files in UTF-8, in their names' order, without
    tests and what a program made: its head says so, it is over a megabyte, a line is
    over 1,000 characters, or more than a tenth of it is digits."""
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if not is_source(name) or wheel.getinfo(name).file_size > 1_000_000:
                continue
            try:
                text = wheel.read(name).decode()
            except UnicodeDecodeError:
                continue
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            digits = sum(map(text.count, "0123456789"))
            generated = "do not edit" in text[:2000].lower() or digits > len(text) / 10
            longest = max(map(len, text.split("\n")))
            if text and not text.isspace() and not generated and longest <= 1000:
                yield text


# ----------------------------------------------------------------------------------------
# token files


def write_corpus(documents, out, tokenizer, max_tokens=math.inf):
    """Write (text, share) documents as the token files of the folder `out`, cut by the
    tokenizer of this name, to the document with which there are max_tokens to train on.
    All or nothing: the folder is written beside its place and renamed. Returns
    meta.json's contents. Raises BadInput."""
    encoder = load_tokenizer(tokenizer)
    out = os.path.realpath(out)
    check_place(out)
    temporary = temporary_folder(out)
    try:
        meta = {"tokenizer": tokenizer, "tokenizer_sha256": fingerprint(encoder)}
        meta |= write_tokens(documents, temporary, encoder, max_tokens)
        with open(f"{temporary}/meta.json", "w") as f:
            json.dump(meta, f, indent=1)
            flush(f)
        replace_folder(temporary, out)
    except OSError as e:
        raise BadInput(f"cannot write {out}: {why(e)}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def check_place(out):
    """Raises BadInput where token files cannot be: for a file, a mount point, which no folder
    can be renamed to, and a folder with files that are none of ours."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadInput(f"{out} is a file; --out names a folder")
    if os.path.ismount(out):
        raise BadInput(f"{out} is where a disk is mounted; name a folder in it with --out")
    try:
        held = os.listdir(out)
    except (FileNotFoundError, NotADirectoryError):     # none yet, or another run is replacing it
        held = []
    except OSError as e:
        raise BadInput(f"cannot read {out}: {e.strerror}") from e
    ours = ("train.bin", "val.bin", "meta.json", "bigrams.npz")         # the last: recall.py's
    if any(name not in ours and not re.fullmatch(r"bigrams\.npz\.\d+\.tmp", name) for name in held):
        raise BadInput(f"{out} holds other files; --out names a folder of its own")


def write_tokens(documents, folder, encoder, max_tokens):
    """Write train.bin and val.bin. Returns what meta.json says of them."""
    dtype = np.dtype(np.uint16 if encoder.n_vocab <= 2**16 else np.uint32)
    n_documents = n_train = n_val = largest = 0
    digest = hashlib.sha256()
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val:
        for ids, share in encoded(documents, encoder):
            ids = np.array([*ids, encoder.eot_token])
            largest = max(largest, ids.max().item())
            if largest >= encoder.n_vocab:
                raise BadInput(f"the tokenizer gives the id {largest}, and its vocabulary has "
                               f"{encoder.n_vocab}; choose another one")
            ids = ids.astype(dtype)
            cut = len(ids) - int(share * len(ids))
            to_train, to_val = ids[:cut], ids[cut:]
            if 0 < cut < len(ids):                      # here, too, the document ends
                to_train = np.append(to_train, ids[-1])
            to_train.tofile(train)
            to_val.tofile(val)
            digest.update(to_train.tobytes() + to_val.tobytes())
            n_documents += 1
            n_train += len(to_train)
            n_val += len(to_val)
            if n_train >= max_tokens:
                break
        flush(train)
        flush(val)
    if n_documents == 0:
        raise BadInput("no text in there: every file is empty or not UTF-8")
    if min(n_train, n_val) < 64:
        raise BadInput(f"{n_train + n_val} tokens, {n_val} of them held out, are too short a text; "
                       "expected 64 held out (of many documents every 20th, of few the last "
                       "twentieth of each): take more text, or a larger --tokens")
    return {"vocab_size": encoder.n_vocab, "end_of_text": encoder.eot_token, "dtype": dtype.name,
            "documents": n_documents, "train_tokens": n_train, "val_tokens": n_val,
            "largest_id": largest, "sha256": digest.hexdigest()}


def encoded(documents, encoder):
    """Yield (ids, share) for each document, a list and a number, encoded 64 at once, or fewer
    if they are long."""
    for batch in batches(documents):
        pieces = [within_limits(text) for text, _ in batch]             # of each text, a list
        ids = iter(encoder.encode_ordinary_batch(list(itertools.chain(*pieces))))
        for of_text, (_, share) in zip(pieces, batch, strict=True):
            yield list(itertools.chain(*itertools.islice(ids, len(of_text)))), share


def batches(documents, most=1 << 22):
    """Lists of 64 documents (text, share), or of fewer that together have `most` characters."""
    batch = []
    for document in documents:
        batch.append(document)
        if len(batch) == 64 or sum(len(text) for text, _ in batch) >= most:
            yield batch
            batch = []
    if batch:
        yield batch


def within_limits(text):
    """The text in pieces: one, but for a cut after each 100,000 blanks in a row, which
    no token then crosses. tiktoken 0.14 panics at a run of 1,000,000, where the engine
    of its pattern is out of steps, by what `except Exception` does not catch."""
    limit = 100_000
    if len(text) <= limit:
        return [text]
    runs = re.finditer(rf"\s{{1,{limit}}}", text)
    cuts = [run.end() for run in runs if run.end() - run.start() == limit]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def flush(f):
    f.flush()
    os.fsync(f.fileno())


def replace_folder(new, place):
    """Rename the folder `new` to `place`. What is there goes, once the new one is in its
    place, also what another run puts there in between: of two runs that prepare one folder,
    the last one stays."""
    old = f"{new}.old.tmp"
    try:
        while True:
            try:
                os.rename(new, place)
                break
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(place, old)
    finally:
        if os.path.exists(old) and not os.path.exists(place):       # Ctrl-C in between
            os.rename(old, place)
        shutil.rmtree(old, ignore_errors=True)


class Corpus(NamedTuple):
    """A folder of token files: two memory-mapped arrays of ids, and meta.json."""
    train: np.ndarray
    val: np.ndarray                 # held out
    meta: dict


def load_corpus(folder):
    """The Corpus in a folder. Raises BadInput."""
    if not folder:
        raise BadInput("--data is empty; name a folder of token files")
    try:
        with open(f"{folder}/meta.json") as f:
            meta = json.load(f)
        dtype = np.dtype(meta["dtype"])
        expected = (meta["train_tokens"], meta["val_tokens"])
        for name, kind in (("tokenizer", str), ("vocab_size", int)):
            if not isinstance(meta[name], kind):
                raise TypeError(f"{name} is {meta[name]!r}")
        train = np.memmap(f"{folder}/train.bin", dtype=dtype, mode="r")
        val = np.memmap(f"{folder}/val.bin", dtype=dtype, mode="r")
    except OSError as e:
        raise BadInput(f"no token files in {folder} ({type(e).__name__}: {one_line(e)}); if it "
                       f"is text: python data/prepare.py {folder} --out=data/NAME") from e
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"the token files in {folder} are damaged ({type(e).__name__}: "
                       f"{one_line(e)}); make them again: python data/prepare.py") from e
    if (len(train), len(val)) != expected:
        raise BadInput(f"the token files in {folder} are cut short; make them again: "
                       "python data/prepare.py")
    return Corpus(train, val, meta)


# ----------------------------------------------------------------------------------------
# run as a script


def source(options, left_out):
    """What the options name: its documents, and a name for the folder of their tokens.
    left_out: a list for the paths of files that are not UTF-8. Raises BadInput."""
    words = options.words
    if sum((bool(words), options.site_packages, bool(options.packages))) > 1:
        raise BadInput("name one source: --site-packages, --packages=FILE, or files and folders")
    if options.ext and not words:
        raise BadInput("--ext chooses among the files of folders; name a folder")
    if options.packages:
        return wheel_documents(options.packages.split(","), options.wheels), "packages"
    if len(words) == 1 and words[0] in DATASETS:
        return download(words[0]), words[0]
    if words:
        names = [name.strip().lower() for name in options.ext.split(",") if options.ext]
        if not all(re.fullmatch(r"[\w.-]*\w", name) for name in names):
            raise BadInput(f"--ext={options.ext}; expected endings such as .md,.py")
        endings = tuple(name if name[0] in "._" else "." + name for name in names)
        made = [options.train_bpe, options.out or f"{HERE}/text"]
        tokenizer = from_any_folder(options.tokenizer).removeprefix("hf:")
        if os.path.isabs(tokenizer):        # else it is a name, and no file
            made.append(tokenizer)
        return read_documents(text_files(words, endings, made), left_out), "text"
    folder = "python-all" if options.site_packages else "python"
    return read_documents(python_files(options.site_packages), left_out), folder


def from_any_folder(tokenizer):
    """A tokenizer's name; of a file or folder its whole path, for those who read the text, or a
    model trained on it, from elsewhere."""
    prefix = "hf:" if tokenizer.startswith("hf:") else ""
    path = tokenizer.removeprefix(prefix)
    if path.endswith(".tiktoken") or prefix and os.path.exists(path):
        return prefix + os.path.abspath(path)
    return tokenizer


def main():
    given = command_line(Options, __doc__)
    options = Options(**given)
    tokenizer = options.tokenizer
    if options.train_bpe and "tokenizer" in given:
        raise BadInput("--train_bpe learns the tokenizer that cuts the text; leave out --tokenizer")
    if options.train_bpe:
        documents, name = source(options, [])
        check_place(os.path.realpath(options.out or f"{HERE}/{name}"))
        if name in DATASETS:
            raise BadInput(f"--train_bpe reads a source to its end, and {name} has hundreds of "
                           "gigabytes; learn from files of yours, and name the result with "
                           "--tokenizer")
        train_bpe(documents, options.train_bpe)
        tokenizer = options.train_bpe
    left_out = []
    documents, folder = source(options, left_out)
    out = options.out or f"{HERE}/{folder}"
    meta = write_corpus(documents, out, from_any_folder(tokenizer), options.tokens or math.inf)
    for path in left_out[:10]:
        print(f"left out, not UTF-8: {path}", file=sys.stderr)
    if left_out:
        print(f"files left out because they are not UTF-8: {len(left_out)}", file=sys.stderr)
    print(f"{out}: {meta['documents']:,} documents, {meta['train_tokens']:,} tokens to train on, "
          f"{meta['val_tokens']:,} held out, sha256 {meta['sha256']}")


if __name__ == "__main__":
    run_script(main)
