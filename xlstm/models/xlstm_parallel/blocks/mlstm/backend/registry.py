"""The one place where a backend is found by its name."""

import dataclasses
from typing import Any

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    mLSTMBackend,
    mLSTMBackendConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import mLSTMBackendFwbw
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.parallel_stabilized import (
    mLSTMBackendParallelStabilized,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.recurrent import mLSTMBackendRecurrent

BACKENDS: dict[str, type[mLSTMBackend]] = {
    "fwbw": mLSTMBackendFwbw,
    "parallel_stabilized": mLSTMBackendParallelStabilized,
    "recurrent": mLSTMBackendRecurrent,
}


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Choice of a backend, with the options of all of them; each takes those that it knows.

    What is kept lives during the backward pass of one block, unless `model.remat` is none; so all
    of it is, other than by `mLSTMBackendFwbwConfig`'s own defaults.
    """

    name: str = "fwbw"  # fwbw (chunkwise), parallel_stabilized (quadratic) or recurrent.
    chunk_size: int = 64  # Tokens in a chunk of fwbw; 0 takes the whole sequence as one chunk.
    stabilize_correctly: bool = True  # Bound the normalizer by exp(-m), the paper's way, not 1.
    keep_G: bool = True  # fwbw keeps weights and scores of the pairs in a chunk; else recomputes.
    keep_gates: bool = True  # fwbw keeps the sums of the gates within the chunks.
    keep_M: bool = True  # fwbw keeps the log scales of the tokens.
    keep_c: bool = True  # fwbw keeps the states between chunks.

    def __post_init__(self):
        if self.name not in BACKENDS:
            raise ValueError(
                f"backend.name={self.name!r} is unknown; there are {', '.join(sorted(BACKENDS))}"
            )
        backend_config(self)  # Raises if an option's value is wrong.


def backend_config(choice: BackendConfig) -> mLSTMBackendConfig:
    """Returns the configuration of the chosen backend."""
    config_class = BACKENDS[choice.name].config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    options = dataclasses.asdict(choice) | {"chunk_size": choice.chunk_size or None}
    return config_class(**{name: value for name, value in options.items() if name in known})


def create_backend(choice: BackendConfig, model_config: Any = None) -> mLSTMBackend:
    """Creates the chosen backend, adapted to a model.

    Args:
        choice: Name and options.
        model_config: The model's configuration, whose `precision` the backend's products have, and
            for backends that adapt to it; None for the backend on its own.

    Returns:
        The Flax module.
    """
    config = backend_config(choice).assign_model_config_params(model_config)
    precision = None if model_config is None else model_config.precision
    return BACKENDS[choice.name](config=config, precision=precision)
