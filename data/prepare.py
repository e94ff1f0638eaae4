"""Text to token files.

    python data/prepare.py                          the Python source on this machine (standard library) -> data/python
    python data/prepare.py --site-packages          the same with every installed package, for GPU-sized runs
    python data/prepare.py FILE_OR_FOLDER...        your own text -> data/text
    python data/prepare.py fineweb-edu --tokens=1e9 FineWeb-Edu or slimpajama, through the `datasets` library

Each writes train.bin and val.bin (flat uint16, uint32 for a vocabulary over 65,536) and meta.json (vocabulary, tokenizer,
counts, sha256) into --out. Documents end with the end-of-text token. The split is 95/5: every 20th document is held out;
where there are fewer than 20 documents, the last 5 % of each.

--tokenizer is "code4096" (data/code4096.tiktoken, a byte-level BPE of the standard library; `--train_bpe` made it), the
name of a tiktoken encoding ("gpt2", "cl100k_base"), or "hf:NAME" for a Hugging Face tokenizer or folder.
"""
import base64, difflib, hashlib, json, math, os, shutil, site, sys, sysconfig, types

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""       # where BPE may not merge across
DATASETS = {"fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT"), "slimpajama": ("cerebras/SlimPajama-627B", None)}


# ---------------------------------------------------------------------------------------------------------------------
# the command line, for every script here: --name=value over a set of defaults


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line: what was wrong, what was expected, what to do."""


def command_line(doc, **defaults):
    """Read sys.argv as --name=value (or --name value; dashes and underscores are the same). A value takes the type of
    its default; numbers are from 0 up. Words without -- go to `words`, if that is among the defaults. Returns a namespace."""
    o, args = dict(defaults), sys.argv[1:]
    if {"--help", "-h"} & set(args):
        print(doc.strip(), "\n\noptions and defaults:")
        print("\n".join(f"  --{k}={v}" for k, v in defaults.items() if k != "words"))
        sys.exit(0)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            if "words" not in o:
                raise BadInput(f"{arg!r} is not an option; options look like --name=value")
            o["words"] = o["words"] + [arg]
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name not in defaults or name == "words":
            near = difflib.get_close_matches(name, defaults, 1, 0)
            raise BadInput(f"unknown option --{name}" + (f"; the nearest known one is --{near[0]}" if near else ""))
        kind = type(defaults[name])
        if kind is bool and not equals:
            value = "true"
        elif not equals:
            if not args:
                raise BadInput(f"--{name} needs a value, as in --{name}={defaults[name]}")
            value = args.pop(0)
        try:
            if kind is bool:
                o[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif kind is int:
                o[name] = int(float(value)) if float(value).is_integer() else int(value)
            else:
                o[name] = kind(value)
        except (ValueError, KeyError, OverflowError):
            raise BadInput(f"--{name}={value} is not {'true or false' if kind is bool else 'a number'}; "
                           f"the default is {defaults[name]}")
        if kind in (int, float) and not 0 <= o[name] < math.inf:
            raise BadInput(f"--{name}={value} is not a number from 0 up; the default is {defaults[name]}")
    if "device" in o:
        check_device(o["device"])
    return types.SimpleNamespace(**o)


def check_device(name):
    """Raises BadInput where tensors cannot be put on the device `name`, such as cpu, cuda or cuda:1."""
    import torch
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(1, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():     # asked without making a context on the first GPU
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs that PyTorch can use")
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"--device={name} cannot be used here: {' '.join(str(e).split())[:200]}")


def main_line(main):
    """Run a script's main; what the user can mend ends it with one line and exit status 2."""
    try:
        main()
    except BadInput as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def load_tokenizer(name):
    """-> an object with n_vocab, eot_token, encode_ordinary(text), encode_ordinary_batch(texts), decode(ids)."""
    if name == "code4096":
        import tiktoken
        with open(f"{HERE}/code4096.tiktoken") as f:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
        return tiktoken.Encoding("code4096", pat_str=WORDS, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if name.startswith("hf:"):
        return HuggingFace(name[3:])
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        known = difflib.get_close_matches(name, tiktoken.list_encoding_names(), 1, 0)[0]
        raise BadInput(f"no tokenizer {name!r}; expected code4096, a tiktoken encoding (the nearest is {known}) or hf:NAME")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:                                     # tiktoken fetches it; any network error lands here
        raise BadInput(f"tiktoken could not fetch {name!r} ({type(e).__name__}); use --tokenizer=code4096 offline")


class HuggingFace:
    """A Hugging Face tokenizer with tiktoken's method names."""

    def __init__(self, name):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise BadInput("hf: tokenizers need the transformers library: pip install transformers")
        try:
            self.tok = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as e:
            raise BadInput(f"no tokenizer at {name!r}: {' '.join(str(e).split())[:200]}")
        self.n_vocab, self.eot_token = len(self.tok), self.tok.eos_token_id

    def encode_ordinary(self, text):
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def encode_ordinary_batch(self, texts):
        return self.tok(texts, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        return self.tok.decode(ids)


def train_bpe(docs, path, n=4095):
    """Learn n byte-level BPE tokens from docs and write them as tiktoken's ranks: base64 bytes, rank."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise BadInput("--train_bpe needs the tokenizers library: pip install tokenizers")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(docs, trainers.BpeTrainer(vocab_size=n, initial_alphabet=alphabet, show_progress=False))
    # The trainer spells each byte as one printable character: printable latin-1 as itself, the rest from U+0100 on.
    plain = [b for b in range(256) if chr(b) in alphabet]
    byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}
    vocab = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    with open(path, "w") as f:
        for rank, token in enumerate(vocab):
            f.write(f"{base64.b64encode(bytes(byte[c] for c in token)).decode()} {rank}\n")


# ---------------------------------------------------------------------------------------------------------------------
# documents


def python_files(site_packages=False):
    """Paths of the Python source on this machine, sorted, tests left out."""
    stdlib, roots = sysconfig.get_paths()["stdlib"], []
    for root, folders, files in os.walk(stdlib):
        folders[:] = [d for d in folders if d not in ("site-packages", "dist-packages")]
        roots += [os.path.join(root, f) for f in files]
    if site_packages:
        for folder in dict.fromkeys(site.getsitepackages() + [sysconfig.get_paths()["purelib"]]):
            roots += [os.path.join(root, f) for root, _, files in os.walk(folder) for f in files]
    parts = lambda p: p.replace("-", "_").lower().split(os.sep)
    is_test = lambda p: any(x in ("test", "tests", "idle_test", "testing") or x.startswith("test_") for x in parts(p))
    return sorted(p for p in set(roots) if p.endswith(".py") and not is_test(p))


def text_files(words):
    """The files named, and those in the folders named, sorted."""
    found = []
    for word in words:
        if os.path.isdir(word):
            found += sorted(os.path.join(r, f) for r, _, files in os.walk(word) for f in files if not f.startswith("."))
        elif os.path.isfile(word):
            found.append(word)
        else:
            near = difflib.get_close_matches(word, DATASETS, 1)
            raise BadInput(f"no file or folder {word}" + (f"; did you mean {near[0]}?" if near else ""))
    if not found:
        raise BadInput(f"no files in {' '.join(words)}")
    return found


def read_documents(paths, strict):
    """Yield each file's text; a file that is not UTF-8 is an error (strict) or left out."""
    for path in paths:
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        except UnicodeDecodeError as e:
            if strict:
                raise BadInput(f"{path} is not UTF-8 text (byte {e.start}); convert it, or leave it out")
            continue
        except OSError as e:
            raise BadInput(f"cannot read {path}: {e.strerror}")
        if text.strip():
            yield text


def download(name):
    """Yield documents of a public dataset, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput(f"{name} comes through the datasets library: pip install datasets")
    path, subset = DATASETS[name]
    try:
        for row in load_dataset(path, subset, split="train", streaming=True):
            yield row["text"]
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {path}: {' '.join(str(e).split())[:200]}")


# ---------------------------------------------------------------------------------------------------------------------
# token files


def write_corpus(docs, out, tokenizer, max_tokens=float("inf")):
    """Tokenize docs (an iterable of texts) into out/train.bin, out/val.bin and out/meta.json. All or nothing: the
    folder is written beside its place and renamed. Returns meta."""
    tok = load_tokenizer(tokenizer)
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadInput(f"{out} is a file; --out names a folder")
    if os.path.isdir(out) and set(os.listdir(out)) - {"train.bin", "val.bin", "meta.json"}:
        raise BadInput(f"{out} holds other files; --out names a folder of its own")
    tmp = f"{out.rstrip('/')}.{os.getpid()}.tmp"                 # its own, where two runs that start together both prepare it
    os.makedirs(tmp)
    dtype = np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32
    count, digest = {"train": 0, "val": 0}, hashlib.sha256()
    files = {split: open(f"{tmp}/{split}.bin", "wb") for split in count}

    def write(split, ids):
        ids = np.array(ids, dtype=dtype)
        ids.tofile(files[split])
        digest.update(ids.tobytes())
        count[split] += len(ids)

    few, n_docs = [], 0                                        # the first documents wait, until we know there are 20
    try:
        for batch in batches(docs, 64):
            for ids in tok.encode_ordinary_batch(batch):
                few, n_docs = (few or []) + [ids + [tok.eot_token]], n_docs + 1
                if n_docs >= 20:
                    for i, ids in enumerate(few, n_docs - len(few)):
                        write("val" if i % 20 == 19 else "train", ids)
                    few = []
            if sum(count.values()) >= max_tokens:
                break
        for ids in few:
            cut = len(ids) - len(ids) // 20
            write("train", ids[:cut]), write("val", ids[cut:])
        for f in files.values():
            f.close()
        if n_docs == 0:
            raise BadInput("no text in there: every file is empty")
        if count["val"] < 64:
            raise BadInput(f"{sum(count.values())} tokens are too short a text; expected at least 1,280, for 64 to be held out")
        meta = {"tokenizer": tokenizer, "vocab_size": tok.n_vocab, "dtype": np.dtype(dtype).name, "documents": n_docs,
                "train_tokens": count["train"], "val_tokens": count["val"], "sha256": digest.hexdigest()}
        with open(f"{tmp}/meta.json", "w") as f:
            json.dump(meta, f, indent=1)
        shutil.rmtree(out, ignore_errors=True)
        try:
            os.rename(tmp, out)
        except OSError:
            if not os.path.exists(f"{out}/meta.json"):                # else another run put its own there in between
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return meta


def batches(items, n):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield batch
            batch = []
    if batch:
        yield batch


def load_corpus(folder):
    """-> (train, val, meta): two memory-mapped arrays of token ids."""
    try:
        with open(f"{folder}/meta.json") as f:
            meta = json.load(f)
        train, val = (np.memmap(f"{folder}/{split}.bin", dtype=meta["dtype"], mode="r") for split in ("train", "val"))
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"no token files in {folder} ({type(e).__name__}); make them: python data/prepare.py")
    if (len(train), len(val)) != (meta["train_tokens"], meta["val_tokens"]):
        raise BadInput(f"the token files in {folder} are cut short; make them again: python data/prepare.py")
    return train, val, meta


def main():
    o = command_line(__doc__, words=[], out="", tokenizer="code4096", site_packages=False, tokens=0, train_bpe=False)
    if o.train_bpe:
        train_bpe(read_documents(python_files(), False), f"{HERE}/code4096.tiktoken")
        return print(f"{HERE}/code4096.tiktoken written")
    if len(o.words) == 1 and o.words[0] in DATASETS:
        docs, out = download(o.words[0]), o.words[0]
    elif o.words:
        docs, out = read_documents(text_files(o.words), True), "text"
    else:
        docs, out = read_documents(python_files(o.site_packages), False), "python-all" if o.site_packages else "python"
    out = o.out or f"{HERE}/{out}"
    meta = write_corpus(docs, out, o.tokenizer, o.tokens or float("inf"))
    print(f"{out}: {meta['documents']:,} documents, {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} held out")


if __name__ == "__main__":
    main_line(main)
