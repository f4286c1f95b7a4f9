"""What a program of every kernel works on, and how it moves between memory and registers.

A lane owns a small patch of ROWS x COLS pixels of one image, and the lanes of a program run over
patches, column first. A tile is one pixel of every lane's patch, in a block of channels:
``(LANES, BLOCK_C)``. In channels_last the channels are what lies side by side, and a thread moves
several of them at once; in contiguous BLOCK_C is 1, and it moves several columns of its patch.

Patches are written out pixel by pixel. Where two outputs read the same input, the two loads are
the same expression and the compiler keeps one.
"""

# ruff: noqa: RUF005 (Triton knows no unpacking)
import triton
import triton.language as tl


@triton.jit
def patches(tile, N, GH, GW, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Image, patch row, patch column and whether there is such a patch, each (LANES, 1), of the
    `tile`-th LANES of N images of GH x GW patches. WIDE: offsets need 64 bits."""
    if WIDE:
        tile = tile.to(tl.int64)
    patch = (tile * LANES + tl.arange(0, LANES))[:, None]
    return patch // (GH * GW), patch // GW % GH, patch % GW, patch < N * GH * GW


@triton.jit
def channels(block, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block and which of them exist, each (1, BLOCK_C)."""
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return c, c < C


@triton.jit
def pixel(n, c, h, w, C: tl.constexpr, H, W, CHANNELS_LAST: tl.constexpr):
    """Offset of an element of a dense (N, C, H, W) tensor."""
    if CHANNELS_LAST:
        return ((n * H + h) * W + w) * C + c
    else:
        return ((n * C + c) * H + h) * W + w


@triton.jit
def weight_at(w_ptr, k, exists, tap, K: tl.constexpr, TAPS: tl.constexpr, BY_TAP: tl.constexpr):
    """One tap's weights as float32. w_ptr: (TAPS, K) where BY_TAP, else (K, TAPS)."""
    offset = tap * K + k if BY_TAP else k * TAPS + tap
    return tl.load(w_ptr + offset, exists, other=0.0).to(tl.float32)


@triton.jit
def weights_of_turn(w_ptr, tile, chunk, CHUNKS, TAPS: tl.constexpr):
    """w_ptr, for the turn `tile` of a loop over chunk, chunk + CHUNKS, ...: the compiler must not
    see that it is the same in all of them, or it holds every tap of a large kernel in registers."""
    return w_ptr + (tile % CHUNKS - chunk) * 16 if TAPS > 9 else w_ptr


@triton.jit
def per_channel(ptr, k, exists, missing: tl.constexpr):
    """Scale or shift of a block of channels, `missing` where the pointer is None."""
    if ptr is None:
        return tl.full((1, 1), missing, tl.float32)
    else:
        return tl.load(ptr + k, exists, other=missing)


@triton.jit
def load_columns(ptr, mask, LANES: tl.constexpr, COUNT: tl.constexpr):
    """COUNT (a power of two) columns from ptr (LANES, 1) on, one access a lane: a tuple of
    (LANES, 1) tiles."""
    values = (tl.load(ptr + tl.arange(0, COUNT)[None, :], mask, other=0.0),)
    if COUNT >= 2:
        values = _halves(values, LANES, COUNT // 2)
    if COUNT >= 4:
        values = _halves(values, LANES, COUNT // 4)
    if COUNT >= 8:
        values = _halves(values, LANES, COUNT // 8)
    return values


@triton.jit
def _halves(values, LANES: tl.constexpr, HALF: tl.constexpr):
    """Splits every (LANES, 2 * HALF) tile into its even and its odd columns; all evens first."""
    even = ()
    odd = ()
    for i in tl.static_range(len(values)):
        left, right = tl.split(values[i].reshape(LANES, HALF, 2))
        even = even + (left,)
        odd = odd + (right,)
    return even + odd


@triton.jit
def store_columns(ptr, values, mask, LANES: tl.constexpr, COUNT: tl.constexpr):
    """The reverse of load_columns."""
    if COUNT >= 8:
        values = _joined(values, LANES, COUNT // 4)
    if COUNT >= 4:
        values = _joined(values, LANES, COUNT // 2)
    if COUNT >= 2:
        values = _joined(values, LANES, COUNT)
    tl.store(ptr + tl.arange(0, COUNT)[None, :], values[0].to(ptr.dtype.element_ty), mask)


@triton.jit
def _joined(values, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of _halves: tiles i and i + half become one of WIDTH columns."""
    HALF: tl.constexpr = len(values) // 2
    joined = ()
    for i in tl.static_range(HALF):
        joined = joined + (tl.join(values[i], values[i + HALF]).reshape(LANES, WIDTH),)
    return joined


@triton.jit
def column(ptr, vector, OFFSET: tl.constexpr, STEP: tl.constexpr, first, width, mask):
    """The tile of a row's column first + OFFSET as float32, 0 outside [0, width): out of the
    columns already loaded from `first` on, or else from memory. ptr: at column `first`."""
    if OFFSET >= 0 and len(vector) > OFFSET:
        value = vector[OFFSET]
    else:
        inside = (first + OFFSET >= 0) & (first + OFFSET < width)
        value = tl.load(ptr + OFFSET * STEP, mask & inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def load_row(
    ptr, n, c, h, w, mask, C: tl.constexpr, H, W,
    CHANNELS_LAST: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tiles of columns w ... w + COLS - 1 of row h, as stored; 0 outside the plane. In
    contiguous COLS divides W."""
    mask = mask & (h < H)
    if CHANNELS_LAST:
        row = ptr + pixel(n, c, h, w, C, H, W, CHANNELS_LAST)
        values = ()
        for t in tl.static_range(COLS):
            values = values + (tl.load(row + t * C, mask & (w + t < W), other=0.0),)
    else:
        row = ptr + pixel(n, c, h, w, C, H, W // COLS * COLS, CHANNELS_LAST)
        values = load_columns(row, mask, LANES, COLS)
    return values


@triton.jit
def store_row(
    ptr, values, n, c, h, w, mask, C: tl.constexpr, H, W,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The reverse of load_row; rounds to the pointer's type. WHOLE: the columns divide W, and in
    contiguous are stored at once."""
    COLS: tl.constexpr = len(values)
    mask = mask & (h < H)
    if CHANNELS_LAST or not WHOLE:
        row = ptr + pixel(n, c, h, w, C, H, W, CHANNELS_LAST)
        STEP: tl.constexpr = C if CHANNELS_LAST else 1
        for t in tl.static_range(COLS):
            tl.store(row + t * STEP, values[t].to(ptr.dtype.element_ty), mask & (w + t < W))
    else:
        row = ptr + pixel(n, c, h, w, C, H, W // COLS * COLS, CHANNELS_LAST)
        store_columns(row, values, mask, LANES, COLS)
