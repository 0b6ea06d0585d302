"""The configuration of a run."""

import dataclasses

from xlstm.dataset.config import DataConfig
from xlstm.distributed.mesh import MeshConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.trainer.base.trainer import TrainerConfig
from xlstm.trainer.logger.base_logger import LoggerConfig
from xlstm.trainer.optimizer.optimizers import OptimizerConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does, a section for each subsystem."""

    model: ModelConfig = ModelConfig()
    backend: BackendConfig = BackendConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    trainer: TrainerConfig = TrainerConfig()
    logger: LoggerConfig = LoggerConfig()

    def __post_init__(self):
        has_validation_set = self.data.validation_fraction > 0 or self.data.validation_stores
        if self.trainer.keep_best_checkpoint and not has_validation_set:
            raise ValueError(
                "trainer.keep_best_checkpoint=True needs a validation loss: set"
                " data.validation_fraction or data.validation_stores"
            )

    @property
    def language_model(self) -> LanguageModelConfig:
        """The part that the model is made from."""
        return LanguageModelConfig(self.model, self.backend, self.mesh)
