"""Learning rate schedules."""

import dataclasses

import jax.numpy as jnp
import optax

from xlstm.finite import check_finite

_DECAYS = ("cosine", "exponential", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A linear warm-up, a decay, and an optional linear cooldown to 0."""

    peak_lr: float = 1e-3  # Reach this learning rate at the end of the warm-up.
    warmup_steps: int = 100  # Raise the learning rate linearly from 0 over this many steps.
    decay: str = "cosine"  # Use this shape after the warm-up: cosine, exponential or constant.
    decay_steps: int = 0  # End the decay at this step, counted from the start of the run; 0 ends it
    # at the end of the run, less the cooldown. A resumed run keeps the step that it started with.
    final_lr_factor: float = 0.1  # Decay to this fraction of peak_lr (cosine, exponential).
    cooldown_steps: int = 0  # Lower the learning rate linearly to 0 over this many steps after
    # decay_steps; 0 keeps it constant instead.

    def __post_init__(self):
        check_finite("schedule.", self)
        if not self.peak_lr > 0:
            raise ValueError(f"schedule.peak_lr={self.peak_lr}: it must be positive")
        if self.decay_steps < 0:
            raise ValueError(f"schedule.decay_steps={self.decay_steps}: it must not be negative")
        if self.warmup_steps < 0 or 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps}: it must be at least 0 and below"
                f" schedule.decay_steps={self.decay_steps}"
            )
        if self.decay not in _DECAYS:
            raise ValueError(
                f"schedule.decay={self.decay!r}: it must be one of {', '.join(_DECAYS)}"
            )
        if not 0 <= self.final_lr_factor <= 1:
            raise ValueError(
                f"schedule.final_lr_factor={self.final_lr_factor}: it must be from 0 to 1"
            )
        if self.decay == "exponential" and self.final_lr_factor == 0:
            raise ValueError(
                "schedule.final_lr_factor=0.0: it must be positive, since an exponential decay"
                " never reaches 0; use schedule.cooldown_steps for that"
            )
        if self.cooldown_steps < 0:
            raise ValueError(
                f"schedule.cooldown_steps={self.cooldown_steps}: it must not be negative"
            )


def create_schedule(config: ScheduleConfig) -> optax.Schedule:
    """Creates the learning rate schedule: a warm-up, a decay, and an optional cooldown.

    A constant "decay" with a cooldown is the warmup-stable-decay schedule (Hu et al., "MiniCPM",
    2024, section 4). xLSTM-7B (Beck et al., 2025) uses an exponential decay with a cooldown.

    Args:
        config: The options; `decay_steps` must be set (see `RunConfig.with_decay_steps`).

    Returns:
        The learning rate as a function of the step, from 0, or of an array of steps.

    Raises:
        ValueError: If `decay_steps` is not set.
    """
    if not config.decay_steps:
        raise ValueError("schedule.decay_steps=0: a schedule needs the step at which it ends")
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_factor
    num_steps = config.decay_steps - config.warmup_steps
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, num_steps, alpha=final / peak)
    elif config.decay == "exponential":
        decay = optax.exponential_decay(peak, num_steps, config.final_lr_factor, end_value=final)
    else:
        final, decay = peak, optax.constant_schedule(peak)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    if not config.cooldown_steps:
        return optax.join_schedules([warmup, decay], [config.warmup_steps])
    linear = optax.linear_schedule(final, 0.0, config.cooldown_steps)

    def cooldown(step):
        return jnp.maximum(
            linear(step), 0.0
        )  # A compiled `linear` may end a rounding error below 0.

    return optax.join_schedules(
        [warmup, decay, cooldown], [config.warmup_steps, config.decay_steps]
    )
