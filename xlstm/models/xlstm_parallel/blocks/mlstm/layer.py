"""The mLSTM layer: projections and gates around the cell, heads divided over `tp`."""

from collections.abc import Callable

import flax.linen as nn
import jax

from xlstm.distributed.tensor_parallel import column_parallel, row_parallel
from xlstm.models.shared.dense import Dense
from xlstm.models.shared.init import small_init, wang_init
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import MLSTMState
from xlstm.models.xlstm_parallel.blocks.mlstm.cell import CellInputs, forget_bias_init, run_cell
from xlstm.models.xlstm_parallel.config import LanguageModelConfig


class mLSTMLayer(nn.Module):
    """Multi-head mLSTM with a sigmoid output gate.

    It sows `gate_moments`, see `run_cell`; `ogate` is the open share of the output gate.

    Attributes:
        config: Configuration of the model.

    References:
        Beck et al., "xLSTM 7B", 2025 (arXiv 2503.13427), section 3.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        reset: jax.Array | None,
        padding: jax.Array | None,
        state: MLSTMState | None,
    ) -> tuple[jax.Array, MLSTMState | None]:
        """Runs the layer.

        Args:
            x: This device's tokens, `(B, T / tp, D)`.
            reset: Where the state is dropped before the token, bool `(B, T)`, or None.
            padding: Which tokens leave no trace in the state, bool `(B, T)`, or None.
            state: State of this device's heads before the first token, leading axes `(B, NH)`, or
                None for zero.

        Returns:
            The output `(B, T / tp, D)`, and the last state if `state` was given, else None.
        """
        config, overlap = self.config.model, self.config.mesh.tp_overlap
        embedding_dim = x.shape[-1]
        numerics = {"dtype": config.compute_dtype, "precision": config.precision}

        def dense(name: str, features: int) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(features, init_fn, (None, "tp"), **numerics, name=name)

        def gate(name: str, bias_init: Callable) -> Dense:
            # Initially the gates do not depend on the input.
            init_fn = nn.initializers.zeros
            return Dense(config.num_heads, init_fn, (None, "tp"), bias_init, **numerics, name=name)

        layers = {
            "q": dense("q", config.qk_dim),
            "k": dense("k", config.qk_dim),
            "v": dense("v", config.v_dim),
            "igate": gate("igate_preact", nn.initializers.constant(config.igate_bias_init)),
            "fgate": gate("fgate_preact", forget_bias_init),
            "ogate": dense("ogate_preact", config.v_dim),
        }
        y = column_parallel(
            lambda x: {name: layer(x) for name, layer in layers.items()}, x, "tp", overlap=overlap
        )
        inputs = CellInputs(**y | {"ogate": nn.sigmoid(y["ogate"])})
        h, state = run_cell(self, self.config, inputs, reset, padding, state)
        out_init = wang_init(embedding_dim, config.num_blocks)
        out_proj = Dense(embedding_dim, out_init, ("tp", None), **numerics, name="out_proj")
        return row_parallel(out_proj, inputs.ogate * h, "tp", overlap=overlap), state
