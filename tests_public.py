"""Tests of data/public.py and data/harness.py.

    python -m pytest tests_public.py

The formats' own libraries, where they are installed, are the reference: transformers,
flash-linear-attention (on a CPU in Triton's interpreter) and lm-evaluation-harness.
"""
from data.options import BadInput

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                     # before kernels is imported
os.environ["HF_HUB_OFFLINE"] = "1"

from data import harness, prepare, public  # noqa: E402
from model import LM, Config, save_checkpoint  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------
# configurations

SSM = {"d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277,
       "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
       "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
       "tie_embeddings": True}
HF = {"model_type": "mamba2", "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288,
      "num_heads": 24, "head_dim": 64, "state_size": 128, "expand": 2, "n_groups": 1,
      "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
GLA = {"model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4,
       "vocab_size": 32000, "expand_k": 0.5, "expand_v": 1, "use_short_conv": False,
       "norm_eps": 1e-6, "tie_word_embeddings": False}


def ssm(**layers):
    return {"ssm_cfg": {"layer": "Mamba2"} | layers}


# An option that says what is built anyway, or that does not change the function.
SAME = [
    (SSM, ssm(use_mem_eff_path=False, chunk_size=64, sequence_parallel=False)),
    (SSM, ssm(rmsnorm=True, norm_before_gate=False, D_has_hdim=False, bias=False, conv_bias=True)),
    (SSM, ssm(A_init_range=[1, 4], dt_min=0.01, dt_max=0.2, dt_init_floor=1e-3, conv_init=0.1)),
    (SSM, ssm(dt_limit=[0.0, {"__float__": "Infinity"}])),
    (SSM, ssm(dt_limit=(0.0, math.inf), d_ssm=1536, ngroups=1, d_state=128, expand=2, d_conv=4)),
    (SSM, {"attn_cfg": {"num_heads": 8}, "attn_layer_idx": None, "residual_in_fp32": False}),
    (HF, {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 8192,
          "time_step_scale": 1.0, "time_step_init_scheme": "random"}),
    (HF, {"time_step_rank": 48, "time_step_min": 0.01, "time_step_floor": 1e-3, "chunk_size": 64}),
    (HF, {"time_step_limit": [0.0, {"__float__": "Infinity"}], "use_bias": False,
          "use_conv_bias": True, "hidden_act": "swish", "layer_types": ["linear_attention"] * 24}),
    (HF, {"norm_eps": 1e-5, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False,
          "dt_limit": [0.0, math.inf], "fuse_norm": False, "use_l2warp": True}),
    (HF, {"layer_sharing": None, "drop_prop": None, "drop_mode": None, "norm_eps": 1e-5}),
    (GLA, {"rms_norm_eps": 1e-6, "share_conv_kernel": True, "attn_mode": "fused_chunk"}),
    (GLA, {"layer_sharing": None, "attn": None, "clamp_min": None, "feature_map": None}),
    (GLA, {"num_kv_heads": 4, "use_gk": True, "use_gv": False, "hidden_act": "silu"}),
    (GLA, {"num_kv_heads": None, "elementwise_affine": True, "use_output_gate": True,
           "hidden_ratio": 4, "intermediate_size": None, "conv_size": 4}),
    (GLA, {"fuse_norm": False, "fuse_swiglu": False, "fuse_linear_cross_entropy": True,
           "max_position_embeddings": 8192, "_name_or_path": "x", "_attn_implementation": "eager"}),
    (GLA, {"attn": {"layers": [], "num_heads": 8}}),
]


@pytest.mark.parametrize("base,more", SAME)
def test_options_that_change_nothing(base, more):
    assert public.read_config(base | more, "f") == public.read_config(base, "f")


# The same thing by another name.
NAMES = [
    (GLA, "norm_eps", {"rms_norm_eps": 1e-6}),
    (GLA, "num_heads", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    (HF, "layer_norm_epsilon", {"norm_eps": 1e-5}),
    (HF, "num_heads", {}),
]


@pytest.mark.parametrize("base,name,other", NAMES)
def test_other_names(base, name, other):
    renamed = {key: value for key, value in base.items() if key != name} | other
    assert public.read_config(renamed, "f") == public.read_config(base, "f")


def test_defaults_are_the_libraries():
    small = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 9}
    gla = public.read_config({"model_type": "gla"} | small, "f")
    assert gla == {"block": "gla", "d_model": 256, "n_layer": 2, "vocab_size": 9, "n_head": 4,
                   "expand_k": 0.5, "expand_v": 1.0, "d_mlp": 768, "conv_size": 0,
                   "norm_eps": 1e-6, "tie_embeddings": False}
    assert public.read_config({"model_type": "mamba2"} | small, "f")["n_groups"] == 8
    fla = {"model_type": "mamba2", "fuse_norm": True, "norm_eps": 1e-4}
    fla = public.read_config(fla | small, "f")
    assert (fla["n_groups"], fla["norm_eps"]) == (1, 1e-4)
    mamba = {"d_model": 256, "n_layer": 2, "vocab_size": 9} | ssm()
    mamba = public.read_config(mamba, "f")
    assert (mamba["n_groups"], mamba["pad_vocab"], mamba["tie_embeddings"]) == (1, 8, True)
    assert mamba["norm_eps"] == 1e-5
    wide = public.read_config(GLA | {"intermediate_size": 100, "use_short_conv": True}, "f")
    assert (wide["d_mlp"], wide["conv_size"]) == (100, 4)


# What would be another function, or is no configuration: one line that names it.
REFUSED = [
    (SSM | ssm(norm_before_gate=True), "ssm_cfg.norm_before_gate = True"),
    (SSM | ssm(D_has_hdim=True), "ssm_cfg.D_has_hdim = True"),
    (SSM | ssm(dt_limit=[0.0, 0.1]), "ssm_cfg.dt_limit = [0.0, 0.1]"),
    (SSM | ssm(rmsnorm=False), "ssm_cfg.rmsnorm = False"),
    (SSM | ssm(d_ssm=768), "ssm_cfg.d_ssm = 768"),
    (SSM | ssm(conv_bias=False), "ssm_cfg.conv_bias = False"),
    (SSM | {"ssm_cfg": {}}, "ssm_cfg.layer = 'Mamba1'"),
    (SSM | {"ssm_cfg": None}, "ssm_cfg.layer = 'Mamba1'"),
    (SSM | {"ssm_cfg": [1]}, "ssm_cfg is [1]"),
    (SSM | {"attn_layer_idx": [3]}, "attn_layer_idx = [3]"),
    (SSM | {"d_intermediate": 64}, "d_intermediate = 64"),
    (SSM | {"rms_norm": False}, "rms_norm = False"),
    (HF | {"use_bias": True}, "use_bias = True"),
    (HF | {"time_step_limit": [0.0, 0.1]}, "time_step_limit = [0.0, 0.1]"),
    (HF | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (HF | {"rmsnorm": True, "norm_before_gate": True}, "norm_before_gate = True"),
    (HF | {"drop_mode": "mamba4"}, "drop_mode = 'mamba4'"),
    (HF | {"num_heads": 12}, "num_heads 12 x head_dim 64"),
    (HF | {"norm_eps": 1e-3}, "expected one value"),
    (HF | {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    (HF | {"num_hidden_layers": True}, "num_hidden_layers is True"),
    (HF | {"vocab_size": 9.5}, "vocab_size is 9.5"),
    (HF | {"n_groups": 0}, "n_groups is 0"),
    (HF | {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
    (HF | {"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
    (HF | {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    (HF | {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    (GLA | {"sliding_window": 5}, "sliding_window = 5"),
    (GLA | {"num_kv_heads": 1}, "num_kv_heads = 1"),
    (GLA | {"attn": {"layers": [1], "num_heads": 8}}, "attn = "),
    (GLA | {"attn_mode": "mh_parallel"}, "attn_mode = 'mh_parallel'"),
    (GLA | {"clamp_min": -3.0, "feature_map": "relu"}, "clamp_min = -3.0, feature_map = 'relu'"),
    (GLA | {"layer_sharing": "mirror"}, "layer_sharing = 'mirror'"),
    (GLA | {"hidden_act": "powlu"}, "hidden_act = 'powlu'"),
    (GLA | {"hidden_size": None}, "lacks hidden_size"),
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({}, "model_type is None"),
    ([1, 2], "holds a list"),
    (None, "holds a NoneType"),
    ("gla", "holds a str"),
]


@pytest.mark.parametrize("config,says", REFUSED)
def test_refused_configurations(config, says):
    with pytest.raises(BadInput) as error:
        public.read_config(config, "folder")
    assert says in str(error.value) and "folder/config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_the_libraries_write_is_known():
    """Every option of their configurations, not only those that differ from the default."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    mamba = transformers.Mamba2Config().to_dict()
    assert public.read_config(mamba, "f")["n_groups"] == 8
    fla = pytest.importorskip("fla.models", reason="pip install flash-linear-attention")
    assert public.read_config(fla.GLAConfig().to_dict(), "f")["n_head"] == 4
    assert public.read_config(fla.Mamba2Config().to_dict(), "f")["n_groups"] == 1


# ---------------------------------------------------------------------------------------
# weights


def small_folder(path, kind):
    """A small random checkpoint folder in a public format, written without its library."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    d_model, inner, d_state, rows, heads = 32, 64, 6, 64, 4
    if kind == "gla":
        config = {"model_type": "gla", "hidden_size": d_model, "num_hidden_layers": 2,
                  "num_heads": heads, "vocab_size": rows, "use_short_conv": True,
                  "intermediate_size": 48}
        layer = {
            "attn_norm.weight": (d_model,), "mlp_norm.weight": (d_model,),
            "attn.q_proj.weight": (16, d_model), "attn.k_proj.weight": (16, d_model),
            "attn.v_proj.weight": (d_model, d_model), "attn.g_proj.weight": (d_model, d_model),
            "attn.gk_proj.0.weight": (16, d_model), "attn.gk_proj.1.weight": (16, 16),
            "attn.gk_proj.1.bias": (16,), "attn.o_proj.weight": (d_model, d_model),
            "attn.g_norm_swish_gate.weight": (8,), "attn.q_conv1d.weight": (16, 1, 4),
            "attn.k_conv1d.weight": (16, 1, 4), "attn.v_conv1d.weight": (d_model, 1, 4),
            "mlp.gate_proj.weight": (96, d_model), "mlp.down_proj.weight": (d_model, 48)}
        weights = {"model.embeddings.weight": normal(rows, d_model),
                   "model.norm.weight": normal(d_model), "lm_head.weight": normal(rows, d_model)}
        prefix = "model"
    else:
        config = SSM | {"d_model": d_model, "n_layer": 2, "vocab_size": 61}
        config |= ssm(d_state=d_state, headdim=16)
        layer = {
            "norm.weight": (d_model,), "mixer.norm.weight": (inner,),
            "mixer.in_proj.weight": (2 * inner + 2 * d_state + heads, d_model),
            "mixer.conv1d.weight": (inner + 2 * d_state, 1, 4),
            "mixer.conv1d.bias": (inner + 2 * d_state,), "mixer.dt_bias": (heads,),
            "mixer.A_log": (heads,), "mixer.D": (heads,),
            "mixer.out_proj.weight": (d_model, inner)}
        embedding = normal(rows, d_model)
        weights = {"backbone.embedding.weight": embedding, "lm_head.weight": embedding,
                   "backbone.norm_f.weight": normal(d_model)}
        prefix = "backbone"
    for i in range(2):
        weights |= {f"{prefix}.layers.{i}.{name}": normal(*shape) for name, shape in layer.items()}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return config, weights


def write_weights(path, weights, shards=0, extension="safetensors"):
    if not shards:
        return torch.save(weights, path / "pytorch_model.bin")
    names = list(weights)
    files = {name: f"part-{i * shards // len(names)}.{extension}" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: weights[name].clone() for name in names if files[name] == file}
        if extension == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(part, path / file)
        else:
            torch.save(part, path / file)
    index = "model.safetensors" if extension == "safetensors" else "pytorch_model.bin"
    (path / f"{index}.index.json").write_text(json.dumps({"weight_map": files}))


def model_of(config, tensors):
    """The LM with this configuration and these tensors."""
    lm = LM(Config(**config))
    lm.load_state_dict(tensors)
    return lm.eval()


@pytest.mark.parametrize("shards,extension", ((0, "bin"), (3, "safetensors"), (2, "bin")))
@pytest.mark.parametrize("kind", ("gla", "mamba2"))
def test_folders_are_read_tensor_for_tensor(kind, shards, extension, tmp_path):
    _, weights = small_folder(tmp_path / "x", kind)
    write_weights(tmp_path / "x", weights, shards, extension)
    config, tensors = public.read_folder(tmp_path / "x")
    if kind == "gla":
        both = torch.cat((tensors["layers.1.mlp.gate_proj.weight"],
                          tensors["layers.1.mlp.up_proj.weight"]))
        assert torch.equal(both, weights["model.layers.1.mlp.gate_proj.weight"])
        assert config["tokenizer"] == f"hf:{tmp_path}/x"
    else:
        assert torch.equal(tensors["embeddings.weight"], weights["backbone.embedding.weight"])
        assert torch.equal(tensors["norm.weight"], weights["backbone.norm_f.weight"])
        assert tensors["lm_head.weight"] is tensors["embeddings.weight"]
        assert (config["vocab_size"], config["tokenizer"]) == (61, "hf:EleutherAI/gpt-neox-20b")
    lm = model_of(config, tensors)
    assert lm(torch.ones(1, 5, dtype=torch.long))[0].shape[-1] == config["vocab_size"]


def test_other_names_of_the_same_tensor(tmp_path):
    """Wrappers' prefixes, g_norm, embed_tokens, half precision, another folder's layout."""
    _, weights = small_folder(tmp_path / "x", "gla")
    write_weights(tmp_path / "x", weights)
    want = public.read_folder(tmp_path / "x")[1]
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("g_norm_swish_gate", "g_norm").replace("embeddings", "embed_tokens")
        renamed[f"module._orig_mod.{name}"] = tensor.bfloat16()
    write_weights(tmp_path / "x", renamed)
    have = public.read_folder(tmp_path / "x")[1]
    assert have.keys() == want.keys() and have["norm.weight"].dtype == torch.float32
    assert all(torch.equal(have[name], want[name].bfloat16().float()) for name in want)


def test_tied_heads(tmp_path):
    """Tied: whichever is there is both; where both are there and differ, as in transformers,
    they are not tied. Not tied: both have to be there."""
    config, weights = small_folder(tmp_path / "x", "gla")
    embedding, head = weights["model.embeddings.weight"], weights["lm_head.weight"]

    def read(tied, **tensors):
        (tmp_path / "x/config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        rest = {k: v for k, v in weights.items() if "embeddings" not in k and "lm_head" not in k}
        given = {"model.embeddings.weight": tensors.get("embedding"),
                 "lm_head.weight": tensors.get("head")}
        write_weights(tmp_path / "x", rest | {k: v for k, v in given.items() if v is not None})
        found, have = public.read_folder(tmp_path / "x")
        return found["tie_embeddings"], have.get("embeddings.weight"), have.get("lm_head.weight")

    for given in ({"embedding": head}, {"head": head}, {"embedding": head, "head": head.clone()}):
        tied, first, second = read(True, **given)
        assert tied and first is second and torch.equal(first, head)
    tied, first, second = read(True, embedding=embedding, head=head)
    assert not tied and torch.equal(first, embedding) and torch.equal(second, head)
    assert read(False, embedding=embedding)[2] is None
    assert read(True) == (True, None, None)


def test_broken_folders(tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    path = tmp_path / "x"
    config, weights = small_folder(path, "gla")

    def refuses(says):
        with pytest.raises(BadInput) as error:
            public.read_folder(path)
        assert says in str(error.value) and "\n" not in str(error.value)

    refuses("there is no model.safetensors")
    write_weights(path, weights)
    content = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(content[:len(content) // 2])
    refuses("cannot read the weights")
    torch.save({"model": weights}, path / "pytorch_model.bin")
    refuses("model is no tensor")
    torch.save(list(weights.values()), path / "pytorch_model.bin")
    refuses("cannot read the weights")
    write_weights(path, weights | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    refuses("model.norm.weight is of torch.int8")
    write_weights(path, weights | {"norm.weight": weights["model.norm.weight"]})
    refuses("twice")
    (path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    refuses("cannot read the weights")
    (path / "model.safetensors.index.json").write_text("[]")
    refuses("cannot read the weights")
    for text in ("{", "[1]", "null", '"gla"'):
        (path / "config.json").write_text(text)
        refuses("config.json")
    (path / "config.json").unlink()
    refuses("no readable config.json")
    with pytest.raises(BadInput, match="no file or folder"):
        public.read_folder(f"{tmp_path}/nothing")


# ---------------------------------------------------------------------------------------
# writing


def scattered(lm, seed=0):
    """lm with every parameter moved, so that no zero and no one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return lm.eval()


def mamba2(**changes):
    torch.manual_seed(0)
    config = dict(block="mamba2", vocab_size=61, n_layer=3, d_model=32, conv_size=4, headdim=16,
                  d_state=8, tie_embeddings=True, tokenizer="code4096")
    return scattered(LM(Config(**config | changes)))


def write(lm, path):
    return public.write_folder(dataclasses.asdict(lm.config), lm.state_dict(), str(path))


def test_padded_vocabulary_survives(tmp_path):
    """61 tokens in 64 rows: those that mean nothing are neither written nor read."""
    pytest.importorskip("safetensors", reason="pip install safetensors")
    for tied in (True, False):
        lm = mamba2(pad_vocab=16, tie_embeddings=tied)
        write(lm, tmp_path / f"{tied}")
        config, tensors = public.read_folder(tmp_path / f"{tied}")
        back = model_of(config, tensors)
        idx = torch.randint(61, (2, 9))
        assert config["vocab_size"] == 61 and config["tokenizer"] == "code4096"
        assert torch.equal(lm(idx)[0], back(idx)[0]) and lm(idx, idx)[1] == back(idx, idx)[1]


@pytest.mark.parametrize("changes", (
    {}, {"pad_vocab": 16}, {"d_state": [8, 24, 16]}, {"d_state": [5, 1, 5], "n_groups": 2},
    {"d_state": [8, 32, 8], "tie_embeddings": False, "conv_size": 3, "headdim": 8, "expand": 3}))
def test_transformers_reads_what_was_written(changes, tmp_path):
    """Mamba2, also with unlike d_state: the same logits, and the same again when read back."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    lm = mamba2(**changes)
    write(lm, tmp_path / "x")
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "x").eval()
    back = model_of(*public.read_folder(tmp_path / "x"))
    assert theirs.config.vocab_size == 61 and theirs.config.eos_token_id == 4095
    for T in (1, 9, 300):
        idx = torch.randint(61, (2, T))
        with torch.no_grad():
            logits = lm(idx)[0]
            assert (theirs(idx).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
            assert (back(idx)[0] - logits).abs().max() <= 1e-5 * logits.abs().max()


def gla_tensors(n_key_head, n_head=4, d_k=16, d_v=24, d_model=20, vocab=53, seed=0):
    """A GLA whose heads share keys: its config and tensors, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = {"block": "gla", "vocab_size": vocab, "n_layer": len(n_key_head), "d_model": d_model,
              "n_head": [n_head] * len(n_key_head), "n_key_head": list(n_key_head),
              "expand_k": d_k / d_model, "expand_v": d_v / d_model, "d_mlp": 28, "conv_size": 0,
              "norm_eps": 1e-6, "tie_embeddings": False, "tokenizer": ""}
    shapes = {"embeddings.weight": (vocab, d_model), "norm.weight": (d_model,),
              "lm_head.weight": (vocab, d_model)}
    for i, keys in enumerate(n_key_head):
        layer = {"attn_norm.weight": (d_model,), "mlp_norm.weight": (d_model,),
                 "attn.q_proj.weight": (d_k, d_model), "attn.k_proj.weight": (d_k, d_model),
                 "attn.v_proj.weight": (d_v, d_model), "attn.g_proj.weight": (d_v, d_model),
                 "attn.gk_proj.0.weight": (16, d_model), "attn.gk_proj.1.weight": (d_k, 16),
                 "attn.gk_proj.1.bias": (d_k,), "attn.o_proj.weight": (d_model, d_v),
                 "attn.g_norm_swish_gate.weight": (d_v // n_head,),
                 "mlp.gate_proj.weight": (28, d_model), "mlp.up_proj.weight": (28, d_model),
                 "mlp.down_proj.weight": (d_model, 28)}
        if keys < n_head:
            layer["attn.gates"] = (keys, n_head // keys, n_head // keys)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return config, {name: normal(*shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def gla_logits(config, tensors, idx):
    """What a GLA with shared keys and gates computes, one token after the other. idx (T,)."""
    x = tensors["embeddings.weight"][idx]
    for i in range(config["n_layer"]):
        w = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in tensors.items()
             if name.startswith(f"layers.{i}.")}
        H = config["n_head"][i]
        G = config["n_key_head"][i]
        f = H // G
        y = F.rms_norm(x, x.shape[-1:], w["attn_norm.weight"], config["norm_eps"])
        q, k, v = (y @ w[f"attn.{name}_proj.weight"].T for name in "qkv")
        g = y @ w["attn.gk_proj.0.weight"].T @ w["attn.gk_proj.1.weight"].T
        g = F.logsigmoid(g + w["attn.gk_proj.1.bias"]) / 16
        q, k, g = (t.unflatten(-1, (G, f, -1)) for t in (q, k, g))            # (T, c, i, K)
        v = v.unflatten(-1, (G, f, -1))                                       # (T, c, j, V)
        scale = q.shape[-1] ** -0.5
        gates = w.get("attn.gates", torch.ones(G, f, f).to(q))
        q = torch.einsum("cij,tcik->tcjik", gates, q).flatten(-2) * scale     # (T, c, j, f K)
        k = k.flatten(-2)
        g = g.flatten(-2)
        S = torch.zeros(G, f, k.shape[-1], v.shape[-1]).to(q)
        o = torch.empty_like(v)
        for t in range(len(idx)):
            S = g[t, :, None, :, None].exp() * S + k[t, :, None, :, None] * v[t, :, :, None, :]
            o[t] = torch.einsum("cjkv,cjk->cjv", S, q[t])
        o = F.rms_norm(o, o.shape[-1:], w["attn.g_norm_swish_gate.weight"], config["norm_eps"])
        gate = F.silu(y @ w["attn.g_proj.weight"].T)
        x = x + (o.flatten(1) * gate) @ w["attn.o_proj.weight"].T
        y = F.rms_norm(x, x.shape[-1:], w["mlp_norm.weight"], config["norm_eps"])
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
    x = F.rms_norm(x, x.shape[-1:], tensors["norm.weight"], config["norm_eps"])
    return x @ tensors["lm_head.weight"].T


FOLDS = ((4, 2, 1), (1, 1), (2,), (4, 2))


@pytest.mark.parametrize("n_key_head", FOLDS)
def test_shared_keys_fold_into_the_projections(n_key_head):
    """The same function in float64, in the public format's own scale."""
    config, tensors = gla_tensors(n_key_head)
    folded, parts = public.uniform(config, tensors)
    assert not any("gates" in name for name in parts)
    assert folded["n_head"] == 4 and int(20 * folded["expand_k"]) == 16 * 4 // min(n_key_head)
    assert any("gates" in name for name in tensors)                       # not changed
    layers = config["n_layer"]
    folded |= {"n_head": [4] * layers, "n_key_head": [4] * layers}
    idx = torch.randint(53, (40,))
    want = gla_logits(config, tensors, idx)
    assert (gla_logits(folded, parts, idx) - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("n_key_head", ((4, 4),) + FOLDS)
def test_folded_models_are_ours_again(n_key_head, tmp_path):
    """Written in float32 and read back, it is a GLA with more key channels."""
    pytest.importorskip("safetensors", reason="pip install safetensors")
    config, tensors = gla_tensors(n_key_head)
    public.write_folder(config, {k: v.float() for k, v in tensors.items()}, f"{tmp_path}/x")
    lm = model_of(*public.read_folder(tmp_path / "x"))
    idx = torch.randint(53, (50,))
    want = gla_logits(config, tensors, idx)
    assert (lm(idx[None])[0][0] - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("d_model,d_k,keys", [(49, 4, 1), (3, 4, 2), (41, 12, 1), (97, 20, 1)])
def test_channels_survive_the_ratio(d_model, d_k, keys):
    """expand_k is a ratio: int(d_model * expand_k) has to be the key channels again."""
    config, tensors = gla_tensors((keys,), d_k=d_k, d_model=d_model)
    if int(d_model * config["expand_k"]) != d_k:
        config["expand_k"] = math.nextafter(config["expand_k"], math.inf)
    folded, parts = public.uniform(config, tensors)
    assert int(d_model * folded["expand_k"]) == len(parts["layers.0.attn.q_proj.weight"])


@pytest.fixture
def fla(monkeypatch):
    """flash-linear-attention. On a CPU its kernels run in Triton's interpreter, where there is
    nothing to be timed."""
    pytest.importorskip("fla", reason="pip install flash-linear-attention")
    if not CUDA:
        from triton.runtime.autotuner import Autotuner
        monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: 1.0)
    return pytest.importorskip("fla.models.gla")


@pytest.mark.parametrize("n_key_head,tied", (((4, 2, 1), False), ((1, 1), True), ((4, 4), False)))
def test_fla_reads_what_was_written(n_key_head, tied, fla, tmp_path):
    import transformers
    config, tensors = gla_tensors(n_key_head, d_k=64, d_v=64, d_model=64)
    if tied:
        config["tie_embeddings"] = True
        tensors["lm_head.weight"] = tensors["embeddings.weight"]
    public.write_folder(config, {k: v.float() for k, v in tensors.items()}, f"{tmp_path}/x")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    assert type(theirs) is fla.GLAForCausalLM
    device = "cuda" if CUDA else "cpu"
    for T in (9, 60, 200) if CUDA else (9, 60):          # beyond 64 another of their kernels
        idx = torch.randint(53, (T,))
        want = gla_logits(config, tensors, idx)
        with torch.no_grad():
            logits = theirs.to(device)(idx[None].to(device)).logits[0].cpu()
        assert (logits - want).norm() <= (1e-2 if CUDA else 1e-5) * want.norm()


@pytest.mark.parametrize("more", ({}, {"use_short_conv": True, "tie_word_embeddings": True},
                                  {"fuse_norm": False, "expand_k": 1, "intermediate_size": 40}))
def test_what_fla_wrote_is_read(more, fla, tmp_path):
    torch.manual_seed(0)
    theirs = fla.GLAForCausalLM(fla.GLAConfig(hidden_size=64, num_hidden_layers=2, num_heads=4,
                                              vocab_size=53, initializer_range=0.2, **more)).eval()
    theirs.save_pretrained(tmp_path / "x")
    lm = model_of(*public.read_folder(tmp_path / "x"))
    idx = torch.randint(53, (2, 60))
    device = "cuda" if CUDA else "cpu"
    with torch.no_grad():
        want = theirs.to(device)(idx.to(device)).logits.cpu()
        assert (lm(idx)[0] - want).norm() <= (1e-2 if CUDA else 1e-5) * want.norm()


def test_fla_reads_a_mamba2(fla, tmp_path):
    """Once imported, it is what transformers' Auto classes take for this model_type."""
    import transformers
    lm = mamba2(norm_eps=1e-3, n_groups=2)
    write(lm, tmp_path / "x")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", output_loading_info=True)
    assert type(theirs).__module__.startswith("fla") and theirs.config.norm_eps == 1e-3
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "y")
    back = model_of(*public.read_folder(tmp_path / "y"))
    idx = torch.randint(61, (2, 9))
    assert torch.equal(back(idx)[0], lm(idx)[0])


def test_models_that_no_public_format_holds(tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    config, tensors = gla_tensors((4, 2))
    for changes, says in (({"n_head": [4, 1], "n_key_head": [4, 1]}, "--init=preserve"),
                          ({"conv_size": 4}, "short convolution")):
        with pytest.raises(BadInput, match=says) as error:
            public.write_folder(config | changes, tensors, f"{tmp_path}/x")
        assert "data/harness.py" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_written(tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    lm = mamba2(n_layer=1)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("")
    (tmp_path / "empty").mkdir()
    for name, says in (("file", "exists"), ("full", "exists"), ("file/x", "cannot write"),
                       ("/proc/x", "cannot write")):
        with pytest.raises(BadInput, match=says):
            write(lm, tmp_path / name)
    assert "model.safetensors" in write(lm, tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


# ---------------------------------------------------------------------------------------
# tokenizers


def sample():
    """Text of the standard library, and some that it does not have."""
    texts = ["", " ", "\n\n  x", "don't they'LL", "naïve 中文 עברית 1234567 ½ \u3000\u200b😀",
             "\t\r\n\x00\x1c", "<|endoftext|", "a" * 300, " " * 300]
    for path in prepare.python_files()[::40]:
        with open(path, encoding="utf-8", errors="ignore") as file:
            texts.append(file.read()[:20000])
    return texts


def test_the_tokenizer_is_written_too(tmp_path):
    """AutoTokenizer gives load_tokenizer's ids, and text again, for every text."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    ours = prepare.load_tokenizer("code4096")
    assert public.write_tokenizer("code4096", tmp_path) == ours.eot_token == 4095
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == theirs.bos_token_id == 4095
    for text in sample():
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode_ordinary(text)
        assert theirs.decode(ids) == text
    assert theirs("a<|endoftext|>b")["input_ids"][1] == 4095


def test_patterns_and_special_tokens_of_tiktoken(tmp_path):
    """Possessive quantifiers, and special tokens whose ids leave a gap, as in cl100k_base."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    import tiktoken
    pattern = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
               r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
    ranks = prepare.load_tokenizer("code4096")._mergeable_ranks
    special = {"<|endoftext|>": len(ranks), "<|endofprompt|>": len(ranks) + 19}
    ours = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    public.byte_pair_tokenizer(ours).save(f"{tmp_path}/tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{tmp_path}/tokenizer.json")
    for text in sample():
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs("<|endofprompt|>")["input_ids"] == [len(ranks) + 19]


def test_hugging_face_tokenizers_are_copied(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    public.write_tokenizer("code4096", f"{tmp_path}")
    lm = mamba2(tokenizer=f"hf:{tmp_path}")
    files = write(lm, tmp_path / "x")
    assert "tokenizer.json" in files
    assert public.read_folder(tmp_path / "x")[0]["tokenizer"] == f"hf:{tmp_path}/x"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    ours = prepare.load_tokenizer("code4096")
    assert theirs("def f")["input_ids"] == ours.encode_ordinary("def f")
    files = write(mamba2(tokenizer="hf:nobody/nothing"), tmp_path / "y")
    assert "tokenizer.json" not in files
    assert public.read_folder(tmp_path / "y")[0]["tokenizer"] == "hf:nobody/nothing"
    assert write(mamba2(tokenizer=""), tmp_path / "z") == ["config.json", "model.safetensors"]
    assert public.read_folder(tmp_path / "z")[0]["tokenizer"] == ""


# ---------------------------------------------------------------------------------------
# lm-evaluation-harness

TASKS = {
    # perplexity of texts, as wikitext
    "statex_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    # the last word, as lambada
    "statex_cloze": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
  - metric: acc
    aggregation: mean
""",
    # multiple choice, as piqa
    "statex_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    # an answer to be written, as the recall tasks
    "statex_recall": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
""",
}


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """The harness, with no tasks of its own: it takes long to look through its thousands."""
    pytest.importorskip("lm_eval.models.huggingface", reason="pip install 'lm_eval[hf]'")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/hub")
    monkeypatch.setattr(tasks, "TaskManager",
                        functools.partial(tasks.TaskManager, include_defaults=False))


def task_files(folder, lm):
    """Tasks with their data. The answer is what lm writes, in every other document."""
    folder.mkdir()
    tokenizer = prepare.load_tokenizer("code4096")
    documents = []
    for i, path in enumerate(prepare.python_files()[::90]):
        with open(path, encoding="utf-8", errors="ignore") as file:
            text = file.read()[:80 + 97 * i].strip()
        ids = tokenizer.encode_ordinary(text)
        answer = lm.generate(torch.tensor([ids]), 12, temperature=0)[0, len(ids):].tolist()
        answer = tokenizer.decode(answer).partition("\n")[0].partition("<|endoftext|>")[0]
        documents.append({"text": text, "answer": answer if i % 2 else " x",
                          "choices": [f"value {i}", "return None", "import os, sys"]})
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n"
            f"  data_files:\n    test: {folder}/documents.jsonl\n{task}")
    return folder


def command(tmp_path, *words):
    """Run python with these words in an empty place -> exit status, stderr."""
    environment = os.environ | {"HF_HOME": f"{tmp_path}/hub", "PYTHONPATH": HERE}
    run = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    return run.returncode, run.stderr


def code_lm(**config):
    torch.manual_seed(0)
    config = dict(vocab_size=4096, d_model=32, tokenizer="code4096") | config
    return scattered(LM(Config(**config)))


def test_both_ways_give_the_same_scores(lm_eval, tmp_path):
    """A Mamba2 with unlike d_state: scored as it is, and exported by the harness alone."""
    lm = code_lm(block="mamba2", n_layer=3, conv_size=4, headdim=16, d_state=[8, 16, 8],
                 tie_embeddings=True)
    save_checkpoint(f"{tmp_path}/x.pt", lm)
    write(lm, tmp_path / "public")
    tasks = task_files(tmp_path / "tasks", lm)
    names = list(TASKS)
    status, errors = command(
        tmp_path, f"{HERE}/data/harness.py", "--ckpt=x.pt", f"--tasks={','.join(names)}",
        f"--include_path={tasks}", "--json=ours.json", "--max_length=128", "--device=cpu")
    assert status == 0, errors
    ours = json.loads((tmp_path / "ours.json").read_text())["results"]
    status, errors = command(
        tmp_path, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        "pretrained=public,max_length=128", "--tasks", *names, "--include_path", str(tasks),
        "--output_path", "theirs", "--device", "cpu", "--batch_size", "5")
    assert status == 0, errors
    theirs = json.loads(next((tmp_path / "theirs").rglob("*.json")).read_text())["results"]
    for name in TASKS:
        numbers = {k for k, v in theirs[name].items() if isinstance(v, float)}
        assert numbers and numbers <= ours[name].keys()
        for number in numbers:
            assert ours[name][number] == pytest.approx(theirs[name][number], rel=1e-4), number
    assert 0.3 < ours["statex_recall"]["exact_match,none"] < 0.7


def test_a_folded_gla_in_the_harness(lm_eval, fla, tmp_path):
    """Shared keys, folded: the harness reads it through flash-linear-attention, once imported."""
    config, tensors = gla_tensors((4, 2), d_k=64, d_v=64, d_model=64, vocab=4096)
    config["tokenizer"] = "code4096"
    public.write_folder(config, {k: v.float() for k, v in tensors.items()}, f"{tmp_path}/public")
    lm = model_of(*public.read_folder(tmp_path / "public"))
    tasks = task_files(tmp_path / "tasks", lm)
    names = ["statex_cloze"]
    if version("transformers") != "5.24.0":      # where generate() with fla 0.6.0 loses the state
        names.append("statex_recall")
    options = harness.Options(tasks=",".join(names), include_path=str(tasks), limit=2,
                              max_length=60, device="cpu")
    ours = harness.evaluate(lm, options)["results"]
    code = "import fla; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    if not CUDA:
        code = ("from triton.runtime.autotuner import Autotuner\n"
                "Autotuner._bench = lambda self, *args, config, **meta: 1.0\n" + code)
    status, errors = command(
        tmp_path, "-c", code, "run", "--model", "hf", "--model_args",
        "pretrained=public,max_length=60", "--tasks", *names, "--include_path", str(tasks),
        "--output_path", "theirs", "--limit", "2", "--device", "cuda" if CUDA else "cpu")
    assert status == 0, errors
    theirs = json.loads(next((tmp_path / "theirs").rglob("*.json")).read_text())["results"]
    for name in names:
        for number in {"perplexity,none", "exact_match,none"} & theirs[name].keys():
            assert ours[name][number] == pytest.approx(theirs[name][number],
                                                       rel=1e-2 if CUDA else 1e-4)


def test_merged_heads_are_scored(lm_eval, tmp_path):
    """A model that no public format holds; limited; batches of any size give the same."""
    lm = code_lm(block="gla", n_layer=2, n_head=[4, 1])
    tasks = task_files(tmp_path / "tasks", lm)
    scores = []
    for batch_size in (1, 4):
        options = harness.Options(tasks="statex_choice,statex_recall", include_path=str(tasks),
                                  batch_size=batch_size, limit=5)
        results = harness.evaluate(lm, options)
        assert len(results["samples"]["statex_recall"]) == 5
        scores.append([sample["resps"] for name in ("statex_choice", "statex_recall")
                       for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])])
    for one, four in zip(scores[0][:5], scores[1][:5], strict=True):
        for (a, _), (b, _) in zip(sum(one, []), sum(four, []), strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-4)
    assert scores[0][5:] == scores[1][5:]


def test_generation_ends(tmp_path):
    """Rows of different lengths at once: as one at a time, and end-of-text goes on as such."""
    lm = code_lm(block="gla", n_layer=2, conv_size=4)
    model = harness.HarnessModel(lm, end_of_text=4095)
    prompts = [torch.randint(4096, (n,)) for n in (3, 1, 7)]
    ids = torch.stack([F.pad(prompt, (7 - len(prompt), 0), value=4095) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones(len(p)), (7 - len(p), 0)) for p in prompts])
    out = model.generate(ids, mask, 16, lambda rows, _: False)
    for prompt, row in zip(prompts, out, strict=True):
        alone = lm.generate(prompt[None], 9, temperature=0)[0, len(prompt):]
        assert torch.equal(row[7:], alone)
    model.end_of_text = out[0, 9].item()
    again = model.generate(ids, mask, 16, lambda rows, _: False)
    first = out[0, 7:].tolist().index(model.end_of_text)
    assert set(again[0, 7 + first:].tolist()) == {model.end_of_text}
    assert model.generate(ids, mask, 16, lambda rows, _: rows.shape[1] == 10).shape == (3, 10)
    with pytest.raises(BadInput, match="at random"):
        model.generate(ids, mask, 16, lambda rows, _: False, do_sample=True)


def test_bad_options_of_the_harness(lm_eval, tmp_path):
    lm = code_lm(block="gla", n_layer=1)
    (tmp_path / "statex_text.yaml").write_text(
        "task: statex_text\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        "dataset_kwargs:\n  data_files: nothing.json")
    for changes, says in (({"tasks": "hellaswagg"}, "no task hellaswagg"),
                          ({"tasks": "statex_text"}, "cannot run statex_text"),
                          ({"metadata": "{"}, "is not JSON"),
                          ({"metadata": "[1]"}, "is not an object")):
        options = {"tasks": "statex_text", "include_path": str(tmp_path)} | changes
        options = harness.Options(**options)
        with pytest.raises(BadInput, match=says) as error:
            harness.evaluate(lm, options)
        assert "\n" not in str(error.value)
    lm.config.tokenizer = "hf:nobody/nothing"
    with pytest.raises(BadInput, match="not to be had"):
        harness.evaluate(lm, harness.Options(tasks="statex_text"))
    status, errors = command(tmp_path, f"{HERE}/data/harness.py", "--tasks=x")
    assert status == 2 and errors.count("\n") == 1 and "name a checkpoint" in errors
