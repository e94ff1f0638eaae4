"""The command line of every script, and the error that ends a script in one line.

A script's options are a dataclass, one field per line with its default and its meaning:

    @dataclass
    class Options:
        steps: int = option(800, "optimizer steps")

    options = Options(**command_line(Options, __doc__))

Every script imports this module before torch, because of OMP_WAIT_POLICY below.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import math
import os
import re
import signal
import sys

# Threads that wait sleep instead of spinning. Beside other work on the machine, a spinning
# thread takes the core that the one it waits for needs: a run is then many times slower.
# OpenMP reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Until run_script takes over, Ctrl-C ends a script of ours silently: in the imports of torch,
# which take seconds, Python would print where it was. Not where others import us.
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = [os.path.join(HERE, *name.split("/")) for name in (
    "kernels.py", "model.py", "expand.py", "train.py", "data/prepare.py", "data/recall.py",
    "data/harness.py")]
started = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
if started in SCRIPTS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: what was wrong, what
    was expected, what to do."""


def option(default, meaning, choices=None, words=False, alias=None):
    """A field of an options dataclass. choices: the values allowed; words: it takes all
    words of the command line that belong to no option; alias: an older name."""
    metadata = {"meaning": meaning, "choices": choices, "words": words, "alias": alias}
    return dataclasses.field(default=default, metadata=metadata)


def command_line(Options, doc, arguments=None):
    """What the user typed, as a dict: --name=value or --name value, dashes and underscores
    alike, numbers from 0 up. Only what was typed is in it, so that a script can put a preset
    between the defaults and it.

    arguments: a list of words, None for this process's own. Raises BadInput. --help prints
    doc and the options."""
    parser = Parser(
        description=doc.strip(), usage="%(prog)s [--option=value ...]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Options):
        about = field.metadata["meaning"].replace("%", "%%")
        names = [f"--{name}" for name in (field.name, field.metadata["alias"]) if name]
        if field.metadata["words"]:
            parser.add_argument(field.name, nargs="*", help=about)
        elif isinstance(field.default, bool):
            parser.add_argument(*names, type=true_or_false, nargs="?", const=True,
                                metavar="true/false", help=about)
        else:
            kind = {int: whole_number, float: number}.get(type(field.default), str)
            shown = f" [{field.default}]" if field.default != "" else ""
            parser.add_argument(*names, type=kind, choices=field.metadata["choices"],
                                metavar=field.name.upper(), help=about + shown)
    words = sys.argv[1:] if arguments is None else arguments
    given, unknown = parser.parse_known_intermixed_args([underscored(word) for word in words])
    if unknown:
        known = [f"--{field.name}" for field in dataclasses.fields(Options)
                 if not field.metadata["words"]]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.7)
        hint = f"the nearest known one is {nearest[0]}; " if nearest else ""
        if not unknown[0].startswith("-"):
            hint = "expected --name=value; "
        raise BadInput(f"unknown option {unknown[0]}; {hint}--help lists them all")
    return vars(given)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def underscored(word):
    """--block-size=3 as --block_size=3; a word that is no option, and -x, as it is."""
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[\w-]+", name):
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


def true_or_false(text):
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text} is not true or false")
    return values[text.lower()]


def number(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def whole_number(text):
    """1e9 is one too; more than 63 bits are not, for they would not fit a seed."""
    value = int(text) if text.isdigit() else number(text)
    if value != int(value) or value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 up, below 2^63")
    return int(value)


def pick_device(name):
    """`name`, or where it is empty the GPU if there is one, else the CPU. A GPU with a number
    becomes the current one. Raises BadInput where tensors cannot be put there and read back."""
    import torch
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return "cpu"                                # cpu:0 is the same one
        if device.type != "cuda":
            torch.zeros(1, device=device).item()
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs that PyTorch can use")
        elif device.index is not None:      # what is recorded or measured is on the current one
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise BadInput(f"--device={name} cannot be used here; expected cpu, cuda or cuda:1: "
                       f"{one_line(e)}") from e
    return name


def number_list(name, text):
    """The value `text` of the option `name`, a list: "4,8" -> [4, 8], "" -> []. Raises
    BadInput unless they are whole numbers above 0, no two alike."""
    try:
        listed = [int(word) for word in text.split(",")] if text else []
    except ValueError:
        listed = [0]                                    # refused below
    if len(set(listed)) < len(listed) or not all(x > 0 for x in listed):
        raise BadInput(f"--{name}={text} is not a list of whole numbers above 0, no two alike; "
                       "expected such as 4,8")
    return listed


def write_file(path, write):
    """A file at path, filled by write(file): written beside its place under a name of this
    process, flushed to the disk and renamed, so that a kill at any moment leaves the old file
    or the new. Raises BadInput, also for what is no file, such as /dev/null, which the file
    would replace for everybody."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"cannot write {path}: it is a folder or a device; name a file")
    part = f"{path}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:    # torch.save's RuntimeError may be a full disk
        raise BadInput(f"cannot write {path}: {why(e)}; what was there is untouched") from e
    finally:                                            # also after Ctrl-C
        with contextlib.suppress(OSError):
            os.remove(part)


def check_json(path):
    """Raises BadInput, before anything is computed, where --json=path could not be written."""
    folder = os.path.dirname(path) or "."
    if path and not os.path.isdir(folder):
        raise BadInput(f"--json={path}: there is no such folder; make it first")
    if os.path.isdir(path) or path and not path.endswith(".json"):
        raise BadInput(f"--json={path}; expected a file's name, which ends in .json")
    if path and not os.access(folder, os.W_OK):
        raise BadInput(f"--json={path}: its folder cannot be written in")


def why(error):
    """Why a file could not be written, by the exception."""
    said = getattr(error, "strerror", None) or one_line(error)
    if "inline_container" in said or "requested and" in said:   # torch.save's, NumPy's words for it
        said = f"the disk may be full ({said})"
    return said


def temporary_folder(place):
    """Make a folder beside `place`, for what is renamed to it when it is whole: under a name
    of its own, which a process elsewhere that shares the disk does not take, either. Raises
    BadInput."""
    path = f"{place}.{os.getpid()}-{os.urandom(3).hex()}.tmp"
    try:
        os.makedirs(path)
    except OSError as e:
        raise BadInput(f"cannot write {place}: {e.strerror or e}") from e
    return path


def one_line(error, most=200):
    """What an exception says, on one line, cut to words of `most` characters; its kind
    where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    if len(said) <= most:
        return said
    return (said[:most].rpartition(" ")[0] or said[:most]) + " ..."


def out_of_memory(error):
    """Whether it is one of Python's, NumPy's or PyTorch's exceptions that say so."""
    names = [kind.__name__ for kind in type(error).__mro__]     # torch may not be loaded
    signs = ("DefaultCPUAllocator", "Storage size calculation overflowed", "array is too big")
    return ("MemoryError" in names or "OutOfMemoryError" in names
            or any(sign in str(error) for sign in signs))


def run_script(main):
    """Run a script's main. What the user can mend ends it with one line and status 2,
    Ctrl-C with 130, a reader that went away with 141, a closed terminal with 129, SIGTERM
    with 143."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                  # closed, as by >&- or 2>&-
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # text that the terminal cannot show
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)    # KeyboardInterrupt, below
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # half-written files go
            # a library's forked workers end by SIGTERM; one that waits for a lock would miss ours
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(
                    after_in_child=functools.partial(signal.signal, number, signal.SIG_DFL))
    try:
        main()
        sys.stdout.flush()
    except (MemoryError, RuntimeError, ValueError) as e:        # BadInput is a ValueError
        message = str(e)
        if out_of_memory(e):
            message = ("out of memory; a smaller model or fewer tokens at a time take less "
                       f"({one_line(e)})")
        elif not isinstance(e, BadInput):
            raise
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.splitlines())}",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # what is still to be printed goes nowhere, or the end would fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):      # as in `python data/recall.py ... | head`
            sys.exit(141)
        print(f"{os.path.basename(sys.argv[0])}: cannot write {e.filename or 'the output'}: "
              f"{e.strerror or e}", file=sys.stderr)
        sys.exit(2)
