"""Public checkpoint formats, read and written as plain dicts.

    config, tensors = read_folder("fla-hub/gla-1.3B-100B")      a folder, or a hub id
    write_folder(config, tensors, "folder")

config has model.Config's fields, tensors has the model's state_dict. This file knows no
model; it knows what others call the same things:

    flash-linear-attention   GLAForCausalLM, Mamba2ForCausalLM      read, GLA written
    transformers             Mamba2ForCausalLM                      read and written, with
                             several groups for 5.23 or later: before, all were normed as one
    mamba_ssm (state-spaces) MambaLMHeadModel with Mamba2 layers    read
    thunlp/StateX            its own GLAConfig and Mamba2Config     read

Public formats have one size for all layers. `write_folder` brings exact expansions to one
size without changing the function:

    Mamba2   y = S C: a layer with a smaller d_state gets rows of B and C that are zero.
    GLA      o_j = S_j^T (m_1j q_1, ..., m_fj q_f): the gates m go into the rows of q_proj,
             and each head gets the keys and decays that it shared as rows of its own.
"""
from data.options import BadInput, one_line, temporary_folder

import json
import math
import os
import re
import shutil
from dataclasses import dataclass

import torch

from data.prepare import byte_letters, load_tokenizer

# ---------------------------------------------------------------------------------------
# configurations

REQUIRED = object()


@dataclass
class Format:
    """What the config.json of one library may say, and what that means here.

    fields: our Config's field -> the library's names for it, the newest first; the type; the
    library's default. only: an option -> its values that mean what is built. ignored:
    options that do not change the function: they choose a kernel, a precision or an
    initialisation, or the library does not read them."""
    block: str
    fields: dict
    only: dict
    ignored: str


# Ignored in every library. Among them is what transformers writes for every model: before
# version 5, also how to generate.
COMMON = """architectures model_type torch_dtype dtype transformers_version auto_map use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id tokenizer_class return_dict
    output_hidden_states output_attentions is_decoder is_encoder_decoder add_cross_attention
    chunk_size_feed_forward tie_encoder_decoder tie_last_hidden_states torchscript id2label label2id
    problem_type initializer_range max_position_embeddings layer_types residual_in_fp32
    rescale_prenorm_residual fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy
    use_l2warp chunk_size statex_tokenizer use_bfloat16 tf_legacy_loss pruned_heads prefix
    cross_attention_hidden_size finetuning_task task_specific_params decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"""

NO_LIMIT = ([0.0, math.inf], None)         # of the time step

GLA = Format(
    block="gla",
    fields={
        "d_model": (("hidden_size",), int, REQUIRED),
        "n_layer": (("num_hidden_layers",), int, REQUIRED),
        "vocab_size": (("vocab_size",), int, REQUIRED),
        "n_head": (("num_heads", "num_attention_heads"), int, 4),
        "expand_k": (("expand_k",), float, 0.5),
        "expand_v": (("expand_v",), float, 1.0),
        "d_mlp": (("intermediate_size",), int, None),
        "hidden_ratio": (("hidden_ratio",), float, 4),
        "use_short_conv": (("use_short_conv",), bool, False),
        "conv_size": (("conv_size",), int, 4),
        "norm_eps": (("norm_eps", "rms_norm_eps"), float, 1e-6),
        "tie_embeddings": (("tie_word_embeddings",), bool, False),
    },
    only={
        "attn_mode": ("chunk", "fused_chunk", "fused_recurrent"),
        "hidden_act": ("swish", "silu"),
        "feature_map": (None,),
        "use_output_gate": (True,),
        "elementwise_affine": (True,),
        "clamp_min": (None,),
        "attn": (None, {}, []),
        "attnres_block_size": (None,),
        "layer_sharing": (None,),
    },
    # The library has never read use_gk and use_gv. It has not read share_conv_kernel since
    # July 2024: weights from before have an h_conv1d, which no model takes. Its layer has the
    # last three, but its model never hands them on.
    ignored="use_gk use_gv share_conv_kernel gate_logit_normalizer gate_low_rank_dim conv_bias",
)

MAMBA2 = Format(
    block="mamba2",
    fields={
        "d_model": (("hidden_size",), int, REQUIRED),
        "n_layer": (("num_hidden_layers",), int, REQUIRED),
        "vocab_size": (("vocab_size",), int, REQUIRED),
        "d_state": (("state_size",), int, 128),
        "headdim": (("head_dim",), int, 64),
        "expand": (("expand",), int, 2),
        "num_heads": (("num_heads",), int, None),
        "n_groups": (("n_groups",), int, None),
        "conv_size": (("conv_kernel",), int, 4),
        "norm_eps": (("layer_norm_epsilon", "norm_eps"), float, 1e-5),
        "tie_embeddings": (("tie_word_embeddings",), bool, False),
    },
    only={
        "hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "time_step_limit": NO_LIMIT,
        "dt_limit": NO_LIMIT,
        "rmsnorm": (True,),
        "norm_before_gate": (False,),
        "D_has_hdim": (False,),
        "layer_sharing": (None,),
        "drop_prop": (None,),
        "drop_mode": (None,),
    },
    ignored="""time_step_rank time_step_min time_step_max time_step_floor time_step_scale
        time_step_init_scheme dt_min dt_max dt_init_floor conv_init A_init_range rms_norm
        A_initializer_range conv_initializer_range emb_initializer_range intermediate_size""",
)

STATE_SPACES = Format(
    block="mamba2",
    fields={
        "d_model": (("d_model",), int, REQUIRED),
        "n_layer": (("n_layer",), int, REQUIRED),
        "vocab_size": (("vocab_size",), int, REQUIRED),
        "pad_vocab": (("pad_vocab_size_multiple",), int, 8),
        "d_state": (("ssm_cfg.d_state",), int, 128),
        "headdim": (("ssm_cfg.headdim",), int, 64),
        "expand": (("ssm_cfg.expand",), int, 2),
        "n_groups": (("ssm_cfg.ngroups",), int, 1),
        "conv_size": (("ssm_cfg.d_conv",), int, 4),
        "tie_embeddings": (("tie_embeddings",), bool, True),
    },
    only={
        "rms_norm": (True,),
        "d_intermediate": (0,),
        "attn_layer_idx": ([], None),
        "ssm_cfg.layer": ("Mamba2",),
        "ssm_cfg.rmsnorm": (True,),
        "ssm_cfg.norm_before_gate": (False,),
        "ssm_cfg.D_has_hdim": (False,),
        "ssm_cfg.bias": (False,),
        "ssm_cfg.conv_bias": (True,),
        "ssm_cfg.dt_limit": NO_LIMIT,
        "ssm_cfg.process_group": (None,),
    },
    # attn_cfg is for the layers in attn_layer_idx
    ignored="""attn_cfg fused_add_norm ssm_cfg.conv_init ssm_cfg.A_init_range ssm_cfg.dt_min
        ssm_cfg.dt_max ssm_cfg.dt_init_floor ssm_cfg.chunk_size ssm_cfg.use_mem_eff_path
        ssm_cfg.sequence_parallel""",
)


def read_config(public, folder):
    """A public config.json, as a dict -> a dict of our Config's fields.

    Every option in it is used, known not to change the function, or refused by name and
    value. folder is named in the messages. Raises BadInput."""
    where = f"{folder}/config.json"
    if not isinstance(public, dict):
        raise BadInput(f"{where} holds a {type(public).__name__}; expected the options of a model")
    options = {name: value for name, value in public.items() if not name.startswith("_")}
    library = recognise(options, where)
    config = {"block": library.block}
    for field, (names, kind, default) in library.fields.items():
        config[field] = take(options, names, kind, default, where)
    if library.block == "gla":
        finish_gla(config, options)
    else:
        finish_mamba2(config, options, where)
    ignored = f"{COMMON} {library.ignored}".split()
    # null for a name that the library does not know means nothing
    refused = [f"{name} = {value!r}" for name, value in options.items()
               if name not in ignored and value not in library.only.get(name, (None,))]
    if refused:
        raise BadInput(f"{where} asks for what is not built: {', '.join(refused)}")
    return config


def recognise(options, where):
    """The Format of these options. mamba_ssm's ssm_cfg is laid flat: ssm_cfg.d_state."""
    kind = options.get("model_type")
    if "ssm_cfg" in options or (kind is None and "d_model" in options):
        layers = options.pop("ssm_cfg", None) or {}
        if not isinstance(layers, dict):
            raise BadInput(f"{where}: ssm_cfg is {layers!r}; expected the options of the layers")
        layers = {"layer": "Mamba1"} | layers
        options |= {f"ssm_cfg.{name}": value for name, value in layers.items()}
        return STATE_SPACES
    if kind == "gla":
        return GLA
    if kind == "mamba2":
        return MAMBA2
    raise BadInput(f"{where}: model_type is {kind!r}; expected gla, mamba2, or state-spaces' "
                   "ssm_cfg")


def take(options, names, kind, default, where):
    """Removes an option, by all of its names, from options. Returns its value, or the
    default: null is as absent. Raises BadInput for a value of another kind."""
    given = {name: options.pop(name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if default is REQUIRED:
            raise BadInput(f"{where} lacks {names[0]}; expected a complete configuration")
        return default
    name, *others = given
    value = given[name]
    if any(given[other] != value for other in others):
        raise BadInput(f"{where} says {given}; expected one value for the same thing")
    expected = {int: "a whole number from 1 up", float: "a number above 0", bool: "true or false"}
    types = {int: (int,), float: (int, float), bool: (bool,)}
    fits = type(value) in types[kind] and (kind is bool or 0 < value < math.inf)
    if not fits:
        raise BadInput(f"{where}: {name} is {value!r}; expected {expected[kind]}")
    return value


def finish_gla(config, options):
    """Edits config by what follows from several options together, as the library has
    it, and takes out of options what asks for nothing but what is built."""
    ratio = config.pop("hidden_ratio")
    if config["d_mlp"] is None:
        config["d_mlp"] = math.ceil(int(config["d_model"] * ratio * 2 / 3) / 256) * 256
    if not config.pop("use_short_conv"):
        config["conv_size"] = 0
    for name in ("num_kv_heads", "num_key_value_heads"):
        if options.get(name) == config["n_head"]:
            options.pop(name)
    attention = options.get("attn")
    if isinstance(attention, dict) and attention.get("layers") == []:
        options.pop("attn")


def finish_mamba2(config, options, where):
    """As finish_gla."""
    inner = config["d_model"] * config["expand"]
    heads = config.pop("num_heads", None)
    if heads is not None and heads * config["headdim"] != inner:
        raise BadInput(f"{where}: num_heads {heads} x head_dim {config['headdim']} is not expand x "
                       f"hidden_size = {inner}; expected equal numbers")
    if options.get("ssm_cfg.d_ssm") == inner:
        options.pop("ssm_cfg.d_ssm")
    if config["n_groups"] is None:
        # the default of flash-linear-attention, which writes fuse_norm, and of transformers
        config["n_groups"] = 1 if "fuse_norm" in options else 8
    if "rmsnorm" not in options:
        # a library without the option rmsnorm may have this one, but does not read it
        options.pop("norm_before_gate", None)
    config.setdefault("norm_eps", 1e-5)                    # mamba_ssm has no option for it


# ---------------------------------------------------------------------------------------
# tensors

# A public name becomes ours by these replacements, in turn. The first takes off what
# torch.compile, checkpointing and FSDP put in front of any part of a name, the second what
# DistributedDataParallel and the libraries' outer classes put in front of all of it.
NAMES = (
    (r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", ""),
    (r"^(module\.|model\.|backbone\.)+", ""),
    (r"^(embedding|embed_tokens)\.", "embeddings."),
    (r"^norm_f\.", "norm."),
    (r"\.gla_norm\.", ".attn_norm."),                    # flash-linear-attention of February 2024
    (r"\.gla\.", ".attn."),
    (r"\.attn\.g_norm\.", ".attn.g_norm_swish_gate."),   # where norm and gate are not fused
)


def read_folder(name):
    """A folder in a public format, or a hub id -> config, tensors.

    config: a dict of our Config's fields, read_config's and tokenizer. tensors: our names
    -> float32 tensors on the CPU; of tied embeddings both names, for one tensor. Whether
    they are all there and fit the config is seen by whoever loads them into a model.
    Raises BadInput."""
    folder = local_folder(str(name))
    try:
        with open(f"{folder}/config.json", encoding="utf-8-sig") as file:   # some begin with a BOM
            public = json.load(file, object_hook=infinity)
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{folder} has no readable config.json ({type(e).__name__}); expected a "
                       "checkpoint folder") from e
    config = read_config(public, folder)
    config["tokenizer"] = f"hf:{os.path.abspath(name) if os.path.isdir(name) else name}"
    if "hidden_size" not in public:                        # mamba_ssm ships no tokenizer: it uses
        config["tokenizer"] = "hf:EleutherAI/gpt-neox-20b"
    if isinstance(public.get("statex_tokenizer"), str):
        config["tokenizer"] = public["statex_tokenizer"]
    tensors = {}
    for public_name, tensor in read_weights(folder):
        if not tensor.is_floating_point():
            raise BadInput(f"{folder}: {public_name} is of {tensor.dtype}; expected weights in "
                           "floating point, not quantized")
        for ours, part in our_tensors(public_name, tensor, config):
            if ours in tensors:
                raise BadInput(f"{folder}: {public_name} is there twice, under two names")
            tensors[ours] = part.float()
    if config["tie_embeddings"]:
        tie(config, tensors)
    return config, tensors


def infinity(value):
    """An object of a JSON file; that by which transformers spells infinity, as a number."""
    return math.inf if value == {"__float__": "Infinity"} else value


def our_tensors(name, tensor, config):
    """Yields name here, tensor for a public parameter. flash-linear-attention until
    February 2025 had the MLP's gate and up projections in one."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".mlp.gate_proj.weight") and tensor.shape[:1] == (2 * config["d_mlp"],):
        gate, up = tensor.chunk(2)
        yield name, gate.clone()
        yield name.replace("gate_proj", "up_proj"), up.clone()
    else:
        yield name, tensor


def tie(config, tensors):
    """One tensor under both names, whichever is there. Where both are there and differ,
    transformers does not tie them, and neither does this."""
    embedding = tensors.get("embeddings.weight", tensors.get("lm_head.weight"))
    if embedding is None:
        return
    head = tensors.get("lm_head.weight", embedding)
    config["tie_embeddings"] = torch.equal(embedding, head)
    tensors["embeddings.weight"] = embedding
    tensors["lm_head.weight"] = embedding if config["tie_embeddings"] else head


def local_folder(name):
    """The folder `name`, or where there is none, that of the hub id `name`."""
    if os.path.isdir(name):
        return name
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise BadInput(f"no file or folder {name}; to fetch it from the hub: "
                       "pip install huggingface_hub") from e
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin",
                                                       "tokenizer*", "*.txt"])
    except Exception as e:                                 # whatever network or hub answer
        raise BadInput(f"no file or folder {name}, and the hub did not give it "
                       f"({type(e).__name__})") from e


def read_weights(folder):
    """Yields name, tensor from model.safetensors or pytorch_model.bin, in one file or in
    shards. One tensor at a time, so that the file and a float32 copy of it are not in memory
    together; nothing but tensors is unpickled. Raises BadInput."""
    try:
        for path in weight_files(folder):
            if path.endswith(".bin"):
                weights = torch.load(path, map_location="cpu", weights_only=True)
                for name in list(weights):
                    if not isinstance(name, str) or not isinstance(weights[name], torch.Tensor):
                        raise BadInput(f"{path}: {name} is no tensor; expected a state_dict")
                    yield name, weights.pop(name)
                continue
            safe_open = import_safetensors().safe_open
            with safe_open(path, "pt") as file:
                names = list(file.keys())
            for name in names:
                with safe_open(path, "pt") as file:        # anew: what was read leaves memory
                    tensor = file.get_tensor(name)
                yield name, tensor
    except BadInput:
        raise
    except Exception as e:                                 # a missing shard, a cut file, no tensors
        raise BadInput(f"cannot read the weights in {folder}: {type(e).__name__}: "
                       f"{one_line(e)}") from e


def weight_files(folder):
    """The files that hold the weights, as transformers looks for them: one file, else the
    shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = f"{folder}/{name}"
        if os.path.exists(path):
            return [path]
        if os.path.exists(f"{path}.index.json"):
            with open(f"{path}.index.json", encoding="utf-8") as file:
                shards = set(json.load(file)["weight_map"].values())
            return [f"{folder}/{shard}" for shard in sorted(shards)]
    raise BadInput(f"cannot read the weights in {folder}: there is no model.safetensors and no "
                   "pytorch_model.bin")


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError as e:
        raise BadInput("public checkpoints are in safetensors format: "
                       "pip install safetensors") from e
    return safetensors


# ---------------------------------------------------------------------------------------
# writing


def write_folder(config, tensors, folder):
    """Write config.json, model.safetensors and the tokenizer's files into a new folder, which
    flash-linear-attention's GLAForCausalLM or transformers' Mamba2ForCausalLM reads.

    config: a dict of our Config's fields (dataclasses.asdict). tensors: the model's
    state_dict; it is not changed. There is no tokenizer.json where the tokenizer is unknown or
    not on this machine. Raises BadInput where the public format cannot hold the model, and
    where the folder cannot be written."""
    folder = os.path.realpath(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise BadInput(f"{folder} exists; expected the name of a new folder")
    if config["block"] not in ("gla", "mamba2"):
        raise BadInput(f"no public format holds {config['block']}; keep the checkpoint")
    config, tensors = uniform(config, tensors)
    public = public_tensors(config, tensors)
    safetensors = import_safetensors()
    temporary = temporary_folder(folder)
    try:
        begin, end = write_tokenizer(config["tokenizer"], temporary)
        with open(f"{temporary}/config.json", "w", encoding="utf-8") as file:
            json.dump(public_config(config, tensors, begin, end), file, indent=1)
        safetensors.torch.save_file(public, f"{temporary}/model.safetensors",
                                    metadata={"format": "pt"})
        # safetensors 0.8 lets nobody but the owner read what it wrote
        shutil.copymode(f"{temporary}/config.json", f"{temporary}/model.safetensors")
        for name in os.listdir(temporary):
            with open(f"{temporary}/{name}", "rb") as file:
                os.fsync(file.fileno())
        if os.path.isdir(folder):                          # empty; Windows does not rename onto it
            os.rmdir(folder)
        os.rename(temporary, folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise BadInput(f"cannot write {folder}: {one_line(e)}; expected a folder that can be made, "
                       "and tensors with memory of their own") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def public_config(config, tensors, begin, end):
    """config.json of a model whose layers are alike. begin, end: see write_tokenizer."""
    library = GLA if config["block"] == "gla" else MAMBA2
    public = {names[0]: config[field] for field, (names, _, _) in library.fields.items()
              if field in config}
    if library is GLA:
        public |= {"architectures": ["GLAForCausalLM"], "model_type": "gla",
                   "use_short_conv": config["conv_size"] > 0, "conv_size": config["conv_size"] or 4}
    else:
        # flash-linear-attention, once imported, takes over this model_type; it reads norm_eps
        public |= {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2",
                   "num_heads": config["d_model"] * config["expand"] // config["headdim"],
                   "norm_eps": config["norm_eps"]}
    name = config["tokenizer"]
    path = name.removeprefix("hf:")
    a_path = name.startswith("hf:") or name.endswith(".tiktoken")
    if not (a_path and os.path.exists(path)):              # what is a path here is none elsewhere
        public["statex_tokenizer"] = name
    dtype = str(tensors["embeddings.weight"].dtype).removeprefix("torch.")
    return public | {"torch_dtype": dtype, "bos_token_id": begin, "eos_token_id": end,
                     "pad_token_id": None}


def ratio(channels, d_model):
    """channels / d_model, as the number by which d_model gives exactly that many channels."""
    close = channels / d_model
    near = (close, math.nextafter(close, math.inf), math.nextafter(close, 0.0))
    return next((x for x in near if x * d_model == channels), close)


# What the public layers have, by our names.
LAYER_TENSORS = {
    "gla": r"(attn|mlp)_norm\.weight|mlp\.(gate|up|down)_proj\.weight|attn\.(([qkvgo]_proj|"
           r"[qkv]_conv1d|g_norm_swish_gate|gk_proj\.[01])\.weight|gk_proj\.1\.bias)",
    "mamba2": r"norm\.weight|mixer\.(A_log|D|dt_bias|conv1d\.bias|"
              r"(in_proj|conv1d|norm|out_proj)\.weight)",
}


def public_tensors(config, tensors):
    """The tensors by their public names. The rows that pad the vocabulary are left out: there
    they would be tokens. Tied, the head is left out. Raises BadInput for a tensor that the
    public layers have not."""
    known = rf"(embeddings|norm|lm_head)\.weight|layers\.\d+\.({LAYER_TENSORS[config['block']]})"
    for name in tensors:
        if not re.fullmatch(known, name):
            raise BadInput(f"the public format has no {name}; keep the .pt checkpoint, which "
                           "data/harness.py scores with the same tasks")
    outer = "model" if config["block"] == "gla" else "backbone"
    public = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config["tie_embeddings"]:
            if not torch.equal(tensor, tensors["embeddings.weight"]):
                raise BadInput("lm_head.weight is not the embeddings, to which config ties it; "
                               "keep the .pt checkpoint")
            continue
        if name in ("embeddings.weight", "lm_head.weight"):
            tensor = tensor[:config["vocab_size"]]
        if config["block"] == "mamba2":
            name = re.sub("^norm", "norm_f", name)
        if name != "lm_head.weight":
            name = f"{outer}.{name}"
        public[name] = tensor.detach().cpu().contiguous()
    return public


def uniform(config, tensors):
    """config and tensors of the same function, with one size for all layers. Raises BadInput
    where there is none."""
    way_out = "keep the .pt checkpoint, which data/harness.py scores with the same tasks"
    if config["block"] == "mamba2":
        if config["norm_groups"] != config["n_groups"]:
            raise BadInput(f"the gated norm has {config['norm_groups']} groups and B and C have "
                           f"{config['n_groups']}, which the public formats cannot say; {way_out}")
        return pad_states(config, tensors)
    heads = config["n_head"][0]
    if set(config["n_head"]) != {heads}:
        raise BadInput(f"the layers' heads are merged unevenly (n_head is {config['n_head']}) and "
                       f"the public format has one n_head; {way_out}, or expand with "
                       "--init=preserve")
    config = config | {"n_head": heads}
    shared = [heads // key_heads for key_heads in config["n_key_head"]]
    if max(shared) > 1:
        if config["conv_size"]:
            raise BadInput("heads share their keys behind a short convolution, which the public "
                           f"format has no place for; {way_out}")
        config, tensors = fold_keys(config, tensors, shared)
    # flash-linear-attention wants ratios whose products with d_model are whole numbers
    for name, rows in (("expand_k", "q_proj"), ("expand_v", "v_proj")):
        channels = len(tensors[f"layers.0.attn.{rows}.weight"])
        config[name] = ratio(channels, config["d_model"])
    return config, tensors


def pad_states(config, tensors):
    """Mamba2 with unlike d_state -> with the largest. A new row of B and C is zero, and so are
    its taps and its bias: the convolution gives silu(0) = 0, and nothing enters the state."""
    inner = config["d_model"] * config["expand"]
    groups = config["n_groups"]
    width = max(config["d_state"])
    tensors = dict(tensors)
    for layer, size in enumerate(config["d_state"]):
        if size == width:
            continue
        for name, before in (("in_proj.weight", 2 * inner), ("conv1d.weight", inner),
                             ("conv1d.bias", inner)):
            name = f"layers.{layer}.mixer.{name}"
            tensor = tensors[name]
            first, BC, last = tensor.tensor_split((before, before + 2 * groups * size))
            BC = pad_rows(BC.unflatten(0, (2 * groups, size)), 1, width)
            tensors[name] = torch.cat((first, BC.flatten(0, 1), last))
    return config | {"d_state": width}, tensors


def fold_keys(config, tensors, shared):
    """GLA with heads that share keys -> with keys of their own, as wide as the widest.

    shared: heads of a group, per layer. The formula is at the top of this file; rows beyond
    those of a group's heads are zero. The public format scales q by its own head size^-0.5,
    ours by that of one head: the square root of the width makes up for it. In 16 bits the
    products with gates are rounded anew."""
    heads = config["n_head"]
    key_channels = len(tensors["layers.0.attn.q_proj.weight"])
    size = key_channels // heads
    width = max(shared)
    tensors = dict(tensors)
    for layer, members in enumerate(shared):
        groups = heads // members
        prefix = f"layers.{layer}.attn"
        gates = tensors.pop(f"{prefix}.gates", torch.ones(groups, members, members))
        gates = gates.to(tensors[f"{prefix}.q_proj.weight"]) * width ** 0.5
        for name in ("q_proj.weight", "k_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"):
            rows = tensors[f"{prefix}.{name}"].unflatten(0, (groups, members, size))
            rows = rows[:, None].expand(groups, members, *rows.shape[1:])   # group, j, i, channel
            if name == "q_proj.weight":
                rows = rows * gates.transpose(1, 2)[..., None, None]           # group, i, j
            rows = pad_rows(rows.flatten(2, 3), 2, width * size)
            tensors[f"{prefix}.{name}"] = rows.flatten(0, 2)
    return {name: value for name, value in config.items() if name != "n_key_head"}, tensors


def pad_rows(tensor, dim, rows):
    """tensor with zeros behind, to `rows` in dimension dim."""
    shape = list(tensor.shape)
    shape[dim] = rows - shape[dim]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


# ---------------------------------------------------------------------------------------
# tokenizers


def write_tokenizer(name, folder):
    """The files from which transformers.AutoTokenizer makes the tokenizer `name`, as
    load_tokenizer knows it: same text, same ids. Returns the ids that begin and end a
    text, each or None; None twice, and no files, where the tokenizer is not known or not to
    be had here. Raises BadInput where the library that writes it is missing, OSError where
    the disk is full."""
    try:
        tokenizer = load_tokenizer(name)
    except BadInput:                                       # no such name, or no files here
        return None, None
    if name.startswith("hf:"):
        try:
            tokenizer.tokenizer.save_pretrained(folder)
        except Exception as e:                             # the tokenizers library has no other
            raise OSError(one_line(e)) from e
        return tokenizer.tokenizer.bos_token_id, tokenizer.eot_token
    with open(f"{folder}/tokenizer.json", "w", encoding="utf-8") as file:
        file.write(byte_pair_tokenizer(tokenizer).to_str(pretty=True))
    end = tokenizer.decode([tokenizer.eot_token])
    with open(f"{folder}/tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end,
                   "eos_token": end, "pad_token": end, "clean_up_tokenization_spaces": False},
                  file, indent=1)
    return tokenizer.eot_token, tokenizer.eot_token


def byte_pair_tokenizer(encoding):
    """A tiktoken.Encoding as a tokenizers.Tokenizer.

    tiktoken joins two neighbours whenever their bytes together are a token, that of lowest
    rank first. So every way to cut a token into two tokens is a merge of that token's rank."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as e:
        raise BadInput("the tokenizer is written by the tokenizers library: "
                       "pip install tokenizers") from e
    ranks = encoding._mergeable_ranks
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(spelled[left], spelled[right]) for left, right in cuts
                   if left in ranks and right in ranks]
    special = encoding._special_tokens
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | special
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    # where tiktoken's patterns end in {1,3}+, tokenizers' engine reads a repeated {1,3}
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", encoding._pat_str)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
