"""Decayed causal attention on Hopper GPUs, in Pallas Mosaic GPU.

A block of three warpgroups walks over the chunks of one head (or of one segment of its sequence)
with the state of `2 * width` features of `x`. Two warpgroups compute: each owns `width` features,
keeps its state in registers in float32, and a copy for the tensor cores in shared memory. The third
loads the arrays chunk by chunk. States leave the chip only where `Options` ask for them.
`decayed_attention` defines the operation; `docs/gpu.md` explains the kernel.
"""

import functools
import inspect

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from xlstm.distributed.mesh import match_varying_axes, varying_axes
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    CHUNK,
    LARGEST_LOG_WEIGHT,
    Inputs,
    Options,
    Outputs,
    Row,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_load import LoadingBlock
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import Plan
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    are_kernels_interpreted,
)

_COMPUTE_REGISTERS = 240  # Of a thread; with those of the loading warpgroup, all there are.
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_LOG_ZERO = -1e30
CAN_INTERPRET = hasattr(plgpu, "InterpretGPUParams")  # Whether kernels run on a CPU; from jax 0.12.
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # Until jax 0.10.
_PART = 32  # Columns of the pairs that are multiplied by the partner's at a time.


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
    plan = Plan(inputs, options)
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    shapes, scratch = plan.output_shapes(), plan.scratch()
    call = plgpu.kernel(
        functools.partial(_run_block, plan, [*given, *shapes, *scratch]),
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes.values()],
        scratch_types=list(scratch.values()),
        grid=(plan.n, options.segments, plan.num_tiles),
        grid_names=("head", "segment", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="_".join(["mlstm", f"{plan.d}x{plan.e}", *shapes]),
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


def _run_block(plan: Plan, names: list[str], *refs) -> None:
    """Runs a block: two warpgroups compute, one loads."""
    head, segment, tile, warpgroup = (
        lax.axis_index(name) for name in ("head", "segment", "tile", "warpgroup")
    )
    block = _Block(plan, dict(zip(names, refs, strict=True)), head, segment, tile)
    pl.when(warpgroup < 2)(lambda: block.compute(warpgroup))
    pl.when(warpgroup == 2)(block.load)


class _Block(LoadingBlock):
    """A block of the kernel, whose first two warpgroups compute."""

    def __init__(self, plan: Plan, refs: dict, head, segment, tile):
        super().__init__(plan, refs, head, segment, tile)
        weights = Row.READ, Row.WRITE
        self.from_state, self.to_state = weights[::-1] if self.options.reverse else weights

    def gate(self, row: int):
        """Returns a row of the chunk's gates, along the rows of a tile."""
        return _load(self.refs["gates_smem"].at[row], layout=_ROWS)

    def gate_of_columns(self, row: int, columns, nil):
        """Returns a part of a row of the chunk's gates, along the columns of a tile."""
        # Without `nil`, Mosaic would take it for the same value as `gate(row)`, in its layout.
        return _load(self.refs["gates_smem"].at[row + nil, columns], layout=_COLUMNS)

    def compute(self, warpgroup) -> None:
        """Walks over the chunks with the state of the warpgroup's features."""
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        refs, features = self.refs, self.features(warpgroup)
        shape = (self.plan.d, self.tiling.width)
        if self.has["init"]:
            init = refs["init"].at[self.segment, :, features]
            state = _load(init, layout=plgpu.Layout.WGMMA, optimized=False)
        else:
            state = _zeros(shape)
        if not self.options.emit_crossings:
            refs["state_smem"].at[warpgroup][...] = state.astype(self.plan.dtype)
            plgpu.commit_smem()
        step = functools.partial(self.step, warpgroup)
        # Not a constant, which would reach the loop's body, if there is a single chunk.
        nil = jnp.minimum(self.head, 0)
        state, _ = lax.fori_loop(0, self.num_chunks, step, (state, nil))
        if self.options.emit_last:
            refs["last"][self.segment, :, features] = state
        plgpu.wait_smem_to_gmem(0)

    def step(self, warpgroup, i, carry):
        """Computes a chunk."""
        # `nil` is 0, but the compiler does not know: it would keep in registers, or spill, the many
        # addresses that do not change from chunk to chunk.
        state, nil = carry
        refs, t, options, dtype = self.refs, self.tiling, self.options, self.plan.dtype
        chunk, head, warpgroup = self.chunk(i) + nil, self.head + nil, warpgroup + nil
        index = head * self.plan.num_chunks + chunk  # Among the chunks of all heads.
        ib, ix = lax.rem(i, t.b_stages) + nil, lax.rem(i, t.x_stages) + nil
        my_b = refs["b_smem"].at[ib]
        my_x = refs["x_smem"].at[ix, warpgroup]
        my_state = refs["state_smem"].at[warpgroup]
        # One warpgroup of a head does what is the same in all, another one in each chunk.
        part = self.tile * 2 + warpgroup
        is_mine = lax.rem(chunk, 2 * self.plan.num_tiles) == part
        is_even, saved = lax.rem(chunk, 2) == 0, head * self.plan.num_states + chunk // 2

        if options.emit_states:
            states = refs["states"].at[saved, :, self.features(warpgroup)]
            pl.when(is_even)(lambda: plgpu.copy_smem_to_gmem(my_state, states))
        if self.has["partner_states"]:
            refs["overlaps"][head, part, chunk] = self.overlaps(warpgroup, state)
        if options.outputs:
            ia = lax.rem(i, t.a_stages) + nil
            my_a = refs["a_smem"].at[ia]
            plgpu.barrier_wait(refs["a_full"].at[ia])
        if self.has["partner"]:
            my_partner = refs["partner_smem"].at[ix, warpgroup]
        if options.emit_crossings:
            plgpu.barrier_wait(refs["x_full"].at[ix])
            crossings = refs["crossings"].at[head, part, chunk // 2]
            # Other addresses than below, or the compiler would keep them for there, and spill.
            cross = functools.partial(self.cross, crossings, ia + nil, warpgroup + nil, my_partner)
            pl.when(is_even & (i > 0))(cross)
            my_state[...] = state.astype(dtype)
            plgpu.commit_smem()
        plgpu.barrier_wait(refs["b_full"].at[ib])
        if options.outputs:
            weighted, total, out = self.scores_and_state_read(
                my_a, my_b, my_state, is_mine, index, nil
            )
            plgpu.barrier_arrive(refs["a_empty"].at[ia])
            out = self.scale_state_read(head, warpgroup, chunk, out)
            if not options.emit_crossings:
                plgpu.barrier_wait(refs["x_full"].at[ix])
            if self.has["partner"]:
                refs["dots"][head, part, chunk] = _sum_of_products(my_partner, out)
            out = _add_product(out, weighted, my_x)
            if options.normalize:
                out = self.normalize(out, total, refs["normalizer"].at[head, chunk], is_mine)
            out = out.astype(dtype)  # Fewer registers during the next product.
        else:
            plgpu.barrier_wait(refs["gates_full"].at[0])
            plgpu.barrier_wait(refs["x_full"].at[ix])

        keep = refs["keep"][head, chunk]
        # x with the weight of each token in the state, in place of x.
        x = _load(my_x, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        if self.has["partner_x"]:
            partner = refs["partner_x_smem"].at[ix, warpgroup]
            refs["x_dots"][head, part, chunk] = _sum_of_products(partner, x)
        weight = self.gate(self.to_state)
        plgpu.barrier_arrive(refs["gates_empty"].at[0])
        my_x[...] = (x * lax.broadcast_in_dim(weight, x.shape, [0])).astype(dtype)
        plgpu.commit_smem()
        state = _add_product(state * keep, my_b.transpose((1, 0)), my_x)
        plgpu.barrier_arrive(refs["b_empty"].at[ib])
        if options.emit_states:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if not options.emit_crossings:
            my_state[...] = state.astype(dtype)

        if options.outputs:
            my_x[...] = out
        plgpu.commit_smem()
        if options.outputs:
            plgpu.copy_smem_to_gmem(my_x, self.tokens("out", chunk, warpgroup))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs["x_empty"].at[ix])
        return state, (keep > 2).astype(jnp.int32)  # Never: a state decays.

    def cross(self, crossings, a_stage, warpgroup, partner) -> None:
        """Writes the sums of the partner times `a` times the state before the last step."""
        a, state = self.refs["a_smem"].at[a_stage], self.refs["state_smem"].at[warpgroup]
        crossings[...] = _sum_of_products(partner, _add_product(_zeros(partner.shape), a, state))

    def normalize(self, out, total, written, is_mine):
        """Returns the output over its normalizer, which is written too."""
        normalizer = total + self.gate(Row.CARRIED)
        divisor = jnp.maximum(jnp.abs(normalizer), self.gate(Row.BOUND))

        @pl.when(is_mine)
        def _():
            written[...] = normalizer

        return out * lax.broadcast_in_dim(1.0 / divisor, out.shape, [0])

    def overlaps(self, warpgroup, state):
        """Returns the sums over features of the state times the partner's, folded into 64 rows."""
        t, total = self.tiling, None
        rows = self.plan.d // t.pieces
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
            plgpu.barrier_wait(self.refs["gates_full"].at[0])
            weights = self.pair_weights(nil)
            return self.weigh(scores_acc[...], weights, is_mine, index, nil)

        def both(scores_acc, out_acc):
            # Computes the weights, and weighs the scores, while the second product runs.
            plgpu.wgmma(scores_acc, my_a, my_b)
            plgpu.wgmma(out_acc, my_a, my_state)
            scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
            plgpu.barrier_wait(self.refs["gates_full"].at[0])
            return *self.weigh(scores, None, is_mine, index, nil), out_acc[...]

        if are_kernels_interpreted():
            scores = _add_product(_zeros((size, size)), my_a, my_b)
            plgpu.barrier_wait(self.refs["gates_full"].at[0])
            weighted = self.weigh(scores, None, is_mine, index, nil)
        elif self.has["partner_states"] and self.tiling.width == 64:
            # Two products at a time would need too many registers.
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
        return scores.astype(self.plan.dtype), total

    def add_bias(self, scores, columns, nil):
        """Returns some columns of the scores plus the bias of their readers."""
        if not self.has["vector"]:
            return scores
        if self.options.reverse:
            bias, axis = self.gate_of_columns(Row.BIAS, columns, nil), 1
        else:
            bias, axis = self.gate(Row.BIAS), 0
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
        refs["pair_sums"][index] = total

    def pair_weights(self, nil):
        """Returns the weights of the pairs, rows by columns; see `decayed_attention`."""
        reverse, shape = self.options.reverse, (CHUNK, CHUNK)
        sides = Row.READER, Row.WRITER
        along_rows, along_columns = sides[::-1] if reverse else sides

        def from_rows(row):
            return lax.broadcast_in_dim(self.gate(row), shape, [0])

        def from_columns(row):
            return lax.broadcast_in_dim(self.gate_of_columns(row, pl.ds(0, CHUNK), nil), shape, [1])

        log_weights = from_rows(Row.COARSE) - from_columns(Row.COARSE)
        log_weights = -log_weights if reverse else log_weights
        log_weights = log_weights + from_rows(along_rows) + from_columns(along_columns)
        log_weights = jnp.minimum(log_weights, LARGEST_LOG_WEIGHT)
        row = lax.broadcast_in_dim(
            plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_ROWS) + nil, shape, [0]
        )
        column = lax.broadcast_in_dim(
            plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_COLUMNS) + nil, shape, [1]
        )
        limit = from_rows(Row.LAST if reverse else Row.FIRST).astype(jnp.int32)
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
                vector = vector * lax.broadcast_in_dim(self.gate(Row.BIAS), out.shape, [0])
            out += vector
        return out * lax.broadcast_in_dim(self.gate(self.from_state), out.shape, [0])


def _load(ref, *, layout, optimized=True):
    """Returns the values of a reference, in registers."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def _zeros(shape: tuple[int, int]):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _sum_of_products(ref, y):
    """Returns the sums over the columns of the values of a reference times `y`."""
    return (_load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32) * y).sum(axis=1)


def _add_product(accumulator, a, b):
    """Returns `accumulator + a @ b`; `a` is in shared memory or registers, `b` in shared memory."""
    if (
        are_kernels_interpreted()
    ):  # The interpreter knows neither this accumulator nor `a` in registers.
        a = a if isinstance(a, jax.Array) else a[...]
        return accumulator + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(accumulator))
