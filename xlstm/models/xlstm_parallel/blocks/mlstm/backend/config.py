"""The choice of an mLSTM backend and its options, and the interface of all backends."""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax
from jax import lax

from xlstm.distributed.mesh import axis_size
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments, MLSTMState

# The names of the backends; `registry.BACKENDS` has their classes.
BACKEND_NAMES = ("fwbw", "parallel_stabilized", "recurrent")
# The programs that compute `fwbw`; `auto` takes the kernels where they can run.
IMPLEMENTATIONS = ("auto", "xla", "mosaic")


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Choice of a backend, and the options of all backends, each of which takes those it knows.

    These are the defaults of a model. `registry.backend_config` maps the options to those of the
    chosen backend; `mLSTMBackendFwbwConfig` has other defaults for callers of its functions.

    Kept arrays live only during the backward pass of one block, unless `model.remat` is `none`, so
    by default everything is kept.
    """

    name: str = "fwbw"  # The backend: fwbw (chunkwise), parallel_stabilized (quadratic) or
    # recurrent.
    chunk_size: int = -1  # Tokens per chunk in fwbw; -1 takes the fastest measured for the device
    # and the head sizes, 0 takes the whole sequence as one chunk.
    stabilize_correctly: bool = True  # Bound the normalizer by exp(-m), as in the paper, not by 1.
    keep_G: bool = True  # Whether fwbw keeps, rather than recomputes, the weights and scores of the
    # token pairs in each chunk.
    keep_gates: bool = True  # Whether fwbw keeps the sums of the gates within the chunks.
    keep_M: bool = True  # Whether fwbw keeps the log scales of the tokens.
    keep_c: bool = True  # Whether fwbw keeps the states between the chunks.
    implementation: str = "auto"  # The program of fwbw: xla, mosaic (kernels for Hopper GPUs), or
    # auto, which takes mosaic where it can run.

    def __post_init__(self):
        if self.name not in BACKEND_NAMES:
            raise ValueError(
                f"backend.name={self.name!r} is unknown; expected one of {', '.join(BACKEND_NAMES)}"
            )
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"backend.implementation={self.implementation!r} is unknown; expected one of"
                f" {', '.join(IMPLEMENTATIONS)}"
            )
        if self.name == "fwbw" and self.chunk_size < -1:
            raise ValueError(
                f"backend.chunk_size={self.chunk_size}: it must be at least 1, 0 for one chunk, or"
                " -1 for the fastest"
            )


class mLSTMBackendConfig:
    """Base class of the configurations of the backends."""

    def assign_model_config_params(self, model_config: Any) -> Self:
        """Returns the configuration adapted to a model; by default, itself."""
        del model_config
        return self


class mLSTMBackend(nn.Module):
    """Interface of the mLSTM backends, which apply the cell to a sequence.

    Attributes:
        config: Configuration of the backend, an instance of `config_class`.
        precision: Precision of float32 products, see `product_precision`.
        context_axis: Mesh axis that the tokens are sharded over in `shard_map`, in contiguous
            parts; None if they are not. `fwbw` alone supports it.
    """

    config: mLSTMBackendConfig
    precision: lax.Precision | None = None
    context_axis: str | None = None
    config_class = mLSTMBackendConfig

    can_shard_tokens = False  # Whether `context_axis` can have several devices.

    @property
    def can_vmap_over_heads(self) -> bool:
        """Whether the backend can be vmapped over the axis of heads."""
        return True

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        i: jax.Array,
        f: jax.Array,
        c_initial: jax.Array | None = None,
        n_initial: jax.Array | None = None,
        m_initial: jax.Array | None = None,
        return_last_states: bool = False,
        reset: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, MLSTMState]:
        """Runs the cell over a sequence.

        Args:
            q: Queries `(..., T, DHQK)`.
            k: Keys `(..., T, DHQK)`.
            v: Values `(..., T, DHV)`.
            i: Input gate pre-activations `(..., T)` or `(..., T, 1)`.
            f: Forget gate pre-activations `(..., T)` or `(..., T, 1)`.
            c_initial: Matrix memory before the first token `(..., DHQK, DHV)`; None for zero.
            n_initial: Normalizer `(..., DHQK)`; None for zero.
            m_initial: Log scale `(...)`; None for zero.
            return_last_states: Whether to return the state after the last token as well.
            reset: Bool, broadcasts to `(..., T)`: True drops the state before that token.

        Returns:
            `h (..., T, DHV)` in the type of `v`, or `(h, MLSTMState)`.

        Raises:
            ValueError: If shapes or types are wrong, the initial state is incomplete, or the tokens
                are sharded and the backend does not support it.
        """
        arguments = MLSTMArguments(q, k, v, i, f, c_initial, n_initial, m_initial)
        if self.context_axis and axis_size(self.context_axis) > 1 and not self.can_shard_tokens:
            raise ValueError(
                f"{type(self).__name__} needs the whole sequence, but its tokens are sharded over"
                f" {self.context_axis}: use backend.name=fwbw"
            )
        return self.run(arguments, reset, return_last_states)

    def run(
        self, arguments: MLSTMArguments, reset: jax.Array | None, return_last_states: bool
    ) -> jax.Array | tuple[jax.Array, MLSTMState]:
        """Implements `__call__`; each backend overrides it."""
        raise NotImplementedError
