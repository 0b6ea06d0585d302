"""The registry of the mLSTM backends: the class of each of the `BACKEND_NAMES`."""

import dataclasses
from typing import Any

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    BackendConfig,
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


def backend_config(choice: BackendConfig) -> mLSTMBackendConfig:
    """Returns the configuration of the chosen backend, with the options that it knows."""
    config_class = BACKENDS[choice.name].config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    options = dataclasses.asdict(choice) | {"chunk_size": choice.chunk_size or None}
    return config_class(**{name: value for name, value in options.items() if name in known})


def create_backend(
    choice: BackendConfig, model_config: Any = None, context_axis: str | None = None
) -> mLSTMBackend:
    """Creates the chosen backend, adapted to a model.

    Args:
        choice: The backend's name and options.
        model_config: The model's configuration, which sets the precision of the backend's products
            and is passed to `assign_model_config_params`; None for JAX's own precision.
        context_axis: Mesh axis that the tokens are sharded over, see `mLSTMBackend`.

    Returns:
        The Flax module.
    """
    config = backend_config(choice).assign_model_config_params(model_config)
    precision = None if model_config is None else model_config.precision
    return BACKENDS[choice.name](config, precision, context_axis)
