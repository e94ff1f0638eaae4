"""The two recurrences of StateX: the definition, chunked PyTorch, Triton.

Both model families are one recurrence. Per head, with a state S of K x V elements:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

    gla   Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3): a_t in (0,1]^K,
          one decay per key channel. Neighbouring heads may share their keys and decays.
    ssd   Mamba2's state space dual (Dao and Gu, arXiv 2405.21060, eq. 1): a_t is one
          number per head, k = B and q = C are shared by the heads of a group, v = dt x,
          and a skip D x is added to the output.

    o, state = gla(q, k, v, g)           y, state = ssd(x, dt, A, B, C)
    python kernels.py                    checks every implementation, then times it

"recurrent" is the definition: a loop over time. "chunked" does the same sums with matrix
products and is the fast path on a CPU. "triton" is the fast path on a GPU. Decays travel
as logarithms g = log a <= 0. Any decay is safe: none at all (g = 0), a state that forgets
everything at every step (g = -60), and a reset (g = -inf, or `first` of ssd), which keeps
packed documents apart.
"""
from __future__ import annotations  # so that tl.constexpr below needs no Triton until a kernel runs

# isort: split
from data.options import BadInput

# isort: split
import contextlib
import functools
import types

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    triton_installed = True
except ImportError:  # not on this platform: recurrent and chunked still work
    triton = types.SimpleNamespace(jit=lambda f=None, **options: f or (lambda g: g))
    triton_installed = False


def gla(q, k, v, g, scale=None, state=None, impl="auto"):
    """Gated linear attention (arXiv 2312.06635, eq. 3).

    q (B,T,H,K); v (B,T,H,V); k, g (B,T,G,K), where g are log decays <= 0, -inf for a reset;
    state (B,H,K,V) or None for zeros. G divides H: head h reads the keys and decays of
    group h // (H / G). Any dimension but T may be 1 where another argument has more.
    scale multiplies q; K**-0.5 when None.
    impl: "recurrent" | "chunked" | "triton" | "auto", which is triton on a GPU that it
    supports, else chunked. Triton has no float64: there it is chunked too.

    Returns o (B,T,H,V) in v's dtype and the final state (B,H,K,V) in float32 (float64 where
    any input is). Differentiable in q, k, v, g and state, through both results: recurrent
    and chunked any number of times, triton once (a second derivative raises RuntimeError).
    Raises BadInput where shapes, dtypes or devices do not fit.
    """
    q, k, v, g, state = check_gla(q, k, v, g, state)
    impl = pick(impl, q, k, v, g, state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if v.numel() == 0:
        return no_tokens(v, state, (v.shape[0], v.shape[2], q.shape[3], v.shape[3]), (q, k, g))
    path = {"recurrent": gla_recurrent, "chunked": gla_chunked, "triton": gla_triton}
    with without_autocast(q.device.type):
        o, state = path[impl](q, k, v, g, scale, state)
    return o.to(v.dtype), state


def ssd(x, dt, A, B, C, D=None, state=None, impl="auto", first=None):
    """Mamba2's recurrence: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t
    (arXiv 2405.21060, eq. 1).

    x (B,T,H,P); dt (B,T,H) > 0, already through softplus; A (H,) < 0; B, C (B,T,G,N), where
    G divides H; D (H,) or (H,P) or None; state (B,H,P,N) or None for zeros; first (B,T) bool
    or None: a document begins at this token, the state before it is forgotten. Any
    dimension but T may be 1 where another argument has more. impl as in gla.

    Returns y (B,T,H,P) in x's dtype and the final state (B,H,P,N) in float32 (float64 where
    any input is). Differentiable in every floating tensor, as gla. Raises BadInput.
    """
    x, dt, A, B, C, D, state, first = check_ssd(x, dt, A, B, C, D, state, first)
    impl = pick(impl, x, dt, A, B, C, D, state)
    if x.numel() == 0:
        sizes = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        return no_tokens(x, state, sizes, [t for t in (dt, A, B, C, D) if t is not None])
    path = {"recurrent": ssd_recurrent, "chunked": ssd_chunked, "triton": ssd_triton}
    with without_autocast(x.device.type):
        y, state = path[impl](x, dt, A, B, C, D, state, first)
    return y.to(x.dtype), state


# ---------------------------------------------------------------------------------------
# In front of every implementation: shapes, dtypes, devices, and which one it is


SHAPES = {
    "gla": {"q": "BTHK", "k": "BTGK", "v": "BTHV", "g": "BTGK", "state": "BHKV"},
    "ssd": {"x": "BTHP", "dt": "BTH", "A": "H", "B": "BTGN", "C": "BTGN", "D": "H",
            "state": "BHPN", "first": "BT"},
}


def check_gla(q, k, v, g, state):
    """The arguments, broadcast. Where nothing is to be done this takes a few microseconds,
    for small layers wait for the processor."""
    try:
        batch, T, H, K = q.shape
        keys = k.shape
        G = keys[2]
        V = v.shape[3]
        device = q.get_device()
        plain = (
            g.shape == keys == (batch, T, G, K) and v.shape == (batch, T, H, V) and H % G == 0
            and q.is_floating_point() and k.is_floating_point()
            and v.is_floating_point() and g.is_floating_point()
            and device == k.get_device() == v.get_device() == g.get_device()
            and (state is None or state.shape == (batch, H, K, V)
                 and state.is_floating_point() and state.get_device() == device))
    except (AttributeError, IndexError, ValueError, ZeroDivisionError):
        plain = False
    return (q, k, v, g, state) if plain else broadcast("gla", q=q, k=k, v=v, g=g, state=state)


def check_ssd(x, dt, A, B, C, D, state, first):
    """As check_gla."""
    try:
        batch, T, H, P = x.shape
        _, _, G, N = keys = B.shape
        device = x.get_device()
        plain = (
            keys == C.shape == (batch, T, G, N) and dt.shape == (batch, T, H) and A.shape == (H,)
            and H % G == 0 and first is None
            and x.is_floating_point() and dt.is_floating_point() and A.is_floating_point()
            and B.is_floating_point() and C.is_floating_point()
            and device == dt.get_device() == A.get_device() == B.get_device() == C.get_device()
            and (D is None or D.shape == (H,)
                 and D.is_floating_point() and D.get_device() == device)
            and (state is None or state.shape == (batch, H, P, N)
                 and state.is_floating_point() and state.get_device() == device))
    except (AttributeError, IndexError, ValueError, ZeroDivisionError):
        plain = False
    if plain:
        return x, dt, A, B, C, D, state, first
    return broadcast("ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, state=state, first=first)


def broadcast(op, **tensors):
    """The tensors of `op`, expanded to the sizes that they share. Raises BadInput."""
    sizes = {}  # letter: its size, and the argument that says so
    layouts = {}
    for name, tensor in tensors.items():
        if tensor is None and name in ("D", "state", "first"):
            continue
        check_kind(op, name, tensor, *next(iter(tensors.items())))
        layout = SHAPES[op][name]
        if name == "D" and tensor.dim() == 2:
            layout = "HP"
        if name in "AD" and tensor.dim() == 0:
            tensors[name] = tensor = tensor.reshape(1)
        if tensor.dim() != len(layout):
            raise BadInput(misfit(op, name, tensor, layout))
        for letter, size in zip(layout, tensor.shape, strict=True):
            known, source = sizes.setdefault(letter, (size, name))
            if size == 0 and letter not in "BT":
                raise BadInput(misfit(op, name, tensor, layout) + f", {letter} at least 1")
            if size != known and (letter == "T" or size != 1 != known):
                raise BadInput(misfit(op, name, tensor, layout) + f", {letter} = {known} as {source}")
            if known == 1:
                sizes[letter] = (size, name)
        layouts[name] = layout
    G, keys = sizes["G"]
    H, queries = sizes["H"]
    if op == "gla" and H == 1:
        H = G
    if H % G:
        raise BadInput(misfit(op, keys, tensors[keys], layouts[keys])
                       + f", G a divisor of the {H} heads of {queries}")
    final = {letter: size for letter, (size, _) in sizes.items()} | {"H": H}
    for name, layout in layouts.items():
        tensors[name] = tensors[name].expand([final[letter] for letter in layout])
    return tuple(tensors.values())


def misfit(op, name, tensor, layout):
    return f"{op}: {name} has shape {tuple(tensor.shape)}; expected ({', '.join(layout)})"


def check_kind(op, name, tensor, first_name, first):
    """That this argument is a tensor of the right dtype, on the device of the first one."""
    if not isinstance(tensor, torch.Tensor):
        raise BadInput(f"{op}: {name} is of type {type(tensor).__name__}; expected a tensor")
    if name == "first" and tensor.dtype != torch.bool:
        raise BadInput(f"{op}: first, of shape {tuple(tensor.shape)}, is {tensor.dtype}; "
                       "expected torch.bool")
    if name != "first" and not tensor.is_floating_point():
        raise BadInput(f"{op}: {name}, of shape {tuple(tensor.shape)}, is {tensor.dtype}; "
                       "expected a floating dtype")
    if tensor.device != first.device:
        raise BadInput(f"{op}: {name}, of shape {tuple(tensor.shape)}, is on {tensor.device}; "
                       f"expected {first.device}, where {first_name} is")


def pick(impl, *tensors):
    """The implementation that computes these tensors when `impl` is asked for."""
    if impl not in ("recurrent", "chunked", "triton", "auto"):
        raise BadInput(f"impl is {impl!r}; expected 'recurrent', 'chunked', 'triton' or 'auto'")
    if impl == "triton" and not triton_installed:
        raise BadInput("impl is 'triton', which is not installed here; pip install triton, or "
                       "use impl='auto'")
    if impl == "auto":
        impl = "triton" if tensors[0].is_cuda and triton_supports(tensors[0].device) else "chunked"
    if impl == "triton" and wide_dtype(tensors) == torch.float64:
        return "chunked"
    return impl


@torch.compiler.assume_constant_result
def triton_supports(device):
    """Whether "auto" may take the Triton kernels there: NVIDIA from capability 8.0 on, the
    first with bfloat16 matrix products."""
    return triton_installed and torch.version.hip is None and capability(device) >= (8, 0)


capability = functools.cache(torch.cuda.get_device_capability)


def without_autocast(device):
    """A context in which the caller's autocast does not narrow our matrix products."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
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


def no_tokens(v, state, sizes, others):
    """The results where T or B is 0: no output, the state as it came. The sums are zero and
    keep every argument in the graph."""
    dtype = wide_dtype((v, state, *others))
    nothing = sum(t.to(dtype).sum() * 0 for t in (v, *others))
    if state is None:
        state = v.new_zeros(sizes, dtype=dtype)
    return (v + nothing).to(v.dtype), state.to(dtype) + nothing


# ---------------------------------------------------------------------------------------
# recurrent: the definition


def gla_recurrent(q, k, v, g, scale, state):
    """A group's heads stand beside each other, (G, H/G), and its keys are (G, 1)."""
    q, k, v, g, S = widen(q, k, v, g, state)
    G = k.shape[2]
    q = q.unflatten(2, (G, -1))
    v = v.unflatten(2, (G, -1))
    if S is None:
        S = q.new_zeros(*q[:, 0].shape, v.shape[-1])
    else:
        S = S.unflatten(1, (G, -1))
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t, :, None, :, None].exp()
        S = decay * S + k[:, t, :, None, :, None] * v[:, t, ..., None, :]
        outputs.append(torch.einsum("bghkv,bghk->bghv", S, scale * q[:, t]))
    return torch.stack(outputs, dim=1).flatten(2, 3), S.flatten(1, 2)


def ssd_recurrent(x, dt, A, B, C, D, state, first):
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    H = x.shape[2]
    G = B.shape[2]
    if S is None:
        S = x.new_zeros(*x[:, 0].shape, B.shape[-1])
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        if first is not None:
            decay = decay.masked_fill(first[:, t, None], 0.0)
        v = dt[:, t, :, None] * x[:, t]
        write = v.unflatten(1, (G, -1))[..., None] * B[:, t, :, None, None, :]
        S = decay[:, :, None, None] * S + write.flatten(1, 2)
        y.append(torch.einsum("bghpn,bgn->bghp", S.unflatten(1, (G, -1)), C[:, t]).flatten(1, 2))
    y = torch.stack(y, dim=1)
    return y if D is None else y + D.view(H, -1) * x, S


# ---------------------------------------------------------------------------------------
# chunked: matrix products inside chunks, one state handed from chunk to chunk


# exp(FORGOTTEN) is 0 even in float64. Larger decays are cut off there, so that a sum over
# several tokens stays finite, and keeps the small decays of the others.
FORGOTTEN = -1000.0


def gla_chunked(q, k, v, g, scale, state, L=32):
    """In a chunk of L tokens, o_i sums q_i . k_j exp(g_{j+1} + ... + g_i) v_j over j <= i,
    with a decay of its own for every channel.

    Blocks of 1, 2, 4, ... L tokens are merged in pairs. When two neighbours merge, the
    queries of the right one meet the keys of the left one, and the decay between them splits
    at the seam: from key j to the end of the left block (`after`), and from the start of the
    right block to query i (`upto`). Both are sums of g over part of one block, so both are
    <= 0, and exact however large the decay elsewhere is. That is log2(L) levels, with one
    exponential per token, channel and level.
    """
    q, k, v, g, S = widen(q, k, v, g, state)
    batch, T, H, K = q.shape
    G = k.shape[2]
    V = v.shape[3]
    L = min(L, 1 << (T - 1).bit_length())
    n = -(-T // L)

    def blocks(x):
        """(B,T,G or H,D) -> (B,G,T',1 or H/G,1,D), T' the tokens of n whole chunks. The
        padding has k = v = 0 and g = 0, which leaves the state alone."""
        x = F.pad(x, (0, 0, 0, 0, 0, n * L - T))
        return x.unflatten(2, (G, -1)).transpose(1, 2).unsqueeze(-2)

    def pairs(x):
        """The left and the right blocks."""
        return x.unflatten(2, (-1, 2)).unbind(3)

    def merge(x):
        return x.unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 5)

    q, k, v, upto = blocks(q * scale), blocks(k), blocks(v), blocks(g.clamp_min(FORGOTTEN))
    after = torch.zeros_like(upto)
    o = (q * k).sum(-1, keepdim=True) * v
    for _ in range(L.bit_length() - 1):
        q1 = pairs(q)[1]
        k0 = pairs(k)[0]
        v0 = pairs(v)[0]
        o0, o1 = pairs(o)
        upto0, upto1 = pairs(upto)
        after0, after1 = pairs(after)
        # the queries of all heads of a group are rows of one product with the group's keys
        rows = (q1 * upto1.exp()).flatten(3, 4)
        scores = rows @ (k0 * after0.exp()).squeeze(3).mT
        o = torch.cat((o0, o1 + scores.view(*o1.shape[:-1], -1) @ v0), dim=-2)
        upto = torch.cat((upto0, upto1 + upto0[..., -1:, :]), dim=-2)
        after = torch.cat((after0 + upto1[..., -1:, :], after1), dim=-2)
        q, k, v = merge(q), merge(k), merge(v)

    # what a chunk adds to the state of all heads of a group, side by side, and what it forgets
    q = q * upto.exp()
    values = v.transpose(3, 4).flatten(4, 5)
    writes = (k * after.exp()).squeeze(3).mT @ values
    decay = upto.squeeze(3)[..., -1, :, None].exp()
    if S is None:
        S = q.new_zeros(batch, G, K, H // G * V)
    else:
        S = S.unflatten(1, (G, -1)).transpose(2, 3).flatten(3, 4)
    before = []
    for chunk in range(n):
        before.append(S.unflatten(3, (-1, V)).transpose(2, 3))
        S = decay[:, :, chunk] * S + writes[:, :, chunk]
    o = o + q @ torch.stack(before, dim=2)
    o = o.transpose(3, 4).flatten(2, 3)[:, :, :T].transpose(1, 2).flatten(2, 3)
    return o, S.unflatten(3, (-1, V)).transpose(2, 3).flatten(1, 2)


def ssd_chunked(x, dt, A, B, C, D, state, first, L=64):
    """In a chunk of L tokens, y_i sums (C_i . B_j) exp(g_{j+1} + ... + g_i) dt_j x_j over
    j <= i, with g = dt A.

    There is one decay per head, so the exponents form one L x L table per head, and C B^T is
    computed once for all heads of a group. The running sums are taken in float64:
    differences of large float32 sums would lose the small decays.
    """
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    heads = H // G
    L = min(L, T)
    n = -(-T // L)
    padding = n * L - T

    g = dt * A
    if first is not None:
        g = g.masked_fill(first[..., None], FORGOTTEN)
    g = F.pad(g, (0, 0, 0, padding)).double().view(batch, n, L, G, heads)
    g = g.permute(0, 3, 1, 4, 2).contiguous().clamp_min(FORGOTTEN)  # (B,G,n,heads,L)
    upto = g.cumsum(-1)
    to_end = F.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    v = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, padding))
    v = v.view(batch, n, L, G, heads, P).permute(0, 3, 1, 4, 2, 5)  # (B,G,n,heads,L,P)
    B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)).view(batch, n, L, G, N).permute(0, 3, 1, 2, 4)
            for t in (B, C))  # (B,G,n,L,N)

    # Keys after the query are not seen. The query's own key, on the diagonal, has no decay:
    # it is kept out of the exponentials, where its large gradient would cancel only to
    # rounding.
    unseen = torch.ones(L, L, dtype=torch.bool, device=x.device).triu()
    between = (upto[..., :, None] - upto[..., None, :]).to(x.dtype).masked_fill(unseen, -torch.inf)
    scores = (C @ B.mT).unsqueeze(3) * between.exp()
    y = scores @ v + (C * B).sum(-1)[:, :, :, None, :, None] * v  # (B,G,n,heads,L,P)

    rows = (to_end.to(x.dtype).exp()[..., None] * v).transpose(3, 4)
    rows = rows.reshape(batch, G, n, L, heads * P)
    writes = (rows.mT @ B).view(batch, G, n, heads, P, N)
    decay = upto[..., -1].to(x.dtype).exp()[..., None, None]  # (B,G,n,heads,1,1)
    S = x.new_zeros(batch, G, heads, P, N) if S is None else S.unflatten(1, (G, -1))
    before = []
    for chunk in range(n):
        before.append(S)
        S = decay[:, :, chunk] * S + writes[:, :, chunk]
    before = torch.stack(before, dim=2).view(batch, G, n, heads * P, N)
    carried = (C @ before.mT).view(batch, G, n, L, heads, P).transpose(3, 4)
    y = y + upto.to(x.dtype).exp()[..., None] * carried
    y = y.permute(0, 2, 4, 1, 3, 5).reshape(batch, n * L, H, P)[:, :T]
    return y if D is None else y + D.view(H, -1) * x, S.flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Triton, gated linear attention
#
# Three launches forward, five backward (gla_prepare and gla_finish once more for steep chunks, returning at once where there
# are none); each program owns one tile of one chunk of one head, or one tile of a state.
#
#   gla_prepare   q, k, g -> qs = scale q exp(upto), ks = k exp(after), A = the scores inside a chunk, decay = log2 of the chunk's
#   gla_scan      S_0 = state,  S_{c+1} = decay_c S_c + ks_c^T v_c             stores S_c, the state before chunk c
#   gla_rows      o_c = qs_c S_c + A_c v_c
#
#   gla_scan      dS_{c-1} = decay_c dS_c + qs_c^T do_c, from the last chunk   stores dS_c, the gradient after chunk c
#   gla_rows      dv_c = ks_c dS_c + A_c^T do_c
#   gla_scores    dA_c = do_c v_c^T, below the diagonal, and the diagonal
#   gla_through   dqs_c = do_c S_c^T,  dks_c = v_c dS_c^T,  and the sums of S_c dS_c over the value channels
#   gla_finish    dq, dk: the above through exp(upto), exp(after), and dA through the scores; dg from all of them
#
# Chunk length C. A stored state costs K V / C numbers a token, written once and read twice; the scores inside a chunk cost
# about C (K + V) products a token beside the states' 4 K V. Short chunks drown in states: at C = 64 a state of 1024 x 2048
# is 64 KiB a token, eight times the inputs. At C = 128 the scores are still a small part, and a 128 x 128 tile of them is
# what one program holds in registers. Measured, C = 128 wins at every public size.
#
# No kernel masks tokens or channels (the one-token steps do): the callers pad T to whole chunks (with g = 0 or dt = 0,
# k = v = 0, which leaves the state alone) and the channels to whole tiles. Heads and channels are compile-time constants, so
# that addresses fold into the instructions.


chunk_kernel = triton.jit(do_not_specialize=["n"])      # n, the number of chunks: one compilation for every T
LOG2E = tl.constexpr(1.4426950408889634) if triton_installed else None      # the kernels take exp(x) as exp2(x LOG2E)
CUT = tl.constexpr(-200.0) if triton_installed else None      # exp(CUT) is 0 in float32: a larger decay is cut off there, a reset (-inf) too


@triton.jit
def bits(g):
    return tl.maximum(g, CUT) * LOG2E


@triton.jit
def sum_rows(which, x, DOT: tl.constexpr):
    """For every row of which (C,C) the sum of the rows of x (C,BK) that it names: a matrix product in place of a scan. Without DOT
    x goes in as the sum of two bfloat16, which keeps 16 of its bits."""
    if DOT is not None:
        return tl.dot(which.to(tl.float32), x, input_precision=DOT)
    ones, hi = which.to(tl.bfloat16), x.to(tl.bfloat16)
    return tl.dot(ones, hi, tl.dot(ones, (x - hi.to(tl.float32)).to(tl.bfloat16)))


@triton.jit
def finished(x):
    """x, a running sum of matrix products in a loop, waited for. Triton (3.6 and 3.9, seen in what they make for an H100) lets a product
    run on while the next tiles are fetched, and keeps too few buffers for a tile that is also read into registers: the fetch would write
    over what the product still reads. A loop with such a tile adds 0 to its sums at every turn, which it can only do to finished ones."""
    return x + 0.0


@triton.jit
def gla_is_steep(whole, LIMIT, K: tl.constexpr, BK: tl.constexpr):
    """Whether some channel of a chunk has a decay whose base-2 logarithm, in whole (K,), is below -2 LIMIT."""
    lowest = tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        lowest = tl.minimum(lowest, tl.load(whole + k0 + tl.arange(0, BK)))
    return tl.min(lowest) < -2 * LIMIT


@triton.jit
def halves(g, b, DOT: tl.constexpr):
    """g (C,BK) in blocks of 2^b rows -> for every row the sum from its block's start to it, and the sum after it to the block's end."""
    row, t = tl.arange(0, g.shape[0])[:, None], tl.arange(0, g.shape[0])[None, :]
    same = (row ^ t) >> b == 0
    return sum_rows(same & (t <= row), g, DOT), sum_rows(same & (t > row), g, DOT)


@chunk_kernel
def gla_prepare(q, k, g, qs, ks, decay, A, scale, n, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                DOT: tl.constexpr):
    """One program: one chunk of one head. Slices of BK channels; the scores add up over the slices.

    Score (i, j) of a channel is q_i k_j exp(c_i - c_j), c the running sum of g. Around the middle m of the chunk's decay it
    splits into q_i exp(c_i - m) and k_j exp(m - c_j), one matrix product for all pairs. One of the two exponents can be
    positive, by at most half of the chunk's decay; where that is too much, gla_prepare_steep does the chunk again."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, start = tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H      # token i of the chunk is row start + i H
    scores, diagonal = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for k0 in range(0, K, BK):
        col = k0 + tl.arange(0, BK)
        at = start * K + i[:, None] * (H * K) + col[None, :]
        qt, kt, gt = tl.load(q + at).to(tl.float32) * scale, tl.load(k + at).to(tl.float32), bits(tl.load(g + at))
        diagonal += tl.sum(qt * kt, axis=1)
        whole = tl.sum(gt, 0)
        e = tl.cumsum(gt, 0) - 0.5 * whole[None, :]
        half = tl.exp2(0.5 * whole)[None, :]
        qt, kt = qt * tl.exp2(e), kt * tl.exp2(-e)
        scores = tl.dot(qt.to(q.dtype.element_ty), tl.trans(kt.to(q.dtype.element_ty)), scores, input_precision=DOT)
        tl.store(decay + (bh * n + c) * K + col, whole)
        tl.store(qs + at, (qt * half).to(qs.dtype.element_ty))
        tl.store(ks + at, (kt * half).to(ks.dtype.element_ty))
    scores = tl.where(i[:, None] > i[None, :], scores, tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0))
    tl.store(A + start * C + i[:, None] * (H * C) + i[None, :], scores.to(A.dtype.element_ty))


@chunk_kernel
def gla_prepare_steep(q, k, g, qs, ks, decay, A, scale, LIMIT, n, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                      DOT: tl.constexpr):
    """One program: a chunk that decays by more than 2 LIMIT bits in some channel; where none does (a GLA model's g is above -1
    almost always) it returns at once.

    i and j < i part at their highest unequal bit, 2^b: in a block of 2^(b+1) tokens j is in the lower half, i in the upper one, and
    exp(sum from the upper half's start to i) exp(sum after j to the lower half's end) has no positive exponent. So one matrix
    product for each bit, of which that bit's pairs are written over what gla_prepare left."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if not gla_is_steep(decay + (bh * n + c) * K, LIMIT, K, BK):
        return
    i, start = tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H
    row, t = i[:, None], i[None, :]
    for b in range(8):                                                    # C is at most 128; the last one is for qs and ks
        scores = tl.zeros((C, C), tl.float32)
        for k0 in range(0, K, BK):
            at = start * K + row * (H * K) + k0 + tl.arange(0, BK)[None, :]
            gt = bits(tl.load(g + at))
            upto, after = halves(gt, b, DOT)
            qt = tl.load(q + at).to(tl.float32) * scale * tl.exp2(upto)
            kt = tl.load(k + at).to(tl.float32) * tl.exp2(after)
            if b < 7:
                scores = tl.dot(qt.to(q.dtype.element_ty), tl.trans(kt.to(q.dtype.element_ty)), scores, input_precision=DOT)
            else:
                tl.store(qs + at, qt.to(qs.dtype.element_ty))
                tl.store(ks + at, kt.to(ks.dtype.element_ty))
        tl.store(A + start * C + row * (H * C) + t, scores.to(A.dtype.element_ty), (row > t) & ((row ^ t) >> b == 1))


@chunk_kernel
def gla_scan(x, y, decay, first, S, last, n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
             BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
             LAST: tl.constexpr, DOT: tl.constexpr):
    """One program: a BK x BV tile of one head's state, carried over all chunks in registers, stored before each."""
    kb, vb, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    col, val, i = kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV), tl.arange(0, C)
    tile = col[:, None] * V + val[None, :]
    carry = tl.zeros((BK, BV), tl.float32)
    if FIRST:
        carry += tl.load(first + bh * K * V + tile)
    for step in range(n):
        c = n - 1 - step if REVERSE else step
        tl.store(S + (bh * n + c) * K * V + tile, carry.to(S.dtype.element_ty))
        start = ((bh // H) * n + c) * C * H + bh % H
        xt = tl.load(x + start * K + i[None, :] * (H * K) + col[:, None])                  # (BK,C)
        yt = tl.load(y + start * V + i[:, None] * (H * V) + val[None, :])                  # (C,BV)
        d = tl.exp2(tl.load(decay + (bh * n + c) * K + col))
        carry = tl.dot(xt, yt, carry * d[:, None], input_precision=DOT)
    if LAST:
        tl.store(last + bh * K * V + tile, carry)


@chunk_kernel
def gla_rows(x, S, A, y, out, n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
             BV: tl.constexpr, TRANSPOSE: tl.constexpr, DOT: tl.constexpr):
    """One program: a chunk's rows of the output, BV columns: x S + A y, or x S + A^T y."""
    vb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    val, i, start = vb * BV + tl.arange(0, BV), tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H
    rows = start * V + i[:, None] * (H * V) + val[None, :]
    acc = tl.zeros((C, BV), tl.float32)
    for k0 in range(0, K, BK):
        col = k0 + tl.arange(0, BK)
        xt = tl.load(x + start * K + i[:, None] * (H * K) + col[None, :])
        s = tl.load(S + (bh * n + c) * K * V + col[:, None] * V + val[None, :])
        acc = tl.dot(xt, s, acc, input_precision=DOT)
    a = tl.load(A + start * C + i[:, None] * (H * C) + i[None, :])
    acc = tl.dot(tl.trans(a) if TRANSPOSE else a, tl.load(y + rows), acc, input_precision=DOT)
    tl.store(out + rows, acc.to(out.dtype.element_ty))


@chunk_kernel
def gla_scores(do, v, dA, diagonal, n, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr):
    """One program: dA of one chunk of one head, its diagonal apart (B,H,T)."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, start = tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H
    acc = tl.zeros((C, C), tl.float32)
    for v0 in range(0, V, BV):
        at = start * V + i[:, None] * (H * V) + v0 + tl.arange(0, BV)[None, :]
        acc = tl.dot(tl.load(do + at), tl.trans(tl.load(v + at)), acc, input_precision=DOT)
    tl.store(diagonal + (bh * n + c) * C + i, tl.sum(tl.where(i[:, None] == i[None, :], acc, 0.0), axis=1))
    acc = tl.where(i[:, None] > i[None, :], acc, 0.0)
    tl.store(dA + start * C + i[:, None] * (H * C) + i[None, :], acc.to(dA.dtype.element_ty))


@chunk_kernel
def gla_through(do, v, S, dS, dqs, dks, both, n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
                BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr):
    """One program: BK channels of one chunk. What the queries read from S and the keys write to dS."""
    kb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    col, i, start = kb * BK + tl.arange(0, BK), tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H
    dq, dk = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    sd = tl.zeros((BK,), tl.float32)
    for v0 in range(0, V, BV):
        val = v0 + tl.arange(0, BV)
        at, tile = start * V + i[:, None] * (H * V) + val[None, :], (bh * n + c) * K * V + col[:, None] * V + val[None, :]
        s, ds = tl.load(S + tile), tl.load(dS + tile)
        dq = tl.dot(tl.load(do + at), tl.trans(s), dq, input_precision=DOT)
        dk = tl.dot(tl.load(v + at), tl.trans(ds), dk, input_precision=DOT)
        sd += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
        dq, dk = finished(dq), finished(dk)
    at = start * K + i[:, None] * (H * K) + col[None, :]
    tl.store(dqs + at, dq.to(dqs.dtype.element_ty))
    tl.store(dks + at, dk.to(dks.dtype.element_ty))
    tl.store(both + (bh * n + c) * K + col, sd)


@chunk_kernel
def gla_finish(q, k, g, ks, dA, diagonal, dqs, dks, both, decay, dq, dk, dg, scale, LIMIT, n, H: tl.constexpr, K: tl.constexpr,
               C: tl.constexpr, BK: tl.constexpr, STEEP: tl.constexpr, DOT: tl.constexpr):
    """One program: BK channels of one chunk.

    The weight of key j in query i is exp of the sum of g over j < t <= i, so dg_t adds up (weight x its gradient) over all
    pairs that span t. Pairs inside the chunk: those that end at t or later, less those that begin at t or later; a query
    and the state before the chunk: those that end at t or later; a key and the state after it: those that begin before t;
    the two states: always. The diagonal i = j spans nothing and is left out, else it would drown small gradients."""
    kb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if STEEP:
        if not gla_is_steep(decay + (bh * n + c) * K, LIMIT, K, BK):
            return
    col, i, start = kb * BK + tl.arange(0, BK), tl.arange(0, C), ((bh // H) * n + c) * C * H + bh % H
    at, scores = start * K + i[:, None] * (H * K) + col[None, :], dA + start * C
    qt, kt, gt, from_state, to_state = tl.load(q + at), tl.load(k + at), tl.load(g + at), tl.load(dqs + at), tl.load(dks + at)
    qt, kt = qt.to(tl.float32) * scale, kt.to(tl.float32)
    if not STEEP:
        gt = bits(gt)
        whole = tl.sum(gt, 0)
        e = (tl.cumsum(gt, 0) if DOT is not None else sum_rows(i[:, None] >= i[None, :], gt, DOT)) - 0.5 * whole[None, :]
        half, to_q, to_k = tl.exp2(0.5 * whole)[None, :], tl.exp2(e), tl.exp2(-e)
        ds = tl.load(scores + i[:, None] * (H * C) + i[None, :])
        qe, ke = (qt * to_q).to(ds.dtype), (kt * to_k).to(ds.dtype)
        dqt, dkt = tl.dot(ds, ke, input_precision=DOT), tl.dot(tl.trans(ds), qe, input_precision=DOT)
        pairs = qe.to(tl.float32) * dqt - ke.to(tl.float32) * dkt         # from the rounded factors: they cancel exactly
        dqt, dkt, to_q, to_k = dqt * to_q, dkt * to_k, to_q * half, to_k * half
    else:                                                                 # as in gla_prepare, bit by bit
        gt = bits(gt)
        dqt, dkt, pairs = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        for b in range(7):
            upto, after = halves(gt, b, DOT)
            to_q, to_k = tl.exp2(upto), tl.exp2(after)
            ds = tl.load(scores + i[:, None] * (H * C) + i[None, :], (i[:, None] ^ i[None, :]) >> b == 1, 0.0)
            qe, ke = (qt * to_q).to(ds.dtype), (kt * to_k).to(ds.dtype)
            dqe, dke = tl.dot(ds, ke, input_precision=DOT), tl.dot(tl.trans(ds), qe, input_precision=DOT)
            pairs += qe.to(tl.float32) * dqe - ke.to(tl.float32) * dke
            dqt, dkt = dqt + dqe * to_q, dkt + dke * to_k
        upto, after = halves(gt, 7, DOT)
        to_q, to_k = tl.exp2(upto), tl.exp2(after)
    own = tl.load(diagonal + (bh * n + c) * C + i)[:, None]
    from_state, to_state = to_q * from_state.to(tl.float32), to_k * to_state.to(tl.float32)
    pairs += qt * from_state
    tl.store(dq + at, ((dqt + own * kt + from_state) * scale).to(dq.dtype.element_ty))
    tl.store(dk + at, (dkt + own * qt + to_state).to(dk.dtype.element_ty))
    always = tl.load(both + (bh * n + c) * K + col) * tl.exp2(tl.load(decay + (bh * n + c) * K + col))
    if STEEP or DOT is not None:                                          # the keys before t: added up without their last
        begun = (i > 0)[:, None]
        before = tl.load(ks + at - H * K, begun, 0.0).to(tl.float32) * tl.load(dks + at - H * K, begun, 0.0).to(tl.float32)
        total = tl.cumsum(pairs, 0, reverse=True) + tl.cumsum(before, 0)
    else:                                                                 # one sum for both: all pairs less those before t
        total = tl.sum(pairs, 0)[None, :] + sum_rows(i[:, None] > i[None, :], kt * to_state - pairs, DOT)
    tl.store(dg + at, tl.where(tl.load(g + at) > CUT, total + always[None, :], 0.0))


def pow2(x, low, high=1 << 30):                           # not triton's next_power_of_2 (nor its cdiv): small layers wait for the processor
    return max(low, min(high, 1 << (x - 1).bit_length()))


# Triton 3.6 on an H100 gave wrong numbers for some bfloat16 products of less than 64 channels in kernels like these, and for chunks of
# 64 tokens (perhaps what `finished` is about): the only such here are ssd_scan's tiles of 32 columns, which the tests have run there.


def chunk(T):
    """The chunk length for T tokens."""
    return pow2(T, 16) if T <= 32 else 128


def whole_tile(D, x):
    """D channels are padded to a multiple of this; in the interpreter, where size costs and nothing is compiled, by less."""
    return pow2(D, 64 if x.is_cuda else 16, 128)


def pad(x, multiples):
    """x with zeros after its end: every dimension becomes a multiple of the number that {dimension: number} gives for it."""
    ends = [0] * (2 * x.dim())                                            # F.pad counts from the last dimension
    for d, multiple in multiples.items():
        ends[-1 - 2 * d] = -x.shape[d] % multiple
    return F.pad(x, ends) if any(ends) else x


def launch(kernel, grid, *args, num_stages, **options):
    """kernel[grid](*args) with that many stages of the software pipeline, or as many as the GPU's shared memory holds. (An H100's 227 KiB
    hold all that are asked for here.)"""
    for stages in range(num_stages, 0, -1):
        try:
            return kernel[grid](*args, num_stages=stages, **options)
        except triton.OutOfResources:
            if stages == 1:
                raise


def widest(dtype):
    """Channels of a tile at most: float32's take twice the shared memory."""
    return 128 if dtype == torch.bfloat16 else 64


def gla_scan_tile(K, V, heads, rows, dtype):
    """A scan's tile of the state: rows x 128 in bfloat16 where that makes a program for each of a large GPU's processors, else 64 x 64;
    with it, the warps and the stages of the software pipeline. (Forward 64 rows is fastest, in reverse 128.)"""
    if widest(dtype) == 128 and -(-K // rows) * -(-V // 128) * heads >= 128:
        return pow2(K, 16, rows), pow2(V, 16, 128), 8, 2
    return pow2(K, 16, 64), pow2(V, 16, 64), 4, 3


def gla_rows_tile(K, V, dtype):
    """Channels of a tile of gla_rows, and warps: 4 are faster in small states, 8 as fast in large ones and sooner compiled."""
    return pow2(K, 16, 64), pow2(V, 16, widest(dtype)), 8 if K > 256 else 4


def on_device(x):
    """A context in which kernels run on x's GPU."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def operator(schema, buffers):
    """Makes a function a PyTorch operator, which torch.compile leaves in one piece. `buffers` allocates the results from the
    arguments; the function gets the arguments and the results, and fills these. `.plain` is the same without the operator."""
    def make(f):
        def call(*args):
            out = buffers(*args)
            with on_device(args[0]):
                f(*args, *out)
            return out
        op = torch.library.custom_op(f"statex::{f.__name__}", call, mutates_args=(), schema=schema)
        op.register_fake(buffers)
        op.plain = call
        return op
    return make


class NotTwice(torch.autograd.Function):
    """Hands on the first n tensors, the gradients that a backward pass made by hand. Whoever differentiates them, which is by what
    they were made of, the other tensors, is told that it cannot be done. (once_differentiable says so only where the gradients that
    came in depend on something.)"""
    @staticmethod
    def forward(ctx, n, *tensors):
        return tuple(t if t is None else t.detach() for t in tensors[:n])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("the Triton kernels have no second derivative; use impl='chunked'")


def differentiable(forward, save, backward, chain):
    """Two operators as one differentiable function. save(ctx, inputs, output) keeps what chain(backward, ctx, *gradients) needs. Outside of
    torch.compile the plain functions are called: small layers wait for the processor, and the way through PyTorch's operators is long."""
    forward.register_autograd(functools.partial(chain, backward), setup_context=save)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward.plain(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            with torch.no_grad():
                results = chain(backward.plain, ctx, *gradients)
            return NotTwice.apply(len(results), *results, *ctx.saved_tensors, *gradients) if torch.is_grad_enabled() else results
    return lambda *inputs: forward(*inputs) if torch.compiler.is_compiling() else Plain.apply(*inputs)


def gla_results(q, k, v, g, state, scale, C):
    """o (B,T,H,V), the last state (B,H,K,V), qs and ks (B,T,H,K), A (B,T,H,C), decay (B,H,T/C,K), S (B,H,T/C,K,V)."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    return (torch.empty_like(v), g.new_empty(B, H, K, V), torch.empty_like(q), torch.empty_like(k), q.new_empty(B, T, H, C),
            g.new_empty(B, H, T // C, K), v.new_empty(B, H, T // C, K, V))


@operator("(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? state, float scale, int C) -> "
          "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", gla_results)
def gla_forward(q, k, v, g, state, scale, C, o, last, qs, ks, A, decay, S):
    """T a multiple of C = 16, 32 or 128; K and V multiples of 128, or powers of two from 16."""
    (B, T, H, K), V, n = q.shape, v.shape[-1], q.shape[1] // C
    dot, limit = ("tf32x3", 30.0) if q.dtype == torch.float32 else (None, 90.0)
    BK = pow2(K, 16, 64)
    gla_prepare[(n, B * H)](q, k, g, qs, ks, decay, A, scale, n, H, K, C, BK, dot, num_warps=8, num_stages=1)
    gla_prepare_steep[(n, B * H)](q, k, g, qs, ks, decay, A, scale, limit, n, H, K, C, BK, dot, num_warps=8, num_stages=1)
    BK, BV, warps, stages = gla_scan_tile(K, V, B * H, 64, q.dtype)
    launch(gla_scan, (K // BK, V // BV, B * H), ks, v, decay, state, S, last, n, H, K, V, C, BK, BV, False, state is not None, True, dot,
           num_warps=warps, num_stages=stages)
    BK, BV, warps = gla_rows_tile(K, V, q.dtype)
    launch(gla_rows, (V // BV, n, B * H), qs, S, A, v, o, n, H, K, V, C, BK, BV, False, dot, num_warps=warps, num_stages=3)


def gla_gradients(q, k, v, g, qs, ks, A, decay, S, do, dlast, scale, C, has_state):
    """Of q, k, v, g, and of the incoming state (B,H,K,V), empty where there was none."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    return (*(torch.empty_like(x) for x in (q, k, v, g)), g.new_empty(B, H, K, V) if has_state else g.new_empty(0))


@operator("(Tensor q, Tensor k, Tensor v, Tensor g, Tensor qs, Tensor ks, Tensor A, Tensor decay, Tensor S, Tensor do, Tensor? dlast, "
          "float scale, int C, bool has_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", gla_gradients)
def gla_backward(q, k, v, g, qs, ks, A, decay, S, do, dlast, scale, C, has_state, dq, dk, dv, dg, first):
    (B, T, H, K), V, n = q.shape, v.shape[-1], q.shape[1] // C
    dot, limit = ("tf32x3", 30.0) if q.dtype == torch.float32 else (None, 90.0)
    dS, dA, diagonal = torch.empty_like(S), torch.empty_like(A), g.new_empty(B, H, T)
    dqs, dks, both = torch.empty_like(q), torch.empty_like(k), torch.empty_like(decay)
    BK, BV, warps, stages = gla_scan_tile(K, V, B * H, 128, q.dtype)
    launch(gla_scan, (K // BK, V // BV, B * H), qs, do, decay, dlast, dS, first, n, H, K, V, C, BK, BV, True, dlast is not None, has_state, dot,
           num_warps=warps, num_stages=stages)
    BK, BV, warps = gla_rows_tile(K, V, q.dtype)
    launch(gla_rows, (V // BV, n, B * H), ks, dS, A, do, dv, n, H, K, V, C, BK, BV, True, dot, num_warps=warps, num_stages=3)
    launch(gla_scores, (n, B * H), do, v, dA, diagonal, n, H, V, C, BV, dot, num_warps=4, num_stages=3)
    BK, BV = pow2(K, 16, widest(q.dtype)), pow2(V, 16, 64)
    launch(gla_through, (K // BK, n, B * H), do, v, S, dS, dqs, dks, both, n, H, K, V, C, BK, BV, dot, num_warps=8, num_stages=3)
    BK = pow2(K, 16, 32)
    for steep in (False, True):
        gla_finish[(K // BK, n, B * H)](q, k, g, ks, dA, diagonal, dqs, dks, both, decay, dq, dk, dg, scale, limit,
                                        n, H, K, C, BK, steep, dot, num_warps=8)


def gla_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[2:])
    ctx.has_state, ctx.scale, ctx.C = inputs[4] is not None, *inputs[5:]


def gla_chain(backward, ctx, do, dlast, *_):
    v = ctx.saved_tensors[2]
    do, dlast = torch.zeros_like(v) if do is None else do.contiguous(), None if dlast is None else dlast.contiguous()
    *grads, first = backward(*ctx.saved_tensors, do, dlast, ctx.scale, ctx.C, ctx.has_state)
    return *grads, first if ctx.has_state else None, None, None


gla_kernels = differentiable(gla_forward, gla_save, gla_backward, gla_chain)


@triton.jit
def gla_step(q, k, v, g, S, o, new, scale, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """One program: BV columns of one head's state, one token: read once, written once."""
    vb, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    val = vb * BV + tl.arange(0, BV)
    vt = tl.load(v + bh * V + val, val < V, 0.0).to(tl.float32)
    acc = tl.zeros((BV,), tl.float32)
    for k0 in range(0, K, BK):
        col = k0 + tl.arange(0, BK)
        tile, inside = bh * K * V + col[:, None] * V + val[None, :], (col < K)[:, None] & (val < V)[None, :]
        a = tl.exp2(tl.load(g + bh * K + col, col < K, 0.0) * LOG2E)
        kt, qt = tl.load(k + bh * K + col, col < K, 0.0).to(tl.float32), tl.load(q + bh * K + col, col < K, 0.0).to(tl.float32)
        s = a[:, None] * tl.load(S + tile, inside, 0.0) + kt[:, None] * vt[None, :]
        tl.store(new + tile, s, inside)
        acc += tl.sum(qt[:, None] * s, axis=0)
    tl.store(o + bh * V + val, (acc * scale).to(o.dtype.element_ty), val < V)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gla_triton(q, k, v, g, scale, state):
    (B, T, H, K), V = q.shape, v.shape[-1]
    k, g = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, g))
    with on_device(q):
        if T == 1 and state is not None and not needs_grad(q, k, v, g, state):
            o, new = v.new_empty(v.shape), g.new_empty(state.shape, dtype=torch.float32)
            BV = pow2(V, 16, 64)
            gla_step[(-(-V // BV), B * H)](*(t.contiguous() for t in (q, k, v, g.float(), state.float())), o, new, scale, K, V,
                                           pow2(K, 16, 64), BV, num_warps=4)
            return o, new
        dtype = torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32
        C, BK, BV = chunk(T), whole_tile(K, q), whole_tile(V, q)
        q, k, g = (pad(x, {1: C, 3: BK}).contiguous() for x in (q.to(dtype), k.to(dtype), g.float()))
        state = None if state is None else pad(state.float(), {2: BK, 3: BV}).contiguous()
        o, last, *_ = gla_kernels(q, k, pad(v.to(dtype), {1: C, 3: BV}).contiguous(), g, state, scale, C)
    return o[:, :T, :, :V], last[:, :, :K, :V]


# ---------------------------------------------------------------------------------------------------------------------
# Triton, Mamba2's state space recurrence
#
# Three launches forward, five backward; a large state takes one more each. One decay a head, so the scores inside a chunk are
# a table C B^T, shared by all heads of a group, times a table of decays W_ij = exp(g_{j+1} + ... + g_i) for each head, with
# g = dt A and v = dt x.
#
#   ssd_prepare   CB_c = C_c B_c^T, and cum = LOG2E x the sums of g from the chunk's start, as hi + lo
#   ssd_scan      S_0 = state,  S_{c+1} = decay_c S_c + (to_end v)^T B         stores S_c, the state before chunk c
#   ssd_read      y_S = C S_c^T, where N > 128
#   ssd_rows      y = exp(cum) (C S_c^T) + (CB W) v + D x
#
#   ssd_scan      dS_{c-1} = decay_c dS_c + (exp(cum) dy)^T C                  stores dS_c, the gradient after chunk c
#   ssd_read      B dS_c^T, where N > 128
#   ssd_rows      dv = to_end (B dS_c^T) + (CB W)^T dy; from it dx, D's and dt's parts
#   ssd_scores    dCB = sum over heads of W (dy v^T), and for each head its sums along rows and columns
#   ssd_through   dC = sum over heads of exp(cum) dy S_c + dCB B,  dB = the same of to_end v dS_c + dCB^T C
#                 with queries = sum_n C (dC through the state), which is exp(cum) sum_p dy y_S too
#   ssd_finish    dg from the sums over all pairs that span a token, as in gla_finish; then d(dt) and dA
#
# Chunk length L. A stored state costs N P / L numbers a token and head, the tables of decays about L / 2 exponentials:
# L = 128 for every N (256 was no faster at N = 512). A state of more than 128 columns is read apart, by a plain matrix product
# over neighbouring heads. Its y_S is kept for the backward pass, P numbers a token and head beside the N P / L of the state:
# ssd_through then needs no dy S for each head but adds up dC in the matrix unit, and has registers for tiles of 128 x 128, which
# read S and dS half as often. Tables are worked on in blocks of R x R, those above the diagonal left out. A block below the
# diagonal needs no table: its decays split at the seam s between the two blocks into exp(cum_i - cum_s) exp(cum_s - cum_j), a
# factor for each row and one for each column, neither above 1.
# cum is a float64 sum kept as two float32: a difference of two large sums then keeps the digits of the small decays
# (bfloat16 inputs have fewer digits to keep: EXACT is off for them, and lo is left out).


@chunk_kernel
def ssd_prepare(B, C, dt, A, doc, CB, hi, lo, n, G: tl.constexpr, N: tl.constexpr, H: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
                BN: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr):
    """One program: R rows of CB in one chunk of one group. dt is (B,T,H); hi, lo are (B,H,T); CB is (B,T,G,L)."""
    block, b, group = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    c, r, T = block // (L // R), block % (L // R), n * L
    i, start = tl.arange(0, R), (b * T + c * L) * G + group                # token i of the chunk is row start + i G
    for jb in range(r + 1):
        acc = tl.zeros((R, R), tl.float32)
        for n0 in range(0, N, BN):
            at = start * N + i[:, None] * (G * N) + n0 + tl.arange(0, BN)[None, :]
            acc = tl.dot(tl.load(C + at + r * R * G * N), tl.trans(tl.load(B + at + jb * R * G * N)), acc, input_precision=DOT)
        tl.store(CB + start * L + (r * R + i)[:, None] * (G * L) + jb * R + i[None, :], acc.to(CB.dtype.element_ty))
    if r == 0:
        t = c * L + tl.arange(0, L)
        for h0 in range(0, H // G, BH):
            of_group = h0 + tl.arange(0, BH)
            h = group * (H // G) + of_group
            inside = (of_group < H // G)[None, :]
            g = tl.load(dt + b * T * H + t[:, None] * H + h[None, :], inside, 0.0) * tl.load(A + h, of_group < H // G, 0.0)[None, :]
            g = tl.maximum(g, CUT)
            if doc is not None:
                g = tl.where(tl.load(doc + b * T + t)[:, None] != 0, CUT, g)
            cum = tl.cumsum(g.to(tl.float64), 0) * LOG2E
            at = b * H * T + h[None, :] * T + t[:, None]
            tl.store(hi + at, cum.to(tl.float32), inside)
            if DOT is not None:
                tl.store(lo + at, (cum - cum.to(tl.float32).to(tl.float64)).to(tl.float32), inside)


@triton.jit
def ssd_between(hi, lo, t, u, EXACT: tl.constexpr):
    """The base-2 logarithm of the decay from token u to token t of one head's hi, lo; t or u a vector, the other a number."""
    between = tl.load(hi + t) - tl.load(hi + u)
    if EXACT:
        between += tl.load(lo + t) - tl.load(lo + u)
    return between


@triton.jit
def ssd_table(hi, lo, t, EXACT: tl.constexpr):
    """W_ij = exp(g_{j+1} + ... + g_i) for i >= j, else 0, for tokens t (R,) of one head."""
    cum = tl.load(hi + t)
    between = cum[:, None] - cum[None, :]
    if EXACT:
        rest = tl.load(lo + t)
        between += rest[:, None] - rest[None, :]
    return tl.exp2(tl.where(t[:, None] >= t[None, :], between, float("-inf")))


@chunk_kernel
def ssd_scan(x, y, dt, hi, lo, first, S, last, n, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
             L: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
             LAST: tl.constexpr, DOT: tl.constexpr):
    """One program: BN columns of one head's state, carried over all tokens in registers, stored before each chunk.
    x is x or dy (B,T,H,P), y is B or C (B,T,G,N)."""
    nb, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, col, i, T = tl.arange(0, P), nb * BN + tl.arange(0, BN), tl.arange(0, R), n * L
    tile = p[:, None] * N + col[None, :]
    hi, lo, dt = hi + (b * H + h) * T, lo + (b * H + h) * T, dt + b * T * H + h
    carry = tl.zeros((P, BN), tl.float32)
    if FIRST:
        carry += tl.load(first + (b * H + h) * P * N + tile)
    for step in range(n * (L // R)):
        piece = n * (L // R) - 1 - step if REVERSE else step
        c, enter = piece // (L // R), step % (L // R) == 0                   # enter: this piece is its chunk's first
        if enter:
            tl.store(S + ((b * H + h) * n + c) * P * N + tile, carry.to(S.dtype.element_ty))
        t, end = piece * R + i, c * L + L - 1
        if REVERSE:
            weight = tl.exp2(tl.load(hi + t))
        else:
            weight = tl.exp2(ssd_between(hi, lo, end, t, DOT is not None)) * tl.load(dt + t * H)
        xt = tl.load(x + ((b * T + piece * R) * H + h) * P + i[None, :] * (H * P) + p[:, None])
        yt = tl.load(y + ((b * T + piece * R) * G + h // (H // G)) * N + i[:, None] * (G * N) + col[None, :])
        whole = tl.where(enter, tl.exp2(tl.load(hi + end)), 1.0)
        carry = tl.dot((xt.to(tl.float32) * weight[None, :]).to(yt.dtype), yt, carry * whole, input_precision=DOT)
    if LAST:
        tl.store(last + (b * H + h) * P * N + tile, carry)


@chunk_kernel
def ssd_read(z, S, out, n, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr,
             BN: tl.constexpr, DOT: tl.constexpr):
    """One program: what a chunk reads from the state in BV channels, of neighbouring heads of one group: out (B,T,H,P) = z S^T, where z is
    C or B (B,T,G,N) and S is S or dS (B,H,n,P,N)."""
    vb, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, val = tl.arange(0, L), vb * BV + tl.arange(0, BV)
    token, group = b * n * L + c * L, vb * BV // (H // G * P)
    rows = ((b * H + val // P) * n + c) * P * N + val % P * N
    acc = tl.zeros((L, BV), tl.float32)
    for n0 in range(0, N, BN):
        col = n0 + tl.arange(0, BN)
        zt = tl.load(z + (token * G + group) * N + i[:, None] * (G * N) + col[None, :])
        acc = tl.dot(zt, tl.load(S + rows[None, :] + col[:, None]), acc, input_precision=DOT)
    tl.store(out + token * H * P + i[:, None] * (H * P) + val[None, :], acc.to(out.dtype.element_ty))


@chunk_kernel
def ssd_rows(z, S, CB, x, dy, dt, hi, lo, D, read, y_S, out, ddt, keys, queries, dD, n, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
             N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BACKWARD: tl.constexpr,
             SKIP: tl.constexpr, APART: tl.constexpr, DOT: tl.constexpr):
    """One program: R tokens of one chunk of one head; R is L or L / 2. Forward z is C and out is y; backward z is B, S is dS and
    out is dx, with ddt = sum_p x dv (B,H,T), keys = sum_p v (dv through the state) (B,H,T), dD = sum_tp dy x (B,H,blocks).
    APART: read (B,T,H,P) has z S^T already (backward it is out's own buffer), and backward y_S gives queries = exp(cum) sum_p dy y_S
    (B,H,T).

    The other block of the chunk is read in any case and weighs nothing where it is not an earlier one (forward) or a later one
    (backward): without a branch its loads are under way early."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, r, i, p, T = block // (L // R), block % (L // R), tl.arange(0, R), tl.arange(0, P), n * L
    t, token = block * R + i, b * T + block * R                             # token i is t in its sequence, token + i in all
    zs = z + (token * G + h // (H // G)) * N + i[:, None] * (G * N)
    cbs = CB + ((b * T + c * L) * G + h // (H // G)) * L + i[:, None] * (G * L) + i[None, :]
    cb = tl.load(cbs + r * R * (G * L + 1)).to(tl.float32)                  # the block on the diagonal, and below it
    other, there = (c * L + L - R, r + 1 < L // R) if BACKWARD else (c * L, r > 0)
    if L > R:
        below = tl.load(cbs + R * G * L)
    his, los, dts = hi + (b * H + h) * T, lo + (b * H + h) * T, dt + b * T * H + h
    at = h * P + i[:, None] * (H * P) + p[None, :]
    if BACKWARD and APART:                                              # before all else: later, it costs registers
        seen = tl.load(y_S + token * H * P + at).to(tl.float32) * tl.load(dy + token * H * P + at).to(tl.float32)
        tl.store(queries + (b * H + h) * T + t, tl.exp2(tl.load(his + t)) * tl.sum(seen, axis=1))
    xt, dt_t = tl.load(x + token * H * P + at), tl.load(dts + t * H)
    if APART:                                                           # through the state
        acc = tl.load(read + token * H * P + at).to(tl.float32)
    else:
        acc = tl.zeros((R, P), tl.float32)
        for n0 in range(0, N, BN):
            col = n0 + tl.arange(0, BN)
            s = tl.load(S + ((b * H + h) * n + c) * P * N + p[None, :] * N + col[:, None])
            acc = tl.dot(tl.load(zs + col[None, :]), s, acc, input_precision=DOT)
    w = cb * ssd_table(his, los, t, DOT is not None)
    if BACKWARD:                                                        # the seam: the last token of this block
        seam, end = block * R + R - 1, c * L + L - 1
        after = tl.exp2(ssd_between(his, los, seam, t, DOT is not None))
        acc = acc * tl.exp2(ssd_between(his, los, end, seam, DOT is not None))
        tl.store(keys + (b * H + h) * T + t, dt_t * after * tl.sum(xt.to(tl.float32) * acc, axis=1))
        dyt = tl.load(dy + token * H * P + at)
        if L > R:
            upto = tl.exp2(tl.where(there, ssd_between(his, los, other + i, seam, DOT is not None), float("-inf")))
            dyo = tl.load(dy + (b * T + other) * H * P + at).to(tl.float32) * upto[:, None]
            acc = tl.dot(tl.trans(below), dyo.to(dyt.dtype), acc, input_precision=DOT)
        acc = tl.dot(tl.trans(w.to(dyt.dtype)), dyt, acc * after[:, None], input_precision=DOT)
        tl.store(ddt + (b * H + h) * T + t, tl.sum(xt.to(tl.float32) * acc, axis=1))          # acc is dv
        acc = acc * dt_t[:, None]
        if SKIP:
            acc += tl.load(D + h) * dyt.to(tl.float32)
            tl.store(dD + (b * H + h) * tl.num_programs(1) + block, tl.sum(xt.to(tl.float32) * dyt.to(tl.float32)))
    else:                                                               # the seam: the last token before this block
        seam = c * L + R - 1
        upto = tl.where(there, ssd_between(his, los, t, seam, DOT is not None), tl.load(his + t))
        if L > R:
            after = tl.exp2(tl.where(there, ssd_between(his, los, seam, other + i, DOT is not None), float("-inf")))
            xo = tl.load(x + (b * T + other) * H * P + at).to(tl.float32) * (after * tl.load(dts + (other + i) * H))[:, None]
            acc = tl.dot(below, xo.to(xt.dtype), acc * tl.exp2(tl.where(there, tl.load(his + seam), 0.0)), input_precision=DOT)
        acc = tl.dot((w * dt_t[None, :]).to(xt.dtype), xt, acc * tl.exp2(upto)[:, None], input_precision=DOT)
        if SKIP:
            acc += tl.load(D + h) * xt.to(tl.float32)
    tl.store(out + token * H * P + at, acc.to(out.dtype.element_ty))


@chunk_kernel
def ssd_scores(x, dy, dt, hi, lo, CB, dCB, ends, begins, n, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
               L: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr):
    """One program: queries of block ib and keys of block jb of one chunk of one group, its heads in turn. dCB (B,T,G,L)
    sums over the heads; for each head, ends[jb] (blocks,B,H,T) is the sum of weight x gradient over the pairs that end at
    a token, begins[ib] over those that begin there."""
    jb, block, b, group = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    c, ib, T, heads = block // (L // R), block % (L // R), n * L, tl.num_programs(2) // G * H
    if jb > ib:
        return
    r, p = tl.arange(0, R), tl.arange(0, P)
    t, u = c * L + ib * R + r, c * L + jb * R + r                           # queries, keys
    table = ((b * T + c * L) * G + group) * L + (ib * R + r)[:, None] * (G * L) + jb * R + r[None, :]
    cb = tl.load(CB + table).to(tl.float32)
    acc = tl.zeros((R, R), tl.float32)
    for m in range(H // G):
        h = group * (H // G) + m
        his, los = hi + (b * H + h) * T, lo + (b * H + h) * T
        at = (b * T * H + h) * P + p[None, :]
        dyt, xt = tl.load(dy + at + t[:, None] * (H * P)), tl.load(x + at + u[:, None] * (H * P))
        d = tl.dot(dyt, tl.trans(xt), input_precision=DOT) * tl.load(dt + b * T * H + u * H + h)[None, :]
        if jb == ib:
            d = d * ssd_table(his, los, t, DOT is not None)
        else:
            seam = c * L + ib * R - 1
            d = d * (tl.exp2(ssd_between(his, los, t, seam, DOT is not None))[:, None] *
                     tl.exp2(ssd_between(his, los, seam, u, DOT is not None))[None, :])
        acc += d
        # The diagonal spans nothing. The two sums nearly cancel in ssd_finish: float64 for float32 inputs.
        d = tl.where(t[:, None] > u[None, :], d * cb, 0.0).to(ends.dtype.element_ty)
        tl.store(ends + (jb * heads + b * H + h) * T + t, tl.sum(d, axis=1))
        tl.store(begins + (ib * heads + b * H + h) * T + u, tl.sum(d, axis=0))
    tl.store(dCB + table, acc.to(dCB.dtype.element_ty))


@chunk_kernel
def ssd_through(x, dy, B, C, dt, hi, lo, S, dS, dCB, dB, dC, queries, both, n, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
                N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, APART: tl.constexpr,
                DOT: tl.constexpr):
    """One program: BN columns of BR tokens of one chunk of one group, its heads in turn; dCB is read in R x R. For every head also
    the part of both = sum S dS (blocks of N, B,H,n) and, unless APART (ssd_rows has it from y_S), of queries = sum_n C (dC through the
    state) (blocks of N, B,H,T)."""
    nb, block, b, group = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    c, r, T, heads = block // (L // BR), block % (L // BR), n * L, tl.num_programs(2) // G * H
    i, j, p, col = tl.arange(0, BR), tl.arange(0, R), tl.arange(0, P), nb * BN + tl.arange(0, BN)
    t, end, token, start = block * BR + i, c * L + L - 1, b * T + block * BR, b * T + c * L
    wide = (token * G + group) * N + i[:, None] * (G * N) + col[None, :]
    dc, db = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    for k in range(L // R):                                                 # the chunk's keys, those after a query left out
        row, key = r * BR + i[:, None], k * R + j[None, :]
        pairs = tl.load(dCB + (start * G + group) * L + row * (G * L) + key, row >= key, 0.0)
        bt = tl.load(B + ((start + k * R) * G + group) * N + j[:, None] * (G * N) + col[None, :])
        dc = tl.dot(pairs, bt, dc, input_precision=DOT)
    for k in range(L // R):                                                 # and its queries
        row, key = k * R + j[:, None], r * BR + i[None, :]
        pairs = tl.load(dCB + (start * G + group) * L + row * (G * L) + key, row >= key, 0.0)
        ct = tl.load(C + ((start + k * R) * G + group) * N + j[:, None] * (G * N) + col[None, :])
        db = tl.dot(tl.trans(pairs), ct, db, input_precision=DOT)
    if not APART:
        c_own = tl.load(C + wide).to(tl.float32)
    for m in range(H // G):
        h = group * (H // G) + m
        his, los = hi + (b * H + h) * T, lo + (b * H + h) * T
        at = (token * H + h) * P + i[:, None] * (H * P) + p[None, :]
        tile = ((b * H + h) * n + c) * P * N + p[:, None] * N + col[None, :]
        s, ds, dyt = tl.load(S + tile), tl.load(dS + tile), tl.load(dy + at)
        upto, to_end = tl.exp2(tl.load(his + t)), tl.exp2(ssd_between(his, los, end, t, DOT is not None))
        if APART:
            dc = tl.dot((dyt.to(tl.float32) * upto[:, None]).to(s.dtype), s, dc, input_precision=DOT)
        else:
            read = tl.dot(dyt, s, input_precision=DOT)
            dc += read * upto[:, None]
            tl.store(queries + (nb * heads + b * H + h) * T + t, upto * tl.sum(read * c_own, axis=1))
        v = tl.load(x + at).to(tl.float32) * (to_end * tl.load(dt + b * T * H + t * H + h))[:, None]
        db = tl.dot(v.to(ds.dtype), ds, db, input_precision=DOT)
        dc, db = finished(dc), finished(db)
        if r == 0:
            tl.store(both + (nb * heads + b * H + h) * n + c, tl.sum(s.to(tl.float32) * ds.to(tl.float32)))
    tl.store(dC + wide, dc.to(dC.dtype.element_ty))
    tl.store(dB + wide, db.to(dB.dtype.element_ty))


@chunk_kernel
def ssd_finish(queries, keys, ends, begins, both, hi, dt, A, doc, ddt_x, ddt, dA, n, H: tl.constexpr, READS: tl.constexpr,
               BLOCKS: tl.constexpr, L: tl.constexpr, R: tl.constexpr):
    """One program: one chunk of one head: dg, and from g = dt A the gradients of dt (B,T,H) and A (B,H,n)."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, T, heads = tl.arange(0, L), n * L, tl.num_programs(1)
    here = bh * T + c * L + i
    ended, always = tl.zeros((L,), ends.dtype.element_ty), 0.0
    for k in range(L // R):                                                 # blocks that do not exist hold nothing
        ended += tl.load(ends + k * heads * T + here, k <= i // R, 0.0)
        ended -= tl.load(begins + k * heads * T + here, k >= i // R, 0.0)
    for nb in range(READS):                                                 # the parts of queries, and those of both
        ended += tl.load(queries + nb * heads * T + here)
    for nb in range(BLOCKS):
        always += tl.load(both + (nb * heads + bh) * n + c)
    always = always * tl.exp2(tl.load(hi + bh * T + c * L + L - 1))
    dg = tl.cumsum(ended, 0, reverse=True) + tl.cumsum(tl.load(keys + here - 1, i > 0, 0.0), 0) + always
    at = ((bh // H) * T + c * L + i) * H + bh % H
    dg = tl.where(tl.load(dt + at) * tl.load(A + bh % H) > CUT, dg, 0.0)
    if doc is not None:
        dg = tl.where(tl.load(doc + (bh // H) * T + c * L + i) != 0, 0.0, dg)
    tl.store(ddt + at, tl.load(ddt_x + here) + dg * tl.load(A + bh % H))
    tl.store(dA + bh * n + c, tl.sum(dg * tl.load(dt + at), axis=0))


def ssd_results(x, dt, A, B, C, D, state, doc, L):
    """y (B,T,H,P), the last state (B,H,P,N), CB (B,T,G,L), hi and lo (B,H,T), lo empty in bfloat16, S (B,H,T/L,P,N),
    y_S (B,T,H,P), empty where the state is not read apart."""
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    lo = dt.new_empty(b, H, T) if x.dtype == torch.float32 else dt.new_empty(0)
    return (torch.empty_like(x), dt.new_empty(b, H, P, N), x.new_empty(b, T, G, L), dt.new_empty(b, H, T), lo,
            x.new_empty(b, H, T // L, P, N), x.new_empty(b if N > 128 else 0, T, H, P))


def ssd_scan_tile(N, heads, L, R):
    """Columns and tokens of a tile of ssd_scan: 128 in pieces of R where that makes a program for each of a large GPU's processors. Of
    fewer programs (one sequence) each must be quick: 32 columns, a whole chunk at a time."""
    BN = pow2(N, 16, 128)
    return (BN, R) if N // BN * heads >= 128 else (min(BN, 32), L)


def read_apart(z, S, out, dot):
    """out (B,T,H,P) = z S^T with z (B,T,G,N) and S (B,H,chunks,P,N). A tile of 128 x 128, or half as wide where a group's heads end."""
    (b, T, G, N), (_, H, n, P, _) = z.shape, S.shape
    BV = P if dot or H // G * P % 128 else 128
    launch(ssd_read, (H * P // BV, n, b), z, S, out, n, H, G, P, N, T // n, BV, 64, dot, num_warps=8, num_stages=3)


@operator("(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? doc, int L) -> "
          "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", ssd_results)
def ssd_forward(x, dt, A, B, C, D, state, doc, L, y, last, CB, hi, lo, S, y_S):
    """T a multiple of L = 16, 32 or 128; P 16, 32 or 64; N a multiple of 128, or a power of two from 16."""
    (b, T, H, P), (G, N), n, R = x.shape, B.shape[2:], x.shape[1] // L, min(L, 64)
    dot, apart = "tf32x3" if x.dtype == torch.float32 else None, N > 128
    ssd_prepare[(T // R, b * G)](B, C, dt, A, doc, CB, hi, lo, n, G, N, H, L, R, pow2(N, 16, 64), 16, dot, num_warps=4)
    BN, piece = ssd_scan_tile(N, b * H, L, R)
    launch(ssd_scan, (N // BN, H, b), x, B, dt, hi, lo, state, S, last, n, H, G, P, N, L, piece, BN, False, state is not None, True, dot,
           num_warps=4, num_stages=3 if dot else 4)
    if apart:
        read_apart(C, S, y_S, dot)
    # 168 registers let three programs run on a processor, 128 four.
    launch(ssd_rows, (H, T // R, b), C, S, CB, x, None, dt, hi, lo, D, y_S, None, y, None, None, None, None, n, H, G, P, N, L, R,
           pow2(N, 16, widest(x.dtype)), False, D is not None, apart, dot, num_warps=4, num_stages=3 if dot else 2,
           maxnreg=None if dot else 128 if apart else 168)


def ssd_gradients(x, dt, A, B, C, D, doc, CB, hi, lo, S, y_S, dy, dlast, L, has_state):
    """Of x, dt, A, B, C, D, and of the incoming state (B,H,P,N); the last two empty where they were not given."""
    (b, T, H, P), N = x.shape, B.shape[-1]
    return (*(torch.empty_like(t) for t in (x, dt, A, B, C)), torch.empty_like(A) if D is not None else A.new_empty(0),
            dt.new_empty(b, H, P, N) if has_state else dt.new_empty(0))


@operator("(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? doc, Tensor CB, Tensor hi, Tensor lo, Tensor S, Tensor y_S, Tensor dy, "
          "Tensor? dlast, int L, bool has_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", ssd_gradients)
def ssd_backward(x, dt, A, B, C, D, doc, CB, hi, lo, S, y_S, dy, dlast, L, has_state, dx, ddt, dA, dB, dC, dD, first):
    (b, T, H, P), (G, N), n, R = x.shape, B.shape[2:], x.shape[1] // L, min(L, 64)
    dot, apart = "tf32x3" if x.dtype == torch.float32 else None, N > 128
    BR, BN, warps = (L, 128, 8) if apart and not dot and L == 128 else (R, pow2(N, 16, 64), 4)    # tokens, columns and warps of ssd_through
    blocks, reads, wide = N // BN, 1 if apart else N // BN, torch.float64 if dot else torch.float32
    dS, dCB, ddt_x, keys, queries = torch.empty_like(S), torch.empty_like(CB), *(hi.new_empty(m * b, H, T) for m in (1, 1, reads))
    ends, begins = (torch.empty(L // R, b, H, T, dtype=wide, device=x.device) for _ in range(2))
    both, dA_parts, dD_parts = (hi.new_empty(b, H, m) for m in (blocks * n, n, T // R))
    BS, piece = ssd_scan_tile(N, b * H, L, R)
    launch(ssd_scan, (N // BS, H, b), dy, C, dt, hi, lo, dlast, dS, first, n, H, G, P, N, L, piece, BS, True, dlast is not None, has_state, dot,
           num_warps=4, num_stages=3)
    if apart:
        read_apart(B, dS, dx, dot)
    launch(ssd_rows, (H, T // R, b), B, dS, CB, x, dy, dt, hi, lo, D, dx, y_S, dx, ddt_x, keys, queries, dD_parts, n, H, G, P, N, L, R,
           pow2(N, 16, widest(x.dtype)), True, D is not None, apart, dot, num_warps=4, num_stages=2, maxnreg=None if dot else 168)
    launch(ssd_scores, (L // R, T // R, b * G), x, dy, dt, hi, lo, CB, dCB, ends, begins, n, H, G, P, L, R, dot, num_warps=4, num_stages=3)
    launch(ssd_through, (blocks, T // BR, b * G), x, dy, B, C, dt, hi, lo, S, dS, dCB, dB, dC, queries, both, n, H, G, P, N, L, R, BR, BN,
           apart, dot, num_warps=warps, num_stages=3)
    ssd_finish[(n, b * H)](queries, keys, ends, begins, both, hi, dt, A, doc, ddt_x, ddt, dA_parts, n, H, reads, blocks, L, R, num_warps=4)
    torch.sum(dA_parts, (0, 2), out=dA)
    if D is not None:
        torch.sum(dD_parts, (0, 2), out=dD)


def ssd_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], inputs[7], *output[2:])
    ctx.has_state, ctx.L = inputs[6] is not None, inputs[8]


def ssd_chain(backward, ctx, dy, dlast, *_):
    x, D = ctx.saved_tensors[0], ctx.saved_tensors[5]
    dy, dlast = torch.zeros_like(x) if dy is None else dy.contiguous(), None if dlast is None else dlast.contiguous()
    *grads, dD, first = backward(*ctx.saved_tensors, dy, dlast, ctx.L, ctx.has_state)
    return *grads, None if D is None else dD, first if ctx.has_state else None, None, None


ssd_kernels = differentiable(ssd_forward, ssd_save, ssd_backward, ssd_chain)


@triton.jit
def ssd_step(x, dt, A, B, C, D, S, y, new, H, G, P, N, BP: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr):
    """One program: BP rows of one head's state, one token: read once, written once."""
    pb, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, row = pb * BP + tl.arange(0, BP), b * G + h // (H // G)
    xt = tl.load(x + (b * H + h) * P + p, p < P, 0.0).to(tl.float32)
    dtt = tl.load(dt + b * H + h)
    a = tl.exp2(dtt * tl.load(A + h) * LOG2E)
    acc = tl.zeros((BP,), tl.float32)
    for n0 in range(0, N, BN):
        col = n0 + tl.arange(0, BN)
        tile, inside = (b * H + h) * P * N + p[:, None] * N + col[None, :], (p < P)[:, None] & (col < N)[None, :]
        bt, ct = tl.load(B + row * N + col, col < N, 0.0).to(tl.float32), tl.load(C + row * N + col, col < N, 0.0).to(tl.float32)
        s = a * tl.load(S + tile, inside, 0.0) + (dtt * xt)[:, None] * bt[None, :]
        tl.store(new + tile, s, inside)
        acc += tl.sum(s * ct[None, :], axis=1)
    if SKIP:
        acc += tl.load(D + h) * xt
    tl.store(y + (b * H + h) * P + p, acc.to(y.dtype.element_ty), p < P)


def ssd_triton(x, dt, A, B, C, D, state, first):
    if D is not None and D.dim() == 2:                  # a skip for every channel is added outside of the kernels
        y, state = ssd_triton(x, dt, A, B, C, None, state, first)
        return y + D * x, state
    with on_device(x):
        if x.shape[1] == 1 and state is not None and not needs_grad(x, dt, A, B, C, D, state):
            (b, _, H, P), (G, N) = x.shape, B.shape[2:]
            if first is not None:
                state = state.masked_fill(first[:, :, None, None], 0.0)
            y, new = x.new_empty(x.shape), x.new_empty(state.shape, dtype=torch.float32)
            dt, A, D, state = (None if t is None else t.float().contiguous() for t in (dt, A, D, state))
            BP, BN = pow2(P, 16, 32), pow2(N, 16, 128)
            ssd_step[(-(-P // BP), H, b)](x.contiguous(), dt, A, B.contiguous(), C.contiguous(), D, state, y, new,
                                          H, G, P, N, BP, BN, D is not None, num_warps=4)
            return y, new
        dtype = torch.bfloat16 if x.dtype == B.dtype == C.dtype == torch.bfloat16 else torch.float32
        (_, T, _, P), N = x.shape, B.shape[-1]
        parts = -(-P // 64)                              # a tile has all channels of a head, 64 at most: a wider head is several of one decay
        L, BP, BN = chunk(T), whole_tile(min(P, 64), x), whole_tile(N, x)
        x = pad(x.to(dtype), {1: L, 3: parts * BP}).unflatten(3, (parts, BP)).flatten(2, 3).contiguous()
        dt, A, D = (t if t is None or parts == 1 else t.repeat_interleave(parts, -1) for t in (pad(dt.float(), {1: L}), A, D))
        B, C = (pad(t.to(dtype), {1: L, 3: BN}).contiguous() for t in (B, C))
        if state is not None:
            state = pad(state.float(), {2: parts * BP, 3: BN}).unflatten(2, (parts, BP)).flatten(1, 2).contiguous()
        A, D = (None if t is None else t.float().contiguous() for t in (A, D))
        first = None if first is None else pad(first.to(torch.int8), {1: L}).contiguous()
        y, last, *_ = ssd_kernels(x, dt.contiguous(), A, B, C, D, state, first, L)
    return y.unflatten(2, (-1, parts)).flatten(3)[:, :T, :, :P], last.unflatten(1, (-1, parts)).flatten(2, 3)[:, :, :P, :N]


# ---------------------------------------------------------------------------------------------------------------------
# Triton, the short convolution of Mamba2 (and of GLA, where it has one)
#
# pre_t = bias + sum over taps of w_i x_{t - taps + 1 + i},  y = silu(pre). Forward, x is read and y written once: the shifted copies of
# a tile come out of the cache. Backward, one kernel writes dpre and sums dw and db, a second makes dx of dpre. Offsets within a
# sequence are 32 bits wide, so that T times the distance of two tokens must stay below 2^31 (conv_fits).


@triton.jit
def conv_at(x, w, bias, t, T, row: tl.constexpr, col, width, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """pre at tokens t (BT,) and channels col (BD,); x points at one sequence, before which there are zeros."""
    acc = tl.zeros((t.shape[0], col.shape[0]), tl.float32)
    if BIAS:
        acc += tl.load(bias + col, col < width, 0.0).to(tl.float32)[None, :]
    for i in tl.static_range(TAPS):
        s = t - (TAPS - 1) + i
        xs = tl.load(x + s[:, None] * row + col[None, :], ((s >= 0) & (s < T))[:, None] & (col < width)[None, :], 0.0)
        acc += xs.to(tl.float32) * tl.load(w + col * TAPS + i, col < width, 0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def conv_rows(x, w, bias, y, T, row: tl.constexpr, width: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
              BIAS: tl.constexpr):
    """One program: BT tokens of BD channels of one sequence. x has `row` numbers from token to token, y is contiguous."""
    t, col, b = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2).to(tl.int64)
    pre = conv_at(x + b * T * row, w, bias, t, T, row, col, width, TAPS, BIAS)
    tl.store(y + b * T * width + t[:, None] * width + col[None, :], (pre * tl.sigmoid(pre)).to(y.dtype.element_ty),
             (t < T)[:, None] & (col < width)[None, :])


@triton.jit
def conv_gradients(x, w, bias, dy, dpre, dw, db, T, STEPS, row: tl.constexpr, dy_row: tl.constexpr, width: tl.constexpr,
                   TAPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr):
    """One program: STEPS tiles of BT tokens, one after the other, of BD channels of one sequence. dpre = dy silu'(pre), pre
    computed again, and the program's own sums for dw (parts,width,taps) and db (parts,width)."""
    col, b = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2).to(tl.int64)
    part = b * tl.num_programs(0) + tl.program_id(0)
    x, dy, dpre, inside = x + b * T * row, dy + b * T * dy_row, dpre + b * T * width, (col < width)[None, :]
    zero, ws = tl.zeros((BT, BD), tl.float32), ()
    for i in tl.static_range(TAPS):
        ws += (tl.load(w + col * TAPS + i, col < width, 0.0).to(tl.float32)[None, :],)
    shift = zero
    if BIAS:
        shift += tl.load(bias + col, col < width, 0.0).to(tl.float32)[None, :]
    db_sum, dw_sums = zero, (zero,) * TAPS                                # over a tile's tokens they are summed once, at the end
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * BT + tl.arange(0, BT)
        here = (t < T)[:, None] & inside
        pre, xs, sums = shift, (), ()
        for i in tl.static_range(TAPS):
            s = t - (TAPS - 1) + i
            xs += (tl.load(x + s[:, None] * row + col[None, :], ((s >= 0) & (s < T))[:, None] & inside, 0.0).to(tl.float32),)
            pre += xs[i] * ws[i]
        gate = tl.sigmoid(pre)
        d = tl.load(dy + t[:, None] * dy_row + col[None, :], here, 0.0).to(tl.float32) * gate * (1 + pre * (1 - gate))
        tl.store(dpre + t[:, None] * width + col[None, :], d.to(dpre.dtype.element_ty), here)
        db_sum += d
        for i in tl.static_range(TAPS):
            sums += (dw_sums[i] + d * xs[i],)
        dw_sums = sums
    for i in tl.static_range(TAPS):
        tl.store(dw + (part * width + col) * TAPS + i, tl.sum(dw_sums[i], 0), col < width)
    if BIAS:
        tl.store(db + part * width + col, tl.sum(db_sum, 0), col < width)


@triton.jit
def conv_dx(dpre, w, dx, T, width: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """One program: BT tokens of BD channels of one sequence. dx_t = sum over j of w_{taps - 1 - j} dpre_{t + j}."""
    t, col, b = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(TAPS):
        d = tl.load(dpre + b * T * width + (t + j)[:, None] * width + col[None, :], (t + j < T)[:, None] & (col < width)[None, :], 0.0)
        acc += d.to(tl.float32) * tl.load(w + col * TAPS + TAPS - 1 - j, col < width, 0.0).to(tl.float32)[None, :]
    tl.store(dx + b * T * width + t[:, None] * width + col[None, :], acc.to(dx.dtype.element_ty), (t < T)[:, None] & (col < width)[None, :])


def conv_tile(x):
    """Tokens and channels of a tile."""
    return (64, 64) if x.is_cuda else (pow2(x.shape[1], 4, 32), pow2(x.shape[2], 4, 32))


@torch.library.custom_op("statex::conv_forward", mutates_args=(), schema="(Tensor x, Tensor w, Tensor? bias) -> Tensor")
def conv_forward(x, w, bias):
    """x (B,T,D), its tokens any number of channels apart; w (D,taps); bias (D,) or None -> y (B,T,D)."""
    (B, T, D), (BT, BD), y = x.shape, conv_tile(x), x.new_empty(x.shape)
    conv_rows[(-(-T // BT), -(-D // BD), B)](x, w, bias, y, T, x.stride(1), D, w.shape[1], BT, BD, bias is not None, num_warps=4)
    return y


conv_forward.register_fake(lambda x, w, bias: x.new_empty(x.shape))


@operator("(Tensor x, Tensor w, Tensor? bias, Tensor dy) -> (Tensor, Tensor, Tensor)",
          lambda x, w, bias, dy: (x.new_empty(x.shape), torch.empty_like(w), w.new_empty(len(w) if bias is not None else 0)))
def conv_backward(x, w, bias, dy, dx, dw, db):
    """x, dy, dx (B,T,D); w, dw (D,taps); bias, db (D,), db empty where there is no bias."""
    (B, T, D), (BT, BD) = x.shape, conv_tile(x)
    BG = min(BT, 16)                                                      # tokens of a tile of conv_gradients, which keeps many tiles in registers
    steps = 32 if T >= 32 * BG else 1                                     # tiles a program: its sums are one part of dw and db
    grid = (-(-T // (BG * steps)), -(-D // BD), B)
    dw_parts, db_parts = x.new_empty(grid[0] * B, *w.shape, dtype=torch.float32), x.new_empty(grid[0] * B, D, dtype=torch.float32)
    dpre = x.new_empty(x.shape)
    conv_gradients[grid](x, w, bias, dy, dpre, dw_parts, db_parts, T, steps, x.stride(1), dy.stride(1), D, w.shape[1], BG, BD, bias is not None,
                         num_warps=4)
    conv_dx[-(-T // BT), grid[1], B](dpre, w, dx, T, D, w.shape[1], BT, BD, num_warps=4)
    dw.copy_(dw_parts.sum(0))
    if bias is not None:
        db.copy_(db_parts.sum(0))


def conv_chain(ctx, dy):
    x, w, bias = ctx.saved_tensors
    dx, dw, db = conv_backward(x, w, bias, rows_apart(dy))
    return dx, dw, None if bias is None else db


conv_forward.register_autograd(conv_chain, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def rows_apart(x):
    """x (B,T,D) with its sequences one after the other, tokens a fixed number of channels apart: itself, or a copy."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def conv_fits(x):
    """Whether short_conv is the way for x (B,T,D): on a GPU, not in float64, of fewer than 2^31 numbers a sequence."""
    return triton_installed and x.is_cuda and x.dtype != torch.float64 and x.shape[1] * x.stride(1) < 2**31


def short_conv(x, weight, bias=None):
    """Depthwise causal convolution over time, then silu. x (B,T,D), zeros before it; weight (D,1,taps); bias (D,) or None.
    Returns y (B,T,D) in x's dtype; the sums are in float32. Differentiable in all three."""
    return conv_forward(rows_apart(x), weight[:, 0].contiguous(), bias)


# ---------------------------------------------------------------------------------------------------------------------
# run as a script: check every implementation against the definition, then time them

CASES = {      # the public models' layers and their expansions: gla B T H K V, ssd B T H P N
    "gla-340m": ("gla", 4, 8192, 4, 128, 256), "gla-340m expanded": ("gla", 4, 8192, 1, 512, 1024),
    "gla-1.3b": ("gla", 4, 8192, 4, 256, 512), "gla-1.3b expanded": ("gla", 4, 8192, 1, 1024, 2048),
    "mamba2-370m": ("ssd", 4, 8192, 32, 64, 128), "mamba2-370m expanded": ("ssd", 4, 8192, 32, 64, 512),
    "mamba2-1.3b": ("ssd", 4, 8192, 64, 64, 128), "mamba2-1.3b expanded": ("ssd", 4, 8192, 64, 64, 512),
}


def example(op, B, T, H, K, V, G=1, dtype=torch.float32, device="cpu", decay=None, seed=0):
    """Random arguments of gla (B T H K V) or ssd (B T H P N), in order, with a state. decay: the log decay of every step,
    "mixed" for 0, -1e-4, -1 and -60 at random, None for what a model has."""
    rng = torch.Generator(device=device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, device=device, dtype=torch.float32).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def logs(*shape):
        if decay is None:
            return F.logsigmoid(normal(*shape).to(wide)) / 16
        kinds = torch.tensor([0, -1e-4, -1, -60] if decay == "mixed" else [decay], dtype=wide, device=device)
        return kinds[torch.randint(len(kinds), shape, generator=rng, device=device)]

    if op == "gla":
        return [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), logs(B, T, H, K), normal(B, H, K, V).to(wide)]
    dt = F.softplus(normal(B, T, H).to(wide)) if decay is None else -logs(B, T, H) + 1e-9
    A = -1 - 15 * torch.rand(H, generator=rng, device=device).to(wide) if decay is None else dt.new_full((H,), -1.0)
    return [normal(B, T, H, K), dt, A, normal(B, T, G, V), normal(B, T, G, V), normal(H).to(wide), normal(B, H, K, V).to(wide)]


def run(op, args, impl):
    """o and the final state of gla or ssd on the arguments that `example` makes."""
    return gla(*args[:4], state=args[4], impl=impl) if op == "gla" else ssd(*args, impl=impl)


def errors(op, args, impl, reference="recurrent"):
    """||x - ref|| / ||ref|| of the output, the final state and every gradient, ref being the reference impl in float64.
    The gradient that arrives is random, in the output and in the final state, the same numbers for both."""
    def everything(impl, dtype):
        inputs = [a.detach().to(dtype or a.dtype).requires_grad_() for a in args]
        o, s = run(op, inputs, impl)
        rng = torch.Generator().manual_seed(1)
        do, ds = (torch.randn(x.shape, generator=rng).to(narrow).to(x) for x, narrow in ((o, args[0].dtype), (s, torch.float32)))
        return [o, s, *torch.autograd.grad([o, s], inputs, [do, ds])]
    names = "o state dq dk dv dg dstate" if op == "gla" else "y state dx ddt dA dB dC dD dstate"
    pairs = zip(everything(impl, None), everything(reference, torch.float64))
    return {name: ((x.double() - ref.double()).norm() / ref.double().norm()).item() for name, (x, ref) in zip(names.split(), pairs)}


def ceilings(device):
    """Measured FLOP/s of a bfloat16 (CPU: float32) matrix product and bytes/s of a copy."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(1 << 30 if device == "cuda" else 1 << 24, device=device, dtype=dtype)
    y = torch.empty_like(x)
    return (2 * size ** 3 / median_ms(lambda: a @ b, device) * 1e3,
            2 * x.numel() * x.element_size() / median_ms(lambda: y.copy_(x), device) * 1e3)


def median_ms(f, device):
    if device == "cuda":
        return triton.testing.do_bench(f, warmup=50, rep=200, return_mode="median")
    import statistics, time
    f()
    times = []
    for _ in range(5):
        t0 = time.perf_counter()
        f()
        times.append(time.perf_counter() - t0)
    return statistics.median(times) * 1e3


def peer(op, args):
    """flash-linear-attention's chunk_gla or mamba_ssm's scan on the same arguments, or None where not importable."""
    try:
        if op == "gla":
            from fla.ops.gla import chunk_gla
            return lambda a: chunk_gla(*a[:4])[0]
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        return lambda a: mamba_chunk_scan_combined(*a[:5], chunk_size=256, D=a[5])
    except ImportError:
        return None


def bench_one_token(cases, device, bandwidth, batch=64):
    """The step of generation: one token, state in and out, against reading and writing the state once."""
    for name, (op, _, _, H, K, V) in cases.items():
        args = example(op, batch, 1, H, K, V, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
        with torch.no_grad():
            ms = median_ms(lambda: run(op, args, "auto"), device)
        print(f"{name:22s} one token, batch {batch}: {ms:.3f} ms, {8 * args[-1].numel() / ms * 1e3 / bandwidth:.0%} of the copy bandwidth", flush=True)


def bench(cases, device, flops, bandwidth):
    """One table: every implementation that runs here on every case."""
    print(f"{'case':29s} {'B T H K V (ssd: P N)':24s} {'impl':10s} {'fwd ms':>8s} {'x floor':>8s} {'fwd+bwd':>8s} {'x floor':>8s} {'GB':>7s}")
    for name, (op, B, T, H, K, V) in cases.items():
        args = example(op, B, T, H, K, V, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)[:-1]
        args = [a.requires_grad_() for a in args]
        grad = torch.randn_like(args[2] if op == "gla" else args[0])
        # The least work: intra-chunk scores of 64 (gla) or 256 (ssd) tokens, each input and output moved once.
        work = B * T * (H * (4 * K * V + 64 * (K + V)) if op == "gla" else H * 4 * V * K + H * 256 * K + 256 * V)
        moved = B * T * (H * ((2 * K + 2 * V) * 2 + K * 4) if op == "gla" else 2 * H * K * 2 + H * 2 + 2 * V * 2)
        floor = max(work / flops, moved / bandwidth) * 1e3
        impls = {"chunked": lambda a: run(op, [*a, None], "chunked")[0]}
        if device == "cuda":
            impls = {"triton": lambda a: run(op, [*a, None], "triton")[0], "peer": peer(op, args)}
        else:
            impls["recurrent"] = lambda a: run(op, [*a, None], "recurrent")[0]
        for impl, f in impls.items():
            if f is None:
                continue

            def both():
                torch.autograd.grad(f(args), args, grad)
            try:
                forward = median_ms(lambda: f(args), device)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() if device == "cuda" else 0
                total = median_ms(both, device)
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else float("nan")
                print(f"{name:29s} {f'{B} {T} {H} {K} {V}':24s} {impl:10s} {forward:8.3f} {forward / floor:8.1f} {total:8.3f} {total / 3 / floor:8.1f} {peak:7.2f}", flush=True)
            except Exception as e:
                print(f"{name:29s} {impl:10s} failed: {' '.join(str(e).split())[:150]}", flush=True)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("largest ||x - ref|| / ||ref|| over the output, the state and all gradients")
    impls = [("chunked", torch.float32)] + ([("triton", torch.float32), ("triton", torch.bfloat16)] if device == "cuda" else [])
    for op in ("gla", "ssd"):
        for decay in (0, -1e-4, -1, -60, "mixed", None):
            worst = []
            for impl, dtype in impls:
                e = errors(op, example(op, 2, 200, 6, 24, 40, G=2, dtype=dtype, device=device, decay=decay), impl)
                worst.append(f"{impl} {str(dtype)[6:]} {max(e.values()):.1e} ({max(e, key=e.get)})")
            print(f"{op} decay {'of a model' if decay is None else decay}:".ljust(22), "   ".join(worst), flush=True)
    small = {"gla small": ("gla", 4, 512, 4, 32, 64), "gla small expanded": ("gla", 4, 512, 1, 128, 256),
             "mamba2 small": ("ssd", 4, 512, 8, 64, 64), "mamba2 small expanded": ("ssd", 4, 512, 8, 64, 256)}
    cases, (flops, bandwidth) = CASES if device == "cuda" else small, ceilings(device)
    print(f"\n{flops / 1e12:.2f} TFLOP/s matrix product, {bandwidth / 1e9:.0f} GB/s copy")
    other_lengths = {f"{name} {B} x {T}": (cases[name][0], B, T, *cases[name][3:]) for B, T in ((1, 32768), (64, 512))
                     for name in ("gla-340m", "gla-1.3b expanded", "mamba2-370m", "mamba2-370m expanded") if name in cases}
    bench({**cases, **other_lengths}, device, flops, bandwidth)
    bench_one_token(cases, device, bandwidth)


if __name__ == "__main__":
    main()
