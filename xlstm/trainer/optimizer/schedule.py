"""Learning rate schedules."""

import dataclasses

import jax.numpy as jnp
import optax

from xlstm.finite import check_finite

_DECAYS = ("cosine", "exponential", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, a decay, and perhaps a linear cooldown to 0."""

    peak_lr: float = 1e-3  # Learning rate at the end of the warm-up.
    warmup_steps: int = 100  # Steps of the linear warm-up from 0.
    decay: str = "cosine"  # Shape after the warm-up: cosine, exponential or constant.
    decay_steps: int = 0  # Step, counted from the start of the run, at which the decay ends; 0: the
    # end of the run less the cooldown (a run that resumes keeps the step that it began with).
    final_lr_factor: float = 0.1  # Cosine, exponential: what is left at decay_steps, as a fraction
    # of the peak.
    cooldown_steps: int = 0  # Steps from decay_steps on of a linear way to 0; without any, the
    # learning rate stays as it is.

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
                "schedule.final_lr_factor=0.0: an exponential decay never gets to 0; it must be"
                " positive, and schedule.cooldown_steps lead to 0"
            )
        if self.cooldown_steps < 0:
            raise ValueError(
                f"schedule.cooldown_steps={self.cooldown_steps}: it must not be negative"
            )


def create_schedule(config: ScheduleConfig) -> optax.Schedule:
    """Makes the learning rate: a warm-up, then a decay, then perhaps a cooldown.

    A constant "decay" with a cooldown is known as warm-up-stable-decay (Hu et al., "MiniCPM", 2024,
    section 4), an exponential one with a cooldown is that of xLSTM-7B (Beck et al., 2025).

    Args:
        config: Options; `decay_steps` must be set (`RunConfig.with_decay_steps` does it).

    Returns:
        The learning rate as a function of the step, which counts from 0; of an array of steps too.

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
        return jnp.maximum(linear(step), 0.0)  # Compiled, its end may be a rounding error below 0.

    return optax.join_schedules(
        [warmup, decay, cooldown], [config.warmup_steps, config.decay_steps]
    )
