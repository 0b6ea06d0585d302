"""Decayed causal attention on Hopper GPUs, in Pallas Mosaic GPU.

A block of three warpgroups walks over the chunks of one head (or of one segment of its sequence)
with the state of `2 * width` features of `x`. Two warpgroups compute: each owns `width` features,
keeps its state in registers in float32, and a copy for the tensor cores in shared memory. The third
loads the arrays chunk by chunk. States leave the chip only where `Options` ask for them.
`decayed_attention` defines the operation; `docs/gpu.md` explains the kernel.
"""

import dataclasses
import functools
import inspect

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from xlstm.distributed.mesh import match_varying_axes, varying_axes
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    BIAS,
    BOUND,
    CARRIED,
    CHUNK,
    COARSE,
    FIRST,
    LARGEST_LOG_WEIGHT,
    LAST,
    READ,
    READER,
    WRITE,
    WRITER,
    Inputs,
    Options,
    Outputs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    are_kernels_interpreted,
)

_SHARED_MEMORY = 227 * 1024  # Bytes of a block.
_BARRIERS = 1024  # Bytes set aside for the barriers.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 240, 24  # Of a thread; the register file holds no more.
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_LOG_ZERO = -1e30
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # Until jax 0.10.
_PART = 32  # Columns of the pairs that are multiplied by the partner's at a time.


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
    if inputs.partner is not None:
        total += tiling.x_stages * tile
    if inputs.partner_states is not None:
        total += state // tiling.pieces
    return total + _BARRIERS


def head_dims(inputs: Inputs) -> tuple[int, int]:
    """Returns `D` and `E` of a pass."""
    heads = inputs.gates.shape[0] // inputs.b.shape[0]
    return inputs.b.shape[-1] // heads, inputs.x.shape[-1] // heads


def decayed_attention_hopper(inputs: Inputs, options: Options) -> Outputs:
    """Computes a pass with one kernel.

    Args:
        inputs: The inputs. `a`, `b` and `x` are bfloat16, and `D` and `E` multiples of 64.
        options: What to compute.

    Returns:
        The outputs.

    Raises:
        ValueError: If the heads are too large.
    """
    kernel = _Kernel(inputs, options)
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    shapes = kernel.output_shapes()
    call = plgpu.kernel(
        functools.partial(kernel.run, [*given, *shapes, *kernel.scratch()]),
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes.values()],
        scratch_types=list(kernel.scratch().values()),
        grid=(kernel.n, options.segments, kernel.num_tiles),
        grid_names=("head", "segment", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({"interpret": plgpu.InterpretGPUParams()} if are_kernels_interpreted() else {}),
    )
    # Inside of `shard_map`, the kernel's results bear no marks of their own.
    results = match_varying_axes(call(*given.values()), sorted(varying_axes(given)))
    return Outputs(**dict(zip(shapes, results, strict=True)))


def compile_smallest_kernel() -> None:
    """Compiles a small kernel for JAX's first device; raises whatever goes wrong."""
    tokens = jax.ShapeDtypeStruct((1, CHUNK, 64), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((1, 1, 8, CHUNK), jnp.float32)
    inputs = Inputs(tokens, tokens, tokens, gates, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    jax.jit(lambda x: decayed_attention_hopper(x, Options()).out).lower(inputs).compile()


class _Kernel:
    """The body of the kernel, for one choice of inputs and options."""

    def __init__(self, inputs: Inputs, options: Options):
        self.options, self.tiling = options, choose_tiling(inputs, options)
        self.has = {name: x is not None for name, x in inputs._asdict().items()}
        self.n, self.num_chunks, _, _ = inputs.gates.shape
        self.batch, self.time, _ = inputs.b.shape
        self.heads = self.n // self.batch
        self.d, self.e = head_dims(inputs)
        self.num_tiles = self.e // (2 * self.tiling.width)
        self.dtype = inputs.x.dtype
        self.chunks_of_segment = self.num_chunks // options.segments

    def output_shapes(self) -> dict[str, tuple]:
        """Returns the shapes and types of the outputs, by their names in `Outputs`."""
        o, n, nc, size = self.options, self.n, self.num_chunks, CHUNK
        f32, parts = jnp.float32, self.num_tiles * 2
        pairs = ((n * nc, size, size), f32)
        all_shapes = {
            "out": (o.outputs, ((self.batch, self.time, self.heads * self.e), self.dtype)),
            "normalizer": (o.normalize, ((n, nc, size), f32)),
            "states": (o.emit_states, ((n * nc, self.d, self.e), self.dtype)),
            "last": (o.emit_last, ((n * o.segments, self.d, self.e), f32)),
            "scores": (o.emit_scores, pairs),
            "dots": (self.has["partner"], ((n, parts, nc, size), f32)),
            "pairs": (self.has["partner_scores"], pairs),
            "pair_sums": (self.has["partner_scores"], ((n, nc, size), f32)),
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
            "x_full": plgpu.Barrier(
                num_arrivals=4 if self.has["partner"] else 2, num_barriers=t.x_stages
            ),
            "gates_full": plgpu.Barrier(),
            "b_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.b_stages),
            "x_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.x_stages),
            "gates_empty": plgpu.Barrier(num_arrivals=2),
        }
        if self.options.outputs:
            scratch |= {
                "a_smem": plgpu.SMEM((t.a_stages, size, d), dtype, transforms=tiled),
                "a_full": plgpu.Barrier(num_barriers=t.a_stages),
                "a_empty": plgpu.Barrier(num_arrivals=2, num_barriers=t.a_stages),
            }
        if self.has["partner"]:
            shape = (t.x_stages, 2, size, t.width)
            scratch["partner_smem"] = plgpu.SMEM(shape, dtype, transforms=tiled)
        if self.has["partner_states"]:
            scratch |= {
                "partner_states_smem": plgpu.SMEM(
                    (2, d // t.pieces, t.width), dtype, transforms=tiled
                ),
                "partner_states_full": plgpu.Barrier(num_arrivals=2),
                "partner_states_empty": plgpu.Barrier(num_arrivals=2),
            }
        return scratch

    def run(self, names: list[str], *refs) -> None:
        """Runs a block: two warpgroups compute, one loads."""
        refs = dict(zip(names, refs, strict=True))
        head, segment, tile, warpgroup = (
            lax.axis_index(name) for name in ("head", "segment", "tile", "warpgroup")
        )
        block = _Block(self, refs, head, segment, tile)
        pl.when(warpgroup < 2)(lambda: block.compute(warpgroup))
        pl.when(warpgroup == 2)(block.load)


class _Block:
    """A block of the kernel, which computes one tile of features of one head, or of its segment."""

    def __init__(self, kernel: _Kernel, refs: dict, head, segment, tile):
        self.kernel, self.refs, self.tile = kernel, refs, tile
        self.options, self.has, self.tiling = kernel.options, kernel.has, kernel.tiling
        self.head = head
        self.sequence, self.head_of_sequence = head // kernel.heads, lax.rem(head, kernel.heads)
        self.segment = head * kernel.options.segments + segment
        self.num_chunks = kernel.chunks_of_segment
        self.first_chunk = segment * self.num_chunks
        self.from_state, self.to_state = (WRITE, READ) if self.options.reverse else (READ, WRITE)

    # Indices.

    def chunk(self, i):
        """Returns the chunk of step `i`."""
        i = self.num_chunks - 1 - i if self.options.reverse else i
        return self.first_chunk + i

    def features(self, warpgroup):
        """Returns the features of a head that a warpgroup owns."""
        width = self.tiling.width
        return pl.ds((self.tile * 2 + warpgroup) * width, width)

    def tokens(self, name: str, chunk, warpgroup=None):
        """Returns the part of an array `(B, T, NH * features)` in global memory."""
        if warpgroup is None:
            features = pl.ds(self.head_of_sequence * self.kernel.d, self.kernel.d)
        else:
            width = self.tiling.width
            start = self.head_of_sequence * self.kernel.e + (self.tile * 2 + warpgroup) * width
            features = pl.ds(start, width)
        return self.refs[name].at[self.sequence, pl.ds(chunk * CHUNK, CHUNK), features]

    def gate(self, row: int):
        """Returns a row of the chunk's gates, along the rows of a tile."""
        return _load(self.refs["gates_smem"].at[row], layout=_ROWS)

    def gate_of_columns(self, row: int, columns, nil):
        """Returns a part of a row of the chunk's gates, along the columns of a tile."""
        # Without `nil`, Mosaic would take it for the same value as `gate(row)`, in its layout.
        return _load(self.refs["gates_smem"].at[row + nil, columns], layout=_COLUMNS)

    # Computing warpgroups.

    def compute(self, warpgroup) -> None:
        """Walks over the chunks with the state of the warpgroup's features."""
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        refs, features = self.refs, self.features(warpgroup)
        shape = (self.kernel.d, self.tiling.width)
        if self.has["init"]:
            init = refs["init"].at[self.segment, :, features]
            state = _load(init, layout=plgpu.Layout.WGMMA, optimized=False)
        else:
            state = _zeros(shape)
        refs["state_smem"].at[warpgroup][...] = state.astype(self.kernel.dtype)
        plgpu.commit_smem()
        step = functools.partial(self.step, warpgroup)
        state, _ = lax.fori_loop(0, self.num_chunks, step, (state, jnp.int32(0)))
        if self.options.emit_last:
            refs["last"][self.segment, :, features] = state
        plgpu.wait_smem_to_gmem(0)

    def step(self, warpgroup, i, carry):
        """Computes a chunk."""
        # `nil` is 0, but the compiler does not know: it would keep in registers, or spill, the many
        # addresses that do not change from chunk to chunk.
        state, nil = carry
        refs, t, options, dtype = self.refs, self.tiling, self.options, self.kernel.dtype
        chunk, head, warpgroup = self.chunk(i), self.head + nil, warpgroup + nil
        index = head * self.kernel.num_chunks + chunk  # Among the chunks of all heads.
        ib, ix = lax.rem(i, t.b_stages) + nil, lax.rem(i, t.x_stages) + nil
        my_b = refs["b_smem"].at[ib]
        my_x = refs["x_smem"].at[ix, warpgroup]
        my_state = refs["state_smem"].at[warpgroup]
        # One warpgroup of a head does what is the same in all, another one in each chunk.
        is_mine = lax.rem(chunk, 2 * self.kernel.num_tiles) == self.tile * 2 + warpgroup

        if options.emit_states:
            features = self.features(warpgroup)
            plgpu.copy_smem_to_gmem(my_state, refs["states"].at[index, :, features])
        if self.has["partner_states"]:
            overlaps = self.overlaps(warpgroup, state)
            refs["overlaps"][head, self.tile * 2 + warpgroup, chunk] = overlaps
        if options.outputs:
            ia = lax.rem(i, t.a_stages) + nil
            plgpu.barrier_wait(refs["a_full"].at[ia])
        plgpu.barrier_wait(refs["b_full"].at[ib])
        if options.outputs:
            my_a = refs["a_smem"].at[ia]
            weighted, total, out = self.scores_and_state_read(
                my_a, my_b, my_state, is_mine, index, nil
            )
            plgpu.barrier_arrive(refs["a_empty"].at[ia])
            out = self.scale_state_read(head, warpgroup, chunk, out)
            plgpu.barrier_wait(refs["x_full"].at[ix])
            if self.has["partner"]:
                partner = _load(refs["partner_smem"].at[ix, warpgroup], layout=plgpu.Layout.WGMMA)
                dots = (partner.astype(jnp.float32) * out).sum(axis=1)
                refs["dots"][head, self.tile * 2 + warpgroup, chunk] = dots
            out = _add_product(out, weighted, my_x)
            if options.normalize:
                normalizer = total + self.gate(CARRIED)
                divisor = jnp.maximum(jnp.abs(normalizer), self.gate(BOUND))
                out = out * lax.broadcast_in_dim(1.0 / divisor, out.shape, [0])

                @pl.when(is_mine)
                def _():
                    refs["normalizer"][head, chunk] = normalizer

            out = out.astype(dtype)  # Fewer registers during the next product.
        else:
            plgpu.barrier_wait(refs["gates_full"])
            plgpu.barrier_wait(refs["x_full"].at[ix])

        keep = refs["keep"][head, chunk]
        # x with the weight of each token in the state, in place of x.
        x = _load(my_x, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        weight = self.gate(self.to_state)
        plgpu.barrier_arrive(refs["gates_empty"])
        my_x[...] = (x * lax.broadcast_in_dim(weight, x.shape, [0])).astype(dtype)
        plgpu.commit_smem()
        state = _add_product(state * keep, my_b.transpose((1, 0)), my_x)
        plgpu.barrier_arrive(refs["b_empty"].at[ib])
        if options.emit_states:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        my_state[...] = state.astype(dtype)

        if options.outputs:
            my_x[...] = out
        plgpu.commit_smem()
        if options.outputs:
            plgpu.copy_smem_to_gmem(my_x, self.tokens("out", chunk, warpgroup))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs["x_empty"].at[ix])
        return state, (keep > 2).astype(jnp.int32)  # Never: a state decays.

    def overlaps(self, warpgroup, state):
        """Returns the sums over features of the state times the partner's, folded into 64 rows."""
        t, total = self.tiling, None
        rows = self.kernel.d // t.pieces
        for piece in range(t.pieces):
            plgpu.barrier_wait(self.refs["partner_states_full"])
            for start in range(0, rows, CHUNK):
                part = self.refs["partner_states_smem"].at[warpgroup, pl.ds(start, CHUNK)]
                other = _load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                first = piece * rows + start
                product = (state[first : first + CHUNK] * other).sum(axis=1)
                total = product if total is None else total + product
            plgpu.barrier_arrive(self.refs["partner_states_empty"])
        return total

    def scores_and_state_read(self, my_a, my_b, my_state, is_mine, index, nil):
        """Returns the weighted scores, the sums of their rows, and `a` times the state."""
        width, size = self.tiling.width, CHUNK
        my_b = my_b.transpose((1, 0))
        scores_acc = plgpu.ACC((size, size), jnp.float32)

        def scores_alone(scores_acc):
            # Computes the weights while the product runs.
            plgpu.wgmma(scores_acc, my_a, my_b)
            plgpu.barrier_wait(self.refs["gates_full"])
            weights = self.pair_weights(nil)
            return self.weigh(scores_acc[...], weights, is_mine, index, nil)

        def both(scores_acc, out_acc):
            # Computes the weights, and weighs the scores, while the second product runs.
            plgpu.wgmma(scores_acc, my_a, my_b)
            plgpu.wgmma(out_acc, my_a, my_state)
            scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
            plgpu.barrier_wait(self.refs["gates_full"])
            return *self.weigh(scores, None, is_mine, index, nil), out_acc[...]

        if are_kernels_interpreted():
            scores = _add_product(_zeros((size, size)), my_a, my_b)
            plgpu.barrier_wait(self.refs["gates_full"])
            weighted = self.weigh(scores, None, is_mine, index, nil)
        elif (
            self.has["partner_states"] and self.tiling.width == 64
        ):  # Two products at a time would need too many registers.
            weighted = pl.run_scoped(scores_alone, scores_acc)
        else:
            return pl.run_scoped(both, scores_acc, plgpu.ACC((size, width), jnp.float32))
        return *weighted, _add_product(_zeros((size, width)), my_a, my_state)

    def weigh(self, scores, weights, is_mine, index, nil):
        """Returns the weighted scores of a chunk's pairs, and the sums of their rows."""
        if self.has["partner_scores"]:

            @pl.when(is_mine)
            def _():
                self.multiply_partner_scores(scores, index, nil)

        weights = self.pair_weights(nil) if weights is None else weights
        scores = self.add_bias(scores, pl.ds(0, CHUNK), nil) * weights
        if self.options.emit_scores:

            @pl.when(is_mine)
            def _():
                self.refs["scores"][index] = scores

        total = scores.sum(axis=1) if self.options.normalize else None
        return scores.astype(self.kernel.dtype), total

    def add_bias(self, scores, columns, nil):
        """Returns some columns of the scores plus the bias of their readers."""
        if not self.has["vector"]:
            return scores
        if self.options.reverse:
            bias, axis = self.gate_of_columns(BIAS, columns, nil), 1
        else:
            bias, axis = self.gate(BIAS), 0
        return scores + lax.broadcast_in_dim(bias, scores.shape, [axis])

    def multiply_partner_scores(self, scores, index, nil) -> None:
        """Writes the products of the scores and the partner's, and the sums of their rows."""
        refs, total = self.refs, None
        for start in range(0, CHUNK, _PART):
            columns = pl.ds(start, _PART)
            partner = _load(
                refs["partner_scores"].at[index, :, columns],
                layout=plgpu.Layout.WGMMA,
                optimized=False,
            )
            pairs = partner * self.add_bias(scores[:, start : start + _PART], columns, nil)
            refs["pairs"][index, :, columns] = pairs
            part_total = pairs.sum(axis=1)
            total = part_total if total is None else total + part_total
        chunk = lax.rem(index, self.kernel.num_chunks)
        refs["pair_sums"][self.head + nil, chunk] = total

    def pair_weights(self, nil):
        """Returns the weights of the pairs, rows by columns; see `decayed_attention`."""
        reverse, shape = self.options.reverse, (CHUNK, CHUNK)
        along_rows, along_columns = (WRITER, READER) if reverse else (READER, WRITER)

        def from_rows(row):
            return lax.broadcast_in_dim(self.gate(row), shape, [0])

        def from_columns(row):
            return lax.broadcast_in_dim(self.gate_of_columns(row, pl.ds(0, CHUNK), nil), shape, [1])

        if reverse:
            log_weights = from_columns(COARSE) - from_rows(COARSE)
        else:
            log_weights = from_rows(COARSE) - from_columns(COARSE)
        log_weights = log_weights + from_rows(along_rows) + from_columns(along_columns)
        log_weights = jnp.minimum(log_weights, LARGEST_LOG_WEIGHT)
        row = lax.broadcast_in_dim(
            plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_ROWS) + nil, shape, [0]
        )
        column = lax.broadcast_in_dim(
            plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_COLUMNS) + nil, shape, [1]
        )
        limit = from_rows(LAST if reverse else FIRST).astype(jnp.int32)
        if reverse:
            mask = (column >= row) & (column <= limit)
        else:
            mask = (column <= row) & (column >= limit)
        return jnp.exp(jnp.where(mask, log_weights, _LOG_ZERO))

    def scale_state_read(self, head, warpgroup, chunk, out):
        """Returns the output through the state: `a` times the state, with weights and vector."""
        if self.has["vector"]:
            vector = _load(
                self.refs["vector"].at[head, chunk, self.features(warpgroup)],
                layout=_COLUMNS,
                optimized=False,
            )
            vector = lax.broadcast_in_dim(vector, out.shape, [1])
            if not self.options.reverse:
                vector = vector * lax.broadcast_in_dim(self.gate(BIAS), out.shape, [0])
            out += vector
        return out * lax.broadcast_in_dim(self.gate(self.from_state), out.shape, [0])

    # The loading warpgroup.

    def load(self) -> None:
        """Loads the arrays of each chunk as soon as their shared memory is free."""
        plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
        t, uses = self.tiling, self.num_chunks
        stages = {"b": t.b_stages, "x": t.x_stages, "gates": 1}
        if self.options.outputs:
            stages["a"] = t.a_stages

        @pl.loop(0, uses)
        def _(i):
            chunk = self.chunk(i)
            if self.has["partner_states"]:
                self.load_partner_states(i, chunk, 0)
            if self.options.outputs:
                self.load_stage("a", i, t.a_stages, [self.tokens("a", chunk)])
            self.load_stage("b", i, t.b_stages, [self.tokens("b", chunk)])
            pl.when(i >= 1)(lambda: plgpu.barrier_wait(self.refs["gates_empty"]))
            plgpu.copy_gmem_to_smem(
                self.refs["gates"].at[self.head, chunk],
                self.refs["gates_smem"],
                self.refs["gates_full"],
            )
            names = ["x", "partner"] if self.has["partner"] else ["x"]
            ix = lax.rem(i, t.x_stages)
            self.wait_until_free("x", i, t.x_stages)
            for name in names:
                for warpgroup in range(2):
                    plgpu.copy_gmem_to_smem(
                        self.tokens(name, chunk, warpgroup),
                        self.refs[f"{name}_smem"].at[ix, warpgroup],
                        self.refs["x_full"].at[ix],
                    )
            for piece in range(1, t.pieces):
                self.load_partner_states(i, chunk, piece)

        # No completion of a barrier may be left without a wait.
        for name, count in stages.items():
            for stage in range(min(count, uses)):
                empty = self.refs[f"{name}_empty"]
                plgpu.barrier_wait(empty if name == "gates" else empty.at[stage])
        if self.has["partner_states"]:
            plgpu.barrier_wait(self.refs["partner_states_empty"])

    def wait_until_free(self, name: str, i, stages: int) -> None:
        """Waits until the stage of step `i` is free again."""
        empty = self.refs[f"{name}_empty"].at[lax.rem(i, stages)]
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty))

    def load_stage(self, name: str, i, stages: int, sources: list) -> None:
        """Loads `a` or `b`."""
        self.wait_until_free(name, i, stages)
        stage = lax.rem(i, stages)
        for source in sources:
            plgpu.copy_gmem_to_smem(
                source, self.refs[f"{name}_smem"].at[stage], self.refs[f"{name}_full"].at[stage]
            )

    def load_partner_states(self, i, chunk, piece: int) -> None:
        """Loads a piece of the partner's states."""
        is_first = piece == 0
        empty = self.refs["partner_states_empty"]
        if is_first:
            pl.when(i >= 1)(lambda: plgpu.barrier_wait(empty))
        else:
            plgpu.barrier_wait(empty)
        rows = self.kernel.d // self.tiling.pieces
        index = self.head * self.kernel.num_chunks + chunk
        for warpgroup in range(2):
            plgpu.copy_gmem_to_smem(
                self.refs["partner_states"].at[
                    index, pl.ds(piece * rows, rows), self.features(warpgroup)
                ],
                self.refs["partner_states_smem"].at[warpgroup],
                self.refs["partner_states_full"],
            )


def _load(ref, *, layout, optimized=True):
    """Returns the values of a reference, in registers."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def _zeros(shape: tuple[int, int]):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _add_product(accumulator, a, b):
    """Returns `accumulator + a @ b`; `a` is in shared memory or registers, `b` in shared memory."""
    if (
        are_kernels_interpreted()
    ):  # The interpreter knows neither this accumulator nor `a` in registers.
        a = a if isinstance(a, jax.Array) else a[...]
        return accumulator + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(accumulator))
