"""Learning rate schedules."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to a fraction of the peak."""

    peak_lr: float = 1e-3  # Learning rate at the end of the warm-up.
    warmup_steps: int = 100  # Steps of the linear warm-up from 0.
    decay_steps: int = 1000  # Step at which the cosine has come down; constant from there on.
    final_lr_factor: float = 0.1  # The last learning rate as a fraction of the peak.

    def __post_init__(self):
        if not self.peak_lr > 0:
            raise ValueError(f"schedule.peak_lr={self.peak_lr}: it must be positive")
        if not 0 <= self.final_lr_factor <= 1:
            raise ValueError(
                f"schedule.final_lr_factor={self.final_lr_factor}: it must be from 0 to 1"
            )
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps}: it must be at least 0 and below"
                f" schedule.decay_steps={self.decay_steps}"
            )


def create_schedule(config: ScheduleConfig) -> optax.Schedule:
    """Returns the learning rate as a function of the step, which counts from 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=config.peak_lr * config.final_lr_factor,
    )
