"""Soundness of training steps: whether the parameters after them can be relied on."""

import collections
import itertools
import math
from typing import Any

# Number of last sound steps whose mean loss and norms a new step is compared with.
_WINDOW = 50
# An update is also too large if its norm exceeds both this many times the mean of the last sound
# updates and this share of the parameters' norm: the loss shows that only a step later, when a
# checkpoint may have been written.
_MAX_UPDATE_GROWTH, _LARGE_UPDATE = 10, 0.1
# A loss within this many standard deviations is no spike: small batches of mixed text vary by nats.
_DEVIATIONS = 5
_EMPTY_RECORD = {
    "losses": [],
    "lowest_loss": None,
    "param_norms": [],
    "update_norms": [],
    "sound_since_fault": None,
}


class Soundness:
    """The criteria for sound steps and confirmed checkpoints, and the record that they need.

    A step is sound if its loss, gradient, parameters and update are finite, its loss is no spike
    above the last sound losses and not far above the lowest ones, and its update and its parameters
    are not large compared with the parameters of the last sound steps. Later steps are compared
    with sound steps only, so a ruined model does not become the reference.

    A checkpoint is confirmed if all steps of the run were sound, or enough sound ones have followed
    the last one that was not. A step that was skipped for its loss or gradient has changed nothing:
    after it, one sound step is enough.
    """

    def __init__(self, confirm_steps: int, max_loss_spike: float, max_update_ratio: float):
        """Starts a run.

        Args:
            confirm_steps: Number of sound steps that must follow an unsound one before a checkpoint
                is confirmed; 0 confirms every checkpoint.
            max_loss_spike: A loss is a spike if it exceeds the mean of the last sound losses by
                more than this many nats and by more than they usually vary. A loss that exceeds the
                lowest mean of the run by as much has climbed too far.
            max_update_ratio: An update is too large if its norm exceeds this many times the mean
                parameter norm of the last sound steps; parameters are too large if their norm has
                grown by as much.
        """
        self._confirm_steps = confirm_steps
        self._max_loss_spike, self._max_update_ratio = max_loss_spike, max_update_ratio
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._lowest_loss: float | None = None  # The lowest mean of a full window.
        self._param_norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._update_norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._sound_since_fault: int | None = None  # None if all steps were sound.
        self._was_skipped = False

    def judge(self, metrics: dict[str, float]) -> str | None:
        """Judges the next step.

        Args:
            metrics: `loss`, `grad_norm`, `param_norm` (before the step), `update_norm`, and
                `skipped` (1 if the step changed nothing).

        Returns:
            The reason why the step is not sound, as a clause; None if it is sound.
        """
        param_fault, loss_fault = self._find_param_fault(metrics), self._find_loss_fault(metrics)
        self._was_skipped = bool(loss_fault and metrics["skipped"])
        if param_fault or (loss_fault and not metrics["skipped"]):
            self._sound_since_fault = 0
        elif not loss_fault:
            if self._sound_since_fault is not None:
                self._sound_since_fault += 1
            self._losses.append(metrics["loss"])
            if len(self._losses) == _WINDOW:
                mean, lowest = _mean(self._losses, 0.0), self._lowest_loss
                self._lowest_loss = mean if lowest is None else min(mean, lowest)
            self._param_norms.append(metrics["param_norm"])
            if not metrics["skipped"]:
                self._update_norms.append(metrics["update_norm"])
        return param_fault or loss_fault

    def _find_param_fault(self, metrics: dict[str, float]) -> str | None:
        """Returns what is wrong with the parameters after the step; None if nothing is."""
        fault = _find_infinite(metrics, "param_norm", "update_norm")
        param_norm, update_norm = metrics["param_norm"], metrics["update_norm"]
        usual = _mean(self._param_norms, param_norm)
        for norm, what in [
            (update_norm, "the norm of its update"),
            (param_norm - usual, "the growth of the parameters' norm"),
        ]:
            if not fault and usual > 0 and norm > self._max_update_ratio * usual:
                fault = f"{what}, {norm:.4g}, is too large for parameters of norm {usual:.4g}"
        usual_update = _mean(self._update_norms, update_norm)
        limit = max(_MAX_UPDATE_GROWTH * usual_update, _LARGE_UPDATE * usual)
        if not fault and update_norm > limit:
            what = f"the norm of its update, {update_norm:.4g},"
            fault = f"{what} is far above the usual {usual_update:.4g}"
        return fault

    def _find_loss_fault(self, metrics: dict[str, float]) -> str | None:
        """Returns what is wrong with the loss or the gradient; None if nothing is."""
        fault = _find_infinite(metrics, "loss", "grad_norm")
        loss = metrics["loss"]
        usual = _mean(self._losses, loss)
        limit = max(self._max_loss_spike, _DEVIATIONS * _deviation(self._losses))
        if not fault and loss > usual + limit:
            fault = f"its loss of {loss:.4g} is a spike above the usual {usual:.4g}"
        lowest = self._lowest_loss
        if not fault and lowest is not None and loss > lowest + limit:
            fault = f"its loss has climbed to {loss:.4g} from {lowest:.4g}"
        return fault

    def confirms(self) -> bool:
        """Returns whether a checkpoint after the last step is confirmed."""
        if self._confirm_steps == 0:
            return True
        since = self._sound_since_fault
        return not self._was_skipped and (since is None or since >= self._confirm_steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record that `from_dict` continues from; JSON can represent it."""
        return {
            "losses": list(self._losses),
            "lowest_loss": self._lowest_loss,
            "param_norms": list(self._param_norms),
            "update_norms": list(self._update_norms),
            "sound_since_fault": self._sound_since_fault,
        }

    def from_dict(self, saved: dict[str, Any] | None) -> None:
        """Continues from a confirmed checkpoint.

        Args:
            saved: The result of `to_dict` at that checkpoint; None if it is unknown or from other
                data.
        """
        saved = _EMPTY_RECORD | (saved or {})  # Older versions saved fewer keys.
        self._losses = collections.deque(saved["losses"], _WINDOW)
        self._lowest_loss = saved["lowest_loss"]
        self._param_norms = collections.deque(saved["param_norms"], _WINDOW)
        self._update_norms = collections.deque(saved["update_norms"], _WINDOW)
        self._sound_since_fault, self._was_skipped = saved["sound_since_fault"], False


def _find_infinite(metrics: dict[str, float], *names: str) -> str | None:
    return next((f"{x}={metrics[x]}" for x in names if not math.isfinite(metrics[x])), None)


def _mean(values: collections.deque[float], default: float) -> float:
    return math.fsum(values) / len(values) if values else default


def _deviation(values: collections.deque[float]) -> float:
    """Returns the standard deviation, from differences of neighbors so that a trend adds none."""
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(values)]
    return math.sqrt(math.fsum(squares) / (2 * len(squares))) if squares else 0.0
