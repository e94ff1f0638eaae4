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
        x, dt, A, B, C, D, state)
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


def ssd_recurrent(x, dt, A, B, C, D, state):
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    heads = x.shape[2] // B.shape[2]                                                # heads that share one B and C
    B, C = B.repeat_interleave(heads, dim=2), C.repeat_interleave(heads, dim=2)     # (B,T,H,N)
    if S is None:
        S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])                      # (B,H,P,N)
    y = []
    for t in range(x.shape[1]):
        a = torch.exp(dt[:, t] * A)[:, :, None, None]
        S = a * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]))
    y = torch.stack(y, dim=1)
    return y if D is None else y + D[:, None] * x, S


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


def ssd_chunked(x, dt, A, B, C, D, state, L=64):
    """Inside a chunk of L tokens, y_i sums (C_i . B_j) exp(g_{j+1} + ... + g_i) dt_j x_j over j <= i, g = dt A.

    One decay a head: the exponents form an L x L table a head, and C B^T is computed once for all heads of a group.
    The cumulative sums are taken in float64: differences of large float32 sums would lose the small decays.
    """
    x, dt, A, B, C, D, S = widen(x, dt, A, B, C, D, state)
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    L = min(L, T)
    n, M = -(-T // L), H // G                                                       # chunks, heads in a group
    pad = n * L - T

    g = F.pad(dt * A, (0, 0, 0, pad)).double().view(b, n, L, G, M).permute(0, 3, 1, 4, 2).cumsum(-1)     # (B,G,n,M,L)
    v = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(b, n, L, G, M, P).permute(0, 3, 1, 4, 2, 5)  # (B,G,n,M,L,P)
    B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(b, n, L, G, N).permute(0, 3, 1, 2, 4) for t in (B, C))   # (B,G,n,L,N)

    # Keys after the query are not seen. The query's own key (the diagonal) has no decay: kept out of the exponentials,
    # where its large gradient would cancel only to rounding.
    unseen = torch.ones(L, L, dtype=torch.bool, device=x.device).triu()
    between = (g[..., :, None] - g[..., None, :]).to(x.dtype).masked_fill(unseen, -torch.inf)            # i, j
    y = ((C @ B.mT).unsqueeze(3) * between.exp()) @ v + (C * B).sum(-1)[:, :, :, None, :, None] * v      # (B,G,n,M,L,P)

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
    y = y.permute(0, 2, 4, 1, 3, 5).reshape(b, n * L, H, P)[:, :T]
    return y if D is None else y + D[:, None] * x, S.view(b, H, P, N)


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


# ---------------------------------------------------------------------------------------------------------------------
# Triton, Mamba2's state space recurrence
#
# Three launches forward, five backward. One decay a head, so the scores inside a chunk are a table C B^T, shared by all
# heads of a group, times a table of decays W_ij = exp(g_{j+1} + ... + g_i) for each head, with g = dt A and v = dt x.
#
#   ssd_prepare   CB_c = C_c B_c^T, and cum = the sums of g from the start of the chunk, as hi + lo
#   ssd_scan      S_0 = state,  S_{c+1} = decay_c S_c + (to_end v)^T B         stores S_c, the state before chunk c
#   ssd_rows      y = exp(cum) (C S_c^T) + (CB W) v + D x
#
#   ssd_scan      dS_{c-1} = decay_c dS_c + (exp(cum) dy)^T C                  stores dS_c, the gradient after chunk c
#   ssd_rows      dv = to_end (B dS_c^T) + (CB W)^T dy; from it dx, D's and dt's parts
#   ssd_scores    dCB = sum over heads of W (dy v^T), and for each head its sums along rows and columns
#   ssd_through   dC = sum over heads of exp(cum) dy S_c + dCB B,  dB = the same of to_end v dS_c + dCB^T C
#   ssd_finish    dg from the sums over all pairs that span a token, as in gla_finish; then d(dt) and dA
#
# Chunk length L = 128: the table of decays costs L exponentials a token and head, a stored state 2 N P / L numbers.
# cum is a float64 sum kept as two float32: a difference of two large sums then keeps the digits of the small decays.


@triton.jit
def ssd_prepare(B, C, dt, A, CB, hi, lo, T, G, N, H, L: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
                DOT: tl.constexpr):
    """One program: one chunk of one group. dt is (B,T,H); hi, lo are (B,H,T); CB is (B,T,G,L)."""
    c, bg = tl.program_id(0), tl.program_id(1)
    b, group, i = (bg // G).to(tl.int64), bg % G, tl.arange(0, L)
    t = c * L + i
    row = (b * T + t) * G + group
    acc = tl.zeros((L, L), tl.float32)
    for n0 in range(0, N, BN):
        col = n0 + tl.arange(0, BN)
        at, inside = row[:, None] * N + col[None, :], (t < T)[:, None] & (col < N)[None, :]
        acc = tl.dot(tl.load(C + at, inside, 0.0), tl.trans(tl.load(B + at, inside, 0.0)), acc, input_precision=DOT)
    acc = tl.where(i[:, None] >= i[None, :], acc, 0.0)
    tl.store(CB + row[:, None] * L + i[None, :], acc.to(CB.dtype.element_ty), (t < T)[:, None])
    for h0 in range(0, H // G, BH):
        of_group = h0 + tl.arange(0, BH)
        h = group * (H // G) + of_group
        inside = (t < T)[:, None] & (of_group < H // G)[None, :]
        g = tl.load(dt + ((b * T + t) * H)[:, None] + h[None, :], inside, 0.0) * tl.load(A + h, of_group < H // G, 0.0)[None, :]
        cum = tl.cumsum(g.to(tl.float64), 0)
        at = (b * H + h)[None, :] * T + t[:, None]
        tl.store(hi + at, cum.to(tl.float32), inside)
        tl.store(lo + at, (cum - cum.to(tl.float32).to(tl.float64)).to(tl.float32), inside)


@triton.jit
def ssd_decays(hi, lo, dt, b, h, c, T, H, L: tl.constexpr):
    """A chunk's cum as (hi, lo), dt, and to_end_j = exp(g_{j+1} + ... to the chunk's end), (L,) each, for one head."""
    t = c * L + tl.arange(0, L)
    at = (b * H + h) * T + tl.minimum(t, T - 1)                             # past the end, the sums stay as they are
    cum_hi, cum_lo = tl.load(hi + at), tl.load(lo + at)
    end = (b * H + h) * T + tl.minimum(c * L + L, T) - 1
    to_end = tl.exp((tl.load(hi + end) - cum_hi) + (tl.load(lo + end) - cum_lo))
    return cum_hi, cum_lo, tl.load(dt + (b * T + t) * H + h, t < T, 0.0), to_end


@triton.jit
def ssd_table(hi, lo, L: tl.constexpr):
    """W_ij = exp(g_{j+1} + ... + g_i) for i >= j, else 0."""
    between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
    return tl.exp(tl.where(tl.arange(0, L)[:, None] >= tl.arange(0, L)[None, :], between, float("-inf")))


@triton.jit
def ssd_scan(x, y, dt, hi, lo, first, S, last, T, n, H, G, P, N,
             L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
             DOT: tl.constexpr):
    """One program: BN columns of one head's state, carried over all chunks in registers, stored before each.
    x is x or dy (B,T,H,P), y is B or C (B,T,G,N)."""
    nb, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, col, i = tl.arange(0, BP), nb * BN + tl.arange(0, BN), tl.arange(0, L)
    tile, inside = p[:, None] * N + col[None, :], (p < P)[:, None] & (col < N)[None, :]
    carry = tl.zeros((BP, BN), tl.float32)
    if FIRST:
        carry += tl.load(first + (b * H + h) * P * N + tile, inside, 0.0)
    for step in range(n):
        c = n - 1 - step if REVERSE else step
        tl.store(S + ((b * H + h) * n + c) * P * N + tile, carry.to(S.dtype.element_ty), inside)
        t = c * L + i
        cum, cum_lo, dts, to_end = ssd_decays(hi, lo, dt, b, h, c, T, H, L)
        weight = tl.exp(cum) if REVERSE else to_end * dts
        xt = tl.load(x + (((b * T + t) * H + h) * P)[None, :] + p[:, None], (t < T)[None, :] & (p < P)[:, None], 0.0)
        yt = tl.load(y + (((b * T + t) * G + h // (H // G)) * N)[:, None] + col[None, :],
                     (t < T)[:, None] & (col < N)[None, :], 0.0)
        whole = tl.exp(tl.load(hi + (b * H + h) * T + tl.minimum(c * L + L, T) - 1))
        carry = tl.dot((xt.to(tl.float32) * weight[None, :]).to(yt.dtype), yt, carry * whole, input_precision=DOT)
    tl.store(last + (b * H + h) * P * N + tile, carry, inside)


@triton.jit
def ssd_rows(z, S, CB, x, dy, dt, hi, lo, D, out, ddt, keys, dD, T, n, H, G, P, N,
             L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BACKWARD: tl.constexpr, SKIP: tl.constexpr,
             DOT: tl.constexpr):
    """One program: one chunk of one head. Forward z is C and out is y; backward z is B, S is dS and out is dx, with
    ddt = sum_p x dv (B,H,T), keys = sum_p v (dv through the state) (B,H,T) and dD = sum_tp dy x (B,H,n)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, i = tl.arange(0, BP), tl.arange(0, L)
    t = c * L + i
    row = (b * T + t) * G + h // (H // G)
    acc = tl.zeros((L, BP), tl.float32)
    for n0 in range(0, N, BN):
        col = n0 + tl.arange(0, BN)
        zt = tl.load(z + row[:, None] * N + col[None, :], (t < T)[:, None] & (col < N)[None, :], 0.0)
        s = tl.load(S + (((b * H + h) * n + c) * P + p[None, :]) * N + col[:, None], (p < P)[None, :] & (col < N)[:, None], 0.0)
        acc = tl.dot(zt, s, acc, input_precision=DOT)
    cum, cum_lo, dts, to_end = ssd_decays(hi, lo, dt, b, h, c, T, H, L)
    at, inside = (((b * T + t) * H + h) * P)[:, None] + p[None, :], (t < T)[:, None] & (p < P)[None, :]
    xt = tl.load(x + at, inside, 0.0)
    cb = tl.load(CB + row[:, None] * L + i[None, :], (t < T)[:, None], 0.0)
    w = (cb.to(tl.float32) * ssd_table(cum, cum_lo, L)).to(cb.dtype)
    if BACKWARD:
        dyt = tl.load(dy + at, inside, 0.0)
        v = xt.to(tl.float32) * dts[:, None]
        acc = acc * to_end[:, None]
        tl.store(keys + (b * H + h) * T + t, tl.sum(v * acc, axis=1), t < T)
        acc = tl.dot(tl.trans(w), dyt, acc, input_precision=DOT)                        # dv
        tl.store(ddt + (b * H + h) * T + t, tl.sum(xt.to(tl.float32) * acc, axis=1), t < T)
        acc = acc * dts[:, None]
        if SKIP:
            acc += tl.load(D + h) * dyt.to(tl.float32)
            tl.store(dD + (b * H + h) * n + c, tl.sum(tl.sum(xt.to(tl.float32) * dyt.to(tl.float32), axis=1), axis=0))
    else:
        v = (xt.to(tl.float32) * dts[:, None]).to(xt.dtype)
        acc = tl.dot(w, v, acc * tl.exp(cum)[:, None], input_precision=DOT)
        if SKIP:
            acc += tl.load(D + h) * xt.to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), inside)


@triton.jit
def ssd_scores(x, dy, dt, hi, lo, CB, dCB, pairs, T, H, G, P, L: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr):
    """One program: one chunk of one group, its heads in turn. dCB (B,T,G,L) sums over the heads; pairs (B,H,T) is, for
    each head, the sum of weight x gradient over pairs that end at t less those that begin at t."""
    c, bg = tl.program_id(0), tl.program_id(1)
    b, group, i, p = (bg // G).to(tl.int64), bg % G, tl.arange(0, L), tl.arange(0, BP)
    t = c * L + i
    row = (b * T + t) * G + group
    cb = tl.load(CB + row[:, None] * L + i[None, :], (t < T)[:, None], 0.0)
    acc = tl.zeros((L, L), tl.float32)
    for m in range(H // G):
        h = group * (H // G) + m
        cum, cum_lo, dts, to_end = ssd_decays(hi, lo, dt, b, h, c, T, H, L)
        at, inside = (((b * T + t) * H + h) * P)[:, None] + p[None, :], (t < T)[:, None] & (p < P)[None, :]
        dyt, xt = tl.load(dy + at, inside, 0.0), tl.load(x + at, inside, 0.0)
        v = (xt.to(tl.float32) * dts[:, None]).to(xt.dtype)
        d = tl.dot(dyt, tl.trans(v), input_precision=DOT) * ssd_table(cum, cum_lo, L)
        acc += d
        # The diagonal spans nothing. The two sums nearly cancel in ssd_finish: float64 for float32 inputs.
        d = tl.where(i[:, None] > i[None, :], d * cb.to(tl.float32), 0.0).to(pairs.dtype.element_ty)
        tl.store(pairs + (b * H + h) * T + t, tl.sum(d, axis=1) - tl.sum(d, axis=0), t < T)
    tl.store(dCB + row[:, None] * L + i[None, :], acc.to(dCB.dtype.element_ty), (t < T)[:, None])


@triton.jit
def ssd_through(x, dy, B, C, dt, hi, lo, S, dS, dCB, dB, dC, queries, both, T, n, H, G, P, N,
                L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr):
    """One program: BN columns of one chunk of one group, its heads in turn. For every head also the part of
    queries = sum_n C (dC through the state) (blocks of N, B,H,T) and both = sum S dS (blocks of N, B,H,n)."""
    nb, c, bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, group, i, p, col = (bg // G).to(tl.int64), bg % G, tl.arange(0, L), tl.arange(0, BP), nb * BN + tl.arange(0, BN)
    t = c * L + i
    row = (b * T + t) * G + group
    wide, inside = row[:, None] * N + col[None, :], (t < T)[:, None] & (col < N)[None, :]
    ct, bt = tl.load(C + wide, inside, 0.0), tl.load(B + wide, inside, 0.0)
    d = tl.load(dCB + row[:, None] * L + i[None, :], (t < T)[:, None], 0.0)
    dc, db = tl.dot(d, bt, input_precision=DOT), tl.dot(tl.trans(d), ct, input_precision=DOT)
    batch = tl.num_programs(2) // G
    for m in range(H // G):
        h = group * (H // G) + m
        cum, cum_lo, dts, to_end = ssd_decays(hi, lo, dt, b, h, c, T, H, L)
        at, there = (((b * T + t) * H + h) * P)[:, None] + p[None, :], (t < T)[:, None] & (p < P)[None, :]
        dyt, xt = tl.load(dy + at, there, 0.0), tl.load(x + at, there, 0.0)
        tile = (((b * H + h) * n + c) * P + p[:, None]) * N + col[None, :]
        s = tl.load(S + tile, (p < P)[:, None] & (col < N)[None, :], 0.0)
        ds = tl.load(dS + tile, (p < P)[:, None] & (col < N)[None, :], 0.0)
        read = tl.dot((dyt.to(tl.float32) * tl.exp(cum)[:, None]).to(dyt.dtype), s, input_precision=DOT)
        dc += read
        tl.store(queries + ((nb * batch + b) * H + h) * T + t, tl.sum(read * ct.to(tl.float32), axis=1), t < T)
        db = tl.dot((xt.to(tl.float32) * (to_end * dts)[:, None]).to(xt.dtype), ds, db, input_precision=DOT)
        tl.store(both + ((nb * batch + b) * H + h) * n + c,
                 tl.sum(tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1), axis=0))
    tl.store(dC + wide, dc.to(dC.dtype.element_ty), inside)
    tl.store(dB + wide, db.to(dB.dtype.element_ty), inside)


@triton.jit
def ssd_finish(queries, keys, pairs, both, hi, dt, A, ddt_x, ddt, dA, T, n, H, blocks, L: tl.constexpr):
    """One program: one chunk of one head: dg, and from g = dt A the gradients of dt (B,T,H) and A (B,H,n)."""
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, L)
    t = c * L + i
    here, heads = bh * T + t, tl.num_programs(1)
    ends, always = tl.load(pairs + here, t < T, 0.0), 0.0
    for nb in range(blocks):
        ends += tl.load(queries + nb * heads * T + here, t < T, 0.0)
        always += tl.load(both + (nb * heads + bh) * n + c)
    always = always * tl.exp(tl.load(hi + bh * T + tl.minimum(c * L + L, T) - 1))
    begun = tl.load(keys + here - 1, (t < T) & (i > 0), 0.0)
    dg = tl.cumsum(ends, 0, reverse=True) + tl.cumsum(begun, 0) + always
    at = ((bh // H) * T + t) * H + bh % H
    tl.store(ddt + at, tl.load(ddt_x + here, t < T, 0.0) + dg * tl.load(A + bh % H), t < T)
    tl.store(dA + bh * n + c, tl.sum(tl.where(t < T, dg * tl.load(dt + at, t < T, 0.0), 0.0), axis=0))


class SSDTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state):
        (b, T, H, P), (G, N) = x.shape, B.shape[2:]
        L = pow2(T, 16, 128)
        n, BP, BN = triton.cdiv(T, L), pow2(P, 16, 128), pow2(N, 16, 64)
        dot = "tf32x3" if x.dtype == torch.float32 else None
        CB, hi, lo = x.new_empty(b, T, G, L), dt.new_empty(b, H, T), dt.new_empty(b, H, T)
        S, last, y = x.new_empty(b, H, n, P, N), dt.new_empty(b, H, P, N), torch.empty_like(x)
        ssd_prepare[(n, b * G)](B, C, dt, A, CB, hi, lo, T, G, N, H, L, BN, 16, dot, num_warps=8)
        ssd_scan[(triton.cdiv(N, BN), H, b)](x, B, dt, hi, lo, state, S, last, T, n, H, G, P, N, L, BP, BN, False,
                                             state is not None, dot, num_warps=4, num_stages=3)
        ssd_rows[(H, n, b)](C, S, CB, x, None, dt, hi, lo, D, y, None, None, None, T, n, H, G, P, N, L, BP, BN, False,
                            D is not None, dot, num_warps=4, num_stages=3)
        ctx.save_for_backward(x, dt, A, B, C, D, CB, hi, lo, S)
        ctx.L, ctx.dot, ctx.has_state = L, dot, state is not None
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, CB, hi, lo, S = ctx.saved_tensors
        (b, T, H, P), (G, N), L, dot = x.shape, B.shape[2:], ctx.L, ctx.dot
        n, BP, BN, dy, dlast = triton.cdiv(T, L), pow2(P, 16, 128), pow2(N, 16, 64), dy.contiguous(), dlast.contiguous()
        blocks = triton.cdiv(N, BN)
        dS, first, dx, dCB = torch.empty_like(S), torch.empty_like(dlast), torch.empty_like(x), torch.empty_like(CB)
        dB, dC, ddt = torch.empty_like(B), torch.empty_like(C), torch.empty_like(dt)
        ddt_x, keys, queries = (hi.new_empty(m * b, H, T) for m in (1, 1, blocks))
        pairs = torch.empty_like(hi, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32)
        both, dA, dD = (hi.new_empty(m * b, H, n) for m in (blocks, 1, 1))
        ssd_scan[(blocks, H, b)](dy, C, dt, hi, lo, dlast, dS, first, T, n, H, G, P, N, L, BP, BN, True, True, dot,
                                 num_warps=4, num_stages=3)
        ssd_rows[(H, n, b)](B, dS, CB, x, dy, dt, hi, lo, D, dx, ddt_x, keys, dD, T, n, H, G, P, N, L, BP, BN, True,
                            D is not None, dot, num_warps=4, num_stages=3)
        ssd_scores[(n, b * G)](x, dy, dt, hi, lo, CB, dCB, pairs, T, H, G, P, L, BP, dot, num_warps=8, num_stages=2)
        ssd_through[(blocks, n, b * G)](x, dy, B, C, dt, hi, lo, S, dS, dCB, dB, dC, queries, both, T, n, H, G, P, N,
                                        L, BP, BN, dot, num_warps=8, num_stages=2)
        ssd_finish[(n, b * H)](queries, keys, pairs, both, hi, dt, A, ddt_x, ddt, dA, T, n, H, blocks, L, num_warps=4)
        return (dx, ddt, dA.sum((0, 2)), dB, dC, dD.sum((0, 2)) if D is not None else None,
                first if ctx.has_state else None)


def ssd_triton(x, dt, A, B, C, D, state):
    dtype = torch.bfloat16 if {x.dtype, B.dtype, C.dtype} == {torch.bfloat16} else torch.float32
    x, B, C = (t.to(dtype).contiguous() for t in (x, B, C))
    dt, A, D, state = (None if t is None else t.float().contiguous() for t in (dt, A, D, state))
    return SSDTriton.apply(x, dt, A, B, C, D, state)


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


def errors(op, args, impl, reference=None):
    """||x - ref|| / ||ref|| of the output, the final state and every gradient, against the recurrent form in float64.
    The gradient that arrives is random, in the output and in the final state."""
    def everything(impl, dtype):
        inputs = [a.detach().to(dtype or a.dtype).requires_grad_() for a in args]
        o, s = run(op, inputs, impl)
        rng = torch.Generator().manual_seed(1)
        do, ds = (torch.randn(x.shape, generator=rng).to(x) for x in (o, s))
        return [o, s, *torch.autograd.grad([o, s], inputs, [do, ds])]
    names = "o state dq dk dv dg dstate" if op == "gla" else "y state dx ddt dA dB dC dD dstate"
    pairs = zip(everything(impl, None), reference or everything("recurrent", torch.float64))
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


def bench(cases, device):
    flops, bandwidth = ceilings(device)
    print(f"\n{flops / 1e12:.2f} TFLOP/s matrix product, {bandwidth / 1e9:.0f} GB/s copy")
    print(f"{'case':22s} {'B T H K V (ssd: P N)':24s} {'impl':10s} {'fwd ms':>8s} {'x floor':>8s} {'fwd+bwd':>8s} {'x floor':>8s} {'GB':>7s}")
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
                print(f"{name:22s} {f'{B} {T} {H} {K} {V}':24s} {impl:10s} {forward:8.3f} {forward / floor:8.1f} {total:8.3f} {total / 3 / floor:8.1f} {peak:7.2f}", flush=True)
            except Exception as e:
                print(f"{name:22s} {impl:10s} failed: {' '.join(str(e).split())[:150]}", flush=True)


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
    bench(CASES if device == "cuda" else small, device)


if __name__ == "__main__":
    main()
