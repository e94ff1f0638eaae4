"""The two recurrences of StateX (state expansion): definition, chunked PyTorch, Triton.

Both model families are one recurrence. Per head, with a state S of K x V elements:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

    gla   Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3): a_t in [0,1]^K,
          one decay per key channel; q is divided by sqrt(K) first. Neighbouring heads
          may share their keys and decays.
    ssd   Mamba2's state space dual (Dao and Gu, arXiv 2405.21060, eq. 1): one a_t per
          head, k = B and q = C are shared by the heads of a group, v = dt x, and a
          skip D x is added to the output. As in mamba_ssm the state is kept the other
          way round: S_t = a_t S_{t-1} + v_t k_t^T, P x N where V is P and K is N.

    o, state = gla(q, k, v, g)           y, state = ssd(x, dt, A, B, C)
    python kernels.py                    checks chunked; on a GPU checks and times triton
    python kernels.py --only=340m        only these layers; --help lists the options

"recurrent" is the definition: a loop over time. "chunked" does the same sums with
matrix products and is the fast path on a CPU. "triton" is the fast path on a GPU; on a
CPU it needs TRITON_INTERPRET=1 before the import, is slow, and right in float32 only.
Decays travel as natural logarithms g = log a <= 0. Any decay is safe: none (g = 0), all
at once (g = -60), a reset (g = -inf; in ssd `first`) that keeps packed documents apart.
"""
# first: it sets how the CPU's threads wait, which torch reads when it is loaded
from data.options import BadInput, command_line, option, pick_device, run_script

import contextlib
import functools
import inspect
import math
import os
import types
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor  # since Triton 3.4
    triton_installed = True
except ImportError:  # recurrent and chunked still work; with these stand-ins the file loads
    triton = types.SimpleNamespace(jit=lambda f=None, **options: f or (lambda g: g))
    constexpr = float
    triton_installed = False


def gla(q, k, v, g, scale=None, state=None, impl="auto", gates=None):
    """Gated linear attention (arXiv 2312.06635, eq. 3).

    q (B,T,H,K); v (B,T,H,V); k, g (B,T,G,K), where g are natural logarithms of decays,
    <= 0, -inf for a reset; state (B,H,K,V) or None for zeros. G divides H: head h reads
    the keys and decays of group h // (H / G). Any dimension but T and f may be 1 where
    another argument has more.
    gates (G,f,f) or None, f = H / G: each head may read the keys of all f heads of its
    group. k and g are then (B,T,G,f K), the state (B,H,f K,V), K channels for each of
    the f heads, side by side. On the channels with head i's keys, head j of the group
    reads with the query gates[:,i,j] q_i.
    scale, a number, multiplies q; K**-0.5 when None.
    impl: "recurrent" | "chunked" | "triton" | "auto", which is triton on a GPU that it
    supports, else chunked. Where any input is float64, chunked takes triton's place.

    Returns o (B,T,H,V) in v's dtype and the final state in float32 (float64 where any
    input is). Differentiable in every tensor, through both results: recurrent and
    chunked any number of times, triton once and not by torch.func (a second derivative
    raises RuntimeError).
    Raises BadInput where shapes, dtypes or devices do not fit.
    """
    q, k, v, g, state, gates = broadcast("gla", q=q, k=k, v=v, g=g, state=state, gates=gates)
    impl = pick(impl, q, k, v, g, state, gates)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise BadInput(f"gla: scale is of type {type(scale).__name__}; expected a number "
                       "(q can be multiplied by a tensor)")
    scale = float(scale)
    if v.numel() == 0:
        sizes = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        return no_tokens(v, state, sizes, q, k, g, gates)
    if impl == "triton":
        o, state = gla_triton(q, k, v, g, scale, state, gates)
    else:
        path = gla_recurrent if impl == "recurrent" else gla_chunked
        if gates is not None:
            q = ask_the_group(q, gates)
        with without_autocast(q.device.type):
            o, state = path(q, k, v, g, scale, state)
    return o.to(v.dtype), state


def ssd(x, dt, A, B, C, D=None, state=None, impl="auto", first=None):
    """Mamba2's recurrence (arXiv 2405.21060, eq. 1):
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t.

    x (B,T,H,P); dt (B,T,H) >= 0, after softplus; A (H,) < 0; B, C (B,T,G,N), where head
    h reads group h // (H / G); D (H,) or (H,P) or None; state (B,H,P,N) or None for
    zeros; first (B,T) bool or None: a document begins at this token, the state before
    it is forgotten. Dimensions of 1 and impl as in gla.

    Returns y (B,T,H,P) in x's dtype and the final state (B,H,P,N) in float32 (float64
    where any input is). Differentiable in every floating tensor, and raises, as gla.
    """
    x, dt, A, B, C, D, state, first = broadcast(
        "ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, state=state, first=first)
    impl = pick(impl, x, dt, A, B, C, D, state)
    if x.numel() == 0:
        sizes = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        return no_tokens(x, state, sizes, dt, A, B, C, D)
    if impl == "triton":
        y, state = ssd_triton(x, dt, A, B, C, D, state, first)
    else:
        path = ssd_recurrent if impl == "recurrent" else ssd_chunked
        with without_autocast(x.device.type):
            y, state = path(x, dt, A, B, C, D, state, first)
    return y.to(x.dtype), state


# --------------------------------------------------------------------------------------
# recurrent: the definition


def ask_the_group(q, gates):
    """q (B,T,H,K), gates (G,f,f) -> (B,T,H,f K), the query of every head to its group's
    keys: head j gets gates[:,0,j] q_0, ..., gates[:,f-1,j] q_{f-1} side by side."""
    G, f, _ = gates.shape
    q = q.unflatten(2, (G, 1, f))  # (B,T,G,1,f,K)
    return (q * gates.mT[..., None]).flatten(-2).flatten(2, 3)


def gla_recurrent(q, k, v, g, scale, state):
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T (scale q_t), token by token."""
    q, k, v, g, S = widen(q, k, v, g, state)
    # per group: k and g, or ssd's q (C), too
    q, k, g = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k, g))
    if S is None:
        S = q.new_zeros(*q[:, 0].shape, v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t, ..., None].exp() * S + k[:, t, ..., None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(outputs, dim=1), S


def ssd_recurrent(x, dt, A, B, C, D, state, first):
    """The same with g = dt A, q = C, k = B and v = dt x, its state the other way round."""
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    g = dt * A.clamp_min(-1e30)  # 0 * -inf is no number
    if first is not None:
        g = g.masked_fill(first[..., None], -torch.inf)
    v = dt[..., None] * x
    y, S = gla_recurrent(C, B, v, g[..., None], 1.0, None if S is None else S.mT)
    return y if D is None else y + D.view(x.shape[2], -1) * x, S.mT


# --------------------------------------------------------------------------------------
# chunked: matrix products inside chunks, one state handed from chunk to chunk


# exp(FORGOTTEN) is 0 even in float64. Smaller g are raised to it: so sums are finite, and
# those of ssd, in float64, keep the digits of small decays.
FORGOTTEN = -1000.0
# gla_inside multiplies keys by exp(-upto), upto the running sum of g in a chunk. Where
# that would be more than exp(MAX_EXPONENT) anywhere, the whole call goes through
# gla_inside_steep, four times slower, which never forms it. float32 would hold exp(88),
# but upto is rounded, near 30 by 1e-6, and that is exp(-upto)'s relative error.
MAX_EXPONENT = 30.0


def chunks(x, G, L):
    """x (B,T,H,D) -> (B,G,n,heads,L,D): n chunks, heads = H / G (keys: 1). Zeros fill
    the last chunk: k = v = g = 0 leaves the state alone."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % L))
    x = x.unflatten(2, (G, -1)).transpose(1, 2)  # (B,G,n L,heads,D)
    return x.unflatten(2, (-1, L)).transpose(3, 4)


def halves(x):
    """The left and the right blocks of all pairs of neighbours, x (B,G,blocks,...)."""
    return x.unflatten(2, (-1, 2)).unbind(3)


def gla_chunked(q, k, v, g, scale, state):
    """In a chunk of L tokens (a power of two) o_i is the sum over j <= i of
    ((q_i * exp(g_{j+1} + ... + g_i)) . k_j) v_j, plus what q_i * exp(g_1 + ... + g_i)
    reads from the state before the chunk."""
    q, k, v, g, S = widen(q, k, v, g, state)
    batch, T, H, K = q.shape
    G = k.shape[2]
    V = v.shape[3]
    L = min(16, 1 << (T - 1).bit_length())

    q, k, v, g = (chunks(x, G, L) for x in (q * scale, k, v, g.clamp_min(FORGOTTEN)))
    unknown = torch.compiler.is_compiling() or g.is_meta  # no values to look at
    steep = unknown or bool((g.sum(4) < -MAX_EXPONENT).any())
    read_chunk = gla_inside_steep if steep else gla_inside
    o, q_start, k_end, decay = read_chunk(q, k, v, g)

    # S is (B,G,K,heads V), a group's states side by side, so that one product makes what
    # a chunk adds to all of them
    writes = k_end.mT @ v.transpose(3, 4).flatten(4, 5)
    if S is None:
        S = q.new_zeros(batch, G, K, H // G * V)
    else:
        S = S.unflatten(1, (G, -1)).transpose(2, 3).flatten(3, 4)
    before = []
    for kept, written in zip(decay.unbind(2), writes.unbind(2), strict=True):
        before.append(S.unflatten(3, (-1, V)).transpose(2, 3))
        S = kept * S + written
    o = o + q_start @ torch.stack(before, dim=2)
    o = o.transpose(3, 4).flatten(2, 3)[:, :, :T].transpose(1, 2).flatten(2, 3)
    return o, S.unflatten(3, (-1, V)).transpose(2, 3).flatten(1, 2)


def gla_inside(q, k, v, g):
    """What the tokens of a chunk read from each other, in one product: the decay from
    key j to query i is exp(upto_i) exp(-upto_j), upto_i = g_1 + ... + g_i, which is at
    least -MAX_EXPONENT.

    Arguments as chunks makes them. Returns o (B,G,n,heads,L,V), the queries with
    the decay since the chunk began (B,G,n,heads,L,K), the keys with the decay to its end
    (B,G,n,L,K), and the decay of whole chunks (B,G,n,K,1)."""
    # A token's own key has no decay, and stays out of the product: there the gradients
    # of its two factors would cancel but for rounding, which may drown the true ones.
    # For the same reason `after` is a sum of its own, not a difference.
    o = (q * k).sum(-1, keepdim=True) * v
    k = k.squeeze(3)
    g = g.squeeze(3)
    upto = g.cumsum(-2)
    after = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    q_start = q * upto.exp().unsqueeze(3)
    # the queries of a group's heads are rows of one product with its keys
    scores = q_start.flatten(3, 4) @ (k * (-upto).exp()).mT
    o = o + scores.unflatten(3, o.shape[3:5]).tril(-1) @ v
    return o, q_start, k * after.exp(), upto[..., -1, :, None].exp()


def gla_inside_steep(q, k, v, g):
    """As gla_inside, where exp(-upto_j) would be too large.

    Blocks of 1, 2, 4, ... L/2 tokens are merged in pairs: the queries of the right one
    (1) meet the keys of the left one (0), and the decay between them splits at the
    seam: from key j to the end of the left block (`after`), and from the start of the
    right block to query i (`upto`). Both are sums of g over part of one block, so <= 0.
    """
    L = q.shape[4]
    # blocks of one token, (B,G,n L,heads,1,D)
    q, k, v, g = (x.transpose(3, 4).flatten(2, 3).unsqueeze(-2) for x in (q, k, v, g))
    upto = g
    after = torch.zeros_like(upto)
    o = (q * k).sum(-1, keepdim=True) * v
    for _ in range(L.bit_length() - 1):
        q1 = halves(q)[1]
        k0 = halves(k)[0]
        v0 = halves(v)[0]
        o0, o1 = halves(o)
        upto0, upto1 = halves(upto)
        after0, after1 = halves(after)
        rows = (q1 * upto1.exp()).flatten(3, 4)
        scores = rows @ (k0 * after0.exp()).squeeze(3).mT
        o = torch.cat((o0, o1 + scores.view(*o1.shape[:-1], -1) @ v0), dim=-2)
        upto = torch.cat((upto0, upto1 + upto0[..., -1:, :]), dim=-2)
        after = torch.cat((after0 + upto1[..., -1:, :], after1), dim=-2)
        # neighbouring blocks as one
        q, k, v = (x.unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 5) for x in (q, k, v))
    decay = upto.squeeze(3)[..., -1, :, None].exp()
    return o, q * upto.exp(), (k * after.exp()).squeeze(3), decay


def ssd_chunked(x, dt, A, B, C, D, state, first):
    """In a chunk of L tokens, y_i sums (C_i . B_j) exp(g_{j+1} + ... + g_i) dt_j x_j
    over j <= i, with g = dt A.

    One decay per head: so the exponents are one L x L table per head, and C B^T is
    computed once for all heads of a group. The running sums are float64: differences
    of large float32 sums would lose the small decays."""
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    heads = H // G
    L = min(64, T)

    g = dt * A.clamp_min(-1e30)
    if first is not None:
        g = g.masked_fill(first[..., None], FORGOTTEN)
    g = chunks(g[..., None], G, L).squeeze(5)  # (B,G,n,heads,L)
    g = g.double().contiguous().clamp_min(FORGOTTEN)
    upto = g.cumsum(-1)
    after = F.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    v = chunks(x * dt[..., None], G, L)  # (B,G,n,heads,L,P)
    B, C = (chunks(t, G, L).squeeze(3) for t in (B, C))  # (B,G,n,L,N)
    n = v.shape[2]

    # Keys after the query are not seen; its own stays out, as in gla_inside.
    unseen = torch.ones(L, L, dtype=torch.bool, device=x.device).triu()
    between = (upto[..., :, None] - upto[..., None, :]).to(x.dtype).masked_fill(unseen, -torch.inf)
    scores = (C @ B.mT).unsqueeze(3) * between.exp()
    y = scores @ v + (C * B).sum(-1)[:, :, :, None, :, None] * v  # (B,G,n,heads,L,P)

    rows = (after.to(x.dtype).exp()[..., None] * v).transpose(3, 4)
    rows = rows.reshape(batch, G, n, L, heads * P)
    writes = (rows.mT @ B).view(batch, G, n, heads, P, N)
    decay = upto[..., -1].to(x.dtype).exp()[..., None, None]  # (B,G,n,heads,1,1)
    S = x.new_zeros(batch, G, heads, P, N) if S is None else S.unflatten(1, (G, -1))
    before = []
    for kept, written in zip(decay.unbind(2), writes.unbind(2), strict=True):
        before.append(S)
        S = kept * S + written
    before = torch.stack(before, dim=2).view(batch, G, n, heads * P, N)
    carried = (C @ before.mT).view(batch, G, n, L, heads, P).transpose(3, 4)
    y = y + upto.to(x.dtype).exp()[..., None] * carried
    y = y.permute(0, 2, 4, 1, 3, 5).reshape(batch, n * L, H, P)[:, :T]
    return y if D is None else y + D.view(H, -1) * x, S.flatten(1, 2)


# --------------------------------------------------------------------------------------
# In front of every implementation: shapes, dtypes, devices, and which one it is


SHAPES = {
    "gla": {"q": "BTHK", "k": "BTGK", "v": "BTHV", "g": "BTGK", "state": "BHKV"},
    # W: the f K channels of a group's f heads
    "gates": {"q": "BTHK", "k": "BTGW", "v": "BTHV", "g": "BTGW", "state": "BHWV", "gates": "Gff"},
    "ssd": {"x": "BTHP", "dt": "BTH", "A": "H", "B": "BTGN", "C": "BTGN", "D": "H",
            "state": "BHPN", "first": "BT"},
}


def broadcast(op, **tensors):
    """The tensors of `op`, expanded to the sizes that they share."""
    sizes = {}  # letter: its size, and the argument that has it
    layouts = {}
    shapes = SHAPES["gates" if tensors.get("gates") is not None else op]

    def misfit(name, more=""):
        return BadInput(f"{op}: {name} has shape {tuple(tensors[name].shape)}; expected "
                        f"({', '.join(layouts[name])}){more}")

    like_name, like = next(iter(tensors.items()))  # the first one says which device
    for name, tensor in tensors.items():
        if tensor is None and name in ("D", "state", "first", "gates"):
            continue
        check_kind(op, name, tensor, like_name, like)
        if name in "AD" and tensor.dim() == 0:
            tensors[name] = tensor = tensor.reshape(1)
        layouts[name] = "HP" if name == "D" and tensor.dim() == 2 else shapes[name]
        if tensor.dim() != len(layouts[name]):
            raise misfit(name)
        for letter, size in zip(layouts[name], tensor.shape, strict=True):
            known, source = sizes.setdefault(letter, (size, name))
            if size == 0 and letter not in "BT":
                raise misfit(name, f", {letter} at least 1")
            if size != known and (letter in "Tf" or 1 not in (size, known)):  # 1 gives way
                raise misfit(name, f", {letter} = {known} as {source}")
            if known == 1:
                sizes[letter] = (size, name)
    G, of_G = sizes["G"]
    H, of_H = sizes["H"]
    if H == 1:
        H = G
    if H % G:
        raise misfit(of_G, f", G a divisor of the {H} heads of {of_H}")
    if "gates" in layouts:
        f = H // G
        if sizes["f"][0] != f:
            raise misfit("gates", f", f = H / G = {f}")
        W, of_W = sizes["W"]
        if W != f * sizes["K"][0]:
            raise misfit(of_W, f", W = f K = {f * sizes['K'][0]} as gates of {f} heads")
    final = {letter: size for letter, (size, _) in sizes.items()} | {"H": H}
    for name, layout in layouts.items():
        shape = tuple(final[letter] for letter in layout)
        if tensors[name].shape != shape:
            tensors[name] = tensors[name].expand(shape)
    return tuple(tensors.values())


def check_kind(op, name, tensor, like_name, like):
    """Raises BadInput unless it is a tensor of the right dtype, on like's device."""
    if not isinstance(tensor, torch.Tensor):
        raise BadInput(f"{op}: {name} is of type {type(tensor).__name__}; expected a tensor")
    wrong = ""
    if name == "first" and tensor.dtype != torch.bool:
        wrong = f"{tensor.dtype}; expected torch.bool"
    elif name == "document" and (tensor.is_floating_point() or tensor.is_complex()):
        wrong = f"{tensor.dtype}; expected integers"
    elif name not in ("first", "document") and not tensor.is_floating_point():
        wrong = f"{tensor.dtype}; expected a floating dtype"
    elif tensor.device != like.device:
        wrong = f"on {tensor.device}; expected {like.device}, where {like_name} is"
    if wrong:
        raise BadInput(f"{op}: {name}, of shape {tuple(tensor.shape)}, is {wrong}")


def pick(impl, *tensors):
    """The implementation that computes these tensors when `impl` is asked for."""
    if impl not in ("recurrent", "chunked", "triton", "auto"):
        raise BadInput(f"impl is {impl!r}; expected 'recurrent', 'chunked', 'triton' or 'auto'")
    if impl == "triton" and not triton_installed:
        raise BadInput("impl is 'triton'; Triton 3.4 or later is not installed here: pip install "
                       "-U triton, or use impl='auto'")
    if impl == "triton" and not can_launch(tensors[0]):
        raise BadInput(f"impl is 'triton', which takes tensors of a GPU, and these are on "
                       f"{tensors[0].device}; use impl='auto', or set TRITON_INTERPRET=1 first")
    if impl == "auto":
        impl = "triton" if tensors[0].is_cuda and triton_supports(tensors[0].device) else "chunked"
    if impl == "triton" and wide_dtype(tensors) == torch.float64:
        return "chunked"
    return impl


def can_launch(tensor):
    """Whether kernels take it: on a GPU, or anywhere in Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def triton_supports(device):
    """Whether "auto" may take the Triton kernels there: NVIDIA from capability 8.0 on,
    the first with bfloat16 matrix products."""
    return triton_installed and torch.version.hip is None and capability(device) >= (8, 0)


@functools.cache
def capability(device):
    """(major, minor) of a GPU. Warns, once, on Hopper (9.x), where Triton before 3.9 may
    make wrong code: see waited_for. Of these kernels Triton 3.6 makes right code
    (data/results/README.md)."""
    found = torch.cuda.get_device_capability(device)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found[0] == 9 and version < (3, 9):
        warnings.warn(
            f"Triton {triton.__version__} may miscompile for this GPU (triton-lang/triton issues "
            "9433, 11047); `python kernels.py` checks, Triton 3.9 has fixed them", stacklevel=2)
    return found


def without_autocast(kind):
    """A context in which the caller's autocast does not narrow our matrix products on
    devices of this kind."""
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def wide_dtype(tensors):
    """The dtype of the arithmetic: float64 if any tensor has it, else float32."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def widen(*tensors):
    """The tensors in the dtype of the arithmetic. None stays None."""
    dtype = wide_dtype(tensors)
    return [None if t is None else t.to(dtype) for t in tensors]


def no_tokens(v, state, sizes, *others):
    """The results where T or B is 0: no output, the state as it came or zeros of these
    sizes, and, by sums over nothing, every argument in the graph."""
    dtype = wide_dtype((v, state, *others))
    nothing = sum(t.to(dtype).flatten()[:0].sum() for t in (v, *others) if t is not None)
    if state is None:
        state = v.new_zeros(sizes, dtype=dtype)
    return (v + nothing).to(v.dtype), state.to(dtype) + nothing


# --------------------------------------------------------------------------------------
# Triton, first: each recurrence as one short kernel, forward only, to be read before
# the fast path. Only test_the_first_kernels_are_the_definition calls them.


# FORGOTTEN for float32, where exp(-200) is 0. (Kernels may read no globals but constexpr.)
FORGOTTEN_32 = constexpr(-200.0)


@triton.jit
def split(number, size):
    """inner, outer of number = inner + size * outer (divmod gives outer first)."""
    return number % size, number // size


@triton.jit
def gla_first(
    q_ptr, k_ptr, v_ptr, g_ptr,  # (B,T,H,K), (B,T,G,K), (B,T,H,V), (B,T,G,K)
    state_ptr, o_ptr, last_ptr,  # (B,H,K,V), (B,T,H,V), (B,H,K,V)
    scale, T,
    H: constexpr, G: constexpr, K: constexpr, V: constexpr, L: constexpr,
):
    """With c the running sum of g in a chunk of L tokens, o_i = S^T (q_i exp c_i) + sum
    over j <= i of (q_i . k_j exp(c_i - c_j)) v_j, and then S becomes exp(c_L) S + sum
    over j of (k_j exp(c_L - c_j)) v_j^T.

    K, V and L are powers of two. One program owns one head's state, in registers from the
    first token to the last."""
    head, batch = split(tl.program_id(0), H)
    i = tl.arange(0, L)
    k_channel = tl.arange(0, K)[None, :]
    v_channel = tl.arange(0, V)[None, :]
    of_state = (batch * H + head) * K * V + tl.arange(0, K)[:, None] * V + v_channel

    state = tl.load(state_ptr + of_state)
    for start in range(0, T, L):
        inside = (start + i < T)[:, None]
        token = (batch * T + start + i)[:, None]
        query = (token * H + head) * K + k_channel
        key = (token * G + head // (H // G)) * K + k_channel
        value = (token * H + head) * V + v_channel
        q = tl.load(q_ptr + query, inside, 0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + key, inside, 0.0).to(tl.float32)
        v = tl.load(v_ptr + value, inside, 0.0).to(tl.float32)
        g = tl.maximum(tl.load(g_ptr + key, inside, 0.0), FORGOTTEN_32)
        c = tl.cumsum(g, 0)
        total = tl.sum(g, 0)[None, :]

        # what queries read from the keys up to them; no exponent is positive
        decay = tl.exp(tl.minimum(c[:, None, :] - c[None, :, :], 0.0))
        scores = tl.sum(q[:, None, :] * k[None, :, :] * decay, 2)
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
        o = tl.dot(scores, v, input_precision="ieee")
        o += tl.dot(q * tl.exp(c), state, input_precision="ieee")
        tl.store(o_ptr + value, o, inside)

        # forget, then write
        state *= tl.trans(tl.exp(total))
        state += tl.dot(tl.trans(k * tl.exp(total - c)), v, input_precision="ieee")
    tl.store(last_ptr + of_state, state)


@triton.jit
def ssd_first(
    x_ptr, dt_ptr, A_ptr,        # (B,T,H,P), (B,T,H), (H,)
    B_ptr, C_ptr,                # (B,T,G,N)
    state_ptr, y_ptr, last_ptr,  # (B,H,P,N), (B,T,H,P), (B,H,P,N)
    T,
    H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr,
):
    """As gla_first, but with one decay per head exp(c_i - c_j) is a table of L x L,
    times C B^T. Without D and `first`; P, N and L are powers of two. One program owns
    one head's state."""
    head, batch = split(tl.program_id(0), H)
    i = tl.arange(0, L)
    p = tl.arange(0, P)[None, :]
    channel = tl.arange(0, N)[None, :]
    of_state = (batch * H + head) * P * N + tl.arange(0, P)[:, None] * N + channel

    state = tl.load(state_ptr + of_state)
    for start in range(0, T, L):
        inside = start + i < T
        token = batch * T + start + i
        shared = (token * G + head // (H // G))[:, None] * N + channel
        value = (token * H + head)[:, None] * P + p
        dt = tl.load(dt_ptr + token * H + head, inside, 0.0)
        v = tl.load(x_ptr + value, inside[:, None], 0.0).to(tl.float32) * dt[:, None]
        b = tl.load(B_ptr + shared, inside[:, None], 0.0).to(tl.float32)
        query = tl.load(C_ptr + shared, inside[:, None], 0.0).to(tl.float32)
        g = tl.maximum(dt * tl.load(A_ptr + head), FORGOTTEN_32)
        c = tl.cumsum(g, 0)
        total = tl.sum(g, 0)

        decay = tl.exp(tl.minimum(c[:, None] - c[None, :], 0.0))
        scores = tl.dot(query, tl.trans(b), input_precision="ieee") * decay
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
        y = tl.dot(scores, v, input_precision="ieee")
        y += tl.exp(c)[:, None] * tl.dot(query, tl.trans(state), input_precision="ieee")
        tl.store(y_ptr + value, y, inside[:, None])

        state *= tl.exp(total)
        state += tl.dot(tl.trans(v * tl.exp(total - c)[:, None]), b, input_precision="ieee")
    tl.store(last_ptr + of_state, state)


# --------------------------------------------------------------------------------------
# Triton, the fast path. Five changes to the kernels above:
#
#   all chunks at once   scan_states takes the chunks in turn and stores the state at
#                        each; outputs and gradients then take all chunks side by side
#   products only        scores too are a matrix product: in gla the decay of a pair is
#                        split into a factor for each of the two
#   long chunks          a stored state costs K V / L elements per token, most of the
#                        traffic: 256 tokens where states are large and bfloat16, else
#                        128, of short sequences fewer
#   small tiles          a state is split among programs, which fetch tokens ahead
#   gradients by hand    from the stored states; only decays are computed again
#
# Measured on an H100, one layer, batch 4, 8192 tokens, bfloat16, both passes: long chunks
# take gla-340m with one head from 1.49 to 1.41 ms and from 0.89 to 0.69 GB, Mamba2-1.3b
# with d_state 512 from 2.9 to 2.0 GB in the same 4.8 ms; both scans of gla-1.3b with one
# head took 2.36 ms in tiles of 128 x 256, 0.95 in those of 64 x 128.
#
# In gla's kernels every head has keys of its own, of K channels: gla_triton copies shared
# keys; with gates it cuts a group's f K channels into f heads, whose scores
# gla_mix_scores mixes. Kernels of states see the same memory as (B,T,G,W), W = f K and
# G = H / f (HX of the scan); without gates f is 1 and G is H.
#
# In brackets: with gates only, or where N > READ_APART.
#
#   launch             gla                           ssd
#   decays             in gla_scores                 ssd_decays
#   scores             gla_scores, _steep, _across   ssd_scores = multiply_rows
#     of all heads     [gla_mix_scores]
#   states             scan_states                   scan_states
#   outputs            gla_outputs                   [ssd_read_states] ssd_outputs
#   backward: states   scan_states, in reverse       scan_states, in reverse
#   values             gla_grad_values               [ssd_read_states] ssd_grad_values
#   scores             gla_grad_scores = multiply_rows   ssd_grad_scores
#     of all heads     [gla_grad_mix_scores]
#   queries and keys   gla_grad_queries_keys         ssd_grad_queries_keys
#   decays             gla_grad_decays, then STEEP   ssd_grad_decays
#
# Kernels of chunks (those that take n) mask neither tokens nor channels: callers pad T
# to whole chunks (as in gla_chunked, for ssd with dt = 0) and channels to whole tiles.
# Their names (in shapes B is the batch):
#
#   n, L, R           chunks of a sequence, tokens of a chunk, tokens of a block.
#                     gla: L is R or 2 R; `block` counts from the sequence's start
#                     ssd: L is R, 2 R or 4 R; `block` counts from the chunk's start
#                     Where a program takes BT or BR tokens, `block` counts these.
#   F, W              heads of a group in gla, f above; the f K channels that they share
#   heads             as a number B H; as a vector the heads of a group
#   BK, BV, BN        channels of a tile; PK: of a program with several tiles
#   BT, BR, BJ        tokens of a tile
#   BE, BF, BH        scores of a tile; F up to a power of two; heads of a program
#   DOT               tl.dot's input_precision: None where factors are bfloat16; "tf32x3"
#                     for float32; "tf32" where float32 gates mix bfloat16 scores
#   upto (c, cum)     sum of g from the start of a chunk or block up to a token
#   key_cum           upto - log dt (ssd): in place of a key's upto it multiplies the
#                     decays from that key by its dt
#   after             sum of g after a token to the chunk's or block's end
#                     All these, and decays, are in bits (log2, exp2), though formulas
#                     write exp.
#   q_start, k_end    q exp(upto), k exp(after): what meets the states around a chunk
#   q_seam, k_seam    the same of one block, where a chunk's two blocks meet: of the
#                     second one's queries, of the first one's keys
#   dx, grad_x        the gradient of x; S is a state, dS its gradient
#   x_table           x (B,T,H,K) as B T rows of H K channels, read in tiles: see Launch
#   mine, at_, of_    offsets in elements: first the program's, a scalar of 64 bits, then
#                     tiles of 32 bits, for those of 64 cost instructions
#   processor         one of the GPU's multiprocessors
#
# A program of gla's outputs and gradient of values takes all tokens of a chunk, so that a
# state is read once; ssd's take a block, for which they make a table of decays. A head's
# P channels, at most 64, are never cut: ssd_triton cuts wider heads into several.
# tl.store rounds to the type of what its pointer points to.
# Programs next to each other read the same tiles, while these are in the cache.


# Sizes are constants of the compilation, so that addresses fold into instructions. n and
# heads are not, and Triton shall not compile anew where they are 1 or multiples of 16: so
# one compilation serves all T and B.
chunk_kernel = triton.jit(do_not_specialize=["n", "heads"])
LOG2E = constexpr(1.4426950408889634)


@triton.jit
def split3(number, H, n, blocks: constexpr = 1):
    """head, block and batch of number = head + H * (block + n * blocks * batch). The
    batch has 64 bits, since offsets may pass 2^31."""
    head, rest = split(number, H)
    block, batch = split(rest, n * blocks)
    return head, block, batch.to(tl.int64)


@triton.jit
def log2_decay(g):
    """log2(exp(g)): the GPU's exponential is exp2. A NaN stays one."""
    return tl.maximum(g, FORGOTTEN_32, tl.PropagateNan.ALL) * LOG2E


@triton.jit
def waited_for(x):
    """x, a sum of matrix products, waited for by adding 0 (no compiler drops that, since
    -0.0 + 0.0 is 0.0). The first wait of ssd_outputs is for speed. Loops need it where
    the next turn may begin while a product still reads

    - a tile that registers read, too: Triton's pipeliner has too few buffers for it, and
      the next fetch may write over it (triton-lang/triton issue 6691);
    - registers, as its left factor: ptxas before 13.3 gives them to others (issue 9433;
      Triton 3.9 brings 13.4).

    Not where a turn itself uses its product (gla_grad_decays) or may use the sum, in a
    branch (scan_states), nor with num_stages=1 (gla_scores)."""
    return x + 0.0


@triton.jit
def round_bfloat16(x):
    """x rounded to a bfloat16's digits, still float32; ties go away from 0. By integers:
    where a conversion's result is needed as float32, too, the GPU converts one number at a
    time, which takes long. (A NaN that the GPU made becomes -0.0; what forward made of it
    is NaN still.)"""
    bits = x.to(tl.int32, bitcast=True) + 0x8000
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def sum_rows(which, x, DOT: constexpr):
    """For every row of which (R,R), of bool or ones and zeros, the sum of the rows of x
    (R,BK) that it names, as a matrix product. In bfloat16 x goes in as the sum of two
    bfloat16, which keeps 16 of its bits."""
    if DOT is not None:
        return tl.dot(which.to(tl.float32), x, input_precision=DOT)
    ones = which.to(tl.bfloat16)
    high = round_bfloat16(x)
    return tl.dot(ones, high.to(tl.bfloat16), tl.dot(ones, (x - high).to(tl.bfloat16)))


@triton.jit
def load_gate(gates_ptr, channel, head, W: constexpr, F: constexpr):
    """Of gates (G,F,F) the one by which `head` reads `channel`, one of its group's W. (All
    channels of a tile are of one head.) A gate below 1e-20 in size counts as 1e-20, so
    that one can divide by it."""
    key_head = head // F * F + channel // (W // F)
    gate = tl.load(gates_ptr + key_head * F + head % F)
    return tl.where(tl.abs(gate) < 1e-20, 1e-20, gate)


@triton.jit
def load_decay(decay_ptr, chunk, k, DECAYS: constexpr):
    """A chunk's decay, log2: one (ssd), or where DECAYS = W / F > 1 that of each channel
    k, (BK,1). chunk: its number among those of all heads, in (B,H,n)."""
    if DECAYS == 1:
        decay = tl.load(decay_ptr + chunk)
    else:
        decay = tl.load(decay_ptr + chunk * DECAYS + k % DECAYS)[:, None]
    return decay


# What scan_states adds up. Tiles go from memory straight into the product, q_start without
# its gate: so in reverse registers hold dS / gate, and what is stored is multiplied by the
# gate (if any) with which the head reads the tile's channels.
#
#                  x        y   weight         S
#     gla          k_end    v   None           W x V
#     gla reverse  q_start  do  None           W x V
#     ssd          x        B   exp(after) dt  P x N
#     ssd reverse  dy       C   exp(upto)      P x N


@chunk_kernel
def scan_states(
    x_table, y_table,        # (B T,HX W), (B T,HY V): F = H / HX heads share x, H / HY y
    weight_ptr, gates_ptr,   # (B,H,T), ssd only; (HX,F,F), in reverse only; or None
    decay_ptr,               # (B,H,n,W/F), for ssd (B,H,n): of a whole chunk, log2
    initial_ptr, final_ptr,  # (B,H,W,V)  S (dS) where the scan begins and ends, or None
    states_ptr,              # (B,H,n,W,V)
    n,
    H: constexpr, HX: constexpr, HY: constexpr, W: constexpr, V: constexpr,
    L: constexpr, BT: constexpr, BK: constexpr, BV: constexpr,
    REVERSE: constexpr, DOT: constexpr,
):
    """S = decay S + sum of weight_t x_t y_t^T over a chunk's tokens, chunk after chunk;
    dS the same in REVERSE. Stored are S before, dS after every chunk. (In ssd W is P and
    V is N.) One program owns BK x BV elements of a head's S, in registers, and adds BT
    tokens (a piece) at a time."""
    k_block, rest = split(tl.program_id(0), W // BK)
    v_block, rest = split(rest, V // BV)
    head, batch = split(rest, H)
    batch = batch.to(tl.int64)
    i = tl.arange(0, BT)
    k = k_block * BK + tl.arange(0, BK)
    v = v_block * BV + tl.arange(0, BV)
    mine = k[:, None] * V + v[None, :]
    F: constexpr = H // HX
    x_column = head // F * W + k_block * BK
    y_column = head // (H // HY) * V + v_block * BV
    states_ptr += (batch * H + head) * n * W * V
    # the head whose keys and decays the tile's channels belong to
    key_head = batch * H + head // F * F + k_block * BK // (W // F)
    gate = 1.0
    if gates_ptr is not None:
        gate = load_gate(gates_ptr, k_block * BK, head, W, F)
    state = tl.zeros((BK, BV), tl.float32)
    if initial_ptr is not None:
        state += tl.load(initial_ptr + (batch * H + head) * W * V + mine) / gate
    DECAYS: constexpr = W // F if weight_ptr is None else 1
    decay = load_decay(decay_ptr, key_head * n + (n - 1 if REVERSE else 0), k, DECAYS)
    PIECES: constexpr = L // BT  # per chunk
    for step in range(n * PIECES):
        piece = n * PIECES - 1 - step if REVERSE else step
        chunk = (piece // PIECES).to(tl.int64)
        # Forget once, on entering the chunk: the decays inside it are in x or weight.
        if step % PIECES == 0:
            tl.store(states_ptr + chunk * W * V + mine, state * gate)
            state *= tl.exp2(decay)
        token = (batch * n * L + piece * BT).to(tl.int32)  # tables take 32 bits
        x = x_table.load([token, x_column])  # (BT,BK)
        y = y_table.load([token, y_column])
        # The next chunk's decay, already now: Triton itself fetches ahead only factors of
        # products. At every piece: once per chunk would take a branch more.
        following = tl.maximum(chunk - 1, 0) if REVERSE else tl.minimum(chunk + 1, n - 1)
        decay = load_decay(decay_ptr, key_head * n + following, k, DECAYS)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + (batch * H + head) * n * L + piece * BT + i)
            x = (x.to(tl.float32) * weight[:, None]).to(y.dtype)
        state = tl.dot(tl.trans(x), y, state, input_precision=DOT)
    if final_ptr is not None:
        tl.store(final_ptr + (batch * H + head) * W * V + mine, state * gate)


@triton.jit
def step_state(
    q_ptr, k_ptr, v_ptr,   # (B,H,K), for ssd (B,G,K); (B,G,K), (B,H,V)
    g_ptr, dt_ptr, A_ptr,  # gla: (B,G,K), None, None; ssd: None, (B,H), (H,)
    D_ptr,                 # (H,) or None
    state_ptr, new_ptr,    # (B,H,K,V), for ssd (B,H,V,K)
    out_ptr,               # (B,H,V)
    scale,
    H: constexpr, G: constexpr, K: constexpr, V: constexpr, BK: constexpr, BV: constexpr,
):
    """One token of either recurrence. For ssd q is C, k is B, v is x: K is N and V is P,
    the other way round than in scan_states.

    One program owns BV value channels of one head's state, read and written once."""
    v_block, rest = split(tl.program_id(0), tl.cdiv(V, BV))
    head, batch = split(rest, H)
    batch = batch.to(tl.int64)
    v = v_block * BV + tl.arange(0, BV)
    bh = batch * H + head
    shared = batch * G + head // (H // G)
    query = bh if dt_ptr is None else shared
    v_inside = v < V

    x = tl.load(v_ptr + bh * V + v, v_inside, 0.0).to(tl.float32)
    value = x
    if dt_ptr is not None:
        dt = tl.load(dt_ptr + bh)
        value = dt * x
        log_decay = dt * load_A(A_ptr, head, H)
    out = tl.zeros((BV,), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        k_inside = k < K
        inside = k_inside[:, None] & v_inside[None, :]
        if dt_ptr is not None:
            at = bh * K * V + v[None, :] * K + k[:, None]
        else:
            at = bh * K * V + k[:, None] * V + v[None, :]
            log_decay = tl.load(g_ptr + shared * K + k, k_inside, 0.0)[:, None]
        key = tl.load(k_ptr + shared * K + k, k_inside, 0.0).to(tl.float32)
        q = tl.load(q_ptr + query * K + k, k_inside, 0.0).to(tl.float32)
        state = tl.exp(log_decay) * tl.load(state_ptr + at, inside, 0.0)
        state += key[:, None] * value[None, :]
        tl.store(new_ptr + at, state, inside)
        out += tl.sum(q[:, None] * state, axis=0)
    out *= scale
    if D_ptr is not None:
        out += tl.load(D_ptr + head) * x
    tl.store(out_ptr + bh * V + v, out, v_inside)


@chunk_kernel
def multiply_rows(
    x_ptr, y_ptr,  # (B,T,H,K)  for ssd H, K are G, N; for gla K is V
    scores_ptr,    # (B,T,H,L)
    diagonal_ptr,  # (B,H,T) or None
    n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr, BK: constexpr, DOT: constexpr,
):
    """scores_ij = x_i . y_j, in blocks of keys no later than queries. For ssd C . B,
    shared by the heads of a group: their decays, 0 for j > i, come later. For gla
    do . v, the gradient of scores: 0 for j >= i, with the diagonal apart, for it has no
    decay. One program owns one block of queries and one of keys, of one head."""
    key_block, rest = split(tl.program_id(0), L // R)
    query_block, rest = split(rest, L // R)
    head, chunk, batch = split3(rest, H, n)
    if key_block > query_block:
        return
    query = query_block * R + tl.arange(0, R)
    key = key_block * R + tl.arange(0, R)
    token = batch * n * L + chunk * L
    x_ptr += (token * H + head) * K
    y_ptr += (token * H + head) * K
    scores_ptr += (token * H + head) * L

    scores = tl.zeros((R, R), tl.float32)
    for k0 in range(0, K, BK):
        channel = k0 + tl.arange(0, BK)[None, :]
        x = tl.load(x_ptr + query[:, None] * (H * K) + channel)
        y = tl.load(y_ptr + key[:, None] * (H * K) + channel)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=DOT)

    if diagonal_ptr is not None:
        if key_block == query_block:
            diagonal = tl.sum(tl.where(query[:, None] == key[None, :], scores, 0.0), axis=1)
            tl.store(diagonal_ptr + (batch * H + head) * n * L + chunk * L + query, diagonal)
        scores = tl.where(query[:, None] > key[None, :], scores, 0.0)
    at = query[:, None] * (H * L) + key[None, :]
    tl.store(scores_ptr + at, scores)


# Each family launches these three by names of its own: a search for gla_ or ssd_ finds all
# its kernels.
gla_scan_states = ssd_scan_states = scan_states
gla_step_state = ssd_step_state = step_state
gla_grad_scores = ssd_scores = multiply_rows


# --------------------------------------------------------------------------------------
# Triton: how kernels are launched


class Launch:
    """A kernel with its sizes and its tile. A call launches `programs` programs, times
    the number of tiles in each size of `cut`: {"BV": H * P} is one for every BV of H P
    channels. tables: the kernel reads as many of its first arguments (B,T,H,K) as tables
    of B T rows and H K columns, in tiles of BT rows and of as many columns as the option
    of that name says. Hopper's tensor memory accelerator (TMA) then computes the addresses,
    on older GPUs threads do. Such a descriptor takes the host 4 microseconds.

    gla_launches and ssd_launches are cached, so that a Launch learns: where the GPU's
    shared memory does not hold num_stages stages of the pipeline, it takes fewer from then
    on; and it keeps compiled kernels by the kind of their arguments, for Triton looks at
    every argument to find one, which takes longer than to launch it."""

    def __init__(self, kernel, cut=None, tables=(), **options):
        self.kernel = kernel
        self.tables = tables
        self.options = options
        self.tiles = math.prod(-(-size // options[tile]) for tile, size in (cut or {}).items())
        self.compiled = {}  # by the kind of arguments

    def __call__(self, programs, *pointers, **numbers):
        options = self.options
        grid = (programs * self.tiles, 1, 1)  # the other axes end at 65,535
        # what Triton compiles a kernel for; no numbers: see chunk_kernel
        tensors = [x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in pointers]
        kind = (pointers[0].device, *tensors)
        pointers = list(pointers)
        for position, columns in enumerate(self.tables):
            x = pointers[position]
            B, T, H, K = x.shape
            if x.data_ptr() % 16:  # no address for a descriptor
                x = x.clone()
            tile = [options["BT"], options[columns]]
            pointers[position] = TensorDescriptor(x, [B * T, H * K], [H * K, 1], tile)
        compiled = self.compiled.get(kind)
        if compiled is None:  # in the interpreter always
            self.compiled[kind] = self.compile(grid, pointers, numbers)
            return
        named = options | numbers
        names = self.kernel.arg_names[len(pointers):]
        compiled[grid](*pointers, *[named[name] for name in names])

    def compile(self, grid, pointers, numbers):
        """The compiled kernel, which has been launched, too."""
        while True:
            try:
                return self.kernel[grid](*pointers, **numbers, **self.options)
            except triton.OutOfResources:
                stages = self.options.get("num_stages", 3)  # Triton's default
                if stages == 1:
                    raise
                self.options["num_stages"] = stages - 1


def power_of_two(x, low, high=1 << 30):
    """The power of two from x up, within low and high. (Triton's own is slower.)"""
    return max(low, min(high, 1 << (x - 1).bit_length()))


def on_device(x):
    """A context in which kernels run on x's GPU; torch.compile needs none."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def pad(x, multiples):
    """x, contiguous, with zeros up to multiples: {dimension: a multiple of this}."""
    ends = [0] * (2 * x.dim())  # F.pad counts from the last dimension
    for dimension, multiple in multiples.items():
        ends[-1 - 2 * dimension] = -x.shape[dimension] % multiple
    return F.pad(x, ends).contiguous() if any(ends) else x.contiguous()


def chunk_lengths(T, R, large):
    """L and R: tokens of a chunk, and of its blocks, of R at most. Chunks are longer where
    states are large, which halves what is kept of them."""
    if T <= 32:
        L = power_of_two(T, 16)
        return L, L
    return 256 if large and T > 128 else 128, R


def tile_multiple(channels, x):
    """Channels are padded to a multiple of this; less in the slow interpreter."""
    return power_of_two(channels, 64 if x.is_cuda else 16, 128)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def operator(results):
    """Makes the generator `steps` a PyTorch operator, into which torch.compile does not
    look. It allocates its results, that many tensors, yields them, and goes on to fill
    them; torch.compile, which asks for their shapes only, runs it up to the yield. `.plain`
    is the same function without PyTorch's dispatcher, which takes long."""
    def make(steps):
        names = inspect.signature(steps).parameters
        numbers = {"scale": "float", "L": "int", "R": "int"}
        arguments = ", ".join(f"{numbers.get(name, 'Tensor?')} {name}" for name in names)
        schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"

        def call(*arguments):
            with on_device(arguments[0]):
                [out] = steps(*arguments)  # runs it to its end
            return out

        op = torch.library.custom_op(
            f"statex::{steps.__name__}", call, mutates_args=(), schema=schema)
        op.register_fake(lambda *arguments: next(steps(*arguments)))
        op.plain = call
        return op
    return make


def one_step(kernel, q, k, v, state, BK, BV, scale=1.0, g=None, dt=None, A=None, D=None):
    """The output and the new state of one token, by step_state, whose arguments these are,
    in tiles of BK x BV at most. kernel: its name in the family."""
    g, dt, A, D, state = (
        None if t is None else t.float().contiguous() for t in (g, dt, A, D, state))
    q, k, v = (t.contiguous() for t in (q, k, v))
    B, _, H, V = v.shape
    K = q.shape[3]
    BV = power_of_two(V, 16, BV)
    out = torch.empty_like(v)
    new = torch.empty_like(state)
    with on_device(q):
        kernel[(B * H * -(-V // BV),)](
            q, k, v, g, dt, A, D, state_ptr=state, new_ptr=new, out_ptr=out, scale=scale,
            H=H, G=k.shape[2], K=K, V=V, BK=power_of_two(K, 16, BK), BV=BV, num_warps=4)
    return out, new


def differentiable(forward_operator, backward_operator):
    """Two operators as one differentiable function: as they are for torch.compile, else
    plain. The first takes tensors (or None), then numbers. The second takes the tensors,
    all results but the first two, the gradients of those (or None), and the numbers.
    It makes the gradients of the tensors in turn, empty where there is none."""
    def save(ctx, inputs, output):
        tensors = [x for x in inputs if x is None or isinstance(x, torch.Tensor)]
        ctx.numbers = inputs[len(tensors):]
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)
        kept = output[2:] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*tensors, *kept)

    def chain(backward, ctx, *gradients):
        saved = ctx.saved_tensors
        made = backward(*saved, *gradients[:2], *ctx.numbers)
        made = [None if x is None else dx for x, dx in zip(saved, made, strict=False)]
        return (*made, *[None] * (ctx.inputs - len(made)))

    def refuse(ctx, *gradients):
        raise RuntimeError("the Triton kernels have no second derivative; use impl='chunked'")

    forward_operator.register_autograd(
        functools.partial(chain, backward_operator), setup_context=save)
    backward_operator.register_autograd(refuse)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward_operator.plain(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            again = torch.is_grad_enabled()  # the gradients may be differentiated: to be refused
            return chain(backward_operator if again else backward_operator.plain, ctx, *gradients)

    def call(*inputs):
        function = forward_operator if torch.compiler.is_compiling() else Plain.apply
        return function(*inputs)
    return call


# --------------------------------------------------------------------------------------
# Triton: gated linear attention


@triton.jit
def is_steep(decay_ptr, K: constexpr, BK: constexpr, DOT: constexpr):
    """Whether a channel of a block decays by more than 2 HALF bits. Up to that the
    factors of gla_scores, exp2(-HALF) to exp2(HALF), are exact enough: a bfloat16 may be
    2^-126 to 2^127, so 2^36 either way are left to q and k; float32 rounds a sum near 30
    by 1e-6, which is then the result's error."""
    HALF: constexpr = 90.0 if DOT is None else 30.0
    lowest = tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        lowest = tl.minimum(lowest, tl.load(decay_ptr + k0 + tl.arange(0, BK)))
    return tl.min(lowest) < -2 * HALF


@triton.jit
def decays_of_part(g, bit, DOT: constexpr):
    """exp(upto) and exp(after) of g's rows (R,BK), each inside its part of 2^bit rows."""
    i = tl.arange(0, g.shape[0])[:, None]
    j = tl.arange(0, g.shape[0])[None, :]
    same = (i ^ j) >> bit == 0
    upto = sum_rows(same & (j <= i), g, DOT)
    after = sum_rows(same & (j > i), g, DOT)
    return tl.exp2(upto), tl.exp2(after)


@triton.jit
def where_ends_go(
    q_start_ptr, k_end_ptr, q_seam_ptr, k_seam_ptr, batch, block, head, n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr,
):
    """Where a block's q exp(upto) and k exp(after) go: to q_start and k_end, or, if they
    have yet to cross the chunk's other block, to q_seam (the second block's) and k_seam
    (the first block's), from which gla_scores_across takes them on."""
    of_block = ((batch * n * L + block * R) * H + head) * K
    q_start_ptr += of_block
    k_end_ptr += of_block
    if L > R:
        of_seam = ((batch * n + block // 2) * R * H + head) * K
        if block % 2 == 0:
            k_end_ptr = k_seam_ptr + of_seam
        else:
            q_start_ptr = q_seam_ptr + of_seam
    return q_start_ptr, k_end_ptr


@chunk_kernel
def gla_scores(
    q_ptr, k_ptr, g_ptr,     # (B,T,H,K)
    q_start_ptr, k_end_ptr,  # (B,T,H,K)
    q_seam_ptr, k_seam_ptr,  # (B,n,R,H,K), or empty: one block a chunk
    block_decay_ptr,         # (B,H,T/R,K)  log2
    scores_ptr,              # (B,T,H,L)    of each query with the keys of its chunk
    scale, n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr, BK: constexpr, DOT: constexpr,
):
    """scores_ij = scale sum_k q_ik k_jk exp(c_ik - c_jk) for j <= i, c the running sum
    of g.

    With m half of c's last row (from_middle is c - m), exp(c_i - m) goes to the query
    and exp(m - c_j) to the key, so that all pairs are one matrix product. One of the
    exponents can be positive, by at most -m; where that is too much, gla_scores_steep
    follows.
    One program owns one block of R tokens of one head."""
    head, block, batch = split3(tl.program_id(0), H, n, L // R)
    i = tl.arange(0, R)
    row = (batch * n * L + block * R) * H + head
    q_ptr += row * K
    k_ptr += row * K
    g_ptr += row * K
    scores_ptr += row * L + block % (L // R) * R
    block_decay_ptr += ((batch * H + head) * n * (L // R) + block) * K
    q_start_ptr, k_end_ptr = where_ends_go(
        q_start_ptr, k_end_ptr, q_seam_ptr, k_seam_ptr, batch, block, head, n, H, K, L, R)

    scores = tl.zeros((R, R), tl.float32)
    diagonal = tl.zeros((R,), tl.float32)
    dtype = q_ptr.dtype.element_ty
    for k0 in range(0, K, BK):
        channel = k0 + tl.arange(0, BK)
        at = i[:, None] * (H * K) + channel[None, :]
        q = tl.load(q_ptr + at).to(tl.float32) * scale
        k = tl.load(k_ptr + at).to(tl.float32)
        g = log2_decay(tl.load(g_ptr + at))
        diagonal += tl.sum(q * k, axis=1)

        total = tl.sum(g, axis=0)
        from_middle = tl.cumsum(g, axis=0) - 0.5 * total[None, :]
        half = tl.exp2(0.5 * total)[None, :]
        q_mid = q * tl.exp2(from_middle)
        k_mid = k * tl.exp2(-from_middle)
        # above the diagonal this may overflow; that is not kept
        scores = tl.dot(q_mid.to(dtype), tl.trans(k_mid.to(dtype)), scores, input_precision=DOT)

        # on from the middle to the ends
        tl.store(q_start_ptr + at, q_mid * half)
        tl.store(k_end_ptr + at, k_mid * half)
        tl.store(block_decay_ptr + channel, total)

    # no decay on the diagonal, nothing above it
    equal = i[:, None] == i[None, :]
    scores = tl.where(i[:, None] > i[None, :], scores, tl.where(equal, diagonal[:, None], 0.0))
    tl.store(scores_ptr + i[:, None] * (H * L) + i[None, :], scores)


@chunk_kernel
def gla_scores_steep(
    q_ptr, k_ptr, g_ptr,  # as in gla_scores
    q_start_ptr, k_end_ptr,
    q_seam_ptr, k_seam_ptr,
    block_decay_ptr,
    scores_ptr,
    scale, n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr, BK: constexpr, DOT: constexpr,
):
    """Of steep blocks stores again what gla_scores did, but for the diagonal and the
    decay; the programs of others, nearly all in a GLA model, return at once.

    Parts of 2^bit tokens meet in pairs, as in gla_inside_steep: tokens j < i meet at
    the highest bit in which they differ. Each bit is one matrix product, of which that
    bit's pairs are stored."""
    head, block, batch = split3(tl.program_id(0), H, n, L // R)
    of_block = ((batch * H + head) * n * (L // R) + block) * K
    if not is_steep(block_decay_ptr + of_block, K, BK, DOT):
        return
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    row = (batch * n * L + block * R) * H + head
    q_ptr += row * K
    k_ptr += row * K
    g_ptr += row * K
    scores_ptr += row * L + block % (L // R) * R
    q_start_ptr, k_end_ptr = where_ends_go(
        q_start_ptr, k_end_ptr, q_seam_ptr, k_seam_ptr, batch, block, head, n, H, K, L, R)

    dtype = q_ptr.dtype.element_ty
    # R is at most 2^7: at bit 7 a part is the whole block, as for q_start and k_end
    for bit in range(8):
        scores = tl.zeros((R, R), tl.float32)
        for k0 in range(0, K, BK):
            at = i * (H * K) + k0 + tl.arange(0, BK)[None, :]
            g = log2_decay(tl.load(g_ptr + at))
            to_q, to_k = decays_of_part(g, bit, DOT)
            q = tl.load(q_ptr + at).to(tl.float32) * scale * to_q
            k = tl.load(k_ptr + at).to(tl.float32) * to_k
            if bit < 7:
                scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), scores, input_precision=DOT)
            else:
                tl.store(q_start_ptr + at, q)
                tl.store(k_end_ptr + at, k)
        met = (i > j) & ((i ^ j) >> bit == 1)
        tl.store(scores_ptr + i * (H * L) + j, scores, met)


@chunk_kernel
def gla_scores_across(
    q_seam_ptr, k_seam_ptr,  # (B,n,R,H,K)
    block_decay_ptr,         # (B,H,n,2,K)  in: of each block
    q_start_ptr, k_end_ptr,  # (B,T,H,K)
    decay_ptr,               # (B,H,n,K)    out: of the chunk
    scores_ptr,              # (B,T,H,L)
    n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr, BK: constexpr, DOT: constexpr,
):
    """Of a chunk of two blocks, the scores of the second one's queries with the first
    one's keys: their decay splits at the seam. Also the second block's q_start and the
    first one's k_end, decayed over the other block, too, and the chunk's decay.

    One program owns one chunk of one head."""
    head, chunk, batch = split3(tl.program_id(0), H, n)
    i = tl.arange(0, R)
    seam = (batch * n + chunk) * R
    first_token = batch * n * L + chunk * L
    second_token = first_token + R
    q_seam_ptr += (seam * H + head) * K
    k_seam_ptr += (seam * H + head) * K
    q_start_ptr += (second_token * H + head) * K
    k_end_ptr += (first_token * H + head) * K
    scores_ptr += (second_token * H + head) * L
    of_chunk = ((batch * H + head) * n + chunk) * K
    block_decay_ptr += 2 * of_chunk
    decay_ptr += of_chunk

    scores = tl.zeros((R, R), tl.float32)
    for k0 in range(0, K, BK):
        channel = k0 + tl.arange(0, BK)
        at = i[:, None] * (H * K) + channel[None, :]
        q = tl.load(q_seam_ptr + at)
        k = tl.load(k_seam_ptr + at)
        scores = waited_for(tl.dot(q, tl.trans(k), scores, input_precision=DOT))

        first_decay = tl.load(block_decay_ptr + channel)
        second_decay = tl.load(block_decay_ptr + K + channel)
        tl.store(q_start_ptr + at, q.to(tl.float32) * tl.exp2(first_decay)[None, :])
        tl.store(k_end_ptr + at, k.to(tl.float32) * tl.exp2(second_decay)[None, :])
        tl.store(decay_ptr + channel, first_decay + second_decay)
    tl.store(scores_ptr + i[:, None] * (H * L) + i[None, :], scores)


@triton.jit
def tile_of_group(
    start, element, heads,
    H: constexpr, F: constexpr, L: constexpr, R: constexpr,
):
    """Of each of these heads' table of BT x L scores the offsets of these elements, and
    which of them were stored (see load_scores). Rows are queries, from the chunk's token
    `start` on; columns are keys."""
    query = element // L
    key = element % L
    at = query[None, :] * (H * L) + heads[:, None] * L + key[None, :]
    return at, (heads < F)[:, None] & ((start + query) // R >= key // R)[None, :]


@chunk_kernel
def gla_mix_scores(
    scores_ptr,  # (B,T,H,L)  of each head's queries with its own keys
    gates_ptr,   # (G,F,F)
    mixed_ptr,   # (B,T,H,L)  of its queries to all keys of its group
    n,
    H: constexpr, F: constexpr, L: constexpr, R: constexpr,
    BT: constexpr, BE: constexpr, BF: constexpr, DOT: constexpr,
):
    """mixed_j = sum of gates_ij scores_i over the heads i of j's group.

    One program owns BT tokens of one group, BE elements at a time."""
    group, block, batch = split3(tl.program_id(0), H // F, n, L // BT)
    heads = tl.arange(0, BF)
    token = batch * n * L + block * BT
    scores_ptr += (token * H + group * F) * L
    mixed_ptr += (token * H + group * F) * L
    of_gates = heads[:, None] * F + heads[None, :]
    inside = (heads < F)[:, None] & (heads < F)[None, :]
    gates = tl.load(gates_ptr + group * F * F + of_gates, inside, 0.0)
    for e0 in range(0, BT * L, BE):
        at, stored = tile_of_group(block * BT % L, e0 + tl.arange(0, BE), heads, H, F, L, R)
        scores = tl.load(scores_ptr + at, stored, 0.0).to(tl.float32)
        mixed = tl.dot(tl.trans(gates), scores, input_precision=DOT)
        tl.store(mixed_ptr + at, mixed, stored)


@triton.jit
def load_scores(
    scores_ptr, query, key, H: constexpr, L: constexpr, R: constexpr,
):
    """A tile of the scores of a chunk of one head. Those of the first block's queries
    with the second block's keys are 0 and were never stored."""
    at = query[:, None] * (H * L) + key[None, :]
    if L > R:
        return tl.load(scores_ptr + at, query[:, None] // R >= key[None, :] // R, 0.0)
    return tl.load(scores_ptr + at)


@chunk_kernel
def gla_outputs(
    q_start_ptr,   # (B,T,G,W)    queries, scaled, decayed from the chunk's start
    gates_ptr,     # (G,F,F) or None: F = H / G, 1 without gates
    states_ptr,    # (B,H,n,W,V)  S before each chunk
    scores_ptr,    # (B,T,H,L)    with scale and decays; 0 for keys after the query
    v_ptr, o_ptr,  # (B,T,H,V)
    n,
    H: constexpr, G: constexpr, W: constexpr, V: constexpr, L: constexpr, R: constexpr,
    BK: constexpr, BV: constexpr, BJ: constexpr, DOT: constexpr,
):
    """o_i = S^T q_start_i + sum over j <= i in its chunk of scores_ij v_j.

    With gates S has W / F rows per head h of the group: read S^T q_start as the sum of
    gate_h S_h^T q_h. q goes from memory straight into the product, and there is one sum
    for all h: so o is kept divided by the gate of the head being added, and the next head
    multiplies it by previous / gate.
    One program owns BV channels of the L tokens of one chunk of one head."""
    v_block, rest = split(tl.program_id(0), V // BV)
    head, chunk, batch = split3(rest, H, n)
    i = tl.arange(0, L)
    token = batch * n * L + chunk * L
    F: constexpr = H // G
    q_start_ptr += (token * G + head // F) * W
    scores_ptr += (token * H + head) * L
    v_ptr += (token * H + head) * V + v_block * BV
    o_ptr += (token * H + head) * V + v_block * BV
    states_ptr += ((batch * H + head) * n + chunk) * W * V + v_block * BV
    channel = tl.arange(0, BV)

    # what queries read from the state
    o = tl.zeros((L, BV), tl.float32)
    gate = 1.0  # any number: o is 0 when the first gate is loaded
    for k0 in range(0, W, BK):
        k = k0 + tl.arange(0, BK)
        q = tl.load(q_start_ptr + i[:, None] * (G * W) + k[None, :])
        s = tl.load(states_ptr + k[:, None] * V + channel[None, :])
        if gates_ptr is not None:
            if k0 % (W // F) == 0:
                previous = gate
                gate = load_gate(gates_ptr, k0, head, W, F)
                o *= previous / gate
        o = tl.dot(q, s, o, input_precision=DOT)
    if gates_ptr is not None:
        o *= gate

    # and from the keys of their chunk, BJ at a time
    for j0 in range(0, L, BJ):
        j = j0 + tl.arange(0, BJ)
        scores = load_scores(scores_ptr, i, j, H, L, R)
        v = tl.load(v_ptr + j[:, None] * (H * V) + channel[None, :])
        o = tl.dot(scores, v, o, input_precision=DOT)
    tl.store(o_ptr + i[:, None] * (H * V) + channel[None, :], o)


@chunk_kernel
def gla_grad_values(
    k_end_ptr,        # (B,T,G,W)
    grad_states_ptr,  # (B,H,n,W,V)  dS after each chunk
    scores_ptr,       # (B,T,H,L)
    do_ptr, dv_ptr,   # (B,T,H,V)
    n,
    H: constexpr, G: constexpr, W: constexpr, V: constexpr, L: constexpr, R: constexpr,
    BK: constexpr, BV: constexpr, BJ: constexpr, DOT: constexpr,
):
    """dv_j = dS^T k_end_j + sum over i >= j in its chunk of scores_ij do_i.

    One program owns BV channels of the L tokens of one chunk of one head."""
    v_block, rest = split(tl.program_id(0), V // BV)
    head, chunk, batch = split3(rest, H, n)
    j = tl.arange(0, L)
    token = batch * n * L + chunk * L
    k_end_ptr += (token * G + head // (H // G)) * W
    scores_ptr += (token * H + head) * L
    do_ptr += (token * H + head) * V + v_block * BV
    dv_ptr += (token * H + head) * V + v_block * BV
    grad_states_ptr += ((batch * H + head) * n + chunk) * W * V + v_block * BV
    channel = tl.arange(0, BV)

    # what keys write to the state
    dv = tl.zeros((L, BV), tl.float32)
    for k0 in range(0, W, BK):
        k = k0 + tl.arange(0, BK)
        keys = tl.load(k_end_ptr + j[:, None] * (G * W) + k[None, :])
        ds = tl.load(grad_states_ptr + k[:, None] * V + channel[None, :])
        dv = tl.dot(keys, ds, dv, input_precision=DOT)

    # and what the queries of their chunk read, BJ at a time
    for i0 in range(0, L, BJ):
        i = i0 + tl.arange(0, BJ)
        scores = load_scores(scores_ptr, i, j, H, L, R)
        do = tl.load(do_ptr + i[:, None] * (H * V) + channel[None, :])
        dv = tl.dot(tl.trans(scores), do, dv, input_precision=DOT)
    tl.store(dv_ptr + j[:, None] * (H * V) + channel[None, :], dv)


@chunk_kernel
def gla_grad_mix_scores(
    scores_ptr, gates_ptr,          # (B,T,H,L), (G,F,F)
    grad_scores_ptr, diagonal_ptr,  # (B,T,H,L), (B,H,T)  in: of mixed; out, in place: of scores
    dgates_ptr,                     # (B,T/BT,G,F,F)      a part of each program
    n,
    H: constexpr, F: constexpr, L: constexpr, R: constexpr,
    BT: constexpr, BE: constexpr, BF: constexpr, DOT: constexpr,
):
    """grad_scores_i = sum of gates_ij grad_mixed_j over the heads j, and dgates_ij = sum
    of scores_i grad_mixed_j over all pairs of tokens. Programs as in gla_mix_scores."""
    group, block, batch = split3(tl.program_id(0), H // F, n, L // BT)
    heads = tl.arange(0, BF)
    token = batch * n * L + block * BT
    scores_ptr += (token * H + group * F) * L
    grad_scores_ptr += (token * H + group * F) * L
    diagonal_ptr += (batch * H + group * F) * n * L + block * BT
    of_gates = heads[:, None] * F + heads[None, :]
    inside = (heads < F)[:, None] & (heads < F)[None, :]
    gates = tl.load(gates_ptr + group * F * F + of_gates, inside, 0.0)
    dgates = tl.zeros((BF, BF), tl.float32)
    for e0 in range(0, BT * L, BE):
        at, stored = tile_of_group(block * BT % L, e0 + tl.arange(0, BE), heads, H, F, L, R)
        scores = tl.load(scores_ptr + at, stored, 0.0).to(tl.float32)
        grad = tl.load(grad_scores_ptr + at, stored, 0.0).to(tl.float32)
        dgates = tl.dot(scores, tl.trans(grad), dgates, input_precision=DOT)
        grad = tl.dot(gates, grad, input_precision=DOT)
        tl.store(grad_scores_ptr + at, grad, stored)

    # and the diagonal, which is 0 in grad_scores
    i = tl.arange(0, BT)[None, :]
    stored = (heads < F)[:, None]
    at = i * (H * L) + heads[:, None] * L + block * BT % L + i
    scores = tl.load(scores_ptr + at, stored, 0.0).to(tl.float32)
    at = heads[:, None] * n * L + i
    grad = tl.load(diagonal_ptr + at, stored, 0.0)
    dgates = tl.dot(scores, tl.trans(grad), dgates, input_precision=DOT)
    grad = tl.dot(gates, grad, input_precision=DOT)
    tl.store(diagonal_ptr + at, grad, stored)
    dgates_ptr += tl.program_id(0).to(tl.int64) * F * F
    tl.store(dgates_ptr + of_gates, dgates, inside)


# The gradient of decays. The score of query i with key j has the factor exp(g_{j+1} +
# ... + g_i). So dg_t sums "score x gradient", the score (in gla a channel's part of it)
# times its gradient, over all pairs that span t, j < t <= i. For a token t of a block
# (in ssd: of a chunk) these are, with the variables that hold them,
#
#   key      query     which                          gla                    ssd
#   inside   inside    i >= t, less those of j >= t   pairs                  pairs
#   before   inside    i >= t                         q dq_before -> pairs   reads -> pairs
#   inside   after     j < t                          k dk_after -> writes   writes
#   before   after     all                            around                 around
#
# where "before" and "after" may be in the same chunk, in its other block. (The pairs of
# j >= t are among those of i >= t.) pairs and writes hold one sum per token; at last the
# kernels of the decays add up pairs from t on and writes before t.
# Summed over a query's pairs score x gradient is q dq, channel by channel, where dq is
# what these pairs add to its gradient; over a key's pairs it is k dk. A query with its
# own key spans nothing: it would cancel but for rounding, which may drown small
# gradients, and is left out.


@triton.jit
def through_states(
    do_ptr, v_ptr, states_ptr, grad_states_ptr, k, dk, state_pairs,
    H: constexpr, V: constexpr, R: constexpr, BV: constexpr, DOT: constexpr,
):
    """One head's dq = S do (R,BK). Its dS v is added to dk (R,BK), and its S dS, summed
    over V, to state_pairs (BK,): these two are sums over the heads of a group. k: numbers
    of the channels."""
    at_v = tl.arange(0, R)[:, None] * (H * V)
    dq = tl.zeros(dk.shape, tl.float32)
    for v0 in range(0, V, BV):
        channel = v0 + tl.arange(0, BV)[None, :]
        s = tl.load(states_ptr + (k[:, None] * V + channel))
        ds = tl.load(grad_states_ptr + (k[:, None] * V + channel))
        do = tl.load(do_ptr + (at_v + channel))
        v = tl.load(v_ptr + (at_v + channel))
        dq = tl.dot(do, tl.trans(s), dq, input_precision=DOT)
        dk = tl.dot(v, tl.trans(ds), dk, input_precision=DOT)
        # never in a branch: of that ptxas 12.8 made wrong code (data/results/README.md)
        state_pairs += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
        dk = waited_for(dk)  # and so for dq: products end in turn
    return dq, dk, state_pairs


@triton.jit
def across_blocks(
    dq, dk, around, second, q_start_ptr, k_end_ptr, q_seam_ptr, k_seam_ptr, other_decay_ptr,
    grad_scores_ptr, ROW: constexpr, DOT: constexpr,
):
    """Of a chunk's two blocks, takes the dq of the second (where `second`) or the dk of
    the first to the seam, as gradient of q_seam or k_seam: times the other block's decay,
    plus what comes through the scores of the second's queries with the first's keys. Adds
    to around (BK,) what jumps over the other block. The pointers are tiles, (R,BK) and
    (BK,), but for grad_scores_ptr: the score of the block's first token with the chunk's
    first key, ROW elements before the next token's."""
    other = tl.exp2(tl.load(other_decay_ptr))[None, :]
    i = tl.arange(0, dq.shape[0])
    grad_scores_ptr += i[:, None] * ROW + i[None, :]
    if second:
        around += tl.sum(tl.load(q_start_ptr).to(tl.float32) * dq, axis=0)
        scores = tl.load(grad_scores_ptr)
        dq = tl.dot(scores, tl.load(k_seam_ptr), dq * other, input_precision=DOT)
    else:
        around += tl.sum(tl.load(k_end_ptr).to(tl.float32) * dk, axis=0)
        scores = tl.load(grad_scores_ptr + dq.shape[0] * ROW)
        dk = tl.dot(tl.trans(scores), tl.load(q_seam_ptr), dk * other, input_precision=DOT)
    return dq, dk, around


@chunk_kernel
def gla_grad_queries_keys(
    do_ptr, v_ptr,                # (B,T,H,V)
    states_ptr, grad_states_ptr,  # (B,H,n,W,V)
    gates_ptr, dgates_ptr,        # (G,F,F), (B,T/R,G,W/BK,F)  or None: F = H / G
    q_start_ptr, k_end_ptr, dq_start_ptr, dk_end_ptr,  # (B,T,G,W)
    q_seam_ptr, k_seam_ptr,       # (B,n,R,G,W), or empty: one block a chunk
    block_decay_ptr, decay_ptr,   # (B,H,T/R,W/F), (B,H,n,W/F)  log2
    grad_scores_ptr, around_ptr,  # (B,T,H,L), (B,H,T/R,W/F)
    n,
    H: constexpr, G: constexpr, W: constexpr, V: constexpr,
    L: constexpr, R: constexpr, BK: constexpr, BV: constexpr, DOT: constexpr,
):
    """dq_i = S do_i and dk_j = dS v_j, of q_start and k_end, sums over the heads that
    read these channels. dgates: q_start . S do, a part of each program.

    around: sums over pairs that span a whole block. S dS exp(decay) spans both blocks of
    a chunk, q_start dq of the second one the first, k_end dk of the first the second. So a
    program stores what it has for the other block, if there are two. One program owns BK
    channels of one block."""
    F: constexpr = H // G
    k_block, rest = split(tl.program_id(0), W // BK)
    group, block, batch = split3(rest, G, n, L // R)
    token = batch * n * L + block * R
    chunk = block // (L // R)
    k = k_block * BK + tl.arange(0, BK)
    tile = group * W + tl.arange(0, R)[:, None] * (G * W) + k[None, :]
    at = token * G * W + tile
    dq = tl.zeros((R, BK), tl.float32)
    dk = tl.zeros((R, BK), tl.float32)
    state_pairs = tl.zeros((BK,), tl.float32)
    for head_of_group in range(F):
        head = group * F + head_of_group
        row = token * H + head
        of_state = ((batch * H + head) * n + chunk) * W * V
        dq_of_head, dk, state_pairs = through_states(
            do_ptr + row * V, v_ptr + row * V, states_ptr + of_state, grad_states_ptr + of_state,
            k, dk, state_pairs, H, V, R, BV, DOT)
        if gates_ptr is not None:
            gate = load_gate(gates_ptr, k_block * BK, head, W, F)
            dgate = tl.sum(tl.load(q_start_ptr + at).to(tl.float32) * dq_of_head)
            tl.store(dgates_ptr + tl.program_id(0).to(tl.int64) * F + head_of_group, dgate)
            dq_of_head *= gate  # dS has it already
        dq += dq_of_head
    K: constexpr = W // F
    key_head = group * F + k_block * BK // K
    of_head = (batch * H + key_head) * n
    decay = tl.load(decay_ptr + (of_head + chunk) * K + k % K)
    around = state_pairs * tl.exp2(decay)
    other_block = (of_head * (L // R) + (block ^ (L // R - 1))) * K + k % K
    if L > R:
        seam = (batch * n + chunk) * R * G * W + tile
        dq, dk, around = across_blocks(
            dq, dk, around, block % 2 == 1, q_start_ptr + at, k_end_ptr + at, q_seam_ptr + seam,
            k_seam_ptr + seam, block_decay_ptr + other_block,
            grad_scores_ptr + (token * H + key_head) * L, H * L, DOT)
    tl.store(around_ptr + other_block, around)
    tl.store(dq_start_ptr + at, dq)
    tl.store(dk_end_ptr + at, dk)


@triton.jit
def meet(q, k, to_q, to_k, grad_scores, pairs, DOT: constexpr):
    """dq and dk from the gradient of the scores (q to_q) (k to_k)^T: to_q and to_k decay
    them to where they meet. pairs: each pair's score x gradient, added at its query's row
    and taken off at its key's. In the sum of rows from t on, pairs of j >= t have to cancel:
    so q dq and k dk take q and k as rounded for the products."""
    k = k * to_k
    q = q * to_q
    if DOT is None:
        k = round_bfloat16(k)
        q = round_bfloat16(q)
    dq = tl.dot(grad_scores, k.to(grad_scores.dtype), input_precision=DOT)
    dk = tl.dot(tl.trans(grad_scores), q.to(grad_scores.dtype), input_precision=DOT)
    pairs += q * dq - k * dk
    return dq * to_q, dk * to_k, pairs


@triton.jit
def within_block(
    q, k, g, total, grad_scores, diagonal, earlier, STEEP: constexpr, DOT: constexpr,
):
    """dq, dk and `pairs` (see meet) inside one block, at once as in gla_scores, or by
    bits as in gla_scores_steep; and exp(upto) and exp(after). grad_scores is 0 on the
    diagonal and above (multiply_rows): a query with its own key has no decay, and comes
    as diagonal (R,1). total (1,BK): the sum of g (R,BK), not for STEEP. earlier (R,R): 1
    where the column comes before the row, else 0 (loaded: made in registers it took a
    third of the instructions). R is at most 2^7."""
    pairs = tl.zeros(q.shape, tl.float32)
    if STEEP:
        i = tl.arange(0, q.shape[0])[:, None]
        j = tl.arange(0, q.shape[0])[None, :]
        exp_upto, exp_after = decays_of_part(g, 7, DOT)
        dq = diagonal * k
        dk = diagonal * q
        for bit in range(7):
            to_q, to_k = decays_of_part(g, bit, DOT)
            of_bit = tl.where((i ^ j) >> bit == 1, grad_scores, 0.0)
            dq_of_bit, dk_of_bit, pairs = meet(q, k, to_q, to_k, of_bit, pairs, DOT)
            dq += dq_of_bit
            dk += dk_of_bit
        return dq, dk, pairs, exp_upto, exp_after
    if DOT is not None:
        from_middle = tl.cumsum(g, 0) - 0.5 * total
    else:  # in bfloat16 a product is faster than a scan, and exact to 16 bits
        from_middle = sum_rows(earlier, g, DOT) + g - 0.5 * total
    half = tl.exp2(0.5 * total)
    to_q = tl.exp2(from_middle)
    to_k = tl.exp2(-from_middle)
    dq, dk, pairs = meet(q, k, to_q, to_k, grad_scores, pairs, DOT)
    return dq + diagonal * k, dk + diagonal * q, pairs, to_q * half, to_k * half


@triton.jit
def spanning(pairs, writes, earlier, STEEP: constexpr, DOT: constexpr):
    """For every row t the sum of pairs (R,BK) from t on and of writes before t. A running
    sum less its last term would drown what is small, so that of earlier rows is a product.
    In bfloat16, unless STEEP, the sum from t on is that of all rows less that
    of earlier ones, exact to 2^-16 of the largest."""
    if STEEP or DOT is not None:
        return tl.cumsum(pairs, 0, reverse=True) + sum_rows(earlier, writes, DOT)
    return tl.sum(pairs, 0)[None, :] + sum_rows(earlier, writes - pairs, DOT)  # one product


@chunk_kernel
def gla_grad_decays(
    q_ptr, k_ptr, g_ptr,            # (B,T,H,K)
    earlier_ptr,                    # (R,R)  see within_block
    block_decay_ptr,                # (B,H,T/R,K)  log2
    grad_scores_ptr, diagonal_ptr,  # (B,T,H,L), (B,H,T)
    dq_start_ptr, dk_end_ptr,       # (B,T,H,K)  of q_start (q_seam), k_end (k_seam)
    around_ptr,                     # (B,H,T/R,K)
    dq_ptr, dk_ptr, dg_ptr,         # (B,T,H,K)
    scale, n,
    H: constexpr, K: constexpr, L: constexpr, R: constexpr,
    PK: constexpr, BK: constexpr, STEEP: constexpr, DOT: constexpr,
):
    """dq, dk and dg. A second launch, STEEP, stores those of steep blocks over the
    first's. One program owns PK channels of one block of one head. In the first launch it
    has a processor to itself, where nothing runs while it waits: so loads come first, and
    where PK > BK those of the next BK channels before the work on these (num_stages)."""
    k_block, rest = split(tl.program_id(0), K // PK)
    head, block, batch = split3(rest, H, n, L // R)
    of_block = ((batch * H + head) * n * (L // R) + block) * K
    if STEEP and not is_steep(block_decay_ptr + of_block, K, BK, DOT):
        return
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    row = (batch * n * L + block * R) * H + head
    grad_scores_ptr += row * L + block % (L // R) * R
    grad_scores = tl.load(grad_scores_ptr + i * (H * L) + j)
    diagonal = tl.load(diagonal_ptr + (batch * H + head) * n * L + block * R + i)
    earlier = tl.load(earlier_ptr + i * R + j)
    for k0 in range(0, PK, BK):
        channel = k_block * PK + k0 + tl.arange(0, BK)
        at = row * K + i * (H * K) + channel[None, :]
        g = tl.load(g_ptr + at)
        q = tl.load(q_ptr + at)
        k = tl.load(k_ptr + at)
        dq_start = tl.load(dq_start_ptr + at)
        dk_end = tl.load(dk_end_ptr + at)
        total = tl.load(block_decay_ptr + of_block + channel)[None, :]
        around = tl.load(around_ptr + of_block + channel)
        g = log2_decay(g)  # after these loads, since to convert is to wait for them
        q = q.to(tl.float32) * scale
        k = k.to(tl.float32)
        dq, dk, pairs, exp_upto, exp_after = within_block(
            q, k, g, total, grad_scores, diagonal, earlier, STEEP, DOT)
        dq_before = dq_start * exp_upto
        dk_after = dk_end * exp_after
        tl.store(dq_ptr + at, (dq + dq_before) * scale)
        tl.store(dk_ptr + at, dk + dk_after)
        pairs += q * dq_before
        dg = spanning(pairs, k * dk_after, earlier, STEEP, DOT) + around[None, :]
        if STEEP:
            # What log2_decay raised has no gradient. Only steep blocks have such a g (288
            # bits are more than is_steep's 180). Loaded again: a kept mask costs registers.
            dg = tl.where(tl.load(g_ptr + at) > FORGOTTEN_32, dg, 0.0)
        tl.store(dg_ptr + at, dg)


# tokens of a program that mixes: a divisor of L, and the least that tl.dot sums over
MIX_TOKENS = 16


@functools.cache
def gla_launches(H, f, K, V, L, R, dtype, heads, whole=False):
    """The kernels with their sizes and tiles, the fastest measured on an H100 at the sizes
    of layers(), for B H = `heads`. The wide tiles are half as wide in float32, which takes
    twice the registers and shared memory. whole: a program of gla_grad_decays takes all
    channels of its block."""
    narrow = dtype == torch.bfloat16
    DOT = None if narrow else "tf32x3"
    W = f * K
    sizes = dict(H=H, K=K, L=L, R=R, DOT=DOT)
    with_states = dict(H=H, G=H // f, W=W, V=V, L=L, R=R, DOT=DOT)
    BK = power_of_two(K, 16, 64)
    BV = power_of_two(V, 16, 64)
    wide_k = power_of_two(K, 16, 128 if narrow else 64)
    wide_v = power_of_two(V, 16, 128 if narrow else 64)
    scan = dict(H=H, HX=H // f, HY=H, W=W, V=V, L=L, BK=BK, DOT=DOT)
    # of the scan, were its tiles BK x wide_v; a large GPU has 132 processors
    programs = heads * (W // BK) * (V // wide_v)
    if not narrow or programs < 128:
        scan |= dict(BV=BV, BT=R, num_warps=4, num_stages=3)
    elif L == R:
        scan |= dict(BV=wide_v, BT=R, num_warps=8, num_stages=2)
    elif programs < 1024:
        scan |= dict(BV=wide_v, BT=64, num_warps=4, num_stages=4)
    else:
        scan |= dict(BK=wide_k, BV=wide_v, BT=32, num_warps=4, num_stages=6)
    scan |= dict(cut={"BK": W, "BV": V}, tables=("BK", "BV"))
    BF = power_of_two(f, 16)  # the least that a matrix product takes
    BE = power_of_two((2048 if narrow else 1024) // BF, 16)
    # tf32 holds a bfloat16, and of a gate 11 bits
    mix = dict(H=H, F=f, L=L, R=R, BT=MIX_TOKENS, BE=BE, BF=BF, num_warps=1, num_stages=1)
    mix |= dict(DOT="tf32" if narrow else "tf32x3")
    rows = dict(with_states, cut={"BV": V}, BK=BK, BV=wide_v, BJ=min(L, 64))
    rows |= dict(num_warps=8, num_stages=4) if L > R else dict(num_warps=4, num_stages=3)
    small_k = power_of_two(K, 16, 32)  # where many tiles are in registers at once
    decays = dict(sizes, cut={"PK": K}, PK=K if whole else small_k, BK=small_k, num_warps=8)
    return types.SimpleNamespace(
        scores=Launch(gla_scores, BK=BK, num_warps=8, num_stages=1, **sizes),
        scores_steep=Launch(gla_scores_steep, BK=small_k, num_warps=8, num_stages=1, **sizes),
        scores_across=Launch(gla_scores_across, BK=wide_k, num_warps=8, num_stages=3, **sizes),
        scan=Launch(gla_scan_states, REVERSE=False, **scan),
        scan_back=Launch(gla_scan_states, REVERSE=True, **scan),
        mix_scores=Launch(gla_mix_scores, **mix),
        outputs=Launch(gla_outputs, **rows),
        grad_values=Launch(gla_grad_values, **rows),
        grad_scores=Launch(
            gla_grad_scores, H=H, K=V, L=L, R=R, BK=BV, DOT=DOT, num_warps=8, num_stages=3),
        grad_mix_scores=Launch(gla_grad_mix_scores, **mix),
        grad_queries_keys=Launch(
            gla_grad_queries_keys, cut={"BK": W}, BK=wide_k, BV=BV, num_warps=8, num_stages=3,
            **with_states),
        grad_decays=Launch(gla_grad_decays, STEEP=False, num_stages=3 if whole else 1, **decays),
        # programs that return at once: two of them fit a processor
        grad_decays_steep=Launch(
            gla_grad_decays, STEEP=True, num_stages=1, maxnreg=128, **decays),
    )


@operator(results=11)
def gla_forward(q, k, v, g, gates, state, scale, L, R):
    """q, k, g (B,T,H,K): every head has keys of its own. T is a multiple of L; K and V
    multiples of 128, or powers of two from 16. q_seam and k_seam are empty where L = R."""
    B, T, H, K = q.shape
    V = v.shape[3]
    f = 1 if gates is None else gates.shape[1]
    n = T // L
    seams = n if L > R else 0
    o = torch.empty_like(v)
    last = g.new_empty(B, H, f * K, V)
    q_start = torch.empty_like(q)
    k_end = torch.empty_like(k)
    q_seam = q.new_empty(B, seams, R, H, K)
    k_seam = torch.empty_like(q_seam)
    block_decay = g.new_empty(B, H, seams, 2, K)
    decay = g.new_empty(B, H, n, K)
    scores = q.new_empty(B, T, H, L)
    mixed = q.new_empty(B, 0 if gates is None else T, H, L)
    states = v.new_empty(B, H, n, f * K, V)
    yield o, last, q_start, k_end, q_seam, k_seam, block_decay, decay, scores, mixed, states
    # an operator may not return one tensor as two results
    if L == R:
        block_decay = decay
    launches = gla_launches(H, f, K, V, L, R, q.dtype, B * H)
    for launch in (launches.scores, launches.scores_steep):
        launch(B * H * T // R, q, k, g, q_start, k_end, q_seam, k_seam, block_decay, scores,
               scale=scale, n=n)
    if L > R:
        launches.scores_across(
            B * H * n, q_seam, k_seam, block_decay, q_start, k_end, decay, scores, n=n)
    if gates is None:
        mixed = scores
    else:
        launches.mix_scores(B * H // f * T // MIX_TOKENS, scores, gates, mixed, n=n)
    launches.scan(B * H, k_end, v, None, None, decay, state, last, states, n=n)
    launches.outputs(B * H * n, q_start, gates, states, mixed, v, o, n=n)


@operator(results=6)
def gla_backward(q, k, v, g, gates, state, q_start, k_end, q_seam, k_seam, block_decay, decay,
                 scores, mixed, states, do, dlast, scale, L, R):
    """The launches of the table under "Triton, the fast path", in its order. Tensors as in
    gla_forward; do as o, dlast as last, or None."""
    B, T, H, K = q.shape
    V = v.shape[3]
    f = 1 if gates is None else gates.shape[1]
    n = T // L
    dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
    dgates = g.new_empty(0) if gates is None else torch.empty_like(gates)
    dstate = g.new_empty(0) if state is None else torch.empty_like(state)
    yield dq, dk, dv, dg, dgates, dstate
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    # whole blocks, where there are enough for a large GPU
    whole = q.dtype == torch.bfloat16 and B * H * T // R >= 128
    launches = gla_launches(H, f, K, V, L, R, q.dtype, B * H, whole)
    grad_states = torch.empty_like(states)
    grad_scores = torch.empty_like(scores)
    diagonal = g.new_empty(B, H, T)
    dq_start = torch.empty_like(q)
    dk_end = torch.empty_like(k)
    if L == R:
        block_decay = decay
    around = torch.empty_like(block_decay)
    if gates is None:
        mixed = scores
    launches.scan_back(
        B * H, q_start, do, None, gates, decay, dlast, None if state is None else dstate,
        grad_states, n=n)
    launches.grad_values(B * H * n, k_end, grad_states, mixed, do, dv, n=n)
    launches.grad_scores(B * H * n * (L // R) ** 2, do, v, grad_scores, diagonal, n=n)
    dgates_reading = None
    if gates is not None:
        BK = launches.grad_queries_keys.options["BK"]
        dgates_mixing = g.new_empty(B * T // MIX_TOKENS, *gates.shape)
        dgates_reading = g.new_empty(B * T // R, H // f, f, K // BK, f)
        launches.grad_mix_scores(
            B * H // f * T // MIX_TOKENS, scores, gates, grad_scores, diagonal, dgates_mixing,
            n=n)
    launches.grad_queries_keys(
        B * H // f * T // R, do, v, states, grad_states, gates, dgates_reading, q_start, k_end,
        dq_start, dk_end, q_seam, k_seam, block_decay, decay, grad_scores, around, n=n)
    if gates is not None:
        dgates.copy_(dgates_mixing.sum(0) + dgates_reading.sum((0, 3)))
    earlier = torch.ones(R, R, dtype=q.dtype, device=q.device).tril_(-1)
    for launch in (launches.grad_decays, launches.grad_decays_steep):
        launch(B * H * T // R, q, k, g, earlier, block_decay, grad_scores, diagonal, dq_start,
               dk_end, around, dq, dk, dg, scale=scale, n=n)


gla_kernels = differentiable(gla_forward, gla_backward)


def gla_triton(q, k, v, g, scale, state, gates):
    """gla by the kernels, whose sizes and types it pads, copies and casts for."""
    _, T, _, K = q.shape
    V = v.shape[3]
    if T == 1 and state is not None and not needs_grad(q, k, v, g, state, gates):
        if gates is not None:
            q = ask_the_group(q, gates)
        return one_step(gla_step_state, q, k, v, state, 64, 64, scale, g=g)
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    # a block's scores are R x R in registers; states are large from gla-1.3b's on
    L, R = chunk_lengths(T, 128, narrow and k.shape[3] * V >= 1 << 17)
    BK = tile_multiple(K, q)
    BV = tile_multiple(V, q)
    if gates is not None:
        k, g = (x.unflatten(3, (-1, K)).flatten(2, 3) for x in (k, g))
        gates = gates.float().contiguous()
        BK = power_of_two(K, 16, 128)  # the least padding, since states have it f times
    elif k.shape[2] < q.shape[2]:  # no model shares keys without gates: copies will do
        k, g = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, g))
    q, k, g = (pad(x, {1: L, 3: BK}) for x in (q.to(dtype), k.to(dtype), g.float()))
    v = pad(v.to(dtype), {1: L, 3: BV})
    if state is not None:
        state = pad(state.float().unflatten(2, (-1, K)), {3: BK, 4: BV}).flatten(2, 3)
    o, last, *_ = gla_kernels(q, k, v, g, gates, state, scale, L, R)
    if q.shape[3] > K or v.shape[3] > V:
        last = last.unflatten(2, (-1, q.shape[3]))[..., :K, :V].flatten(2, 3)
    return o[:, :T, :, :V], last


# --------------------------------------------------------------------------------------
# Triton: Mamba2's recurrence


@triton.jit
def decay_table(cum_of_query, cum_of_key, query, key):
    """exp(g_{key+1} + ... + g_query) for query >= key, else 0, of one head: (R,R) for vectors
    (R,). With key_cum as cum_of_key it is that times dt_key."""
    between = cum_of_query[:, None] - cum_of_key[None, :]
    high = between.to(tl.float32)
    table = tl.exp2(tl.where(query[:, None] >= key[None, :], high, float("-inf")))
    if between.dtype == tl.float64:  # exp2(high + low) is exp2(high) (1 + low log 2)
        low = tl.where(high > float("-inf"), between - high, 0.0).to(tl.float32)
        table += table * low * 0.6931471805599453
    return table


@triton.jit
def load_A(A_ptr, head, H: constexpr):
    """A of head, one or several; -inf as -1e30, for 0 (the padding's dt) * -inf is no
    number. A NaN stays one."""
    return tl.maximum(tl.load(A_ptr + head, head < H, 0.0), -1e30, tl.PropagateNan.ALL)


@chunk_kernel
def ssd_decays(
    dt_ptr, A_ptr, first_ptr,  # (B,T,H), (H,), (B,T) int8 or None: a document begins
    cum_ptr, key_cum_ptr,      # (B,H,T)  upto, and upto - log dt; log2
    read_weight_ptr,           # (B,H,T)  exp(upto)
    write_weight_ptr,          # (B,H,T)  exp(after) dt
    decay_ptr,                 # (B,H,n)  of a chunk, log2
    n,
    H: constexpr, L: constexpr, BH: constexpr,
):
    """Sums of g = dt A in a chunk. For float32 inputs cum and key_cum are float64, so that
    differences of large sums keep the digits of small decays. One program owns one chunk
    of BH heads."""
    head_block, chunk, batch = split3(tl.program_id(0), tl.cdiv(H, BH), n)
    head = head_block * BH + tl.arange(0, BH)
    inside = (head < H)[None, :]
    i = tl.arange(0, L)
    token = batch * n * L + chunk * L

    dt = tl.load(dt_ptr + token * H + i[:, None] * H + head[None, :], inside, 0.0)
    g = dt * load_A(A_ptr, head, H)[None, :]
    g = tl.maximum(g, FORGOTTEN_32, tl.PropagateNan.ALL)
    if first_ptr is not None:
        g = tl.where(tl.load(first_ptr + token + i)[:, None] != 0, FORGOTTEN_32, g)
    g = g.to(tl.float64) * LOG2E
    cum = tl.cumsum(g, 0)
    total = tl.sum(g, 0)

    at = (batch * H + head[None, :]) * n * L + chunk * L + i[:, None]
    exact = cum_ptr.dtype.element_ty
    tl.store(cum_ptr + at, cum, inside)
    tl.store(key_cum_ptr + at, cum - tl.log2(dt.to(exact)), inside)  # infinite where dt is 0
    tl.store(read_weight_ptr + at, tl.exp2(cum.to(tl.float32)), inside)
    tl.store(write_weight_ptr + at, tl.exp2((total[None, :] - cum).to(tl.float32)) * dt, inside)
    tl.store(decay_ptr + (batch * H + head) * n + chunk, total, head < H)


# States of more columns are read by ssd_read_states, not by each block of outputs and
# grad_values, which took a tenth longer at N = 512 (data/results/README.md).
READ_APART = 128


@triton.jit
def read_rows(
    c_ptr, states_ptr, token, rows, G: constexpr, N: constexpr, BN: constexpr, DOT: constexpr,
    read_ptr=None, of_rows=0, mine=0,
):
    """S c for these tokens and rows of S (their offsets). Where ssd_read_states has made
    it, it is loaded from read_ptr + of_rows (the chunk's and head's) + mine (the tile's)."""
    if read_ptr is not None:
        return tl.load(read_ptr + of_rows + mine).to(tl.float32)
    read = tl.zeros((token.shape[0], rows.shape[0]), tl.float32)
    for n0 in range(0, N, BN):
        channel = n0 + tl.arange(0, BN)
        c = tl.load(c_ptr + token[:, None] * (G * N) + channel[None, :])
        s = tl.load(states_ptr + rows[None, :] + channel[:, None])
        read = tl.dot(c, s, read, input_precision=DOT)
    return read


@chunk_kernel
def ssd_read_states(
    c_ptr,       # (B,T,G,N)    C, or B
    states_ptr,  # (B,H,n,P,N)  S, or dS
    read_ptr,    # (B,T,H,P)    the result
    n,
    H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr,
    BV: constexpr, BN: constexpr, DOT: constexpr,
):
    """read = S c, where N > READ_APART; neighbouring heads of a group share c's tile.

    One program owns BV channels, of one head or several of one group, of one chunk."""
    v_block, chunk, batch = split3(tl.program_id(0), H * P // BV, n)
    group = v_block * BV // (H // G * P)
    i = tl.arange(0, L)
    v = v_block * BV + tl.arange(0, BV)
    token = batch * n * L + chunk * L
    c_ptr += (token * G + group) * N
    read_ptr += token * H * P
    rows = ((batch * H + v // P) * n + chunk) * P * N + v % P * N
    read = read_rows(c_ptr, states_ptr, i, rows, G, N, BN, DOT)
    at = i[:, None] * (H * P) + v[None, :]
    tl.store(read_ptr + at, read)


@chunk_kernel
def ssd_outputs(
    C_ptr, states_ptr,     # (B,T,G,N), (B,H,n,P,N)
    state_read_ptr,        # (B,T,H,P)  S C of ssd_read_states, or None
    scores_ptr,            # (B,T,G,L)
    x_ptr, D_ptr,          # (B,T,H,P), (H,) or None
    cum_ptr, key_cum_ptr,  # (B,H,T)
    y_ptr,                 # (B,T,H,P)
    n,
    H: constexpr, G: constexpr, P: constexpr, N: constexpr,
    L: constexpr, R: constexpr, BN: constexpr, DOT: constexpr,
):
    """y_i = exp(cum_i) S C_i + D x_i
           + sum over j <= i in its chunk of scores_ij exp(cum_i - cum_j) dt_j x_j.

    One program owns R queries of one chunk of one head."""
    head, block, batch = split3(tl.program_id(0), H, n, L // R)
    block, chunk = split(block, L // R)
    group = head // (H // G)
    i = tl.arange(0, R)
    query = block * R + i
    p = tl.arange(0, P)
    token = batch * n * L + chunk * L
    C_ptr += (token * G + group) * N
    scores_ptr += (token * G + group) * L
    x_ptr += (token * H + head) * P
    of_head = (batch * H + head) * n * L + chunk * L
    states_ptr += ((batch * H + head) * n + chunk) * P * N
    mine = query[:, None] * (H * P) + p[None, :]

    # what queries read from the state
    of_rows = (token * H + head) * P
    cum = tl.load(cum_ptr + of_head + query)
    weight = tl.exp2(cum.to(tl.float32))[:, None]
    y = read_rows(C_ptr, states_ptr, query, p * N, G, N, BN, DOT, state_read_ptr, of_rows, mine)
    # waited for: else ptxas lets no two products below overlap (its note C7514)
    y = waited_for(y * weight)

    # and from the keys of their chunk, block by block up to the diagonal
    for key_block in range(block + 1):
        key = key_block * R + i
        scores = tl.load(scores_ptr + query[:, None] * (G * L) + key[None, :]).to(tl.float32)
        scores *= decay_table(cum, tl.load(key_cum_ptr + of_head + key), query, key)
        x = tl.load(x_ptr + key[:, None] * (H * P) + p[None, :])
        y = waited_for(tl.dot(scores.to(x.dtype), x, y, input_precision=DOT))

    if D_ptr is not None:
        y += tl.load(D_ptr + head) * tl.load(x_ptr + mine).to(tl.float32)
    tl.store(y_ptr + of_rows + mine, y)


@chunk_kernel
def ssd_grad_values(
    B_ptr, grad_states_ptr,         # (B,T,G,N), (B,H,n,P,N)
    grad_read_ptr, state_read_ptr,  # (B,T,H,P)  dS B, S C of ssd_read_states, or None
    scores_ptr,                     # (B,T,G,L)
    x_ptr, dy_ptr, dt_ptr, D_ptr,   # (B,T,H,P), (B,T,H,P), (B,T,H), (H,) or None
    cum_ptr, write_weight_ptr,      # (B,H,T)
    dx_ptr, ddt_of_x_ptr,           # (B,T,H,P), (B,H,T)  dt's gradient as x's factor
    writes_ptr, reads_ptr, dD_ptr,  # (B,H,T) twice, see "The gradient of decays"; (B,H,T/R)
    n,
    H: constexpr, G: constexpr, P: constexpr, N: constexpr,
    L: constexpr, R: constexpr, BN: constexpr, DOT: constexpr,
):
    """With v = dt x: dv_j = exp(after_j) dS B_j
           + sum over i >= j of scores_ij exp(cum_i - cum_j) dy_i; dx = dt dv + D dy.
    dx may be grad_read. One program owns R keys of one chunk of one head."""
    head, block, batch = split3(tl.program_id(0), H, n, L // R)
    block, chunk = split(block, L // R)
    group = head // (H // G)
    i = tl.arange(0, R)
    key = block * R + i
    p = tl.arange(0, P)
    token = batch * n * L + chunk * L
    B_ptr += (token * G + group) * N
    scores_ptr += (token * G + group) * L
    of_rows = (token * H + head) * P
    x_ptr += of_rows
    dy_ptr += of_rows
    dx_ptr += of_rows
    of_head = (batch * H + head) * n * L + chunk * L
    grad_states_ptr += ((batch * H + head) * n + chunk) * P * N
    mine = key[:, None] * (H * P) + p[None, :]
    cum = tl.load(cum_ptr + of_head + key)
    if state_read_ptr is not None:  # before all else: later, it costs registers
        read = tl.load(state_read_ptr + of_rows + mine).to(tl.float32)
        read = tl.sum(read * tl.load(dy_ptr + mine).to(tl.float32), axis=1)
        tl.store(reads_ptr + of_head + key, tl.exp2(cum.to(tl.float32)) * read)
    # what keys write to the state; all else that this needs is loaded before the products
    x = tl.load(x_ptr + mine)
    dt = tl.load(dt_ptr + (token + key) * H + head)
    weight = tl.load(write_weight_ptr + of_head + key)
    after = (tl.load(cum_ptr + of_head + L - 1) - cum).to(tl.float32)
    dv = read_rows(B_ptr, grad_states_ptr, key, p * N, G, N, BN, DOT, grad_read_ptr, of_rows, mine)
    tl.store(writes_ptr + of_head + key, weight * tl.sum(x * dv, axis=1))
    dv *= tl.exp2(after)[:, None]
    # and what the queries of their chunk read, block by block from the diagonal
    for query_block in range(block, L // R):
        query = query_block * R + i
        scores = tl.load(scores_ptr + query[:, None] * (G * L) + key[None, :]).to(tl.float32)
        scores *= decay_table(tl.load(cum_ptr + of_head + query), cum, query, key)
        dy = tl.load(dy_ptr + query[:, None] * (H * P) + p[None, :])
        scores = tl.trans(scores.to(dy.dtype))
        dv = waited_for(tl.dot(scores, dy, dv, input_precision=DOT))
    tl.store(ddt_of_x_ptr + of_head + key, tl.sum(x * dv, axis=1))
    dx = dv * dt[:, None]
    if D_ptr is not None:
        dy = tl.load(dy_ptr + mine).to(tl.float32)
        dx += tl.load(D_ptr + head) * dy
        tl.store(dD_ptr + ((batch * H + head) * n + chunk) * (L // R) + block, tl.sum(x * dy))
    tl.store(dx_ptr + mine, dx)


@chunk_kernel
def ssd_grad_scores(
    x_ptr, dy_ptr,                # (B,T,H,P)
    cum_ptr, key_cum_ptr,         # (B,H,T)
    scores_ptr, grad_scores_ptr,  # (B,T,G,L)
    pairs_ptr,                    # (L/R,B,H,T)  by the block of the other token
    n, heads,
    H: constexpr, G: constexpr, P: constexpr, L: constexpr, R: constexpr, DOT: constexpr,
):
    """grad_scores_ij sums exp(cum_i - cum_j) dt_j (dy_i . x_j) over the group's heads.
    pairs_t: score x gradient summed over the pairs with t as query, less those with t as
    key; in parts, by the block of the other token.

    One program owns R queries and R keys, no later, of one chunk of one group, its
    heads in turn."""
    key_block, rest = split(tl.program_id(0), L // R)
    query_block, rest = split(rest, L // R)
    group, chunk, batch = split3(rest, G, n)
    if key_block > query_block:
        return
    query = query_block * R + tl.arange(0, R)
    key = key_block * R + tl.arange(0, R)
    p = tl.arange(0, P)[None, :]
    token = batch * n * L + chunk * L
    scores_ptr += (token * G + group) * L
    grad_scores_ptr += (token * G + group) * L
    at = query[:, None] * (G * L) + key[None, :]
    below = query[:, None] > key[None, :]

    scores = tl.load(scores_ptr + at).to(tl.float32)
    grad_scores = tl.zeros((R, R), tl.float32)
    of_head = (batch * H + group * (H // G)) * n * L + chunk * L
    cum_of_query = tl.load(cum_ptr + of_head + query)
    cum_of_key = tl.load(key_cum_ptr + of_head + key)
    for head_of_group in range(H // G):
        head = group * (H // G) + head_of_group
        of_head = (batch * H + head) * n * L + chunk * L
        row = token * H + head
        dy = tl.load(dy_ptr + row * P + (query[:, None] * (H * P) + p))
        x = tl.load(x_ptr + row * P + (key[:, None] * (H * P) + p))
        grad = tl.dot(dy, tl.trans(x), input_precision=DOT)
        grad *= decay_table(cum_of_query, cum_of_key, query, key)
        grad_scores += grad
        # the next head's sums, already now: see scan_states
        following = of_head + tl.where(head_of_group < H // G - 1, n * L, 0)
        cum_of_query = tl.load(cum_ptr + following + query)
        cum_of_key = tl.load(key_cum_ptr + following + key)

        # their sums over t nearly cancel: for float32 inputs they are float64
        pairs = tl.where(below, grad * scores, 0.0).to(pairs_ptr.dtype.element_ty)
        of_query = (key_block * heads).to(tl.int64) * n * L + of_head + query
        of_key = (query_block * heads).to(tl.int64) * n * L + of_head + key
        if key_block == query_block:
            tl.store(pairs_ptr + of_query, tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0))
        else:
            tl.store(pairs_ptr + of_query, tl.sum(pairs, axis=1))
            tl.store(pairs_ptr + of_key, -tl.sum(pairs, axis=0))
    tl.store(grad_scores_ptr + at, grad_scores)


@triton.jit
def through_scores(
    grad_scores_ptr, B_ptr, C_ptr, token, channel,
    G: constexpr, N: constexpr, L: constexpr, R: constexpr, DOT: constexpr,
):
    """What tokens (BR,) of a chunk get through its scores, on channels (BN,): for dC_i the
    sum over keys j <= i of grad_scores_ij B_j, for dB_j that over queries i >= j of
    grad_scores_ij C_i. Returns both, (BR,BN)."""
    dC = tl.zeros((token.shape[0], channel.shape[0]), tl.float32)
    dB = tl.zeros((token.shape[0], channel.shape[0]), tl.float32)
    for other_block in range(L // R):
        other = other_block * R + tl.arange(0, R)
        theirs = other[:, None] * (G * N) + channel[None, :]
        scores = tl.load(grad_scores_ptr + token[:, None] * (G * L) + other[None, :],
                         token[:, None] >= other[None, :], 0.0)
        dC = tl.dot(scores, tl.load(B_ptr + theirs), dC, input_precision=DOT)
        scores = tl.load(grad_scores_ptr + other[:, None] * (G * L) + token[None, :],
                         other[:, None] >= token[None, :], 0.0)
        dB = tl.dot(tl.trans(scores), tl.load(C_ptr + theirs), dB, input_precision=DOT)
    return dC, dB


@chunk_kernel
def ssd_grad_queries_keys(
    B_ptr, C_ptr, x_ptr, dy_ptr,  # (B,T,G,N) twice, (B,T,H,P) twice
    read_weight_ptr, write_weight_ptr,  # (B,H,T)
    states_ptr, grad_states_ptr,  # (B,H,n,P,N)
    grad_scores_ptr, dB_ptr, dC_ptr,  # (B,T,G,L), (B,T,G,N) twice
    reads_ptr,                    # (N/BN,B,H,T)  parts; None if ssd_grad_values stored it
    state_pairs_ptr,              # (N/BN,B,H,n)  parts of the sum of S dS
    n, heads,
    H: constexpr, G: constexpr, P: constexpr, N: constexpr,
    L: constexpr, R: constexpr, BR: constexpr, BN: constexpr, DOT: constexpr,
):
    """dC_i sums exp(cum_i) dy_i S over heads, dB_j exp(after_j) dt_j x_j dS; to both is
    added what comes through the scores. reads_i, per head: C_i . its exp(cum_i) dy_i S.
    One program owns BN columns of BR tokens of one group, its heads in turn."""
    n_block, rest = split(tl.program_id(0), N // BN)
    group, block, batch = split3(rest, G, n, L // BR)
    block, chunk = split(block, L // BR)
    token = block * BR + tl.arange(0, BR)
    channel = n_block * BN + tl.arange(0, BN)
    start = batch * n * L + chunk * L
    B_ptr += (start * G + group) * N
    C_ptr += (start * G + group) * N
    grad_scores_ptr += (start * G + group) * L
    at = token[:, None] * (G * N) + channel[None, :]
    at_v = token[:, None] * (H * P) + tl.arange(0, P)[None, :]
    tile = tl.arange(0, P)[:, None] * N + channel[None, :]
    dC, dB = through_scores(grad_scores_ptr, B_ptr, C_ptr, token, channel, G, N, L, R, DOT)
    if reads_ptr is not None:
        c = tl.load(C_ptr + at).to(tl.float32)
        of_tokens = (batch * H + group * (H // G)) * n * L + chunk * L + token
        weight = tl.load(read_weight_ptr + of_tokens)
    for head_of_group in range(H // G):
        head = group * (H // G) + head_of_group
        of_tokens = (batch * H + head) * n * L + chunk * L + token
        of_state = ((batch * H + head) * n + chunk) * P * N
        s = tl.load(states_ptr + of_state + tile)
        ds = tl.load(grad_states_ptr + of_state + tile)
        dy = tl.load(dy_ptr + (start * H + head) * P + at_v)
        if reads_ptr is None:
            dy = dy.to(tl.float32) * tl.load(read_weight_ptr + of_tokens)[:, None]
            dC = tl.dot(dy.to(s.dtype), s, dC, input_precision=DOT)
        else:
            through_state = tl.dot(dy, s, input_precision=DOT) * weight[:, None]
            dC += through_state
            # the next head's, already now: see scan_states
            following = of_tokens + tl.where(head_of_group < H // G - 1, n * L, 0)
            weight = tl.load(read_weight_ptr + following)
            part = (n_block * heads).to(tl.int64) * n * L
            tl.store(reads_ptr + part + of_tokens, tl.sum(through_state * c, axis=1))
        v = tl.load(x_ptr + (start * H + head) * P + at_v).to(tl.float32)
        v *= tl.load(write_weight_ptr + of_tokens)[:, None]
        dB = tl.dot(v.to(ds.dtype), ds, dB, input_precision=DOT)
        dC = waited_for(dC)
        dB = waited_for(dB)
        if block == 0:  # a branch that GLA's must not have (see through_states); here it is right
            part = (n_block * heads + batch * H + head) * n
            tl.store(state_pairs_ptr + part + chunk, tl.sum(s.to(tl.float32) * ds.to(tl.float32)))
    tl.store(dC_ptr + (start * G + group) * N + at, dC)
    tl.store(dB_ptr + (start * G + group) * N + at, dB)


@chunk_kernel
def ssd_grad_decays(
    reads_ptr, writes_ptr,       # (READS,B,H,T), (B,H,T)
    pairs_ptr,                   # (L/R,B,H,T)
    state_pairs_ptr, decay_ptr,  # (PARTS,B,H,n), (B,H,n)
    dt_ptr, A_ptr, first_ptr,    # (B,T,H), (H,), (B,T) or None
    ddt_of_x_ptr,                # (B,H,T)
    ddt_ptr, dA_ptr,             # (B,T,H), (B,H,n)
    n, heads,
    H: constexpr, L: constexpr, R: constexpr, READS: constexpr, PARTS: constexpr,
):
    """dg by "The gradient of decays", a chunk being one block; from it, as g = dt A, the
    gradients of dt and A. READS and PARTS: parts of reads, of state_pairs. One program
    owns one chunk of one head."""
    head, chunk, batch = split3(tl.program_id(0), H, n)
    i = tl.arange(0, L)
    of_chunk = (batch * H + head) * n + chunk
    mine = of_chunk * L + i
    all_chunks = heads.to(tl.int64) * n

    pairs = tl.zeros((L,), pairs_ptr.dtype.element_ty)
    for block in range(L // R):
        pairs += tl.load(pairs_ptr + block * all_chunks * L + mine)
    for part in range(READS):
        pairs += tl.load(reads_ptr + part * all_chunks * L + mine)
    around = 0.0
    for part in range(PARTS):
        around += tl.load(state_pairs_ptr + part * all_chunks + of_chunk)
    around *= tl.exp2(tl.load(decay_ptr + of_chunk))
    earlier_writes = tl.cumsum(tl.load(writes_ptr + mine - 1, i > 0, 0.0), 0)
    dg = tl.cumsum(pairs, 0, reverse=True) + earlier_writes + around

    token = (batch * n + chunk) * L + i
    dt = tl.load(dt_ptr + token * H + head)
    A = load_A(A_ptr, head, H)
    dg = tl.where(dt * A > FORGOTTEN_32, dg, 0.0)
    if first_ptr is not None:
        dg = tl.where(tl.load(first_ptr + token) != 0, 0.0, dg)
    tl.store(ddt_ptr + token * H + head, tl.load(ddt_of_x_ptr + mine) + dg * A)
    tl.store(dA_ptr + of_chunk, tl.sum(dg * dt, axis=0))


@functools.cache
def ssd_launches(H, G, P, N, L, R, dtype, heads):
    """The kernels with their sizes and tiles; heads: B H."""
    narrow = dtype == torch.bfloat16
    apart = N > READ_APART
    DOT = None if narrow else "tf32x3"
    sizes = dict(H=H, G=G, P=P, N=N, L=L, R=R, DOT=DOT)
    BN = power_of_two(N, 16, 64)
    # small tiles where others are too few for a large GPU's processors
    scan_n = power_of_two(N, 16, 128)
    if N // scan_n * heads < 256:
        scan_n = min(scan_n, 64)
    if N // scan_n * heads < 128:
        scan_n = min(scan_n, 32)
    width = 128 if narrow and H // G * P % 128 == 0 else P  # of heads of one group
    if narrow and L >= 128:
        through = dict(BR=128, BN=128 if apart else BN, num_warps=8, num_stages=3)
    else:
        through = dict(BR=R, BN=BN, num_warps=4, num_stages=3)
    scan = dict(H=H, HX=H, HY=G, W=P, V=N, L=L, BK=P, BV=scan_n, DOT=DOT, num_warps=4)
    scan |= dict(cut={"BK": P, "BV": N}, tables=("BK", "BV"))
    if narrow and apart:
        scan |= dict(BT=min(L, 128), num_stages=2)
    elif scan_n > 64:
        scan |= dict(BT=min(L, 64), num_stages=4)
    else:
        scan |= dict(BT=min(L, 128), num_stages=3)
    # maxnreg, a thread's registers: at 128 four programs fit a processor
    rows = dict(sizes, BN=BN, num_warps=4, maxnreg=128 if narrow else None)
    parts = N // through["BN"]
    return types.SimpleNamespace(
        decays=Launch(ssd_decays, cut={"BH": H}, H=H, L=L, BH=8, num_warps=4),
        scores=Launch(ssd_scores, H=G, K=N, L=L, R=R, BK=BN, DOT=DOT, num_warps=4),
        scan=Launch(ssd_scan_states, REVERSE=False, **scan),
        scan_back=Launch(ssd_scan_states, REVERSE=True, **scan),
        read=Launch(
            ssd_read_states, cut={"BV": H * P}, H=H, G=G, P=P, N=N, L=L, BV=width, BN=BN, DOT=DOT,
            num_warps=8, num_stages=3 if L <= 128 else 4),
        outputs=Launch(ssd_outputs, num_stages=3, **rows),
        grad_values=Launch(ssd_grad_values, num_stages=2, **rows),
        grad_scores=Launch(
            ssd_grad_scores, H=H, G=G, P=P, L=L, R=R, DOT=DOT, num_warps=4, num_stages=3),
        grad_queries_keys=Launch(
            ssd_grad_queries_keys, cut={"BN": N, "BR": L}, **sizes, **through),
        grad_decays=Launch(
            ssd_grad_decays, H=H, L=L, R=R, READS=1 if apart else parts, PARTS=parts, num_warps=4),
    )


@operator(results=10)
def ssd_forward(x, dt, A, B, C, D, state, first, L, R):
    """T is a multiple of L; P 16, 32 or 64; N a multiple of 128, or a power of two from 16.
    state_read is empty for N <= READ_APART."""
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    n = T // L
    y = torch.empty_like(x)
    last = dt.new_empty(batch, H, P, N)
    exact = torch.float64 if x.dtype == torch.float32 else torch.float32  # see ssd_decays
    cum, key_cum = (dt.new_empty(batch, H, T, dtype=exact) for _ in range(2))
    read_weight, write_weight = (dt.new_empty(batch, H, T) for _ in range(2))
    decay = dt.new_empty(batch, H, n)
    scores = x.new_empty(batch, T, G, L)
    states = x.new_empty(batch, H, n, P, N)
    state_read = x.new_empty(batch if N > READ_APART else 0, T, H, P)
    yield y, last, cum, key_cum, read_weight, write_weight, decay, scores, states, state_read
    launches = ssd_launches(H, G, P, N, L, R, x.dtype, batch * H)
    launches.decays(
        batch * n, dt, A, first, cum, key_cum, read_weight, write_weight, decay, n=n)
    launches.scores(batch * n * G * (L // R) ** 2, C, B, scores, None, n=n)
    launches.scan(batch * H, x, B, write_weight, None, decay, state, last, states, n=n)
    if N > READ_APART:
        launches.read(batch * n, C, states, state_read, n=n)
    launches.outputs(
        batch * H * T // R, C, states, state_read if N > READ_APART else None, scores, x, D,
        cum, key_cum, y, n=n)


@operator(results=7)
def ssd_backward(x, dt, A, B, C, D, state, first, cum, key_cum, read_weight, write_weight, decay,
                 scores, states, state_read, dy, dlast, L, R):
    """As gla_backward, for ssd_forward; dy as y."""
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    n = T // L
    dx, ddt, dA, dB, dC = (torch.empty_like(t) for t in (x, dt, A, B, C))
    dD = A.new_empty(0) if D is None else torch.empty_like(D)
    dstate = dt.new_empty(0) if state is None else torch.empty_like(state)
    yield dx, ddt, dA, dB, dC, dD, dstate
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    heads = batch * H
    apart = N > READ_APART
    launches = ssd_launches(H, G, P, N, L, R, x.dtype, heads)
    parts = launches.grad_decays.options["PARTS"]
    grad_states = torch.empty_like(states)
    grad_scores = torch.empty_like(scores)
    ddt_of_x = torch.empty_like(read_weight)
    writes = torch.empty_like(read_weight)
    reads = dt.new_empty(1 if apart else parts, batch, H, T)
    pairs = cum.new_empty(L // R, batch, H, T)
    state_pairs = dt.new_empty(parts, batch, H, n)
    dA_parts = dt.new_empty(batch, H, n)
    dD_parts = dt.new_empty(batch, H, T // R)
    launches.scan_back(
        heads, dy, C, read_weight, None, decay, dlast, None if state is None else dstate,
        grad_states, n=n)
    if apart:
        launches.read(batch * n, B, grad_states, dx, n=n)
    launches.grad_values(
        heads * T // R, B, grad_states, dx if apart else None, state_read if apart else None,
        scores, x, dy, dt, D, cum, write_weight, dx, ddt_of_x, writes, reads, dD_parts, n=n)
    launches.grad_scores(
        batch * n * G * (L // R) ** 2, x, dy, cum, key_cum, scores, grad_scores, pairs, n=n,
        heads=heads)
    launches.grad_queries_keys(
        batch * G * n, B, C, x, dy, read_weight, write_weight, states, grad_states, grad_scores,
        dB, dC, None if apart else reads, state_pairs, n=n, heads=heads)
    launches.grad_decays(
        heads * n, reads, writes, pairs, state_pairs, decay, dt, A, first, ddt_of_x, ddt, dA_parts,
        n=n, heads=heads)
    torch.sum(dA_parts, (0, 2), out=dA)
    if D is not None:
        torch.sum(dD_parts, (0, 2), out=dD)


ssd_kernels = differentiable(ssd_forward, ssd_backward)


def ssd_triton(x, dt, A, B, C, D, state, first):
    """As gla_triton."""
    _, T, _, P = x.shape
    N = B.shape[3]
    if D is not None and D.dim() == 2:  # one D per channel: not in the kernels
        y, state = ssd_triton(x, dt, A, B, C, None, state, first)
        return y + D * x, state
    if T == 1 and state is not None and not needs_grad(x, dt, A, B, C, D, state):
        if first is not None:
            state = state.masked_fill(first[:, :, None, None], 0.0)
        return one_step(ssd_step_state, C, B, x, state, 128, 32, dt=dt, A=A, D=D)
    narrow = x.dtype == B.dtype == C.dtype == torch.bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    # A tile has all channels of a head, at most 64: a wider head becomes several.
    parts = -(-P // 64)
    L, R = chunk_lengths(T, 64, narrow and N > READ_APART)
    BP = tile_multiple(min(P, 64), x)
    BN = tile_multiple(N, x)
    x = pad(x.to(dtype), {1: L, 3: parts * BP})
    dt = pad(dt.float(), {1: L})
    A = A.float().contiguous()
    D = None if D is None else D.float().contiguous()
    if parts > 1:
        x = x.unflatten(3, (parts, BP)).flatten(2, 3)
        dt, A, D = (None if t is None else t.repeat_interleave(parts, -1) for t in (dt, A, D))
    B, C = (pad(t.to(dtype), {1: L, 3: BN}) for t in (B, C))
    if state is not None:
        state = pad(state.float(), {2: parts * BP, 3: BN}).unflatten(2, (parts, BP)).flatten(1, 2)
    if first is not None:
        first = pad(first.to(torch.int8), {1: L})
    y, last, *_ = ssd_kernels(x, dt, A, B, C, D, state, first, L, R)
    if parts > 1:
        y = y.unflatten(2, (-1, parts)).flatten(3)
        last = last.unflatten(1, (-1, parts)).flatten(2, 3)
    return y[:, :T, :, :P], last[:, :, :P, :N]


# --------------------------------------------------------------------------------------
# Triton: the short convolution of Mamba2 (and of GLA, where it has one)
#
# pre_t = bias + sum over i < taps of weight_i x_{t - taps + 1 + i}, y = silu(pre).
# A tile is loaded shifted, once per tap, mostly from the cache. Offsets in a sequence have
# 32 bits.


@triton.jit
def load_shifted(
    x_ptr, document_ptr, other, token, channel, batch, T, ROW: constexpr, D: constexpr,
):
    """Rows `other` of x, 0 outside 0 to T and in other documents than that of `token`."""
    seen = (other >= 0) & (other < T)
    at = other[:, None] * ROW + channel[None, :]
    x_ptr += batch * T * ROW
    if document_ptr is not None:
        document_ptr += batch * T
        of_other = tl.load(document_ptr + other, seen, 0)
        seen = seen & (of_other == tl.load(document_ptr + token, token < T, 0))
    return tl.load(x_ptr + at, seen[:, None] & (channel < D)[None, :], 0.0).to(tl.float32)


@triton.jit
def convolve(
    x_ptr, weight_ptr, bias_ptr,  # (B,T,D) in rows of ROW elements, (D,TAPS), (D,) or None
    document_ptr,                 # (B,T) int64 or None
    y_ptr,                        # (B,T,D)
    T,
    ROW: constexpr, D: constexpr, TAPS: constexpr, BT: constexpr, BD: constexpr,
    REVERSE: constexpr,
):
    """y = silu(pre); in reverse, of dpre, dx_t = sum over i of weight_i dpre_{t + taps - 1 - i}.

    One program owns BT tokens of BD channels of one sequence."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    batch = tl.program_id(2).to(tl.int64)

    y = tl.zeros((BT, BD), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, channel < D, 0.0).to(tl.float32)[None, :]
    for i in tl.static_range(TAPS):
        other = t + (TAPS - 1 - i) if REVERSE else t - (TAPS - 1) + i
        x = load_shifted(x_ptr, document_ptr, other, t, channel, batch, T, ROW, D)
        weight = tl.load(weight_ptr + channel * TAPS + i, channel < D, 0.0)
        y += x * weight.to(tl.float32)[None, :]
    if not REVERSE:
        y *= tl.sigmoid(y)
    y_ptr += batch * T * D
    at = t[:, None] * D + channel[None, :]
    tl.store(y_ptr + at, y, (t < T)[:, None] & (channel < D)[None, :])


@triton.jit
def conv_gradients(
    x_ptr, weight_ptr, bias_ptr,  # as in convolve
    document_ptr,
    dy_ptr,                  # (B,T,D) in rows of DY_ROW elements
    dpre_ptr,                # (B,T,D)
    dweight_ptr, dbias_ptr,  # (B parts,D,TAPS), (B parts,D)  float32
    T, steps,
    ROW: constexpr, DY_ROW: constexpr, D: constexpr, TAPS: constexpr, BT: constexpr, BD: constexpr,
):
    """dpre = dy silu'(pre), pre computed again; dweight_i sums dpre_t times the element
    of x that weight_i met in pre_t, dbias sums dpre.

    One program owns `steps` tiles of BT tokens, in turn, of BD channels of one sequence,
    and their part of the sums."""
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    batch = tl.program_id(2).to(tl.int64)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    dy_ptr += batch * T * DY_ROW
    dpre_ptr += batch * T * D
    inside = (channel < D)[None, :]
    zero = tl.zeros((BT, BD), tl.float32)
    weights = ()
    for i in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + channel * TAPS + i, channel < D, 0.0)
        weights += (weight.to(tl.float32)[None, :],)
    bias = zero
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, channel < D, 0.0).to(tl.float32)[None, :]
    dbias = zero
    dweights = (zero,) * TAPS  # over a tile's tokens they are summed once, at the end
    for step in range(steps):
        t = (tl.program_id(0) * steps + step) * BT + tl.arange(0, BT)
        stored = (t < T)[:, None] & inside
        pre = bias
        shifted = ()
        sums = ()
        for i in tl.static_range(TAPS):
            other = t - (TAPS - 1) + i
            shifted += (load_shifted(x_ptr, document_ptr, other, t, channel, batch, T, ROW, D),)
            pre += shifted[i] * weights[i]
        gate = tl.sigmoid(pre)
        dy = tl.load(dy_ptr + t[:, None] * DY_ROW + channel[None, :], stored, 0.0).to(tl.float32)
        dpre = dy * gate * (1 + pre * (1 - gate))
        tl.store(dpre_ptr + t[:, None] * D + channel[None, :], dpre, stored)
        dbias += dpre
        for i in tl.static_range(TAPS):
            sums += (dweights[i] + dpre * shifted[i],)
        dweights = sums
    for i in tl.static_range(TAPS):
        at = (part * D + channel) * TAPS + i
        tl.store(dweight_ptr + at, tl.sum(dweights[i], 0), channel < D)
    if bias_ptr is not None:
        tl.store(dbias_ptr + part * D + channel, tl.sum(dbias, 0), channel < D)


def conv_tile(x):
    """Tokens and channels of a tile of x (B,T,D)."""
    if x.is_cuda:
        return 64, 64
    return power_of_two(x.shape[1], 4, 32), power_of_two(x.shape[2], 4, 32)


@operator(results=1)
def conv_forward(x, weight, bias, document):
    """short_conv with weight (D,taps) and x as rows_apart gives it."""
    B, T, D = x.shape
    BT, BD = conv_tile(x)
    y = x.new_empty(x.shape)
    yield y
    convolve[(-(-T // BT), -(-D // BD), B)](
        x, weight, bias, document, y, T=T, ROW=x.stride(1), D=D, TAPS=weight.shape[1],
        BT=BT, BD=BD, REVERSE=False, num_warps=4)


@operator(results=3)
def conv_backward(x, weight, bias, document, dy):
    B, T, D = x.shape
    dx = x.new_empty(x.shape)
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    yield dx, dweight, dbias
    dy = x.new_zeros(x.shape) if dy is None else rows_apart(dy)
    taps = weight.shape[1]
    BT, BD = conv_tile(x)
    columns = -(-D // BD)
    rows = min(BT, 16)  # conv_gradients keeps many tiles in registers
    steps = 32 if T >= 32 * rows else 1
    parts = -(-T // (rows * steps))
    dpre = x.new_empty(x.shape)
    dweights = x.new_empty(B * parts, *weight.shape, dtype=torch.float32)
    dbiases = x.new_empty(B * parts, D, dtype=torch.float32)
    conv_gradients[(parts, columns, B)](
        x, weight, bias, document, dy, dpre, dweights, dbiases, T=T, steps=steps,
        ROW=x.stride(1), DY_ROW=dy.stride(1), D=D, TAPS=taps, BT=rows, BD=BD, num_warps=4)
    convolve[(-(-T // BT), columns, B)](
        dpre, weight, None, document, dx, T=T, ROW=D, D=D, TAPS=taps, BT=BT, BD=BD, REVERSE=True,
        num_warps=4)
    dweight.copy_(dweights.sum(0))
    if bias is not None:
        dbias.copy_(dbiases.sum(0))


conv_kernels = differentiable(conv_forward, conv_backward)


def rows_apart(x):
    """x (B,T,D), or a copy, with all tokens x.stride(1) elements apart, a sequence within
    2^31."""
    row = x.stride(1)
    apart = x.stride(2) == 1 and x.stride(0) == x.shape[1] * row and x.shape[1] * row < 2**31
    # a dimension of 1 may have any stride, and counts as contiguous: so flat first
    return x if apart else x.contiguous().view(-1).view(x.shape)


def conv_fits(x):
    """Whether short_conv takes x (B,T,D): on a GPU, not float64, a sequence within 2^31
    elements, and B within a grid's third axis."""
    return (triton_installed and x.is_cuda and x.dtype != torch.float64
            and x.shape[1] * max(x.shape[2], x.stride(1)) < 2**31 and x.shape[0] < 2**16)


def short_conv(x, weight, bias=None, document=None):
    """Depthwise causal convolution over time, then silu (Mamba2, arXiv 2405.21060,
    section 7).

    x (B,T,D), zeros before it; weight (D,1,taps), as of conv1d; bias (D,) or None, all
    of at most 32 bits; document (B,T), integers, or None: no tap reaches a token of
    another document. Call it where conv_fits(x), or in Triton's interpreter. Returns
    y (B,T,D) in x's dtype; the sums are in float32. Differentiable once in x, weight and
    bias. Raises BadInput where shapes, dtypes or devices do not fit."""
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "document": document}.items():
        if name in ("bias", "document") and tensor is None:
            continue
        check_kind("short_conv", name, tensor, "x", x)
        if tensor.dtype == torch.float64:
            raise BadInput(f"short_conv: {name} is {tensor.dtype}; expected at most 32 bits")
    if not can_launch(x):
        raise BadInput(f"short_conv takes tensors of a GPU, and x is on {x.device}; see conv_fits")
    for name, tensor, fits, expected in (
            ("x", x, x.dim() == 3, "(B,T,D)"),
            ("weight", weight, weight.shape[:2] == (*x.shape[2:], 1), "(D,1,taps)"),
            ("bias", bias, bias is None or bias.shape == x.shape[2:], "(D,)"),
            ("document", document, document is None or document.shape == x.shape[:2], "(B,T)")):
        if not fits:
            raise BadInput(f"short_conv: {name} has shape {tuple(tensor.shape)}; expected "
                           f"{expected} for x of shape {tuple(x.shape)}")
    bias = None if bias is None else bias.contiguous()
    document = None if document is None else document.long().contiguous()
    return conv_kernels(rows_apart(x), weight[:, 0].contiguous(), bias, document)


# --------------------------------------------------------------------------------------
# run as a script: check every implementation against the definition, then time them


@dataclass
class Options:
    only: str = option("", "layers to time: parts of their names, with commas; empty: all")
    peers: bool = option(True, "time other libraries too, where they can be imported")
    kernels: bool = option(True, "time each of our kernels too, beside its own floor")
    device: str = option("", "where; empty: the GPU if there is one, else the CPU")


def layers():
    """name -> op, H, G, K, V (for ssd H, G, P, N): the public models' layers, and
    expanded: heads with shared keys, heads merged into one, d_state x4. op: gla, ssd,
    or gates, which is gla with gates."""
    from model import SIZES
    made = {}
    for name, config in SIZES.items():
        if config.block == "gla":
            H = config.n_head[0]
            made[name] = ("gla", H, H, config.d_k // H, config.d_v // H)
            made[f"{name} shared"] = ("gates", H, 1, config.d_k // H, config.d_v // H)
            made[f"{name} merged"] = ("gla", 1, 1, config.d_k, config.d_v)
        else:
            H = config.d_inner // config.headdim
            for factor, suffix in ((1, ""), (4, " x4")):
                N = factor * config.d_state[0]
                made[name + suffix] = ("ssd", H, config.n_groups, config.headdim, N)
    return made


def example(op, B, T, H, K, V, G=1, dtype=torch.float32, device="cpu", decay=None, seed=0):
    """Random arguments for `run`: q, k, v, g, (gates,) state, or for ssd, with P passed
    as K and N as V, x, dt, A, B, C, D, state. decay: the log decay of every step,
    "mixed" for 0, -1e-4, -1 and -60 at random, None for what a model has."""
    rng = torch.Generator(device=device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, device=device, dtype=torch.float32).to(dtype)

    def logs(*shape):
        if decay is None:
            return F.logsigmoid(normal(*shape).to(wide)) / 16
        kinds = [0, -1e-4, -1, -60] if decay == "mixed" else [decay]
        which = torch.randint(len(kinds), shape, generator=rng, device=device)
        return torch.tensor(kinds, dtype=wide, device=device)[which]

    f = H // G
    W = f * K if op == "gates" else K
    state = normal(B, H, W, V).to(wide)
    if op != "ssd":
        made = [normal(B, T, H, K), normal(B, T, G, W), normal(B, T, H, V), logs(B, T, G, W)]
        return [*made, *([normal(G, f, f).to(wide)] if op == "gates" else []), state]
    if decay is None:
        dt = F.softplus(normal(B, T, H).to(wide))
        A = -1 - 15 * torch.rand(H, generator=rng, device=device).to(wide)
    else:
        dt = -logs(B, T, H) + 1e-9
        A = dt.new_full((H,), -1.0)
    B_and_C = normal(B, T, G, V), normal(B, T, G, V)
    return [normal(B, T, H, K), dt, A, *B_and_C, normal(H).to(wide), state]


def run(op, args, impl):
    """The results of gla or ssd on the arguments that `example` makes. (A recurrence of
    your own: a case here and in `example`, its names in `errors`, its shapes in SHAPES.)"""
    if op == "ssd":
        return ssd(*args, impl=impl)
    assert op in ("gla", "gates"), op
    return gla(*args[:4], gates=args[4] if op == "gates" else None, state=args[-1], impl=impl)


def errors(op, args, impl, reference="recurrent"):
    """||x - ref|| / ||ref|| of the output, the final state and every gradient, ref of
    the reference impl in float64. Both get the same random gradients of the results."""
    def everything(impl, dtype):
        inputs = [a.detach().to(dtype or a.dtype).requires_grad_() for a in args]
        o, S = run(op, inputs, impl)
        rng = torch.Generator().manual_seed(1)
        do = torch.randn(o.shape, generator=rng).to(args[0].dtype).to(o)
        dS = torch.randn(S.shape, generator=rng).to(torch.float32).to(S)
        return [o, S, *torch.autograd.grad([o, S], inputs, [do, dS])]

    names = {"gla": "o state dq dk dv dg dstate", "gates": "o state dq dk dv dg dgates dstate",
             "ssd": "y state dx ddt dA dB dC dD dstate"}[op]
    pairs = zip(everything(impl, None), everything(reference, torch.float64), strict=True)
    return {name: ((x.double() - ref.double()).norm() / ref.double().norm()).item()
            for name, (x, ref) in zip(names.split(), pairs, strict=True)}


def check(device):
    """Prints the largest error of every implementation, one line per decay."""
    impls = [("chunked", torch.float32)]
    if device != "cpu":
        impls += [("triton", torch.float32), ("triton", torch.bfloat16)]
    print("largest ||x - ref|| / ||ref|| over the output, the state and all gradients")
    for op in ("gla", "gates", "ssd"):
        for decay in (0, -1e-4, -1, -60, "mixed", None):
            worst = []
            for impl, dtype in impls:
                args = example(op, 2, 200, 6, 24, 40, G=2, dtype=dtype, device=device, decay=decay)
                error = torch.tensor([*errors(op, args, impl).values()]).max()  # NaN if one is
                worst.append(f"{impl} {str(dtype)[6:]} {error:.1e}")
            about = "of a model" if decay is None else decay
            print(f"{op} decay {about}:".ljust(23), "   ".join(worst), flush=True)


def median_ms(f):
    return triton.testing.do_bench(f, warmup=50, rep=200, return_mode="median")


def ceilings():
    """Measured FLOP/s of a bfloat16 matrix product and bytes/s of a copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    flops = 2e3 * 8192 ** 3 / median_ms(lambda: a @ a)
    return flops, 4e3 * x.numel() / median_ms(lambda: y.copy_(x))


def peers(op, G, H):
    """Other libraries' implementations that can be imported: name -> function."""
    with contextlib.suppress(ImportError):
        if op == "ssd":
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
            return {"mamba_ssm": lambda a: mamba_chunk_scan_combined(*a[:5], 256, D=a[5])}
        if G == H:
            from fla.ops.gla import chunk_gla
            return {"fla": lambda a: chunk_gla(*a[:4])[0]}
    return {}


def time_layer(name, layer, B, T, rates, options):
    """A line per implementation: times, and how many times the floor they are: the
    larger of FLOPs and bytes by `rates`, three times that for both passes."""
    op, H, G, K, V = layer
    args = example(op, B, T, H, K, V, G, torch.bfloat16, "cuda")[:-1]
    args = [a.requires_grad_() for a in args]
    grad = torch.randn_like(args[0] if op == "ssd" else args[2])
    # the least work: scores of 64 (gla) or 256 (ssd) tokens, all moved once
    if op != "ssd":
        W = args[1].shape[3]
        work = B * T * H * (4 * W * V + 64 * (K + V))
        moved = B * T * (2 * H * (K + 2 * V) + 6 * G * W)
    else:
        work = B * T * (H * 4 * V * K + H * 256 * K + 256 * V)
        moved = B * T * (4 * H * K + 2 * H + 4 * G * V)
    floor = max(work / rates[0], moved / rates[1]) * 1e3

    def ours(a):
        return run(op, [*a, None], "triton")[0]

    for impl, f in {"triton": ours, **(peers(op, G, H) if options.peers else {})}.items():
        try:
            forward = median_ms(lambda f=f: f(args))
            total = median_ms(lambda f=f: torch.autograd.grad(f(args), args, grad))
        except Exception as e:  # a peer may refuse the shape, in any way
            print(f"{name:18s} {impl:10s} failed: {' '.join(str(e).split())[:60]}", flush=True)
            continue
        print(f"{name:18s} {impl:10s} {B:3d} x {T:5d} {forward:9.3f} {forward / floor:5.1f} "
              f"{total:9.3f} {total / 3 / floor:5.1f}", flush=True)
    if options.kernels:
        time_kernels(lambda: torch.autograd.grad(ours(args), args, grad), rates[1])


def time_kernels(step, bandwidth):
    """Every launch of step() again, alone, beside the time to move its tensors once. In
    small layers they are faster than the step, which waits for the host to launch."""
    import unittest.mock
    launched = []
    launch = Launch.__call__

    def record(self, *pointers, **numbers):
        launched.append((self, pointers, numbers))
        launch(self, *pointers, **numbers)

    with unittest.mock.patch.object(Launch, "__call__", record):
        step()
    total = 0.0
    for self, pointers, numbers in launched:
        ms = median_ms(lambda s=self, p=pointers, n=numbers: s(*p, **n))
        total += ms
        tensors = {p.data_ptr(): p.nbytes for p in pointers if isinstance(p, torch.Tensor)}
        floor = sum(tensors.values()) / bandwidth * 1e3
        print(f"    {self.kernel.fn.__name__:24s} {ms:7.3f} {ms / floor:5.1f} x floor", flush=True)
    print(f"    {'together':24s} {total:7.3f}", flush=True)


def time_step(name, layer, bandwidth):
    """A step of generation: one token of 64 sequences, states read and written."""
    op, H, G, K, V = layer
    args = example(op, 64, 1, H, K, V, G, torch.bfloat16, "cuda")
    with torch.no_grad():
        ms = median_ms(lambda: run(op, args, "auto"))
    share = 8 * args[-1].numel() / ms * 1e3 / bandwidth
    print(f"{name:18s} one token, batch 64: {ms:.3f} ms, {share:.0%} of the copy bandwidth")


def main():
    options = Options(**command_line(Options, __doc__))
    device = pick_device(options.device)
    known = layers()
    parts = [part.strip() for part in options.only.strip(" ,").split(",")]
    chosen = [name for name in known if any(part in name for part in parts)]
    if not chosen:
        raise BadInput(f"--only={options.only} names no layer; they are {', '.join(known)}")
    check(device)
    if device == "cpu":
        print("times need a GPU; here is none, or --device=cpu was given")
        return
    rates = ceilings()
    print(f"\n{rates[0] / 1e12:.2f} TFLOP/s matrix product, {rates[1] / 1e9:.0f} GB/s copy")
    print("layer              impl         B x     T   forward floor    + back floor")
    # as train.py: small layers would wait for PyTorch's own thread
    with torch.autograd.set_multithreading_enabled(False):
        for name in chosen:
            for B, T in ((4, 8192), (1, 32768), (64, 512)):
                time_layer(name, known[name], B, T, rates, options)
            time_step(name, known[name], rates[1])


if __name__ == "__main__":
    run_script(main)
