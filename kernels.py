"""The two recurrences of StateX, each spelled three ways: recurrent, chunked, Triton.

Both model families are one recurrence. Per head, with a state S of K x V numbers:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

    gla   Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3): a_t in (0,1]^K, one decay per key channel.
    ssd   Mamba2's state space dual (Dao & Gu, arXiv 2405.21060, eq. 1): a_t one number per head, k = B and q = C are
          shared by all heads of a group, v = dt * x, and a skip D * x is added to the output.

"recurrent" is the definition: a loop over time. "chunked" does the same sums with matrix products and is the fast path
on a CPU. Decays travel as logarithms g = log a <= 0, and no path ever takes the exponential of a positive number, so any
decay is safe: none at all (g = 0) or a state that forgets everything at every step (g = -60).
"""
from __future__ import annotations               # so that tl.constexpr below needs no Triton until a kernel runs

import types

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                              # not on this platform: recurrent and chunked still work
    triton = types.SimpleNamespace(jit=lambda f: f)


def gla(q, k, v, g, scale=None, state=None, impl="auto"):
    """Gated linear attention.

    q, k (B,T,H,K); v (B,T,H,V); g (B,T,H,K) log decays <= 0; state (B,H,K,V) or None for zeros.
    scale multiplies q; K**-0.5 when None.  impl: "recurrent" | "chunked" | "triton" | "auto".
    Returns o (B,T,H,V) in v's dtype and the final state (B,H,K,V) in float32 (float64 when the inputs are).
    Differentiable in q, k, v, g and state, through both results.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = {"recurrent": gla_recurrent, "chunked": gla_chunked, "triton": gla_triton}[pick(impl, q)](
        q, k, v, g, scale, state)
    return o.to(v.dtype), state


def ssd(x, dt, A, B, C, D=None, state=None, impl="auto"):
    """Mamba2's state space recurrence: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.

    x (B,T,H,P); dt (B,T,H) > 0, already through softplus; A (H,) < 0; B, C (B,T,G,N) with G dividing H;
    D (H,) or None; state (B,H,P,N) or None for zeros.  impl as in gla.
    Returns y (B,T,H,P) in x's dtype and the final state (B,H,P,N) in float32 (float64 when the inputs are).
    Differentiable in every tensor, through both results.
    """
    y, state = {"recurrent": ssd_recurrent, "chunked": ssd_chunked, "triton": ssd_triton}[pick(impl, x)](
        x, dt, A, B, C, state)
    if D is not None:
        y = y + D[:, None] * x
    return y.to(x.dtype), state


def pick(impl, x):
    if impl not in ("auto", "recurrent", "chunked", "triton"):
        raise ValueError(f"impl is {impl!r}; expected 'recurrent', 'chunked', 'triton' or 'auto'")
    return impl if impl != "auto" else "triton" if x.is_cuda else "chunked"


def widen(*tensors):
    """The tensors in the arithmetic's dtype: float64 if any of them is, else float32. None stays None."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# recurrent: the definition


def gla_recurrent(q, k, v, g, scale, state):
    q, k, v, g, S = widen(q, k, v, g, state)
    if S is None:
        S = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])                      # (B,H,K,V)
    o = []
    for t in range(q.shape[1]):
        S = g[:, t, :, :, None].exp() * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(o, dim=1), S


def ssd_recurrent(x, dt, A, B, C, state):
    x, dt, A, B, C, S = widen(x, dt, A, B, C, state)
    heads = x.shape[2] // B.shape[2]                                                # heads that share one B and C
    B, C = B.repeat_interleave(heads, dim=2), C.repeat_interleave(heads, dim=2)     # (B,T,H,N)
    if S is None:
        S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])                      # (B,H,P,N)
    y = []
    for t in range(x.shape[1]):
        a = torch.exp(dt[:, t] * A)[:, :, None, None]
        S = a * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]))
    return torch.stack(y, dim=1), S


# ---------------------------------------------------------------------------------------------------------------------
# chunked: matrix products inside chunks of C tokens, one state handed from chunk to chunk


def gla_chunked(q, k, v, g, scale, state, C=32):
    """Inside a chunk, o_i sums q_i . k_j exp(g_{j+1} + ... + g_i) v_j over j <= i, with a decay for every channel.

    Blocks of 1, 2, 4, ... C tokens are merged in pairs. When two neighbours of h tokens merge, the queries of the right
    one meet the keys of the left one, and the decay between them splits at the seam: from key j to the end of the left
    block (`after`), and from the start of the right block to query i (`upto`). Both are sums of g over part of one block,
    so both are <= 0 and exact however large the decay elsewhere is. log2(C) levels, one exponential a token each.
    """
    q, k, v, g, S = widen(q, k, v, g, state)
    (b, T, H, K), V = q.shape, v.shape[-1]
    C = min(C, 1 << (T - 1).bit_length())
    n = -(-T // C)

    def blocks(x):                                        # (B,T,H,D) -> (B,H,T',1,D): padding has k = v = 0 and g = 0
        return F.pad(x, (0, 0, 0, 0, 0, n * C - T)).transpose(1, 2).unsqueeze(-2)

    q, k, v, upto = blocks(q * scale), blocks(k), blocks(v), blocks(g)
    after = torch.zeros_like(upto)
    o = (q * k).sum(-1, keepdim=True) * v
    for _ in range(C.bit_length() - 1):
        (q0, q1), (k0, k1), (v0, v1), (o0, o1), (u0, u1), (a0, a1) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (q, k, v, o, upto, after))       # each (B,H,n,h,D): left, right
        scores = (q1 * u1.exp()) @ (k0 * a0.exp()).mT                                   # (B,H,n,h,h)
        o = torch.cat((o0, o1 + scores @ v0), dim=3)
        upto = torch.cat((u0, u1 + u0[..., -1:, :]), dim=3)
        after = torch.cat((a0 + u1[..., -1:, :], a1), dim=3)
        q, k, v = (x.reshape(*o.shape[:4], -1) for x in (q, k, v))

    q, writes = q * upto.exp(), (k * after.exp()).mT @ v                                    # (B,H,n,K,V) a chunk adds
    decay = upto[..., -1, :, None].exp()                                                    # (B,H,n,K,1) a chunk forgets
    S = q.new_zeros(b, H, K, V) if S is None else S
    before = []
    for c in range(n):
        before.append(S)
        S = decay[:, :, c] * S + writes[:, :, c]
    o = o + q @ torch.stack(before, dim=2)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def ssd_chunked(x, dt, A, B, C, state, L=64):
    """Inside a chunk of L tokens, y_i sums (C_i . B_j) exp(g_{j+1} + ... + g_i) dt_j x_j over j <= i, g = dt A.

    One decay a head: the exponents form an L x L table a head, and C B^T is computed once for all heads of a group.
    The cumulative sums are taken in float64: differences of large float32 sums would lose the small decays.
    """
    x, dt, A, B, C, S = widen(x, dt, A, B, C, state)
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    L = min(L, T)
    n, M = -(-T // L), H // G                                                       # chunks, heads in a group
    pad = n * L - T

    g = F.pad(dt * A, (0, 0, 0, pad)).double().view(b, n, L, G, M).permute(0, 3, 1, 4, 2).cumsum(-1)     # (B,G,n,M,L)
    v = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(b, n, L, G, M, P).permute(0, 3, 1, 4, 2, 5)  # (B,G,n,M,L,P)
    B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(b, n, L, G, N).permute(0, 3, 1, 2, 4) for t in (B, C))   # (B,G,n,L,N)

    later = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)             # key j after query i: not seen
    between = (g[..., :, None] - g[..., None, :]).to(x.dtype).masked_fill(later, -torch.inf)             # i, j
    y = ((C @ B.mT).unsqueeze(3) * between.exp()) @ v                               # (B,G,n,M,L,P)

    to_end = (g[..., -1:] - g).to(x.dtype).exp()[..., None]                         # (B,G,n,M,L,1)
    rows = (to_end * v).transpose(3, 4).reshape(b, G, n, L, M * P)
    writes = (rows.mT @ B).view(b, G, n, M, P, N)
    decay = g[..., -1].to(x.dtype).exp()[..., None, None]                           # (B,G,n,M,1,1)
    S = x.new_zeros(b, G, M, P, N) if S is None else S.view(b, G, M, P, N)
    before = []
    for c in range(n):
        before.append(S)
        S = decay[:, :, c] * S + writes[:, :, c]
    before = torch.stack(before, dim=2).view(b, G, n, M * P, N)
    carried = (C @ before.mT).view(b, G, n, L, M, P).transpose(3, 4)                # (B,G,n,M,L,P)
    y = y + g.to(x.dtype).exp()[..., None] * carried
    return y.permute(0, 2, 4, 1, 3, 5).reshape(b, n * L, H, P)[:, :T], S.view(b, H, P, N)


# ---------------------------------------------------------------------------------------------------------------------
# Triton, gated linear attention
#
# Three launches forward, five backward; each program owns one tile of one chunk of one head, or one tile of a state.
#
#   gla_prepare   q, k, g -> qs = scale q exp(upto), ks = k exp(after), A = the scores inside a chunk, decay of a chunk
#   gla_scan      S_0 = state,  S_{c+1} = decay_c S_c + ks_c^T v_c             stores S_c, the state before chunk c
#   gla_rows      o_c = qs_c S_c + A_c v_c
#
#   gla_scan      dS_{c-1} = decay_c dS_c + qs_c^T do_c, from the last chunk   stores dS_c, the gradient after chunk c
#   gla_rows      dv_c = ks_c dS_c + A_c^T do_c
#   gla_scores    dA_c = do_c v_c^T, lower triangle
#   gla_through   dqs_c = do_c S_c^T,  dks_c = v_c dS_c^T,  and the sums of S_c dS_c over the value channels
#   gla_finish    dq, dk: the above through exp(upto), exp(after), and dA through the scores; dg from all of them
#
# Chunk length C. A stored state costs 2 K V / C numbers a token, written and read; the scores inside a chunk cost about
# 2 C K log2(C) products a token, and the states 4 K V. So C = 64 while a state is small (K V <= 2^15: as many numbers as
# q, k, v, g, o of four tokens), and C = 128 above that: the states' traffic halves, the scores stay a small part.


@triton.jit
def seams(C: tl.constexpr, level: tl.constexpr):
    """Which scores (i, j) of a C x C tile are decided at a level: i in the right half of a block of 2^(level+1) tokens,
    j in its left half. (The levels and the diagonal together make up the lower triangle.)"""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((i >> level) == (j >> level) + 1) & ((i >> (level + 1)) == (j >> (level + 1)))


@triton.jit
def merge(upto, after, level: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """upto (C,BK): sums of g from the start of a block of 2^level tokens to each token, inclusive; after: from each
    token, exclusive, to the block's end. Returns the same for blocks twice as long. Only sums, never differences, so a
    large decay somewhere does not cost the small ones their digits."""
    h: tl.constexpr = 1 << level
    pair: tl.constexpr = (C // (2 * h), 2, h, BK)
    side = tl.arange(0, 2)[None, :, None, None]
    total = tl.reshape(upto + after, pair)
    left = tl.sum(tl.where(side == 0, total, 0.0), axis=1)
    right = tl.sum(tl.where(side == 1, total, 0.0), axis=1)
    upto = tl.reshape(upto, pair) + tl.where(side == 1, tl.expand_dims(left, 1), 0.0)
    after = tl.reshape(after, pair) + tl.where(side == 0, tl.expand_dims(right, 1), 0.0)
    return tl.reshape(upto, (C, BK)), tl.reshape(after, (C, BK))


@triton.jit
def gla_prepare(q, k, g, qs, ks, decay, A, scale, T, n, H, K,
                C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """One program: one chunk of one head. Slices of BK channels; the scores add up over the slices."""
    c, bh = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, C)
    t = c * C + i
    row = ((bh // H).to(tl.int64) * T + t) * H + bh % H
    scores = tl.zeros((C, C), tl.float32)
    for k0 in range(0, K, BK):
        col = k0 + tl.arange(0, BK)
        at, inside = row[:, None] * K + col[None, :], (t < T)[:, None] & (col < K)[None, :]
        qt = tl.load(q + at, inside, 0.0).to(tl.float32) * scale
        kt = tl.load(k + at, inside, 0.0).to(tl.float32)
        upto = tl.load(g + at, inside, 0.0)
        after = tl.zeros((C, BK), tl.float32)
        scores += tl.where(i[:, None] == i[None, :], tl.sum(qt * kt, axis=1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            # A right half's rows are read as queries, a left half's as keys: one exponential serves both.
            e = tl.exp(tl.where((((i >> level) & 1) == 1)[:, None], upto, after))
            s = tl.dot((qt * e).to(q.dtype.element_ty), tl.trans((kt * e).to(q.dtype.element_ty)), input_precision=DOT)
            scores += tl.where(seams(C, level), s, 0.0)
            upto, after = merge(upto, after, level, C, BK)
        tl.store(qs + at, (qt * tl.exp(upto)).to(qs.dtype.element_ty), inside)
        tl.store(ks + at, (kt * tl.exp(after)).to(ks.dtype.element_ty), inside)
        whole = tl.sum(tl.where((i == 0)[:, None], upto + after, 0.0), axis=0)
        tl.store(decay + (bh.to(tl.int64) * n + c) * K + col, tl.exp(whole), col < K)
    tl.store(A + row[:, None] * C + i[None, :], scores.to(A.dtype.element_ty), (t < T)[:, None])


@triton.jit
def gla_scan(x, y, decay, first, S, last, T, n, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             REVERSE: tl.constexpr, FIRST: tl.constexpr, DOT: tl.constexpr):
    """One program: a BK x BV tile of one head's state, carried over all chunks in registers, stored before each."""
    kb, vb, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    col, val, i = kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV), tl.arange(0, C)
    tile = col[:, None] * V + val[None, :]
    inside = (col < K)[:, None] & (val < V)[None, :]
    carry = tl.zeros((BK, BV), tl.float32)
    if FIRST:
        carry += tl.load(first + bh * K * V + tile, inside, 0.0)
    for step in range(n):
        c = n - 1 - step if REVERSE else step
        tl.store(S + (bh * n + c) * K * V + tile, carry.to(S.dtype.element_ty), inside)
        t = c * C + i
        row = ((bh // H) * T + t) * H + bh % H
        xt = tl.load(x + row[None, :] * K + col[:, None], (t < T)[None, :] & (col < K)[:, None], 0.0)     # (BK,C)
        yt = tl.load(y + row[:, None] * V + val[None, :], (t < T)[:, None] & (val < V)[None, :], 0.0)     # (C,BV)
        d = tl.load(decay + (bh * n + c) * K + col, col < K, 0.0)
        carry = tl.dot(xt, yt, carry * d[:, None], input_precision=DOT)
    tl.store(last + bh * K * V + tile, carry, inside)


@triton.jit
def gla_rows(x, S, A, y, out, T, n, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             TRANSPOSE: tl.constexpr, DOT: tl.constexpr):
    """One program: a chunk's rows of the output, BV columns: x S + A y, or x S + A^T y."""
    vb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    val, i = vb * BV + tl.arange(0, BV), tl.arange(0, C)
    t = c * C + i
    row = ((bh // H) * T + t) * H + bh % H
    acc = tl.zeros((C, BV), tl.float32)
    for k0 in range(0, K, BK):
        col = k0 + tl.arange(0, BK)
        xt = tl.load(x + row[:, None] * K + col[None, :], (t < T)[:, None] & (col < K)[None, :], 0.0)
        s = tl.load(S + ((bh * n + c) * K + col[:, None]) * V + val[None, :], (col < K)[:, None] & (val < V)[None, :], 0.0)
        acc = tl.dot(xt, s, acc, input_precision=DOT)
    inside = (t < T)[:, None] & (val < V)[None, :]
    a = tl.load(A + row[:, None] * C + i[None, :], (t < T)[:, None], 0.0)
    yt = tl.load(y + row[:, None] * V + val[None, :], inside, 0.0)
    acc = tl.dot(tl.trans(a) if TRANSPOSE else a, yt, acc, input_precision=DOT)
    tl.store(out + row[:, None] * V + val[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def gla_scores(do, v, dA, T, H, V, C: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr):
    """One program: dA of one chunk of one head."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, C)
    t = c * C + i
    row = ((bh // H) * T + t) * H + bh % H
    acc = tl.zeros((C, C), tl.float32)
    for v0 in range(0, V, BV):
        val = v0 + tl.arange(0, BV)
        at, inside = row[:, None] * V + val[None, :], (t < T)[:, None] & (val < V)[None, :]
        acc = tl.dot(tl.load(do + at, inside, 0.0), tl.trans(tl.load(v + at, inside, 0.0)), acc, input_precision=DOT)
    acc = tl.where(i[:, None] >= i[None, :], acc, 0.0)
    tl.store(dA + row[:, None] * C + i[None, :], acc.to(dA.dtype.element_ty), (t < T)[:, None])


@triton.jit
def gla_through(do, v, S, dS, dqs, dks, both, T, n, H, K, V, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                DOT: tl.constexpr):
    """One program: BK channels of one chunk. What the queries read from S and the keys write to dS."""
    kb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    col, i = kb * BK + tl.arange(0, BK), tl.arange(0, C)
    t = c * C + i
    row = ((bh // H) * T + t) * H + bh % H
    dq, dk = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    sd = tl.zeros((BK,), tl.float32)
    for v0 in range(0, V, BV):
        val = v0 + tl.arange(0, BV)
        at, inside = row[:, None] * V + val[None, :], (t < T)[:, None] & (val < V)[None, :]
        tile = ((bh * n + c) * K + col[:, None]) * V + val[None, :]
        there = (col < K)[:, None] & (val < V)[None, :]
        s, ds = tl.load(S + tile, there, 0.0), tl.load(dS + tile, there, 0.0)
        dq = tl.dot(tl.load(do + at, inside, 0.0), tl.trans(s), dq, input_precision=DOT)
        dk = tl.dot(tl.load(v + at, inside, 0.0), tl.trans(ds), dk, input_precision=DOT)
        sd += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
    at, inside = row[:, None] * K + col[None, :], (t < T)[:, None] & (col < K)[None, :]
    tl.store(dqs + at, dq.to(dqs.dtype.element_ty), inside)
    tl.store(dks + at, dk.to(dks.dtype.element_ty), inside)
    tl.store(both + (bh * n + c) * K + col, sd, col < K)


@triton.jit
def gla_finish(q, k, g, qs, ks, dA, dqs, dks, both, decay, dq, dk, dg, scale, T, n, H, K,
               C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """One program: BK channels of one chunk.

    The weight of key j in query i is exp of the sum of g over j < t <= i, so dg_t adds up (weight x its gradient) over all
    pairs that span t. Pairs inside the chunk: those that end at t or later, less those that begin at t or later; a query
    and the state before the chunk: those that end at t or later; a key and the state after it: those that begin before t;
    the two states: always. The diagonal i = j spans nothing and is left out, else it would drown small gradients."""
    kb, c, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    col, i = kb * BK + tl.arange(0, BK), tl.arange(0, C)
    t = c * C + i
    row = ((bh // H) * T + t) * H + bh % H
    at, inside = row[:, None] * K + col[None, :], (t < T)[:, None] & (col < K)[None, :]
    qt = tl.load(q + at, inside, 0.0).to(tl.float32) * scale
    kt = tl.load(k + at, inside, 0.0).to(tl.float32)
    upto = tl.load(g + at, inside, 0.0)
    after = tl.zeros((C, BK), tl.float32)
    ds = tl.load(dA + row[:, None] * C + i[None, :], (t < T)[:, None], 0.0)
    dqt, dkt = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    for level in tl.static_range(LEVELS):
        e = tl.exp(tl.where((((i >> level) & 1) == 1)[:, None], upto, after))
        d = tl.where(seams(C, level), ds, 0.0).to(ds.dtype)
        dqt += e * tl.dot(d, (kt * e).to(ds.dtype), input_precision=DOT)
        dkt += e * tl.dot(tl.trans(d), (qt * e).to(ds.dtype), input_precision=DOT)
        upto, after = merge(upto, after, level, C, BK)
    pairs = qt * dqt - kt * dkt
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], ds.to(tl.float32), 0.0), axis=1)[:, None]
    from_state, to_state = tl.load(dqs + at, inside, 0.0).to(tl.float32), tl.load(dks + at, inside, 0.0).to(tl.float32)
    pairs += tl.load(qs + at, inside, 0.0).to(tl.float32) * from_state
    tl.store(dq + at, ((dqt + diagonal * kt + tl.exp(upto) * from_state) * scale).to(dq.dtype.element_ty), inside)
    tl.store(dk + at, (dkt + diagonal * qt + tl.exp(after) * to_state).to(dk.dtype.element_ty), inside)
    begun = inside & (i > 0)[:, None]                                     # the key before t, within the chunk
    keys = tl.load(ks + at - H * K, begun, 0.0).to(tl.float32) * tl.load(dks + at - H * K, begun, 0.0).to(tl.float32)
    here = (bh * n + c) * K + col
    always = tl.load(both + here, col < K, 0.0) * tl.load(decay + here, col < K, 0.0)
    tl.store(dg + at, tl.cumsum(pairs, 0, reverse=True) + tl.cumsum(keys, 0) + always[None, :], inside)


def pow2(x, low, high):
    return max(low, min(high, triton.next_power_of_2(x)))


class GLATriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, scale, state):
        (B, T, H, K), V = q.shape, v.shape[-1]
        small = K * V <= 1 << 15
        C = pow2(T, 16, 64 if small else 128)
        n, levels = triton.cdiv(T, C), C.bit_length() - 1
        dot = "tf32x3" if q.dtype == torch.float32 else None
        qs, ks, A = torch.empty_like(q), torch.empty_like(k), q.new_empty(B, T, H, C)
        decay, S = g.new_empty(B, H, n, K), v.new_empty(B, H, n, K, V)
        o, last = torch.empty_like(v), g.new_empty(B, H, K, V)
        BK, BV = pow2(K, 16, 64), pow2(V, 16, 128)
        gla_prepare[(n, B * H)](q, k, g, qs, ks, decay, A, scale, T, n, H, K, C, levels, pow2(K, 16, 32), dot,
                                num_warps=4 if C <= 64 else 8)
        gla_scan[scan_grid := (triton.cdiv(K, BK), triton.cdiv(V, BK), B * H)](
            ks, v, decay, state, S, last, T, n, H, K, V, C, BK, BK, False, state is not None, dot, num_warps=4, num_stages=3)
        gla_rows[(triton.cdiv(V, BV), n, B * H)](qs, S, A, v, o, T, n, H, K, V, C, BK, BV, False, dot,
                                                 num_warps=4 if C <= 64 else 8, num_stages=3)
        ctx.save_for_backward(q, k, v, g, qs, ks, A, decay, S)
        ctx.scale, ctx.C, ctx.dot, ctx.has_state = scale, C, dot, state is not None
        return o, last

    @staticmethod
    def backward(ctx, do, dlast):
        q, k, v, g, qs, ks, A, decay, S = ctx.saved_tensors
        (B, T, H, K), V, C, dot = q.shape, v.shape[-1], ctx.C, ctx.dot
        n, levels, do, dlast = triton.cdiv(T, C), C.bit_length() - 1, do.contiguous(), dlast.contiguous()
        dS, first, dA = torch.empty_like(S), torch.empty_like(dlast), torch.empty_like(A)
        dv, dqs, dks, both = torch.empty_like(v), torch.empty_like(q), torch.empty_like(k), torch.empty_like(decay)
        dq, dk, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
        BK, BV, warps = pow2(K, 16, 64), pow2(V, 16, 128), 4 if C <= 64 else 8
        gla_scan[(triton.cdiv(K, BK), triton.cdiv(V, BK), B * H)](
            qs, do, decay, dlast, dS, first, T, n, H, K, V, C, BK, BK, True, True, dot, num_warps=4, num_stages=3)
        gla_rows[(triton.cdiv(V, BV), n, B * H)](ks, dS, A, do, dv, T, n, H, K, V, C, BK, BV, True, dot,
                                                 num_warps=warps, num_stages=3)
        gla_scores[(n, B * H)](do, v, dA, T, H, V, C, pow2(V, 16, 64), dot, num_warps=warps, num_stages=3)
        BK = pow2(K, 16, 128)
        gla_through[(triton.cdiv(K, BK), n, B * H)](do, v, S, dS, dqs, dks, both, T, n, H, K, V, C, BK, pow2(V, 16, 64),
                                                    dot, num_warps=8, num_stages=2)
        BK = pow2(K, 16, 32)
        gla_finish[(triton.cdiv(K, BK), n, B * H)](q, k, g, qs, ks, dA, dqs, dks, both, decay, dq, dk, dg, ctx.scale,
                                                   T, n, H, K, C, levels, BK, dot, num_warps=warps)
        return dq, dk, dv, dg, None, first if ctx.has_state else None


def gla_triton(q, k, v, g, scale, state):
    dtype = torch.bfloat16 if {q.dtype, k.dtype, v.dtype} == {torch.bfloat16} else torch.float32
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    return GLATriton.apply(q, k, v, g.float().contiguous(), scale, None if state is None else state.float().contiguous())


def ssd_triton(*args):
    raise NotImplementedError
