"""What a kernel of `hopper` needs: tiles, shared memory, barriers, and shapes of its outputs."""

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    CHUNK,
    Inputs,
    Options,
)

_SHARED_MEMORY = 227 * 1024  # Bytes of a block.
_BARRIERS = 1024  # Bytes set aside for the barriers.


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a pass uses shared memory.

    Attributes:
        width: Features of `x` of a warpgroup.
        a_stages: Chunks of `a` that are loaded ahead, and likewise of `b` and `x`.
        b_stages: See `a_stages`.
        x_stages: See `a_stages`.
        pieces: Parts in which the other states of a chunk are loaded, one after the other.
    """

    width: int
    a_stages: int
    b_stages: int
    x_stages: int
    pieces: int = 1


def choose_tiling(inputs: Inputs, options: Options) -> Tiling:
    """Chooses the largest tiles and the most stages that fit into shared memory.

    Args:
        inputs: Inputs of the pass; `D` and `E` are multiples of 64.
        options: Options of the pass.

    Returns:
        The tiling.

    Raises:
        ValueError: If nothing fits.
    """
    d, e = head_dims(inputs)
    # The state of a warpgroup takes up to half of its registers, and a partner some more.
    largest = 128 if inputs.partner is not None else 256
    width = 64 if d <= largest and e % 128 == 0 else 32
    stages = [(2, 2, 2), (2, 1, 2), (2, 1, 1), (1, 1, 2), (1, 1, 1)]
    pieces = [1, 2, 4, 8] if inputs.partner_states is not None else [1]
    for piece in pieces:
        for a, b, x in stages:
            tiling = Tiling(width, a, b, x, piece)
            if d % (64 * piece) == 0 and shared_bytes(inputs, options, tiling) <= _SHARED_MEMORY:
                return tiling
    raise ValueError(
        f"heads of {d} and {e} features do not fit into the shared memory of a Hopper GPU: set"
        " backend.implementation=xla"
    )


def num_blocks(inputs: Inputs, options: Options) -> int:
    """Returns the number of blocks of a pass, without segments."""
    _, e = head_dims(inputs)
    return inputs.gates.shape[0] * e // (2 * choose_tiling(inputs, options).width)


def shared_bytes(inputs: Inputs, options: Options, tiling: Tiling) -> int:
    """Returns the bytes of shared memory of a block."""
    d, _ = head_dims(inputs)
    per_chunk = 2 * CHUNK * d
    tile, state = 2 * 2 * CHUNK * tiling.width, 2 * 2 * d * tiling.width
    total = tiling.b_stages * per_chunk + tiling.x_stages * tile + state + 4 * 8 * CHUNK
    if options.outputs:
        total += tiling.a_stages * per_chunk
    total += tiling.x_stages * tile * sum(x is not None for x in (inputs.partner, inputs.partner_x))
    if inputs.partner_states is not None:
        total += state // tiling.pieces
    return total + _BARRIERS


def head_dims(inputs: Inputs) -> tuple[int, int]:
    """Returns `D` and `E` of a pass."""
    heads = inputs.gates.shape[0] // inputs.b.shape[0]
    return inputs.b.shape[-1] // heads, inputs.x.shape[-1] // heads


class Plan:
    """The static side of a kernel, for one choice of inputs and options."""

    def __init__(self, inputs: Inputs, options: Options):
        self.options, self.tiling = options, choose_tiling(inputs, options)
        self.has = {name: x is not None for name, x in inputs._asdict().items()}
        # Of these arrays, a warpgroup needs only its own features.
        self.tiles = ["x", *(name for name in ("partner", "partner_x") if self.has[name])]
        self.n, self.num_chunks, _, _ = inputs.gates.shape
        self.batch, self.time, _ = inputs.b.shape
        self.heads = self.n // self.batch
        self.d, self.e = head_dims(inputs)
        self.num_tiles = self.e // (2 * self.tiling.width)
        self.dtype = inputs.x.dtype
        self.chunks_of_segment = self.num_chunks // options.segments
        self.num_states = (self.num_chunks + 1) // 2  # Those of a head that leave the chip.

    def output_shapes(self) -> dict[str, tuple]:
        """Returns the shapes and types of the outputs, by their names in `Outputs`."""
        o, n, nc, size = self.options, self.n, self.num_chunks, CHUNK
        f32, parts = jnp.float32, self.num_tiles * 2
        pairs = ((n * nc, size, size), f32)
        all_shapes = {
            "out": (o.outputs, ((self.batch, self.time, self.heads * self.e), self.dtype)),
            "normalizer": (o.normalize, ((n, nc, size), f32)),
            "states": (o.emit_states, ((n * self.num_states, self.d, self.e), self.dtype)),
            "last": (o.emit_last, ((n * o.segments, self.d, self.e), f32)),
            "scores": (o.emit_scores, pairs),
            "dots": (self.has["partner"], ((n, parts, nc, size), f32)),
            "x_dots": (self.has["partner_x"], ((n, parts, nc, size), f32)),
            "crossings": (o.emit_crossings, ((n, parts, self.num_states, size), f32)),
            "pairs": (self.has["partner_scores"], pairs),
            "pair_sums": (self.has["partner_scores"], ((n * nc, size), f32)),
            "overlaps": (self.has["partner_states"], ((n, parts, nc, size), f32)),
        }
        return {name: shape for name, (is_computed, shape) in all_shapes.items() if is_computed}

    def scratch(self) -> dict:
        """Returns the shared memory and the barriers, by name."""
        t, d, dtype, size = self.tiling, self.d, self.dtype, CHUNK
        swizzle = plgpu.find_swizzle(min(t.width, 64) * 16)
        # One swizzle for all, since both factors of a tensor-core product need the same.
        tiled = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
        scratch = {
            "b_smem": plgpu.SMEM((t.b_stages, size, d), dtype, transforms=tiled),
            "x_smem": plgpu.SMEM((t.x_stages, 2, size, t.width), dtype, transforms=tiled),
            "state_smem": plgpu.SMEM((2, d, t.width), dtype, transforms=tiled),
            "gates_smem": plgpu.SMEM((8, size), jnp.float32),
            "b_full": plgpu.Barrier(num_barriers=t.b_stages),
            "x_full": plgpu.Barrier(num_arrivals=2 * len(self.tiles), num_barriers=t.x_stages),
            "gates_full": plgpu.Barrier(num_barriers=1),
            "b_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.b_stages),
            "x_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.x_stages),
            "gates_empty": plgpu.Barrier(num_arrivals=2, num_barriers=1),
        }
        if self.options.outputs:
            scratch |= {
                "a_smem": plgpu.SMEM((t.a_stages, size, d), dtype, transforms=tiled),
                "a_full": plgpu.Barrier(num_barriers=t.a_stages),
                "a_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.a_stages),
            }
        for name in self.tiles[1:]:
            shape = (t.x_stages, 2, size, t.width)
            scratch[f"{name}_smem"] = plgpu.SMEM(shape, dtype, transforms=tiled)
        if self.has["partner_states"]:
            scratch |= {
                "partner_states_smem": plgpu.SMEM(
                    (2, d // t.pieces, t.width), dtype, transforms=tiled
                ),
                "partner_states_full": plgpu.Barrier(num_arrivals=2),
                "partner_states_empty": plgpu.Barrier(num_arrivals=2),
            }
        return scratch
