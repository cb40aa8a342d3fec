"""Exact retrieval of the topk best rows of a bank on the GPU; the proof of every bound is in docs/bank_retrieval.md.

``_measure_bank_kernel``   bounds of the norm and of what rounding takes from it, for every 128 bank rows; rounded rows
``_group_maxima_kernel``   a tile of queries times 128 bank rows; of a group of rows only the two best scores leave
``_candidates_kernel``     a bar that topk exact scores reach, and the rows that may reach it
``_candidate_scores_kernel``  their exact scores
``_search_all_kernel``     queries with too many candidates: every row by its exact score
``_order_kernel``          the place of a candidate is the number of better ones
``_weigh_rows_kernel``     softmax and weighted sum of the kept rows, which are copied for backward on the way

Exact scores are sums in float32 in one order, whatever the call: ``exact_scores`` has one tile size everywhere.
They are compared as ``ranking`` values: NaN scores are -inf, pairs that are not valid are NaN.
queries, keys, values: (pointer, stride of row).  rules: (queries, bank rows, count or None, mask or None, its strides
of query and row, exclude or None).
"""

import triton
import triton.language as tl

from .tiles import INF, load_rows, narrow, ordered, product, ranking, search, unordered, wide

ROWS = tl.constexpr(128)  # of the bank in a tile
TAME = tl.constexpr(3e38)  # a score beyond it, or NaN, says nothing
HUGE = tl.constexpr(1e15)  # a norm beyond it might have let something overflow


@triton.jit
def total_of(x):
    """The sum of a vector, by way of a matrix like ``tiles.greatest``."""
    return tl.sum(x[:, None])


# Which pairs are valid.


@triton.jit
def limit_of(rules):
    """Bank rows from this one on are not valid."""
    limit = tl.full([], 0, tl.int32) + rules[1]
    if rules[2] is not None:
        limit = tl.minimum(tl.maximum(tl.load(rules[2]), 0), limit.to(tl.int64)).to(tl.int32)
    return limit


@triton.jit
def allowed(rules, limit, b, rows):
    """Whether query b may read the row; b and rows broadcast."""
    ok = (b < rules[0]) & (rows >= 0) & (rows < limit)
    if rules[3] is not None:
        at = b.to(tl.int64) * rules[4] + rows.to(tl.int64) * rules[5]
        ok = ok & (tl.load(rules[3] + at, mask=ok, other=0) != 0)
    if rules[6] is not None:
        ok = ok & (tl.load(rules[6] + b, mask=b < rules[0], other=-1) != rows)
    return ok


# Bounds. Squares in float32 err and vanish; so much more is surely more.


@triton.jit
def length(squares, WIDTH: tl.constexpr):
    """An upper bound of a norm, from the sum of squares in float32."""
    return tl.sqrt(squares) * (1.0 + (2.0 * WIDTH + 16.0) * 5.9604645e-8) + 1e-19 * (WIDTH + 1.0)


@triton.jit
def margin_of(norm, residue, tile, measures, inside, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """How far the scores of a query with this norm may be off in a tile; infinite where nothing is known."""
    rows_norm = tl.load(measures[0] + tile, mask=inside, other=0.0)
    margin = norm * rows_norm * (4.0 * (WIDTH + 16.0) * 1.1920929e-7) + 4.0 * (WIDTH + 16.0) * 1.1754944e-38
    if measures[1] is not None:
        rows_residue = tl.load(measures[1] + tile, mask=inside, other=0.0)
        margin += norm * rows_residue + residue * (rows_norm + rows_residue)
    if not EXACT:
        margin = tl.zeros_like(margin)
    return tl.where((norm < HUGE) & (rows_norm < HUGE), margin, INF)


@triton.jit
def _measure_bank_kernel(
    keys, low, norms, residues, first_tile, rows_in_all, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """norms, residues: for every 128 rows.  low: None, or (pointer, stride) of the rounded rows, row 0 being the first
    row of ``first_tile``."""
    tile = tl.program_id(0)
    rows = (first_tile + tile) * ROWS + tl.arange(0, ROWS)
    squares, errors = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = wide(load_rows(keys[0], keys[1], rows, rows_in_all, start, WIDTH, BLOCK_D))
        squares += tl.sum(x * x, 1)
        if low is not None:
            rounded = narrow(x, low[0].dtype.element_ty)
            error = x - wide(rounded)
            errors += tl.sum(error * error, 1)
            to = low[0] + (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None] * low[1] + d[None, :]
            tl.store(to, rounded, mask=(rows[:, None] < rows_in_all) & (d[None, :] < WIDTH))
    store_measures(norms, residues if low is not None else None, first_tile + tile, squares, errors, WIDTH)


@triton.jit
def store_measures(norms, residues, tile, squares, errors, WIDTH: tl.constexpr):
    """The largest of a tile; a NaN is infinite."""
    norm = length(squares, WIDTH)
    tl.store(norms + tile, tl.max(tl.where(norm == norm, norm, INF), 0))
    if residues is not None:
        residue = length(errors, WIDTH)
        tl.store(residues + tile, tl.max(tl.where(residue == residue, residue, INF), 0))


# First pass. A group is every LANES-th row of TILES * 128 rows. A score carries its place in the group in its low bits,
# which costs less precision than the margin allows for.


@triton.jit
def packed(scores, ok, place, GROUP: tl.constexpr):
    """Scores that name their place; +inf where the score says nothing, -inf where the pair is not valid."""
    bits = (scores.to(tl.int32, bitcast=True) & -GROUP) | place
    tame = tl.abs(scores) < TAME
    return tl.where(ok, tl.where(tame, bits.to(tl.float32, bitcast=True), INF), -INF)


@triton.jit
def short_scores(queries, keys, rows, n_rows, cols, n_cols, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """fp32 <query, row> [R, 128] of a few queries, without a matrix product, and the squares of the rows [128]."""
    total = tl.zeros([BLOCK_R, ROWS, BLOCK_D], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        x = wide(load_rows(queries[0], queries[1], rows, n_rows, start, WIDTH, BLOCK_D))
        y = wide(load_rows(keys[0], keys[1], cols, n_cols, start, WIDTH, BLOCK_D))
        total += x[:, None, :] * y[None, :, :]
        squares += y * y
    return tl.sum(total, 2), tl.sum(squares, 1)


@triton.jit
def long_scores(held, queries, keys, rows, n_rows, cols, n_cols, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """fp32 <query, row> [R, 128] by matrix products; queries of float32 make float32 of the rows.  held: the queries in
    pieces of BLOCK_D elements, or None where they are too wide to be held."""
    total = tl.zeros([BLOCK_R, ROWS], tl.float32)
    if held is not None:
        for i in tl.static_range((WIDTH + BLOCK_D - 1) // BLOCK_D):
            y = load_rows(keys[0], keys[1], cols, n_cols, i * BLOCK_D, WIDTH, BLOCK_D)
            total = product(held[i], tl.trans(y), total)
    else:
        for start in range(0, WIDTH, BLOCK_D):
            x = load_rows(queries[0], queries[1], rows, n_rows, start, WIDTH, BLOCK_D)
            y = load_rows(keys[0], keys[1], cols, n_cols, start, WIDTH, BLOCK_D)
            if x.dtype != y.dtype:
                y = wide(y)
            total = product(x, tl.trans(y), total)
    return total


@triton.jit
def _group_maxima_kernel(
    queries, keys, rules, norms, maxima, groups, first_tile, last_tile, per_program, blocks,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    FEW: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """maxima [B, 2, groups]: largest and second largest score of every group.  keys begin with the rows of
    ``first_tile``.  norms: None, or, where FEW is set, what is measured
    on the way."""
    task = tl.program_id(0)
    block = task % blocks
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    limit = limit_of(rules)
    begin = first_tile + task // blocks * per_program
    end = tl.minimum(tl.minimum(begin + per_program, last_tile), tl.cdiv(limit, ROWS))
    n_cols = rules[1] - first_tile * ROWS
    lane = tl.arange(0, LANES)
    best, second = tl.full([BLOCK_R, LANES], -INF, tl.float32), tl.full([BLOCK_R, LANES], -INF, tl.float32)
    held = None
    if HELD:
        held = (load_rows(queries[0], queries[1], rows, rules[0], 0, WIDTH, BLOCK_D),)
        for i in tl.static_range(1, (WIDTH + BLOCK_D - 1) // BLOCK_D):
            held = held + (load_rows(queries[0], queries[1], rows, rules[0], i * BLOCK_D, WIDTH, BLOCK_D),)
    for tile in range(begin, end):
        col = tl.arange(0, ROWS)
        cols = col + (tile - first_tile) * ROWS
        if FEW:
            total, squares = short_scores(queries, keys, rows, rules[0], cols, n_cols, WIDTH, BLOCK_R, BLOCK_D)
            if block == 0:
                store_measures(norms, None, tile, squares, None, WIDTH)
        else:
            total = long_scores(held, queries, keys, rows, rules[0], cols, n_cols, WIDTH, BLOCK_R, BLOCK_D)
        ok = allowed(rules, limit, rows[:, None], col[None, :] + tile * ROWS)
        place = tile % TILES * (ROWS // LANES) + col // LANES
        score = packed(total, ok, place[None, :], TILES * ROWS // LANES)
        # The rows of a group lie in the registers of one thread: no two threads have to meet.
        score = tl.reshape(score, [BLOCK_R, ROWS // LANES, LANES])
        top = tl.max(score, 1)
        rest = tl.max(tl.where(score == top[:, None, :], -INF, score), 1)
        if TILES > 1:
            fresh = tile % TILES == 0
            best, second = tl.where(fresh, -INF, best), tl.where(fresh, -INF, second)
            second = tl.maximum(tl.minimum(best, top), tl.maximum(second, rest))
            best = tl.maximum(best, top)
        else:
            best, second = top, rest
        to = rows.to(tl.int64)[:, None] * (2 * groups) + (tile // TILES * LANES + lane)[None, :]
        tl.store(maxima + to, best, mask=rows[:, None] < rules[0])
        tl.store(maxima + groups + to, second, mask=rows[:, None] < rules[0])


# Second pass.


@triton.jit
def group_bounds(maxima, g, inside, norm, residue, measures, tiles, WIDTH: tl.constexpr, TILES: tl.constexpr,
                 LANES: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """(largest score of each group, how far it may be off)."""
    score = tl.load(maxima + g, mask=inside, other=-INF)
    first = g // LANES * TILES
    margin = margin_of(norm, residue, first, measures, inside, WIDTH, EXACT)
    for u in tl.static_range(1, TILES):
        other = margin_of(norm, residue, first + u, measures, inside & (first + u < tiles), WIDTH, EXACT)
        margin = tl.maximum(margin, other)
    return score, margin


@triton.jit
def _candidates_kernel(
    queries, low, rules, measures, maxima, found, counts, groups, topk,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr,
    BUCKETS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """found [B, CAPACITY]: rows that may be among the topk best; counts [B]: how many, or -1 where they are too many.

    measures: (norms, residues or None) of tiles.  low: None, or the rounded queries.
    """
    GROUP: tl.constexpr = TILES * ROWS // LANES
    SLACK: tl.constexpr = GROUP * 2.4e-7  # twice what the place in the low bits may change
    b = tl.program_id(0).to(tl.int64)
    squares, errors = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = wide(tl.load(queries[0] + b * queries[1] + d, mask=d < WIDTH, other=0.0))
        squares += x * x
        if low is not None:
            error = x - wide(tl.load(low[0] + b * low[1] + d, mask=d < WIDTH, other=0.0))
            errors += error * error
    norm = length(tl.sum(squares[None, :], 1)[:, None], WIDTH)
    residue = length(tl.sum(errors[None, :], 1)[:, None], WIDTH)
    limit = limit_of(rules)
    tiles = tl.cdiv(limit, ROWS)
    n = tl.cdiv(tiles, TILES) * LANES
    tops, seconds = maxima + b * (2 * groups), maxima + b * (2 * groups) + groups

    # The topk-th best of lower bounds that belong to different rows: of the best of each group, thinned out to BUCKETS.
    place = tl.arange(0, BUCKETS)[None, :]
    lowest = tl.full([1, BUCKETS], -INF, tl.float32)
    for start in range(0, n, BUCKETS):
        g = start + place
        score, margin = group_bounds(tops, g, g < n, norm, residue, measures, tiles, WIDTH, TILES, LANES, EXACT)
        lower = score - (margin + tl.abs(score) * SLACK)
        usable = (tl.abs(score) < INF) & (margin < INF)
        lowest = tl.maximum(lowest, tl.where(usable, lower, -INF))
    rank = tl.where(lowest > -INF, lowest, float("nan"))
    bar, count, _ = search(rank, topk, topk + topk // 8, False)
    bar = tl.where(count >= topk, bar, -INF)[:, None]

    filled = tl.full([1], 0, tl.int32)
    for start in range(0, n, BUCKETS):
        g = start + place
        score, margin = group_bounds(tops, g, g < n, norm, residue, measures, tiles, WIDTH, TILES, LANES, EXACT)
        second = tl.load(seconds + g, mask=g < n, other=-INF)
        # Written so that a NaN of an infinite margin is a candidate.
        some = (score > -INF) & ~(score + (margin + tl.abs(score) * SLACK) < bar)
        every = (second > -INF) & ~(second + (margin + tl.abs(second) * SLACK) < bar)
        every = some & (every | (score == INF) | ~(margin < INF))
        number = tl.where(every, GROUP, some.to(tl.int32))
        slot = filled[:, None] + tl.cumsum(number, 1) - number
        row = g // LANES * (TILES * ROWS) + g % LANES
        named = score.to(tl.int32, bitcast=True) & (GROUP - 1)
        tl.store(found + b * CAPACITY + slot, row + named * LANES, mask=some & ~every & (slot < CAPACITY))
        if tl.max(every.to(tl.int32)) > 0:
            for j in range(GROUP):
                tl.store(found + b * CAPACITY + slot + j, row + j * LANES, mask=every & (slot + j < CAPACITY))
        filled += tl.sum(number, 1)
        filled = tl.minimum(filled, CAPACITY + 1)
    tl.store(counts + b + tl.arange(0, 1), tl.where(filled > CAPACITY, -1, filled))


@triton.jit
def sum_of(x, AXIS: tl.constexpr, HALVINGS: tl.constexpr):
    """The sum of a matrix over an axis of 2^HALVINGS elements: halves are added, so that its order is that of the axis,
    not that of a layout, which the strides of a tensor decide."""
    for _ in tl.static_range(HALVINGS):
        if AXIS == 0:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 0)
        else:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), 1)
    return tl.sum(x, AXIS)


@triton.jit
def exact_scores(query, keys, rows, ok, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 <query, row> [L]: 64 chains of fused multiply-adds, then their sum.  The one definition of a score: its bits
    are the same everywhere."""
    tl.static_assert(BLOCK_D == 64)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = wide(tl.load(query + d, mask=d < WIDTH, other=0.0))
        at = rows.to(tl.int64)[:, None] * keys[1] + d[None, :]
        y = wide(tl.load(keys[0] + at, mask=ok[:, None] & (d < WIDTH)[None, :], other=0.0))
        total = tl.fma(tl.broadcast_to(x[None, :], total.shape), y, total)
    return sum_of(total, 1, 6)


@triton.jit
def exact_ranks(query, keys, rules, limit, b, rows, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    ok = allowed(rules, limit, b, rows)
    score = exact_scores(query, keys, rows, ok, WIDTH, BLOCK_L, BLOCK_D)
    return ranking(score, ok & (score != -INF))


@triton.jit
def _candidate_scores_kernel(
    queries, keys, rules, found, ranks, counts, blocks, capacity,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ranks [B, capacity] of the rows in found."""
    b, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_L
    n = tl.load(counts + b)
    if start < n:
        slots = start + tl.arange(0, BLOCK_L)
        at = b.to(tl.int64) * capacity + slots
        rows = tl.load(found + at, mask=slots < n, other=-1)
        query = queries[0] + b.to(tl.int64) * queries[1]
        rank = exact_ranks(query, keys, rules, limit_of(rules), b, rows, WIDTH, BLOCK_L, BLOCK_D)
        tl.store(ranks + at, rank, mask=slots < n)


@triton.jit
def number_reaching(room, n, bar, BLOCK_M: tl.constexpr):
    """How many of room[:n] are at least ``bar``."""
    reach = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        reach += (tl.load(room + i, mask=i < n, other=float("nan")) >= bar).to(tl.int32)
    return total_of(reach)


@triton.jit
def _search_all_kernel(
    queries, keys, rules, found, ranks, counts, lost, scratch, topk, capacity,
    ALL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The topk best rows, in ascending order, of queries whose count is -1 (ALL: of every query).

    lost [B]: set to 1 where any score is NaN.  scratch [programs, bank rows].  The bar is searched among the integers
    that order like floats, bit by bit.
    """
    limit = limit_of(rules)
    room = scratch + tl.program_id(0).to(tl.int64) * rules[1]
    for task in range(tl.program_id(0), rules[0], tl.num_programs(0)):
        b = tl.full([], 0, tl.int32) + task
        todo = True
        if not ALL:
            todo = tl.load(counts + b) < 0
        if todo:
            query = queries[0] + b.to(tl.int64) * queries[1]
            bad = tl.zeros([BLOCK_L], tl.int32)
            for start in range(0, limit, BLOCK_L):
                rows = start + tl.arange(0, BLOCK_L)
                rank = exact_ranks(query, keys, rules, limit, b, rows, WIDTH, BLOCK_L, BLOCK_D)
                tl.store(room + rows, rank, mask=rows < limit)
                bad = tl.maximum(bad, (rank == -INF).to(tl.int32))
            tl.store(lost + b, tl.max(bad[:, None]))
            tl.debug_barrier()
            # At least topk reach ``low``, or it is -inf, which is below every number; fewer reach ``high``.
            low = ordered(tl.full([], -INF, tl.float32)).to(tl.int64)
            high = ordered(tl.full([], INF, tl.float32)).to(tl.int64) + 1
            while low + 1 < high:
                middle = (low + high) >> 1
                up = number_reaching(room, limit, unordered(middle.to(tl.int32)), BLOCK_M) >= topk
                low, high = tl.where(up, middle, low), tl.where(up, high, middle)
            bar = unordered(low.to(tl.int32))
            above = tl.full([], 0, tl.int32)
            if high.to(tl.int32) != ordered(tl.full([], INF, tl.float32)) + 1:
                above = number_reaching(room, limit, unordered(high.to(tl.int32)), BLOCK_M)
            ties, filled = topk - above, tl.full([], 0, tl.int32)
            to = b.to(tl.int64) * capacity
            for start in range(0, limit, BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                rank = tl.load(room + i, mask=i < limit, other=float("nan"))
                equal = (rank == bar).to(tl.int32)
                kept = (rank > bar) | ((rank == bar) & (tl.cumsum(equal, 0) <= ties))
                slot = filled + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(found + to + slot, i, mask=kept)
                tl.store(ranks + to + slot, rank, mask=kept)
                ties -= total_of(equal)
                filled += total_of(kept.to(tl.int32))
            tl.store(counts + b, filled)
            tl.debug_barrier()  # the next query writes where this one has read


# Results.


@triton.jit
def _order_kernel(
    found, ranks, counts, lost, scores, indices, topk, blocks, capacity, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """scores, indices [B, topk]: best first, lower index first among equals, NaN behind every number; if there is one,
    all scores are NaN."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_I
    n = tl.load(counts + b)
    if first < tl.maximum(n, topk):
        i = first + tl.arange(0, BLOCK_I)
        own = b.to(tl.int64) * capacity
        rank = tl.load(ranks + own + i, mask=i < n, other=float("nan"))
        row = tl.load(found + own + i, mask=i < n, other=-1)
        better, valid = tl.zeros([BLOCK_I], tl.int32), tl.full([], 0, tl.int32)
        bad = tl.load(lost + b)  # of rows that are not among the candidates
        for start in range(0, n, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other = tl.load(ranks + own + j, mask=j < n, other=float("nan"))
            other_row = tl.load(found + own + j, mask=j < n, other=-1)
            tie = (other[None, :] == rank[:, None]) & (other_row[None, :] < row[:, None])
            better += tl.sum(((other[None, :] > rank[:, None]) | tie).to(tl.int32), 1)
            valid += total_of((other == other).to(tl.int32))
            bad += total_of((other == -INF).to(tl.int32))
        to = b.to(tl.int64) * topk
        kept = (rank == rank) & (better < topk)
        tl.store(scores + to + better, tl.where(bad > 0, float("nan"), rank), mask=kept)
        tl.store(indices + to + better, row.to(tl.int64), mask=kept)
        rest = (i >= valid) & (i < topk)
        tl.store(scores + to + i, tl.full([BLOCK_I], -INF, tl.float32), mask=rest)
        tl.store(indices + to + i, tl.full([BLOCK_I], -1, tl.int64), mask=rest)


@triton.jit
def scale_of(scale):
    """scale: (float, pointer to a float or None)."""
    factor = tl.full([], 1.0, tl.float32) * scale[0]
    if scale[1] is not None:
        factor = factor * tl.load(scale[1])
    return factor


@triton.jit
def softmax_bounds(scores, indices, topk, factor, BLOCK_L: tl.constexpr):
    """(what is taken from every logit, the sum of the exponentials)."""
    slot = tl.arange(0, BLOCK_L)
    tops = tl.full([BLOCK_L], -INF, tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + slot
        listed = tl.load(indices + t, mask=t < topk, other=-1) >= 0
        tops = tl.maximum(tops, tl.where(listed, factor * tl.load(scores + t, mask=listed, other=0.0), -INF))
    top = tl.max(tops[:, None])
    base = tl.where(tl.abs(top) < INF, top, 0.0)
    sums = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + slot
        listed = tl.load(indices + t, mask=t < topk, other=-1) >= 0
        logit = factor * tl.load(scores + t, mask=listed, other=0.0)
        sums += tl.where(listed, tl.exp(logit - base), 0.0)
    return base, total_of(sums)


@triton.jit
def _weigh_rows_kernel(
    values, scores, indices, scale, out, copies, topk, blocks,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out [B, E]; copies: None, or [B, topk, E], where slots without a row get row 0."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_E
    kept = b.to(tl.int64) * topk
    factor = scale_of(scale)
    base, norm = softmax_bounds(scores + kept, indices + kept, topk, factor, BLOCK_L)
    e = first + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    for start in range(0, topk, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        row = tl.load(indices + kept + t, mask=t < topk, other=-1)
        listed = row >= 0
        logit = factor * tl.load(scores + kept + t, mask=listed, other=0.0)
        share = tl.where(listed, tl.exp(logit - base) / norm, 0.0)
        inside = (t < topk)[:, None] & (e < WIDTH)[None, :]
        v = tl.load(values[0] + tl.maximum(row, 0)[:, None] * values[1] + e[None, :], mask=inside, other=0.0)
        weight = tl.broadcast_to(share[:, None], total.shape)
        total = tl.where(listed[:, None], tl.fma(weight, wide(v), total), total)
        if copies is not None:
            tl.store(copies + (kept + t)[:, None] * WIDTH + e[None, :], v, mask=inside)
    to = b.to(tl.int64) * WIDTH + e
    tl.static_assert(BLOCK_L == 16)
    tl.store(out + to, narrow(sum_of(total, 0, 4), out.dtype.element_ty), mask=e < WIDTH)
