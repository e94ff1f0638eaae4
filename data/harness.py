"""lm-evaluation-harness on any checkpoint of ours.

    python data/harness.py --ckpt=out/recipe-gla/statex.pt --tasks=swde,fda,squad_completion

The harness's class for Hugging Face models does the work: it cuts texts into tokens and
batches, and scores. Here it gets an LM of ours instead of a model of theirs, so a model
that a public format holds has the same numbers here and, exported, in the harness itself:

    python model.py --ckpt=out/recipe-mamba2/statex.pt --export=FOLDER
    lm_eval run --model hf --model_args pretrained=FOLDER --tasks swde fda squad_completion

An exported GLA is read by flash-linear-attention, which the harness has to import first:
`python -c "import fla; from lm_eval.__main__ import cli_evaluate; cli_evaluate()" run ...`
(with transformers 5.24.0 and fla 0.6.0 its generate() loses the state; 5.23.0 is right).

Tasks are called as in the harness (`lm_eval ls tasks`); --include_path adds a folder of
your own. Needs: pip install "lm_eval[hf]"
"""
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.options import (
    BadInput,
    check_json,
    command_line,
    one_line,
    option,
    pick_device,
    run_script,
    why,
    write_file,
)

import torch

from data.public import write_tokenizer
from model import LM


@dataclass
class Options:
    ckpt: str = option("", "the checkpoint to score: a .pt file, a folder or a hub id")
    tasks: str = option("", "names of tasks or groups, or task files, with commas between")
    include_path: str = option("", "a folder with more task files")
    limit: int = option(0, "score this many documents per task only; 0 for all")
    batch_size: int = option(16, "sequences at a time")
    max_length: int = option(2048, "tokens of a sequence; of a longer one, the last are taken")
    bfloat16: bool = option(False, "multiply matrices in bfloat16")
    metadata: str = option("", 'for tasks that ask: {"max_seq_lengths": [4096]} for RULER')
    json: str = option("", "write the scores into this file too")
    device: str = option("", "where to compute; by default on a GPU if there is one")


class HarnessModel(torch.nn.Module):
    """An LM of ours with the part of transformers' interface that the harness uses."""

    def __init__(self, lm, end_of_text):
        super().__init__()
        self.lm = lm
        self.end_of_text = end_of_text
        self.config = SimpleNamespace(model_type="statex")

    @property
    def device(self):
        return self.lm.embeddings.weight.device

    def tie_weights(self):
        """They are."""

    def forward(self, input_ids):
        """input_ids (B,T) -> an object with logits (B,T,vocab_size)."""
        return SimpleNamespace(logits=self.lm(input_ids)[0])

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_length, stopping_criteria, do_sample=False,
                 **unused):
        """input_ids (B,T), padded on the left where attention_mask (B,T) is 0 -> (B, at
        most max_length), they and the likeliest tokens after them; a row that has ended
        goes on with end-of-text. stopping_criteria: a function of such tokens, whether
        each row may end, or all. Raises BadInput where tokens are to be drawn."""
        if do_sample:
            raise BadInput("a task draws its answers at random; only greedy ones are built")
        prompts = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        for token in self.lm.stream(prompts, max(1, max_length - input_ids.shape[1]),
                                    temperature=0, stop=self.end_of_text):
            input_ids = torch.cat((input_ids, token[:, None]), dim=1)
            if torch.as_tensor(stopping_criteria(input_ids, None)).all():
                break
        return input_ids


def evaluate(lm, options):
    """-> what lm_eval.simple_evaluate returns. Raises BadInput, also for what it raises."""
    try:
        import lm_eval
        from datasets.exceptions import DatasetsError
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import AutoTokenizer
        from yaml import YAMLError
    except ImportError as e:
        raise BadInput(f"{e}; to score with lm-evaluation-harness: "
                       'pip install "lm_eval[hf]"') from e
    tasks = [name for name in options.tasks.split(",") if name]
    if options.include_path and not os.path.isdir(options.include_path):
        raise BadInput(f"--include_path={options.include_path} is no folder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, end_of_text = write_tokenizer(lm.config.tokenizer, folder)
        except OSError as e:
            raise BadInput(f"cannot write the tokenizer into {folder}: {why(e)}") from e
        if end_of_text is None:
            raise BadInput(f"the tokenizer of {options.ckpt} is {lm.config.tokenizer!r}, which is "
                           "not to be had here; expected one that data/prepare.py can load")
        # RULER makes texts of a length in tokens, and asks its metadata for the tokenizer
        metadata = {"tokenizer": folder} | read_metadata(options.metadata)
        try:
            manager = TaskManager(include_path=options.include_path or None, metadata=metadata)
            for name in tasks:
                if not name.endswith(".yaml") and not manager.match_tasks([name]):
                    raise BadInput(f"the harness has no task {name}; `lm_eval ls tasks` lists "
                                   "them, and --include_path adds yours")
            model = HFLM(pretrained=HarnessModel(lm, end_of_text), backend="causal",
                         tokenizer=AutoTokenizer.from_pretrained(folder),
                         batch_size=options.batch_size, max_length=options.max_length,
                         mixed_precision_dtype="bfloat16" if options.bfloat16 else None)
            return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager,
                                           limit=options.limit or None)
        except BadInput:
            raise
        # data that is not there, a wrong file, texts that --max_length leaves no room for
        except (OSError, ValueError, KeyError, AssertionError, DatasetsError, YAMLError) as e:
            raise BadInput(f"the harness cannot run {options.tasks}: "
                           f"{type(e).__name__}: {one_line(e, 300)}") from e


def read_metadata(text):
    """The value of --metadata, a dict. Raises BadInput."""
    try:
        metadata = json.loads(text or "{}")
    except ValueError as e:
        raise BadInput(f"--metadata={text} is not JSON ({e})") from e
    if not isinstance(metadata, dict):
        raise BadInput(f"--metadata={text} is not an object in braces")
    return metadata


def main():
    options = Options(**command_line(Options, __doc__))
    if not options.ckpt or not options.tasks:
        raise BadInput("name a checkpoint and tasks: --ckpt=out/recipe-gla/statex.pt "
                       "--tasks=swde,fda")
    if not options.batch_size or not options.max_length:
        raise BadInput("--batch_size and --max_length must be at least 1")
    check_json(options.json)
    lm = LM.from_pretrained(options.ckpt).to(pick_device(options.device)).eval()
    if options.bfloat16:
        lm.float()                              # autocast takes no float16
    results = evaluate(lm, options)
    from lm_eval.utils import make_table
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if options.json:
        scores = {"ckpt": options.ckpt, "results": results["results"]}
        encoded = json.dumps(scores, indent=1).encode()
        write_file(options.json, lambda file: file.write(encoded))


if __name__ == "__main__":
    run_script(main)
