"""The part of a block of `hopper`'s kernel that loads arrays into shared memory."""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental import pallas as pl

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import CHUNK
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import Plan

_REGISTERS = 24  # Of a thread.


class LoadingBlock:
    """A block, which works on one tile of features of one head, or of a segment of its sequence.

    Attributes:
        plan: The static side of the kernel.
        refs: References to the arrays, the shared memory and the barriers, by name.
        tile: Number of the tile.
        head: Number of the head, among those of all sequences.
        segment: Number of the segment, among those of all heads.
        num_chunks: Number of chunks of the segment.
    """

    def __init__(self, plan: Plan, refs: dict, head, segment, tile):
        self.plan, self.refs, self.tile = plan, refs, tile
        self.options, self.has, self.tiling = plan.options, plan.has, plan.tiling
        self.head = head
        self.sequence, self.head_of_sequence = head // plan.heads, lax.rem(head, plan.heads)
        self.segment = head * plan.options.segments + segment
        self.num_chunks = plan.chunks_of_segment
        self.first_chunk = segment * self.num_chunks

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
            features = pl.ds(self.head_of_sequence * self.plan.d, self.plan.d)
        else:
            width = self.tiling.width
            start = self.head_of_sequence * self.plan.e + (self.tile * 2 + warpgroup) * width
            features = pl.ds(start, width)
        return self.refs[name].at[self.sequence, pl.ds(chunk * CHUNK, CHUNK), features]

    def load(self) -> None:
        """Loads the arrays of each chunk as soon as their shared memory is free."""
        plgpu.set_max_registers(_REGISTERS, action="decrease")
        t, uses = self.tiling, self.num_chunks
        # In the order in which a step of the others frees them.
        stages = {"a": t.a_stages, "gates": 1, "b": t.b_stages, "x": t.x_stages}
        if not self.options.outputs:
            del stages["a"]

        @pl.loop(0, uses)
        def _(i):
            chunk = self.chunk(i)
            if self.has["partner_states"]:
                self.load_partner_states(i, chunk, 0)
            # First the arrays for which there is room while the step before still runs.
            for name in sorted(stages, key=stages.get, reverse=True):
                self.load_stage(name, i, stages[name], chunk)
            for piece in range(1, t.pieces):
                self.load_partner_states(i, chunk, piece)

        # No completion of a barrier may be left without a wait.
        for name, count in stages.items():
            for stage in range(min(count, uses)):
                plgpu.barrier_wait(self.refs[f"{name}_empty"].at[stage])
        if self.has["partner_states"]:
            plgpu.barrier_wait(self.refs["partner_states_empty"])

    def load_stage(self, name: str, i, stages: int, chunk) -> None:
        """Loads an array of a chunk, as soon as its stage is free."""
        stage = lax.rem(i, stages)
        full, empty = (self.refs[f"{name}_{x}"].at[stage] for x in ("full", "empty"))
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty))
        if name == "gates":
            gates = self.refs["gates"].at[self.head, chunk]
            plgpu.copy_gmem_to_smem(gates, self.refs["gates_smem"], full)
        elif name == "x":
            for array in self.plan.tiles:
                for warpgroup in range(2):
                    place = self.refs[f"{array}_smem"].at[stage, warpgroup]
                    plgpu.copy_gmem_to_smem(self.tokens(array, chunk, warpgroup), place, full)
        else:
            place = self.refs[f"{name}_smem"].at[stage]
            plgpu.copy_gmem_to_smem(self.tokens(name, chunk), place, full)

    def load_partner_states(self, i, chunk, piece: int) -> None:
        """Loads a piece of the partner's states."""
        # Only the very first piece finds its shared memory free.
        is_used = i >= 1 if piece == 0 else True
        pl.when(is_used)(lambda: plgpu.barrier_wait(self.refs["partner_states_empty"]))
        rows = self.plan.d // self.tiling.pieces
        states = self.refs["partner_states"].at[self.head * self.plan.num_states + chunk // 2]
        for warpgroup in range(2):
            plgpu.copy_gmem_to_smem(
                states.at[pl.ds(piece * rows, rows), self.features(warpgroup)],
                self.refs["partner_states_smem"].at[warpgroup],
                self.refs["partner_states_full"],
            )
