"""How the GEMM kernels find, read and write a tile of a matrix with unit column stride. Tile sizes are in `configs.py`.

A matrix comes either as a tensor descriptor, through which TMA moves whole tiles and clips them to the matrix, or as a
pointer with a stride; then addresses are int64 and masks clip. Strides of x, W and dy, numbers of columns and ranks are
multiples of 8 (16 bytes), which `eights` tells the compiler: it then moves vectors.
"""

import triton
import triton.language as tl


@triton.jit
def eights(size):
    """Return `size`, a multiple of 8, as the compiler can see."""
    return size // 8 * 8


@triton.jit
def grouped(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return `(row tile, column tile)` of the tile with this number.

    Tiles are counted down GROUP row tiles before the next column of tiles: programs that run side by side then read
    few distinct rows of both factors, which the L2 cache holds.
    """
    group = tile // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * column_tiles)
    return group * GROUP + within % height, within // height


@triton.jit
def load(
    source, row, column, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr
):
    """Return `source[row:row + HEIGHT, column:column + WIDTH]`, 0 from `rows` and `columns` on.

    Through a descriptor the limits are those of the whole matrix, whatever `rows` and `columns` say.
    """
    if DESCRIBED:
        result = source.load([row, column])
    else:
        i, j = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        address = source + i[:, None].to(tl.int64) * stride + j[None, :]
        result = tl.load(address, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return result


@triton.jit
def load_low(source, row, column, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return what `load` does of A, B, S or T at a pointer: a tile of theirs spans less than 2^31 elements, so that
    its elements share one address and differ by an int32, half the registers."""
    i, j = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    address = source + tl.cast(row, tl.int64) * stride + column
    inside = (i < rows - row)[:, None] & (j < columns - column)[None, :]
    return tl.load(address + (i[:, None] * stride + j[None, :]), mask=inside, other=0.0)


@triton.jit
def store_low(target, tile, row, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Write `tile [HEIGHT, WIDTH]` to `target[row:]`, S or T from the first column of a block on, clipped to `rows` and
    `columns`."""
    i, j = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    address = target + tl.cast(row, tl.int64) * stride
    inside = (i < rows - row)[:, None] & (j < columns)[None, :]
    tl.store(address + (i[:, None] * stride + j[None, :]), tile, mask=inside)


@triton.jit
def store(
    target, tile, row, block, column, rows, n, stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write `tile [HEIGHT, WIDTH]` to `target[row:, block * n + column:]`, clipped to `rows` and to the block.

    A descriptor is that of `[rows, blocks, n]`. With HALVES its box is half as wide, and the left half of the tile
    leaves before the right one: TMA's buffer in shared memory is half as large.
    """
    if DESCRIBED:
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(tile, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))
            target.store([row, block, column], tl.reshape(left, (HEIGHT, 1, WIDTH // 2)))
            target.store([row, block, column + WIDTH // 2], tl.reshape(right, (HEIGHT, 1, WIDTH // 2)))
        else:
            target.store([row, block, column], tl.reshape(tile, (HEIGHT, 1, WIDTH)))
    else:
        i, j = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        address = target + block * n + i[:, None].to(tl.int64) * stride + j[None, :]
        tl.store(address, tile, mask=(i < rows)[:, None] & (j < n)[None, :])
