"""Tests: every fast path against its definition, the transplant, training, data, bad input.

    python -m pytest                 on a CPU the Triton kernels run in Triton's interpreter; on a GPU they are compiled
"""
import importlib.util, json, os, signal, subprocess, sys, time

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                     # before kernels is imported

import expand as expand_script
import kernels
import model as model_script
import train as train_script
from data import prepare, recall
from data.prepare import BadInput
from expand import choose_layers, describe, expand
from kernels import errors, example, gla, run, ssd
from model import LM, SIZES, Config, SlicedCrossEntropy, load_checkpoint, save_checkpoint

DEVICE = "cuda" if CUDA else "cpu"
HERE = os.path.dirname(os.path.abspath(__file__))
DECAYS = (0, -1e-4, -1, -60, "mixed", None)                  # the log decay of every step; None: as a model has them
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")     # the interpreter's numpy on masked-out overflows


@pytest.fixture
def mended_interpreter(monkeypatch):
    """Triton's interpreter keeps a bfloat16 as its bits in a uint16. It takes those for a number in matrix products and writes whole
    numbers into them, and it cuts float32 short where a GPU rounds to the nearest (seen in 3.9)."""
    if CUDA:
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(builder, x, dtype):
        if dtype.scalar != bfloat16 or x.dtype.scalar == bfloat16:
            return cast(builder, x, dtype)
        return TensorHandle(torch.from_numpy(np.asarray(x.data, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16), bfloat16)

    def widened(builder, a, b, *rest):
        return dot(builder, *(cast(builder, x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b)), *rest)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def gap(x, ref):
    """||x - ref|| / ||ref||; NaN anywhere makes it NaN, which no comparison passes."""
    return ((x.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-300)).item()


# ---------------------------------------------------------------------------------------------------------------------
# kernels


def test_recurrent_is_the_definition_by_hand():
    """Two tokens, one head, K = V = 1: S = k1 v1, then a2 k1 v1 + k2 v2."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2., 3.], [5., 7.], [11., 13.]))
    g = torch.tensor([-0.5, -0.25], dtype=torch.float64).view(1, 2, 1, 1)
    o, S = gla(q, k, v, g, scale=1.0, impl="recurrent")
    s2 = np.exp(-0.25) * 5 * 11 + 7 * 13
    assert o.flatten().tolist() == pytest.approx([2 * 5 * 11, 3 * s2]) and S.item() == pytest.approx(s2)
    one = torch.ones(1, dtype=torch.float64)
    y, S = ssd(v, -g[..., 0], -one, k, q, D=2 * one, impl="recurrent")           # dt = -g, A = -1: decay exp(g), v = dt x
    s2 = np.exp(-0.25) * 0.5 * 5 * 11 + 0.25 * 7 * 13
    assert y.flatten().tolist() == pytest.approx([2 * 0.5 * 5 * 11 + 22, 3 * s2 + 26]) and S.item() == pytest.approx(s2)


@pytest.mark.parametrize("T", (1, 2, 3, 17, 64, 200, 600))
@pytest.mark.parametrize("taps,bias,dtypes", ((4, True, "32 32"), (4, False, "32 32"), (2, True, "32 32"), (3, True, "32 32"), (4, True, "16 32"), (4, False, "16 16")))
def test_short_convolution(T, taps, bias, dtypes):
    """The kernel against conv1d in float64, values and gradients; x is a slice of a wider tensor, as in Mamba2; bits of x, of the weights."""
    rng = torch.Generator().manual_seed(T)
    of_x, of_w = (torch.bfloat16 if bits == "16" else torch.float32 for bits in dtypes.split())
    inputs = [torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_()
              for shape, dtype in (((2, T, 70), of_x), ((37, 1, taps), of_w), ((37,), of_w))[:2 + bias]]
    dy = torch.randn(2, T, 37, generator=rng).to(DEVICE, of_x)

    def kernel(x, w, b=None):
        return kernels.short_conv(x[..., 5:42], w, b)

    def definition(x, w, b=None):
        padded = torch.nn.functional.pad(x[..., 5:42].mT, (taps - 1, 0))
        return torch.nn.functional.silu(torch.nn.functional.conv1d(padded, w, b, groups=37)).mT
    got, ref = ([y, *torch.autograd.grad(y, i, dy.to(y))] for i in (inputs, [t.detach().double().requires_grad_() for t in inputs])
                for y in [(kernel if i is inputs else definition)(*i)])
    assert [x.dtype for x in got] == [of_x, of_x, of_w, of_w][:3 + bias]
    assert max(gap(x, r) for x, r in zip(got, ref)) < (1e-2 if of_x == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("taps", (1, 2, 4))
def test_convolution_goes_on_from_its_state(taps, monkeypatch):
    """Slices of any length, one after the other, equal the whole: with the kernel and with the sum of shifted copies."""
    x, w, b = (torch.randn(s, device=DEVICE) for s in ((2, 23, 5), (5, 1, taps), (5,)))
    for kernel in (False, True):
        monkeypatch.setattr(model_script, "conv_fits", lambda x: kernel)
        whole, before, parts = torch.cat(model_script.causal_conv(x, w, b, None, (2, 3))[0], dim=-1), None, []
        for part in x.split((2, 1, 3, 9, 8), dim=1):
            y, before = model_script.causal_conv(part, w, b, before, (2, 3))
            assert before.shape == (2, taps - 1, 5)
            parts.append(torch.cat(y, dim=-1))
        assert gap(torch.cat(parts, dim=1), whole) < 1e-6
        assert gap(whole, torch.nn.functional.silu(torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (taps - 1, 0)), w, b, groups=5)).mT) < 1e-6


@pytest.mark.parametrize("T", (1, 2, 63, 64, 65, 200))
@pytest.mark.parametrize("op,shape,G", (("gla", (3, 7, 5), 1), ("gla", (1, 33, 18), 1), ("ssd", (4, 5, 9), 2), ("ssd", (3, 9, 7), 1)))
def test_chunked_equals_recurrent(op, shape, G, T):
    """Values, final states and every gradient, in float64; the state comes in, and its gradient comes back."""
    for seed, decay in enumerate(DECAYS):
        e = errors(op, example(op, 2, T, *shape, G=G, dtype=torch.float64, decay=decay, seed=seed), "chunked")
        assert max(e.values()) < 1e-9, (decay, e)


@pytest.mark.parametrize("op,shape,G", (("gla", (3, 20, 36), 1), ("ssd", (6, 20, 36), 2)) + ((("ssd", (7, 20, 130), 1),) if CUDA else ()))
@pytest.mark.parametrize("T", (1, 17, 64, 200) + ((1000, 8192, 65536) if CUDA else ()))
def test_triton_equals_recurrent(op, shape, G, T, mended_interpreter):
    """Buffers start as NaN, so that an element left unwritten or read too early shows. The same bits twice. (At T = 1 dA is one sum
    a head, which may cancel but for the bfloat16 state's rounding: one of three heads failed by that, so the last shape has seven.)"""
    if T > 1000:                                             # the definition is slow there: against chunked in float64
        reference = "chunked"
    else:
        reference = "recurrent"
    torch.use_deterministic_algorithms(True, warn_only=True)         # fills new memory with NaN
    try:
        for seed, decay in enumerate(DECAYS):
            limits = {torch.float32: 1e-3 if CUDA else 1e-5}
            if CUDA or decay in ("mixed", None):             # the interpreter is slow
                limits[torch.bfloat16] = 1e-2
            for dtype, limit in limits.items():
                args = example(op, 1 if T > 17 else 3, T, *shape, G=G, dtype=dtype, device=DEVICE, decay=decay, seed=seed)
                e = errors(op, args, "triton", reference)
                assert all(x <= limit for x in e.values()), f"{decay} {dtype} {e}"
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(run(op, args, "triton"), run(op, args, "triton")))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype,limit", ((torch.float32, 1e-3 if CUDA else 1e-5), (torch.bfloat16, 1e-2)))
def test_steep_and_gentle_chunks_side_by_side(dtype, limit, mended_interpreter):
    """GLA's kernel takes chunks of little decay and chunks of much decay apart: one sequence with both, and the border."""
    for step in (-0.2, -0.33, -0.8, -3.0):                   # around the limit of a chunk of 128 tokens
        args = example("gla", 1, 300, 2, 16, 16, dtype=dtype, device=DEVICE)
        args[3][:, 128:256] = step
        e = errors("gla", args, "triton")
        assert all(x <= limit for x in e.values()), f"{step} {e}"


@pytest.mark.parametrize("dtype,limit", ((torch.float32, 1e-3 if CUDA else 1e-5), (torch.bfloat16, 1e-2)))
@pytest.mark.parametrize("H,G", ((1, 1), (8, 2)))
def test_large_states(H, G, dtype, limit, mended_interpreter):
    """From N = 256 on (130 is padded to it) the state is read apart, one head at a time or 128 channels of a group's heads."""
    e = errors("ssd", example("ssd", 1, 140, H, 20, 130, G=G, dtype=dtype, device=DEVICE, decay="mixed"), "triton")
    assert all(x <= limit for x in e.values()), str(e)


@pytest.mark.parametrize("op,shape", (("gla", (2, 5, 150)), ("gla", (1, 140, 20)), ("ssd", (2, 70, 20)), ("ssd", (3, 150, 5))))
def test_wide_heads(op, shape):
    """Several tiles of channels, the last one partly filled."""
    e = errors(op, example(op, 1, 40, *shape, device=DEVICE, decay="mixed"), "triton")
    assert all(x <= (1e-3 if CUDA else 1e-5) for x in e.values()), e


@pytest.mark.skipif(not CUDA, reason="needs a GPU: layers of the public sizes")
@pytest.mark.parametrize("dtype,limit", ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)))
@pytest.mark.parametrize("case", kernels.CASES)
def test_layers_of_the_public_sizes(case, dtype, limit):
    op, _, _, H, K, V = kernels.CASES[case]
    e = errors(op, example(op, 1, 300, H, K, V, dtype=dtype, device=DEVICE), "triton", "chunked")
    assert all(x <= limit for x in e.values()), str(e)


COMPILE = """
import re, sys, types, torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
capability, shared, dtype, *cases = sys.argv[1:]

class Driver:                                                # of a GPU that is not there: kernels are compiled for it and not launched
    utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": int(shared)}, load_binary=lambda *args: (1, 1, 0, 0, 1024))
    get_current_target = lambda self: GPUTarget("cuda", int(capability), 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    launcher_cls = lambda self, source, metadata: print(metadata.name, metadata.num_stages, metadata.shared) or (lambda *args: None)

triton.runtime.driver.set_active(Driver())
CUDABackend.make_cubin = lambda *args: b""                   # the assembler would take half of the time
make_ttgir = CUDABackend.make_ttgir

def overwritten(ttgir):                                      # is there a loop that fetches into the buffers of a product under way?
    for loop in ttgir.split("scf.for")[1:]:
        buffer, loaded, multiplied, running = {}, set(), set(), False
        for line in loop.split(chr(10)):
            if found := re.search("(%[^ ]+) = ttg.memdesc_(?:index|trans|subslice) (%[^ [,]+)", line):
                buffer[found[1]] = buffer.get(found[2], found[2])
            elif found := re.search("ttg.local_load (%[^ ,]+)", line):
                loaded.add(buffer.get(found[1]))
            elif found := re.search("ttng.warp_group_dot (%[^ ,]+), (%[^ ,]+)", line):
                multiplied, running = multiplied | {buffer.get(found[1]), buffer.get(found[2])}, True
            elif found := re.search("warp_group_dot_wait.*pendings = ([0-9]+)", line):
                running = found[1] != "0"
            elif "async_copy_global_to_local" in line and running and loaded & multiplied - {None}:
                return True

def checked(module, *args):
    module = make_ttgir(module, *args)
    if overwritten(str(module)):
        print("overwritten")
    return module

CUDABackend.make_ttgir = staticmethod(checked)
from kernels import CASES, example, run
for T in (256, 128, 2048):
    for case in cases:
        op, _, _, *shape = CASES[case]
        args = [torch.empty_like(a).requires_grad_() for a in example(op, 1, T, *shape, dtype=getattr(torch, dtype))]
        o, S = run(op, args, "triton")
        torch.autograd.grad([o, S], args, [o, S])
    CUDABackend.make_ttgir = None                            # one length has compiled for all
"""


@pytest.mark.skipif(CUDA or not kernels.triton_installed, reason="compiles for a GPU where there is none")
@pytest.mark.parametrize("capability,kilobytes,dtype,cases", ((90, 227, "float32", ("gla-1.3b expanded", "mamba2-1.3b expanded")),
                                                              (90, 227, "bfloat16", ("gla-1.3b expanded", "mamba2-370m", "mamba2-370m expanded")),
                                                              (89, 99, "bfloat16", ("gla-1.3b expanded",))))
def test_kernels_compile_for_absent_gpus(capability, kilobytes, dtype, cases, tmp_path):
    """The largest layers compile for an H100 as they are asked for, once for all lengths; on a smaller GPU with fewer stages. And no
    kernel fetches a tile into a buffer that a matrix product of the turn before may still read (see `finished` in kernels.py)."""
    made = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), str(1024 * kilobytes), dtype, *cases], cwd=HERE,
                          env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "overwritten" not in made.stdout
    tried = [line.split() for line in made.stdout.splitlines()]
    too_large = {name for name, stages, shared in tried if int(shared) > 1024 * kilobytes}
    parts = {"gla": "prepare prepare_steep scan rows scores through finish", "ssd": "prepare scan read rows scores through finish"}
    ops = {kernels.CASES[case][0] for case in cases}
    assert {name for name, *_ in tried} == {f"{op}_{part}" for op in ops for part in parts[op].split()}
    assert len(tried) >= 18 if len(ops) == 2 else len(tried) >= 10              # scan, rows and GLA's finish both ways
    assert too_large == ({"gla_scores", "gla_through"} if kilobytes == 99 else set())


@pytest.mark.parametrize("op,shape,G", (("gla", (3, 20, 36), 1), ("ssd", (6, 20, 36), 2)))
def test_one_token_steps(op, shape, G):
    """The kernel for one token, state in and out, repeated, equals the definition over the whole sequence."""
    args = example(op, 2, 5, *shape, G=G, device=DEVICE)
    over_time = [len(a.shape) > 1 and a.shape[1] == 5 for a in args[:-1]]
    o, S = run(op, [a.double() for a in args], "recurrent")
    outs, state = [], args[-1]
    with torch.no_grad():
        for t in range(5):
            y, state = run(op, [a[:, t:t + 1] if timed else a for a, timed in zip(args, over_time)] + [state], "triton")
            outs.append(y)
    assert gap(torch.cat(outs, dim=1), o) < 1e-5 and gap(state, S) < 1e-5


@pytest.mark.parametrize("block", ("gla", "mamba2"))
def test_torch_compile_sees_no_graph_break(block, monkeypatch):
    """A layer with the Triton kernels in it is one graph, forward and backward, and computes the same; from the second T on, T may be a
    symbol in the graph."""
    monkeypatch.setattr(model_script, "gla", lambda *a, **k: gla(*a, **k, impl="triton"))
    monkeypatch.setattr(model_script, "ssd", lambda *a, **k: ssd(*a, **k, impl="triton"))
    layer = small(block).layers[0].to(DEVICE)
    one_graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for T in (20, 25, 40):
        x = torch.randn(1, T, 32, device=DEVICE, requires_grad=True)
        plain, compiled = (sum(f(x)[:2]) for f in (layer, one_graph))
        assert gap(compiled, plain) < 1e-5
        assert gap(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, plain))) < 1e-5


@pytest.mark.skipif(not CUDA, reason="needs a GPU: compares the kernels that training there picks")
@pytest.mark.parametrize("block", ("gla", "mamba2"))
def test_training_with_the_kernels_matches_chunked(block, monkeypatch):
    """Loss curves of 50 steps in bfloat16, on the same data, within 1 %."""
    curves = []
    for impl in ("auto", "chunked"):
        monkeypatch.setattr(model_script, "gla", lambda *a, **k: gla(*a, **k, impl=impl))
        monkeypatch.setattr(model_script, "ssd", lambda *a, **k: ssd(*a, **k, impl=impl))
        lm = small(block, d_model=128, headdim=32, d_state=32).cuda()
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
        rng, curve = torch.Generator().manual_seed(0), []
        for _ in range(50):
            idx = torch.randint(61, (4, 1), generator=rng).add(torch.arange(300) ** 2 // 7).remainder(61).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = lm(idx[:, :-1], idx[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1][-1] < 0.9 * curves[1][0]
    assert all(abs(a / b - 1) < 0.01 for a, b in zip(*curves))


def test_half_precision_inputs_keep_a_float32_state():
    for dtype in (torch.float16, torch.bfloat16):
        for op, shape in (("gla", (2, 8, 8)), ("ssd", (2, 8, 8))):
            args = example(op, 1, 20, *shape, dtype=dtype)
            for impl in ("recurrent", "chunked"):
                o, S = run(op, args, impl)
                ref = run(op, [a.double() for a in args], "recurrent")
                assert o.dtype == dtype and S.dtype == torch.float32 and gap(o, ref[0]) < 1e-2 and gap(S, ref[1]) < 1e-5


def test_unknown_impl():
    with pytest.raises(ValueError, match="recurrent"):
        run("gla", example("gla", 1, 2, 1, 2, 2), "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# model


def small(block, **changes):
    base = dict(block=block, vocab_size=61, n_layer=3, d_model=32, conv_size=4, d_mlp=48, n_head=4, d_state=6, headdim=8)
    torch.manual_seed(0)
    return LM(Config(**{**base, **changes}))


MODELS = [("gla", {}), ("gla", {"conv_size": 0}), ("gla", {"n_head": [4, 1, 2]}), ("mamba2", {}),
          ("mamba2", {"d_state": [6, 24, 3], "n_groups": 2, "tie_embeddings": True, "pad_vocab": 16})]


@pytest.mark.parametrize("block,changes", MODELS)
def test_prefill_then_step_equals_the_full_forward(block, changes):
    lm = small(block, **changes).double()
    idx = torch.randint(61, (2, 70))
    full = lm(idx)[0]
    assert full.shape == (2, 70, 61)
    for cut in (1, 2, 66):
        logits, _, state = lm(idx[:, :cut])
        parts = [logits]
        for t in range(cut, 70):
            logits, _, state = lm(idx[:, t:t + 1], state=state)
            parts.append(logits)
        assert gap(torch.cat(parts, dim=1), full) < 1e-10
    assert len(state) == 3
    for i, (S, _) in enumerate(state):                       # what the config says is what is carried
        assert S[0].numel() == lm.config.state_numbers(i)


@pytest.mark.parametrize("block,changes", MODELS)
def test_generate(block, changes):
    lm = small(block, **changes).to(DEVICE)
    idx, n = torch.randint(61, (2, 9), device=DEVICE), 30 if CUDA else 12               # long runs are recorded on a GPU
    greedy = lm.generate(idx, n, temperature=0)
    again = idx
    for _ in range(n):                                       # without any state: the whole prefix every time
        again = torch.cat((again, lm(again)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(greedy, again) and torch.equal(greedy[:, :9], idx)
    assert torch.equal(lm.generate(idx, n, top_k=1), greedy)
    torch.manual_seed(1)
    assert lm.generate(idx, 5, temperature=1.0, top_k=1000).max() < 61


@pytest.mark.parametrize("vocab,n,slices", ((61, 40, 61 * 7), (50, 1, 1 << 20)))
def test_sliced_loss_equals_the_plain_loss(vocab, n, slices):
    x, w = torch.randn(n, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(vocab, (n,))
    plain = torch.nn.functional.cross_entropy((x @ w.T)[:, :vocab], targets)
    sliced = SlicedCrossEntropy.apply(x, w, targets, vocab, slices)
    assert abs(plain.item() - sliced.item()) < 1e-6
    for a, b in zip(torch.autograd.grad(3 * plain, (x, w)), torch.autograd.grad(3 * sliced, (x, w))):
        assert gap(b, a) < 1e-6


def test_sliced_loss_in_bfloat16():
    x, w = torch.randn(1000, 64, device=DEVICE), torch.randn(500, 64, device=DEVICE) / 10
    x, w = (t.bfloat16().float().requires_grad_() for t in (x, w))                      # so that the factors are exact
    targets = torch.randint(500, (1000,), device=DEVICE)
    plain = torch.nn.functional.cross_entropy(x.double() @ w.double().T, targets)
    with torch.autocast(DEVICE, torch.bfloat16):
        sliced = SlicedCrossEntropy.apply(x, w, targets, 500, 500 * 30)                 # 34 slices
    assert abs(plain.item() - sliced.item()) < 1e-4 * plain.item()
    for a, b in zip(torch.autograd.grad(plain, (x, w)), torch.autograd.grad(sliced, (x, w))):
        assert gap(b, a) < 5e-3


def test_loss_counts_only_what_is_asked():
    lm = small("gla")
    idx = torch.randint(61, (2, 20))
    targets = torch.randint(61, (2, 20))
    targets[:, ::2] = -100
    logits = lm(idx)[0]
    ref = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    none, loss, _ = lm(idx, targets)
    assert none is None and abs(loss.item() - ref.item()) < 1e-6


def test_checkpoint_round_trip(tmp_path):
    for block, changes in MODELS:
        lm = small(block, **changes)
        save_checkpoint(tmp_path / "a.pt", lm, {"step": 3})
        back, extra = load_checkpoint(tmp_path / "a.pt")
        assert back.config == lm.config and extra == {"step": 3}
        assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), back.state_dict().values()))
        assert (back.lm_head.weight is back.embeddings.weight) == lm.config.tie_embeddings
        assert torch.equal(LM.from_pretrained(tmp_path / "a.pt")(torch.ones(1, 3, dtype=torch.long))[0],
                           lm(torch.ones(1, 3, dtype=torch.long))[0])


# ---------------------------------------------------------------------------------------------------------------------
# public checkpoints. The formats' own libraries are a test-only extra: pip install transformers safetensors


def public_folder(path, kind, seed=0):
    """A small random checkpoint folder written in a public format, without that format's library."""
    torch.manual_seed(seed)
    d, heads, N, rows = 32, 4, 6, 64
    normal = lambda *shape: 0.1 * torch.randn(*shape)
    if kind == "gla":
        config = {"model_type": "gla", "hidden_size": d, "num_hidden_layers": 2, "num_heads": heads, "vocab_size": rows, "use_short_conv": True,
                  "intermediate_size": 48, "attn_mode": "chunk", "clamp_min": None, "use_gk": True, "use_gv": False, "fuse_norm": True}
        layer = {"attn_norm.weight": (d,), "attn.q_proj.weight": (16, d), "attn.k_proj.weight": (16, d), "attn.v_proj.weight": (d, d),
                 "attn.g_proj.weight": (d, d), "attn.gk_proj.0.weight": (16, d), "attn.gk_proj.1.weight": (16, 16), "attn.gk_proj.1.bias": (16,),
                 "attn.o_proj.weight": (d, d), "attn.g_norm_swish_gate.weight": (8,), "attn.q_conv1d.weight": (16, 1, 4),
                 "attn.k_conv1d.weight": (16, 1, 4), "attn.v_conv1d.weight": (d, 1, 4), "mlp_norm.weight": (d,),
                 "mlp.gate_proj.weight": (96, d), "mlp.down_proj.weight": (d, 48)}           # gate and up in one, as of old
        weights = {"model.embeddings.weight": normal(rows, d), "model.norm.weight": normal(d), "lm_head.weight": normal(rows, d)}
        weights |= {f"model.layers.{i}.{k}": normal(*v) for i in range(2) for k, v in layer.items()}
    else:
        config = {"d_model": d, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"layer": "Mamba2", "d_state": N, "headdim": 16},
                  "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
                  "pad_vocab_size_multiple": 16, "tie_embeddings": True}
        layer = {"norm.weight": (d,), "mixer.in_proj.weight": (2 * 64 + 2 * N + 4, d), "mixer.conv1d.weight": (64 + 2 * N, 1, 4),
                 "mixer.conv1d.bias": (64 + 2 * N,), "mixer.dt_bias": (4,), "mixer.A_log": (4,), "mixer.D": (4,), "mixer.norm.weight": (64,),
                 "mixer.out_proj.weight": (d, 64)}
        weights = {"backbone.embedding.weight": normal(rows, d), "backbone.norm_f.weight": normal(d)}
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        weights |= {f"backbone.layers.{i}.{k}": normal(*v) for i in range(2) for k, v in layer.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return config, weights


def write_weights(path, weights, shards=0):
    if not shards:
        return torch.save(weights, path / "pytorch_model.bin")
    save_file = pytest.importorskip("safetensors.torch").save_file
    names = list(weights)
    where = {n: f"model-{1 + i * shards // len(names)}.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: weights[n].clone() for n in names if where[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("kind,shards", (("gla", 0), ("mamba2", 0), ("gla", 3), ("mamba2", 3)))
def test_public_folders_load_tensor_for_tensor(kind, shards, tmp_path):
    _, weights = public_folder(tmp_path / "x", kind)
    write_weights(tmp_path / "x", weights, shards)
    lm = LM.from_pretrained(str(tmp_path / "x"))
    ours = lm.state_dict()
    if kind == "gla":
        assert torch.equal(torch.cat((ours["layers.1.mlp.gate_proj.weight"], ours["layers.1.mlp.up_proj.weight"])),
                           weights["model.layers.1.mlp.gate_proj.weight"])
        assert torch.equal(ours["layers.0.attn.gk_proj.1.bias"], weights["model.layers.0.attn.gk_proj.1.bias"])
    else:
        assert torch.equal(ours["embeddings.weight"], weights["backbone.embedding.weight"]) and lm.config.vocab_size == 61
        assert torch.equal(ours["norm.weight"], weights["backbone.norm_f.weight"])
        assert torch.equal(ours["layers.1.mixer.A_log"], weights["backbone.layers.1.mixer.A_log"])
    assert lm(torch.ones(1, 5, dtype=torch.long))[0].shape[-1] == lm.config.vocab_size
    assert cli(expand_script, f"--init_from={tmp_path}/x", "--every=1", f"--out={tmp_path}/x.pt") == (0, "")
    assert lm.config.tokenizer == ("hf:EleutherAI/gpt-neox-20b" if kind == "mamba2" else f"hf:{tmp_path}/x")
    lm(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))[1].backward()


def test_bad_public_folders(tmp_path):
    for kind in ("gla", "mamba2"):
        path = tmp_path / kind
        config, weights = public_folder(path, kind)
        check = lambda says: refused(expand_script, f"--init_from={path}", f"--out={tmp_path}/x.pt", says=says)
        check("cannot read the weights")
        name = [k for k in weights if k.endswith("layers.1.norm.weight" if kind == "mamba2" else "layers.1.attn_norm.weight")][0]
        write_weights(path, {k: v for k, v in weights.items() if k != name})
        check("missing layers.1.")
        write_weights(path, weights | {"model.rotary.weight": torch.ones(2)})
        check("unexpected model.rotary.weight")
        write_weights(path, weights | {name: torch.ones(7)})
        check("has shape (7,), expected (32,)")
        write_weights(path, weights)
        whole = (path / "pytorch_model.bin").read_bytes()
        (path / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
        check("cannot read the weights")
        write_weights(path, weights)
        (path / "config.json").write_text(json.dumps(config | {"sliding_window": 5}))
        check("not built: sliding_window = 5")
        (path / "config.json").write_text("{")
        check("no readable config.json")
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        check("model_type is 'llama'")
    _, weights = public_folder(tmp_path / "st", "gla")
    (tmp_path / "st" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    installed = importlib.util.find_spec("safetensors") is not None
    refused(expand_script, f"--init_from={tmp_path}/st", says="cannot read the weights" if installed else "pip install safetensors")
    assert not os.path.exists(tmp_path / "x.pt")


def test_an_exported_model_generates_text(ckpt, tmp_path):
    """A model of ours, written in the public format, says what its token ids mean."""
    pytest.importorskip("safetensors", reason="test-only extra: pip install safetensors")
    assert cli(model_script, f"--ckpt={ckpt}", f"--export={tmp_path}/public") == (0, "")
    assert cli(model_script, f"--ckpt={tmp_path}/public", "--prompt=def", "--n=3") == (0, "")
    a, b = LM.from_pretrained(ckpt), LM.from_pretrained(f"{tmp_path}/public")
    assert b.config.tokenizer == "code4096" and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("groups,tied", ((1, True), (8, False)))
def test_parity_with_transformers_mamba2(groups, tied, tmp_path):
    transformers = pytest.importorskip("transformers", reason="test-only extra: pip install transformers")
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=101, hidden_size=64, num_hidden_layers=2, head_dim=16, num_heads=8, state_size=12, n_groups=groups, expand=2,
        tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "a")
    lm = LM.from_pretrained(str(tmp_path / "a")).eval()
    with torch.no_grad():
        for T in (1, 63, 300):
            idx = torch.randint(101, (2, T))
            assert (theirs(idx).logits - lm(idx)[0]).abs().max() < 1e-4
        idx = idx[:1, :20]
        greedy = idx                                         # by their full forward, token after token
        for _ in range(50):
            greedy = torch.cat((greedy, theirs(greedy).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(greedy, lm.generate(idx, 50, temperature=0))
        if groups == 1:                      # transformers 5.23's generate strays from its own forward with n_groups > 1
            assert torch.equal(greedy, theirs.generate(idx, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0))
        model_script.export(lm, str(tmp_path / "b"))
        back = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "b").eval()
        assert (back(idx).logits - lm(idx)[0]).abs().max() < 1e-4
    with pytest.raises(BadInput, match="layers differ"):
        model_script.export(expand(lm, [0])[0], str(tmp_path / "c"))


@pytest.mark.skipif(not CUDA, reason="needs a GPU: flash-linear-attention's kernels")
@pytest.mark.parametrize("conv", (False, True))
def test_parity_with_fla_gla(conv, tmp_path):
    fla = pytest.importorskip("fla.models.gla", reason="test-only extra: pip install flash-linear-attention")
    torch.manual_seed(0)
    theirs = fla.GLAForCausalLM(fla.GLAConfig(hidden_size=256, num_hidden_layers=2, num_heads=4, vocab_size=1000,
                                              use_short_conv=conv)).cuda().bfloat16().eval()
    theirs.save_pretrained(tmp_path / "a")
    lm = LM.from_pretrained(str(tmp_path / "a")).cuda().eval()
    for T in (100, 300):
        idx = torch.randint(1000, (2, T), device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            ours, loss = lm(idx)[0], lm(idx[:, :-1], idx[:, 1:])[1]
            ref = theirs(idx).logits
        assert gap(ours, ref) < 2e-2
        plain = torch.nn.functional.cross_entropy(ref[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten())
        assert abs(loss.item() - plain.item()) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# transplant


@pytest.mark.parametrize("block,changes", MODELS)
@pytest.mark.parametrize("init", ("reinit", "inherit", "preserve"))
def test_everything_outside_the_chosen_layers_is_kept(block, changes, init):
    lm = small(block, **changes)
    if block == "gla" and init == "preserve":
        with pytest.raises(BadInput, match="no exact map"):
            expand(lm, [0], init=init)
        return
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    new, report = expand(lm, [0, 2], factor=2, init=init)
    for name, old in before.items():
        assert torch.equal(lm.state_dict()[name], old)                            # the model passed in is untouched
        if not name.startswith(("layers.0.", "layers.2.")) or ".mlp" in name:
            assert torch.equal(new.state_dict()[name], old), name
    numbers = [new.config.state_numbers(i) for i in range(3)]
    assert numbers == [lm.config.state_numbers(i) * m for i, m in enumerate((2, 1, 2))]
    assert report["state_numbers_after"] == sum(numbers) and "parameters" in describe(report)
    _, loss, state = new(torch.randint(61, (2, 30)), torch.randint(61, (2, 30)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    assert [S[0].numel() for S, _ in state] == numbers
    same, other = expand(lm, [0, 2], 2, init, seed=0)[0], expand(lm, [0, 2], 2, init, seed=1)[0]
    equal = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert equal(new, same) and (equal(new, other) == (init == "inherit"))


def test_transplant_row_by_row_mamba2():
    lm, d, G, N = small("mamba2", n_groups=2), 64, 2, 6
    old = lm.layers[1].mixer
    torch.nn.init.normal_(old.norm.weight)
    rows = lambda w, n: w.split((2 * d, G * n, G * n, w.shape[0] - 2 * d - 2 * G * n))
    z, B, C, dt = rows(old.in_proj.weight, N)
    for init in ("reinit", "inherit", "preserve"):
        new = expand(lm, [1], 4, init)[0].layers[1].mixer
        z2, B2, C2, dt2 = rows(new.in_proj.weight, 4 * N)
        assert torch.equal(z, z2) and torch.equal(dt, dt2)                        # z, x and dt rows
        assert torch.equal(new.D, old.D) and torch.equal(new.out_proj.weight, old.out_proj.weight)
        assert torch.equal(new.conv1d.weight[:d], old.conv1d.weight[:d]) and torch.equal(new.conv1d.bias[:d], old.conv1d.bias[:d])
        fresh = [not torch.equal(getattr(new, k), getattr(old, k)) for k in ("A_log", "dt_bias")] + \
                [not torch.equal(new.norm.weight, old.norm.weight)]
        assert fresh == [init == "reinit"] * 3
        for small_rows, large in ((B, B2), (C, C2)):
            for g in range(G):
                s, l = small_rows.view(G, N, -1)[g], large.view(G, 4 * N, -1)[g]
                if init == "inherit":
                    assert torch.equal(l, s.repeat(4, 1))
                elif init == "preserve":
                    assert torch.equal(l[:N], s) and (l[N:] == 0).all() == (large is C2)
                else:
                    assert not (l[:N, None] == s).all(-1).any()


def test_preserve_is_exact_and_its_new_rows_learn():
    for changes in ({}, {"n_groups": 2, "d_state": [6, 24, 3]}):
        lm = small("mamba2", **changes).double()
        new, _ = expand(lm, [0, 1, 2], 4, "preserve")
        idx = torch.randint(61, (2, 100))
        assert gap(new(idx)[0], lm(idx)[0]) < 1e-12
        new(idx, idx)[1].backward()
        for i, layer in enumerate(new.layers):
            G, N, d = lm.config.n_groups, lm.config.d_state[i], lm.config.d_inner
            C = layer.mixer.in_proj.weight.grad[2 * d + G * 4 * N:2 * d + 2 * G * 4 * N].view(G, 4 * N, -1)
            assert (C[:, N:].norm(dim=-1) > 0).all()


def test_inherit_gla_tiles_the_norm_and_keeps_the_rest():
    lm = small("gla")
    torch.nn.init.normal_(lm.layers[1].attn.g_norm_swish_gate.weight)
    new, report = expand(lm, [1], init="inherit")
    for name, old in lm.state_dict().items():
        want = old.repeat(4) if name == "layers.1.attn.g_norm_swish_gate.weight" else old
        assert torch.equal(new.state_dict()[name], want)
    assert report["params_after"] - report["params_before"] == 3 * 8              # the norm's gains, nothing else


@pytest.mark.parametrize("size,every,before,after,more", (
    ("gla-340m", 6, "3.15M", "4.72M", "+0.0M"), ("gla-1.3b", 6, "12.58M", "18.87M", "+0.0M"),
    ("mamba2-370m", 12, "12.58M", "15.73M", "+3.2M"), ("mamba2-1.3b", 12, "25.17M", "31.46M", "+6.3M"),
    ("mamba2-1.3b", 1, "25.17M", "100.66M", "+75.7M")))
def test_counts_of_the_public_sizes(size, every, before, after, more):
    config = SIZES[size]
    with torch.device("meta"):
        lm = LM(config)
    _, r = expand(lm, choose_layers(config.n_layer, every, ""))
    text = describe(r)
    assert f"{before} -> {after}" in text and more in text, text
    public = {"gla-340m": 374e6, "gla-1.3b": 1.36e9, "mamba2-370m": 370e6, "mamba2-1.3b": 1.34e9}[size]
    assert abs(r["params_before"] / public - 1) < 0.03
    if config.block == "mamba2":
        N, n = config.d_state[0], len(r["layers"])
        assert r["params_after"] - r["params_before"] == n * 2 * N * 3 * (config.d_model + 5)


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_mqar_by_perfect_memory_and_by_none():
    for pairs in (1, 4, 32):
        idx, targets = recall.mqar(np.random.default_rng(pairs), 200, pairs, 4096)
        assert idx.shape == targets.shape == (200, 4 * pairs) and (targets != -100).sum() == 200 * pairs
        blind = []
        for x, y in zip(idx, targets):
            memory = dict(zip(x[:2 * pairs:2], x[1:2 * pairs:2]))
            assert len(memory) == pairs
            asked = y != -100
            assert all(memory[k] == v for k, v in zip(x[asked], y[asked]))
            blind.append((y[asked] == x[1]).mean())                               # always the first value seen
        assert abs(np.mean(blind) - 1 / pairs) < 0.02
    with pytest.raises(ValueError):
        recall.mqar(np.random.default_rng(0), 1, 1000, 4096)


def test_fewshot_by_perfect_memory_and_by_none():
    for shots in (1, 3):
        idx, targets = recall.fewshot(np.random.default_rng(shots), 400, shots, 4096)
        blind = []
        for x, y in zip(idx, targets):
            asked = np.flatnonzero(y != -100)
            memory = dict(zip(x[:asked[0]:2], x[1:asked[0]:2]))
            assert len(asked) == 8 and len(memory) == 8 and all(memory[x[t]] == y[t] for t in asked)
            labels = list(dict.fromkeys(x[1:asked[0]:2]))
            blind.append(np.mean([y[t] == labels[0] for t in asked]))
        assert 0.2 < np.mean(blind) < 0.45                                        # 1 in 4, a little more for a label seen


def test_passkey_is_in_the_text_and_nowhere_else(corpus):
    tok = prepare.load_tokenizer("code4096")
    _, val, _ = prepare.load_corpus(corpus)
    idx, targets = recall.passkey(np.random.default_rng(0), 50, 128, val, tok)
    depths = []
    for x, y in zip(idx, targets):
        text = tok.decode(x.tolist())
        key = tok.decode(y[y != -100].tolist())
        assert len(key) == 5 and key.isdigit() and text.endswith(f"\npasskey = {key}")
        assert text.count(f"passkey = {key}") == 2
        depths.append(text.index("passkey"))
        assert x.shape == (128,)
    assert len(set(depths)) > 20


def test_tokenizer_round_trip():
    tok = prepare.load_tokenizer("code4096")
    for text in ("def f(x):\n    return x**2  # é, 漢字, \t\x00\n", "", open(kernels.__file__).read()):
        assert tok.decode(tok.encode_ordinary(text)) == text
    assert tok.n_vocab == 4096 and tok.eot_token == 4095


def test_two_runs_prepare_a_corpus_at_once(tmp_path):
    """As where two recipes are started together on a fresh clone."""
    (tmp_path / "text.txt").write_text("Two runs, one corpus: each writes its own and the last one stays. " * 400)
    runs = [subprocess.Popen([sys.executable, "data/prepare.py", str(tmp_path / "text.txt"), f"--out={tmp_path}/text"], cwd=HERE) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "text")) == ["meta.json", "train.bin", "val.bin"] and len(os.listdir(tmp_path)) == 2


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Token files of the first modules of the standard library: real text, quickly made."""
    out = str(tmp_path_factory.mktemp("data") / "python")
    prepare.write_corpus(prepare.read_documents(prepare.python_files()[:60], False), out, "code4096")
    return out


def test_prepare_own_text(tmp_path):
    words = "the quick brown fox jumps over the lazy dog. " * 400
    (tmp_path / "a.txt").write_text(words)
    out = str(tmp_path / "out")
    assert cli(prepare, str(tmp_path / "a.txt"), f"--out={out}") == (0, "")
    train, val, meta = prepare.load_corpus(out)
    tok = prepare.load_tokenizer("code4096")
    assert tok.decode(train.tolist() + val.tolist()) == words + "<|endoftext|>"
    assert meta["train_tokens"] == len(train) and 0.04 < len(val) / (len(train) + len(val)) < 0.06
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(45):
        (folder / f"{i:02d}.txt").write_text(f"file {i}. " + words[:4000])
    assert cli(prepare, str(folder), f"--out={out}") == (0, "")
    train, val, meta = prepare.load_corpus(out)
    text = tok.decode(val.tolist())
    assert "file 19." in text and "file 39." in text and text.count("file") == 2 and "file 19." not in tok.decode(train.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# training


def cli(script, *args):
    """Run a script's main in this process. -> (exit status, what it wrote to stderr)"""
    import contextlib, io
    argv, err = sys.argv, io.StringIO()
    sys.argv = [script.__file__, *args]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            prepare.main_line(script.main)
        return 0, ""
    except SystemExit as e:
        return e.code, err.getvalue()
    finally:
        sys.argv = argv


TINY = ("--device=cpu", "--n_layer=2", "--d_model=16", "--n_head=2", "--d_state=2", "--d_mlp=16", "--headdim=8", "--block_size=32",
        "--batch_size=4", "--recall_tokens=64", "--pairs=2,4", "--eval_interval=10")


def losses(out_dir):
    lines = [json.loads(line) for line in open(f"{out_dir}/log.jsonl")]
    return {x["step"]: (x["loss"], x["recall_loss"]) for x in lines if "loss" in x}


@pytest.mark.parametrize("block", ("gla", "mamba2"))
def test_killed_and_resumed_gives_the_same_numbers(block, corpus, tmp_path):
    args = [f"--data={corpus}", "--init_from=scratch", f"--block={block}", "--steps=40", *TINY]
    assert cli(train_script, *args, f"--out_dir={tmp_path}/whole") == (0, "")
    script = [sys.executable, f"{HERE}/train.py", *args, f"--out_dir={tmp_path}/killed"]
    run = subprocess.Popen(script, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ckpt = f"{tmp_path}/killed/ckpt.pt"
    while not os.path.exists(ckpt) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    at = load_checkpoint(ckpt)[1]["step"]
    assert at in (10, 20, 30, 40)
    resume = ["--init_from=resume", "--device=cpu", f"--data={corpus}", f"--out_dir={tmp_path}/killed"]
    refused(train_script, *resume, "--steps=50", says="has steps = 40 and goes on with that")
    assert cli(train_script, *resume) == (0, "")
    whole, killed = load_checkpoint(f"{tmp_path}/whole/ckpt.pt"), load_checkpoint(ckpt)
    assert killed[1]["step"] == 40 and killed[1]["tokens"] == whole[1]["tokens"]
    if at < 40:
        assert losses(f"{tmp_path}/killed")[40] == losses(f"{tmp_path}/whole")[40]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].state_dict().values(), killed[0].state_dict().values()))


def test_any_number_of_parts_gives_the_same_step(corpus, tmp_path):
    """A batch in one pass, in four, and with the activations computed twice: the same losses to rounding."""
    args = [f"--data={corpus}", "--init_from=scratch", "--steps=10", *TINY]
    for name, more in (("a", "--accumulate=1"), ("b", "--accumulate=4"), ("c", "--checkpoint_activations")):
        assert cli(train_script, *args, more, f"--out_dir={tmp_path}/{name}") == (0, "")
    a, b, c = (losses(f"{tmp_path}/{x}")[10] for x in "abc")
    assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5)


def torchrun(*args):
    """Start train.py as two processes on this machine's CPU; -> the running torchrun."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{HERE}/train.py", *args],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("more", ((), ("--shard",)))
def test_two_processes_give_the_same_losses(more, corpus, tmp_path):
    """The same batch shared out: DistributedDataParallel and FSDP2, over gloo. The checkpoint is one whole model."""
    args = [f"--data={corpus}", "--init_from=scratch", "--steps=20", "--carry_state", *TINY]
    assert cli(train_script, *args, f"--out_dir={tmp_path}/one") == (0, "")
    run = torchrun(*args, *more, f"--out_dir={tmp_path}/two")
    err = run.communicate()[1]
    assert run.returncode == 0, err
    one, two = losses(f"{tmp_path}/one"), losses(f"{tmp_path}/two")
    assert one[10] == pytest.approx(two[10], rel=1e-5) and one[20] == pytest.approx(two[20], rel=1e-5)
    (a, x), (b, y) = (load_checkpoint(f"{tmp_path}/{n}/ckpt.pt") for n in ("one", "two"))
    assert a.config == b.config and x["tokens"] == y["tokens"] and len(y["carried"]) == 2
    assert all(gap(q, p) < 1e-4 for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_process_that_dies_ends_the_others(corpus, tmp_path):
    run = torchrun(f"--data={corpus}", "--init_from=scratch", "--steps=100000", *TINY, f"--out_dir={tmp_path}")
    while not os.path.exists(f"{tmp_path}/ckpt.pt") and run.poll() is None:
        time.sleep(0.05)
    children = open(f"/proc/{run.pid}/task/{run.pid}/children").read().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    t0 = time.time()
    err = run.communicate(timeout=60)[1]
    assert run.returncode and time.time() - t0 < 60 and "train.py: process" in err and "--init_from=resume" in err
    assert load_checkpoint(f"{tmp_path}/ckpt.pt")[1]["step"] >= 10


def test_sigterm_saves_and_stops(corpus, tmp_path):
    args = [f"--data={corpus}", "--init_from=scratch", "--steps=100000", *TINY, "--eval_interval=50000", f"--out_dir={tmp_path}"]
    run = subprocess.Popen([sys.executable, f"{HERE}/train.py", *args], stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    while not (os.path.exists(f"{tmp_path}/log.jsonl") and losses(tmp_path)) and run.poll() is None:
        time.sleep(0.05)
    run.terminate()
    out = run.communicate(timeout=30)[0]
    assert run.returncode == 128 + signal.SIGTERM and "stopped by a signal" in out and "--init_from=resume" in out
    assert load_checkpoint(f"{tmp_path}/ckpt.pt")[1]["step"] >= max(losses(tmp_path))


def train_quietly(args):
    sys.stderr = sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    sys.argv = [train_script.__file__, *args]
    train_script.main()


def test_killed_twenty_times(corpus, tmp_path, monkeypatch):
    """kill -9 at random moments, most of them in a save: never a checkpoint lost, and in the end the same bits."""
    import multiprocessing
    start = multiprocessing.get_context("forkserver")
    monkeypatch.setenv("PYTHONPATH", HERE)
    start.set_forkserver_preload(["test_statex", "torch.distributed.checkpoint.state_dict"])       # a process starts at once
    args = [f"--data={corpus}", "--steps=60", *TINY, "--eval_interval=1", "--pairs=2"]
    rng, steps = np.random.default_rng(0), [0]
    for go in range(21):
        init, log = "resume" if os.path.exists(f"{tmp_path}/a/ckpt.pt") else "scratch", f"{tmp_path}/a/log.jsonl"
        run = start.Process(target=train_quietly, args=([*args, f"--init_from={init}", f"--out_dir={tmp_path}/a"],))
        run.start()
        seen = os.path.getsize(log) if os.path.exists(log) else 0
        while go < 20 and run.is_alive() and (os.path.getsize(log) if os.path.exists(log) else 0) == seen:
            time.sleep(0.01)
        if go < 20:
            run.join(rng.uniform(0, 0.3))
            run.kill()
        run.join()
        if os.path.exists(f"{tmp_path}/a/ckpt.pt"):
            steps.append(load_checkpoint(f"{tmp_path}/a/ckpt.pt")[1]["step"])
    assert steps == sorted(steps) and len(set(steps)) > 10 and steps[-1] == 60, steps
    run = start.Process(target=train_quietly, args=([*args, "--init_from=scratch", f"--out_dir={tmp_path}/b"],))
    run.start(), run.join()
    a, b = (load_checkpoint(f"{tmp_path}/{x}/ckpt.pt")[0].state_dict().values() for x in "ab")
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("size", SIZES)
def test_presets_have_the_public_shapes(size):
    o = train_script.SimpleNamespace(**{**train_script.DEFAULTS, **train_script.PRESETS[size]})
    with torch.device("meta"):
        made = train_script.new_model(o, {"vocab_size": SIZES[size].vocab_size, "tokenizer": ""}).config
    own = ("n_head", "d_mlp") if made.block == "gla" else ("d_state", "headdim")
    for field in ("block", "n_layer", "d_model", "conv_size", "norm_eps", "tie_embeddings", "vocab_size", *own):
        assert getattr(made, field) == getattr(SIZES[size], field), field


def test_full_disk(ckpt, corpus, tmp_path):
    """A file may not grow past 30,000 bytes, which the system reports much as it does a full disk."""
    import resource, shutil
    shutil.copy(ckpt, tmp_path / "ckpt.pt")
    before, soft = open(ckpt, "rb").read(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > 30000
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, soft[1]))
    try:
        code, err = cli(train_script, f"--init_from={tmp_path}/ckpt.pt", f"--data={corpus}", *TINY, "--steps=3", f"--out_dir={tmp_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert code == 2 and "cannot save" in err.splitlines()[-1] and "last checkpoint is untouched" in err.splitlines()[-1]
    assert open(tmp_path / "ckpt.pt", "rb").read() == before and not os.path.exists(tmp_path / "ckpt.pt.tmp")


def test_carried_state_equals_one_long_sequence(corpus, tmp_path):
    """Without learning, the mean loss of four slices is that of the four in one; and the slices lie end to end."""
    args = [f"--data={corpus}", "--init_from=scratch", *TINY, "--batch_size=2", "--recall_tokens=0", "--lr=0", "--carry_state"]
    for name, T, steps in (("long", 160, 1), ("slices", 16, 10)):
        assert cli(train_script, *args, f"--block_size={T}", f"--steps={steps}", f"--out_dir={tmp_path}/{name}") == (0, "")
    curve = load_checkpoint(f"{tmp_path}/slices/ckpt.pt")[1]["curve"]
    o = train_script.SimpleNamespace(seed=0, batch_size=2, block_size=16, carry_state=True, recall_tokens=0, device="cpu")
    tokens = prepare.load_corpus(corpus)[0]
    got = [train_script.batches(tokens, o, 4096, step, 0, 1)[0] for step in range(10)]
    lm = load_checkpoint(f"{tmp_path}/slices/ckpt.pt")[0]
    state, total = None, 0.0
    for idx, targets, _ in got:
        _, loss, state = lm(idx, targets, state)
        total += loss.item() / 10
    whole = lm(torch.cat([idx for idx, _, _ in got], 1), torch.cat([targets for _, targets, _ in got], 1))[1].item()
    assert total == pytest.approx(whole, rel=1e-5) and curve[-1][1] == pytest.approx(loss.item(), rel=1e-5)
    assert all(torch.equal(a[0][:, 1:], a[1][:, :-1]) and torch.equal(a[1][:, -1], b[0][:, 0]) for a, b in zip(got, got[1:]))


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    args = [f"--data={corpus}", "--init_from=scratch", *TINY, f"--out_dir={tmp_path}/run"]
    assert cli(train_script, *args, "--steps=10") == (0, "")
    good = open(f"{tmp_path}/run/ckpt.pt", "rb").read()
    code, err = cli(train_script, *args, "--steps=200", "--lr=1e30", "--warmup=0", "--eval_interval=1000")
    assert code == 2 and err.count("\n") <= 3 and "step" in err and "last good step" in err
    assert open(f"{tmp_path}/run/ckpt.pt", "rb").read() == good


@pytest.mark.parametrize("block", ("gla", "mamba2"))
def test_the_recipe_on_real_text(block, tmp_path):
    """The default corpus, through the command line, from nothing to results.json."""
    out = subprocess.run([sys.executable, f"{HERE}/train.py", f"--block={block}", "--pretrain_steps=12", "--steps=6",
                          f"--out_dir={tmp_path}", "--device=cpu"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "| StateX" in out.stdout and "val loss" in out.stdout
    r = json.load(open(tmp_path / "results.json"))
    assert set(r) == {"pretrained", "lpt", "statex", "config", "versions"}
    keys = {"params", "state_numbers", "state_bytes", "tokens", "val_loss", "icl_score", "recall", "tokens_per_s",
            "decode_ms_per_token", "peak_mem_mib"}
    for arm in ("pretrained", "lpt", "statex"):
        assert keys <= set(r[arm]) and set(r[arm]["recall"]) == {"mqar", "passkey", "fewshot"}
    assert r["lpt"]["tokens"] == r["statex"]["tokens"] > r["pretrained"]["tokens"]
    assert r["statex"]["state_numbers"] > r["lpt"]["state_numbers"] == r["pretrained"]["state_numbers"]
    lpt, statex, small = (LM.from_pretrained(f"{tmp_path}/{x}.pt") for x in ("lpt", "statex", "pretrained"))
    assert lpt.config == small.config != statex.config
    code = subprocess.run([sys.executable, f"{HERE}/model.py", f"--ckpt={tmp_path}/statex.pt", "--prompt=def read(", "--n=5"],
                          capture_output=True, text=True)
    assert code.returncode == 0 and code.stdout.startswith("def read(")


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one clear line, exit status 2, nothing written or lost


@pytest.fixture(scope="session")
def ckpt(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert cli(train_script, f"--data={corpus}", "--init_from=scratch", "--steps=2", *TINY, f"--out_dir={out}") == (0, "")
    return f"{out}/ckpt.pt"


def refused(script, *args, says):
    code, err = cli(script, *args)
    line = err.strip().splitlines()[-1] if err.strip() else ""
    assert code == 2 and says in line, (code, err)
    assert "Traceback" not in err


def results_script(name):
    spec = importlib.util.spec_from_file_location(name, f"{HERE}/data/results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evidence():
    return results_script("evidence")


def test_throughput_shapes():
    """What data/results/throughput.py times: the paper's expansions of the public sizes, with the vocabulary asked for."""
    throughput = results_script("throughput")
    for name, before, after in (("gla-1.3b", 12.58, 18.87), ("mamba2-1.3b", 25.17, 31.46)):
        for c, millions in ((throughput.shape(name, 32000), before), (throughput.shape(f"{name}-expanded", 32000), after)):
            assert c.vocab_size == 32000 and sum(c.state_numbers(i) for i in range(c.n_layer)) == pytest.approx(millions * 1e6, abs=5e3)
    with pytest.raises(BadInput, match="no model 'gla-2b'"):
        throughput.shape("gla-2b", 32000)
    assert SIZES["gla-1.3b"].n_head == [4] * 24                                 # the table of sizes stays as it is


def test_every_run_of_the_evidence_is_planned_once(evidence, tmp_path):
    """The plan of data/results/evidence.py names each run once, and each has whole options."""
    evidence.RUNS = str(tmp_path)
    for _ in range(3):                                       # later runs take their learning rate from earlier ones
        jobs = list(evidence.plan())
        for i, job in enumerate(jobs):
            evidence.write(job["name"], {"held_out_loss": i})
    assert len({job["name"] for job in jobs}) == len(jobs) == 60
    assert {s for s in evidence.SWEEPS["gla"]} <= {job["name"].rsplit("-", 1)[1] for job in jobs if job["family"] == "gla"}
    for job in jobs:
        assert evidence.options(job).lr == job["lr"] and evidence.options(job).steps == job["steps"]


def test_evidence_trains_again_only_what_a_missing_run_needs(evidence, tmp_path):
    """Results of all runs but two are there, no checkpoint is: seed 1's pre-training is due; then, with its checkpoint, the two runs."""
    evidence.RUNS = evidence.WORK = str(tmp_path)
    for _ in range(3):
        for i, job in enumerate(list(evidence.plan())):
            evidence.write(job["name"], {"held_out_loss": i})
    for arm in ("lpt", "inherit"):
        os.remove(tmp_path / f"gla-s1-{arm}.json")
    assert [job["name"] for job in evidence.due(set())] == ["gla-s1-pre"]
    (tmp_path / "gla-s1-pre.pt").touch()
    assert [job["name"] for job in evidence.due({"gla-s1-pre"})] == []
    assert [job["name"] for job in evidence.due(set())] == ["gla-s1-lpt", "gla-s1-inherit"]


def test_evidence_runs_a_small_plan(evidence, corpus, tmp_path):
    """Every kind of run of the evidence, with tiny models: pre-training, each arm from it, a sweep, the large one from scratch."""
    evidence.RUNS = evidence.WORK = evidence.HERE = str(tmp_path)
    evidence.COMMON |= dict(data=corpus, n_layer=4, block_size=64, batch_size=2, recall_tokens=64, pairs="2,4", compile=False)
    evidence.PAIRS, evidence.LENGTHS, evidence.SHOTS, evidence.SEEDS = (2, 4, 8, 16), (64,), (1, 2, 4), (0,)
    evidence.FAMILIES = {"gla": dict(block="gla", d_model=16, n_head=4, d_mlp=16), "mamba2": dict(block="mamba2", d_model=16, d_state=4, headdim=8, tie_embeddings=True)}
    evidence.FACTOR, evidence.SWEEPS = {"gla": 4, "mamba2": 4}, {f: ("layers0", "steps2") for f in ("gla", "mamba2")}
    for _ in range(4):
        for job in list(evidence.plan()):
            if evidence.read(job["name"]) is None and (evidence.start(job) is None or os.path.exists(evidence.start(job))):
                evidence.run({**job, "steps": 1}, dict(n=2))
    results = {job["name"]: evidence.read(job["name"]) for job in evidence.plan()}
    assert len(results) == 24 and all(results.values())
    states = {arm: results[f"gla-s0-{arm}"]["state_numbers"] for arm in ("pre", "lpt-lr0.002", "inherit-lr0.002", "ceiling")}
    assert states == {"pre": 4 * 32, "lpt-lr0.002": 4 * 32, "inherit-lr0.002": 2 * 32 + 2 * 128, "ceiling": 2 * 32 + 2 * 128}
    assert all(0 <= a <= 1 for r in results.values() for task in r["recall"].values() for a in task.values())
    assert {(r["arm"] in ("pre", "ceiling"), r["start"]) for r in results.values()} == {(True, None), (False, "gla-s0-pre"), (False, "mamba2-s0-pre")}
    pre, lpt = (next(job for job in evidence.plan() if job["name"] == name) for name in ("gla-s0-pre", "gla-s0-lpt-steps2"))
    evidence.run({**pre, "steps": 2}, dict(n=2))             # comes out differently: another model, and runs from it say so
    evidence.run(lpt, dict(n=2))
    assert evidence.read("gla-s0-pre") == results["gla-s0-pre"] != evidence.read("gla-s0-pre-2")
    assert evidence.read(lpt["name"])["start"] == "gla-s0-pre" and evidence.read(f"{lpt['name']}-2")["start"] == "gla-s0-pre-2"
    assert evidence.mean([[1, 3], [4]], float) == (3, 1)      # a seed counts once, however many results it has
    larger = evidence.winner("gla")
    evidence.run({**lpt, "name": f"gla-s0-{larger}-steps2", "arm": larger}, dict(n=2))
    assert evidence.paired_table("gla", "steps2").splitlines()[2:4] == ["| seeds | 1 |", "| models | 2 |"]
    tables = [make(family) for family in evidence.FAMILIES for make in (evidence.table, evidence.sweep_table)]
    assert not any("nan" in t for t in tables)


def test_committed_tables_are_of_the_committed_runs(evidence, tmp_path):
    """tables.md is what the script makes of the JSONs; without matplotlib it writes that and asks for it, with it the figures too."""
    committed = open(f"{evidence.HERE}/tables.md").read()
    evidence.HERE = evidence.WORK = str(tmp_path)
    code, err = cli(evidence)
    figures = {"evidence.png", "sweeps.png"} if importlib.util.find_spec("matplotlib") else set()
    assert code == (0 if figures else 2) and ("pip install matplotlib" in err) != bool(figures)
    assert (tmp_path / "tables.md").read_text() == committed and "nan" not in committed
    assert {f.name for f in tmp_path.iterdir()} == {"tables.md"} | figures


def test_bad_options():
    refused(train_script, "--learning_rat=1", says="unknown option --learning_rat; the nearest known one is --")
    refused(train_script, "--batchsize=1", says="--batch_size")
    refused(train_script, "--steps=many", says="--steps=many is not a number")
    refused(train_script, "scratch", says="options look like --name=value")
    refused(train_script, "--preset=paper", says="paper-gla")
    refused(train_script, "--block=gru", says="expected 'gla' or 'mamba2'")
    refused(train_script, "--lr=-1", says="--lr=-1 is not a number from 0 up")
    refused(model_script, "--temperature=nan", says="not a number from 0 up")
    refused(train_script, "--beta2=1", says="must be below 1")
    refused(train_script, "--name=a/b", says="the folder is --out_dir")
    for script in (train_script, expand_script, model_script, recall):
        refused(script, "--device=tpu", says="--device=tpu cannot be used here")
        refused(script, "--device=cuda:99", says="GPUs that PyTorch can use")
    refused(expand_script, "--evry=6", says="--every")
    refused(model_script, "--n", says="--n needs a value")


def test_bad_checkpoints(ckpt, corpus, tmp_path):
    whole = open(ckpt, "rb").read()
    cut, other, wrong = (str(tmp_path / x) for x in ("cut.pt", "other.pt", "wrong.pt"))
    open(cut, "wb").write(whole[:len(whole) // 2])
    torch.save({"weights": torch.ones(3)}, other)
    loaded = torch.load(ckpt)
    del loaded["model"]["norm.weight"]
    torch.save(loaded, wrong)
    for script, option in ((train_script, "--init_from"), (expand_script, "--init_from"), (model_script, "--ckpt"), (recall, "--ckpt")):
        rest = [f"--data={corpus}", "--out_dir=" + str(tmp_path / "o")] if script is train_script else []
        refused(script, f"{option}={tmp_path}/none.pt", *rest, says="no checkpoint at")
        refused(script, f"{option}={cut}", *rest, says="not a whole checkpoint")
        refused(script, f"{option}={other}", *rest, says="not a StateX checkpoint")
        refused(script, f"{option}={wrong}", *rest, says="norm.weight")
    refused(train_script, f"--init_from={ckpt}", "--block=mamba2", says="holds a gla model")
    refused(train_script, "--init_from=resume", f"--out_dir={tmp_path}/none", says="no checkpoint at")
    assert not os.path.exists(tmp_path / "o")


def test_bad_transplants(ckpt, corpus, tmp_path):
    out = f"--out={tmp_path}/x.pt"
    refused(expand_script, f"--init_from={ckpt}", out, "--init=preserve", says="preserve is for Mamba2")
    refused(expand_script, f"--init_from={ckpt}", out, "--layers=0,7", says="out of range")
    refused(expand_script, f"--init_from={ckpt}", out, "--layers=zero", says="not a list of layers")
    refused(expand_script, f"--init_from={ckpt}", out, "--every=0", says="chooses no layers")
    refused(expand_script, f"--init_from={ckpt}", out, "--every=1", "--factor=3", says="a divisor of its 2 heads")
    refused(expand_script, "--init_from=gla-1.3b", out, says="add --dry-run or --speed")
    recipe = [f"--data={corpus}", f"--out_dir={tmp_path}/o"]                  # the recipe says so before it pre-trains
    refused(train_script, *recipe, "--layers=9", says="out of range")
    refused(train_script, *recipe, "--factor=3", says="a divisor of its 4 heads")
    refused(train_script, *recipe, "--expand_init=preserve", says="preserve is for Mamba2")
    refused(train_script, *recipe, "--lr_grid=1e-2;2e-2", says="not a list of learning rates")
    refused(train_script, *recipe, "--pretrain_steps=0", says="at least 1")
    assert not os.path.exists(tmp_path / "o")
    refused(expand_script, out, says="name a checkpoint")
    assert not os.path.exists(tmp_path / "x.pt")
    assert cli(expand_script, f"--init_from={ckpt}", "--every=2", out) == (0, "") and os.path.exists(tmp_path / "x.pt")


def test_bad_shapes(corpus, tmp_path):
    args = [f"--data={corpus}", "--init_from=scratch", *TINY, f"--out_dir={tmp_path}/o"]
    refused(train_script, *args, "--n_head=3", says="n_head 3 does not divide")
    refused(train_script, *args, "--d_model=0", says="d_model and headdim must be at least 1")
    refused(train_script, *args, "--block=mamba2", "--headdim=7", says="headdim 7 does not divide")
    refused(train_script, *args, "--block_size=10000000", says="block_size")
    refused(train_script, *args, "--accumulate=3", says="does not divide batch_size")
    refused(train_script, *args, "--shard", says="start it with torchrun")
    refused(train_script, *args, "--vocab_size=100", says="vocab_size 100 is less than the 4096 token ids")
    refused(train_script, *args, "--carry_state", "--block_size=2000000", says="expected more than block_size")
    (tmp_path / "file").write_text("x")
    refused(train_script, *args, f"--out_dir={tmp_path}/file", says="is a file")
    refused(train_script, *args, f"--out_dir={tmp_path}/file/run", says="cannot make out_dir")
    assert not os.path.exists(tmp_path / "o") and (tmp_path / "file").read_text() == "x"


def test_bad_text(tmp_path):
    out = f"--out={tmp_path}/tokens"
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("three short words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    refused(prepare, str(tmp_path / "empty.txt"), out, says="every file is empty")
    refused(prepare, str(tmp_path / "short.txt"), out, says="too short a text")
    refused(prepare, str(tmp_path / "latin.txt"), out, says="not UTF-8")
    refused(prepare, str(tmp_path / "none.txt"), out, says="no file or folder")
    refused(prepare, str(tmp_path / "short.txt"), out, "--tokenizer=gpt3", says="no tokenizer 'gpt3'")
    refused(train_script, "--init_from=scratch", f"--data={tmp_path}/none", says="no token files")
    assert not any(name.startswith("tokens") for name in os.listdir(tmp_path))
