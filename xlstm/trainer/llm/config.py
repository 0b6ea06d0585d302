"""The configuration of a run."""

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

from xlstm.dataset.config import STDLIB, DataConfig
from xlstm.distributed.mesh import MeshConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.logger.base_logger import LoggerConfig
from xlstm.trainer.optimizer.optimizers import OptimizerConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig
from xlstm.visible_text import short_repr


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does: one section for each subsystem."""

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Makes a configuration from nested dictionaries, such as those of a `config.json`.

        Args:
            values: The fields of every section, by the section's name. Lists are accepted as
                tuples, and ints as floats.

        Returns:
            The checked configuration.

        Raises:
            ValueError: If a section or field is unknown or missing, or a value is invalid.
        """
        _check_names("the config", values, sections())
        configs = {}
        for section, section_class in sections().items():
            fields = {field.name for field in dataclasses.fields(section_class)}
            _check_names(f"config.{section}", values[section], fields)
            hints = typing.get_type_hints(section_class)
            typed = {
                name: _typed(f"{section}.{name}", value, hints[name])
                for name, value in values[section].items()
            }
            configs[section] = section_class(**typed)
        return cls(**configs)

    @property
    def language_model(self) -> LanguageModelConfig:
        """The sections that define the model."""
        return LanguageModelConfig(self.model, self.backend, self.mesh)

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """Returns a copy with new values of the given fields, named `section.field`."""
        config = self
        for name, value in fields.items():
            section, field = name.split(".")
            changed = dataclasses.replace(getattr(config, section), **{field: value})
            config = dataclasses.replace(config, **{section: changed})
        return config

    def with_decay_steps(self) -> Self:
        """Returns a copy with `schedule.decay_steps`: by default the decay ends with the run."""
        if self.schedule.decay_steps:
            return self
        end = self.trainer.num_steps - self.schedule.cooldown_steps
        # A run may end within the warm-up: it never reaches the decay.
        steps = max(end, self.schedule.warmup_steps + 1)
        return self.with_fields({"schedule.decay_steps": steps})

    def resolve_paths(self, resolve: Callable[[str], str]) -> Self:
        """Returns a copy in which every field that names a file or folder is resolved.

        Args:
            resolve: Makes a path absolute.
        """
        data, init_from = self.data, self.trainer.init_from
        return self.with_fields(
            {
                "data.stores": tuple(
                    name if name == STDLIB else resolve(name) for name in data.stores
                ),
                "data.validation_stores": tuple(
                    f"{name}={resolve(path)}" for name, path in data.validation_paths.items()
                ),
                "trainer.init_from": init_from and resolve(init_from),
            }
        )


def sections() -> dict[str, type]:
    """Returns the dataclass of every section of a configuration, by the section's name."""
    return typing.get_type_hints(RunConfig)


def _check_names(where: str, given: Any, known: typing.Collection[str]) -> None:
    if not isinstance(given, dict):
        listed = ", ".join(sorted(known))
        raise ValueError(f"{where}={short_repr(given)}: expected a section, with {listed}")
    unknown, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
    if unknown or missing:
        raise ValueError(
            f"{where} has the wrong fields (unknown: {', '.join(unknown) or 'none'}; missing:"
            f" {', '.join(missing) or 'none'}); begin with default_config()"
        )


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to a field's type: an int to a float, a list to a tuple."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={short_repr(value)}: expected a tuple, such as ('a', 'b')")
        element = typing.get_args(hint)[0]
        return tuple(_typed(f"{name}[{index}]", x, element) for index, x in enumerate(value))
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}={short_repr(value)}: expected {hint.__name__}")
    return value
