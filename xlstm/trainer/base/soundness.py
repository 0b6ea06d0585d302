"""Judges training steps: whether the parameters that they lead to can be relied on."""

import collections
import itertools
import math
from typing import Any

# Sound steps whose mean loss and parameter norm a new step is compared with.
_WINDOW = 50
# An update so many times larger than the last sound ones is too large, if it is large beside the
# parameters as well: a loss tells of it a step later, when a checkpoint may be written.
_MOST_GROWTH, _LARGE_UPDATE = 10, 0.1
# A loss within so many standard deviations is no spike: small batches of mixed text vary by nats.
_DEVIATIONS = 5
_NOTHING_KNOWN = {
    "losses": [],
    "lowest_loss": None,
    "param_norms": [],
    "update_norms": [],
    "sound_since_fault": None,
}


class Soundness:
    """Follows the steps of a run.

    A step is sound if its loss, its gradient, its parameters and its update are finite, its loss is
    no spike above the last sound ones and not far above the lowest there were, and its update and
    its parameters are not large beside the parameters of the last sound steps. Only sound steps
    move what later ones are compared with: a ruined model does not become the measure.

    A checkpoint is confirmed if no step of the run was unsound, or enough sound ones have followed.
    A step that was left out for its loss or gradient has changed nothing: one sound step after it
    is enough.
    """

    def __init__(self, confirm_steps: int, max_loss_spike: float, max_update_ratio: float):
        """Begins a run.

        Args:
            confirm_steps: So many sound steps have to follow an unsound one; with 0 every
                checkpoint is confirmed.
            max_loss_spike: A loss that exceeds the mean of the last sound ones by more nats, and by
                more than they usually vary, is a spike. One that so exceeds the lowest mean that
                there has been has climbed too far.
            max_update_ratio: An update is too large if its norm is above so many times the mean
                norm of the parameters of the last sound steps; parameters are if theirs has grown
                by as much.
        """
        self._confirm_steps = confirm_steps
        self._max_loss_spike, self._max_update_ratio = max_loss_spike, max_update_ratio
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._lowest_loss: float | None = None  # The lowest mean of a full window.
        self._param_norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._update_norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._sound_since_fault: int | None = None  # None: there was no fault.
        self._was_left_out = False

    def judge(self, metrics: dict[str, float]) -> str | None:
        """Takes the metrics of the next step.

        Args:
            metrics: `loss`, `grad_norm`, `param_norm` (before the step), `update_norm`, and
                `skipped`: whether it was left out.

        Returns:
            Why the step is not sound, as a clause; None if it is.
        """
        of_params, of_loss = self._find_param_fault(metrics), self._find_loss_fault(metrics)
        self._was_left_out = bool(of_loss and metrics["skipped"])
        if of_params or (of_loss and not metrics["skipped"]):
            self._sound_since_fault = 0
        elif not of_loss:
            if self._sound_since_fault is not None:
                self._sound_since_fault += 1
            self._losses.append(metrics["loss"])
            if len(self._losses) == _WINDOW:
                mean, lowest = _mean(self._losses, 0.0), self._lowest_loss
                self._lowest_loss = mean if lowest is None else min(mean, lowest)
            self._param_norms.append(metrics["param_norm"])
            if not metrics["skipped"]:
                self._update_norms.append(metrics["update_norm"])
        return of_params or of_loss

    def _find_param_fault(self, metrics: dict[str, float]) -> str | None:
        """What is wrong with the parameters that the step leads to."""
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
        if not fault and update_norm > max(_MOST_GROWTH * usual_update, _LARGE_UPDATE * usual):
            fault = f"the norm of its update, {update_norm:.4g}, is far above {usual_update:.4g}"
        return fault

    def _find_loss_fault(self, metrics: dict[str, float]) -> str | None:
        fault = _find_infinite(metrics, "loss", "grad_norm")
        loss = metrics["loss"]
        usual = _mean(self._losses, loss)
        limit = max(self._max_loss_spike, _DEVIATIONS * _deviation(self._losses))
        if not fault and loss > usual + limit:
            fault = f"its loss of {loss:.4g} is a spike above the usual {usual:.4g}"
        lowest = self._lowest_loss
        if not fault and lowest is not None and loss > lowest + limit:
            fault = f"its loss has climbed to {loss:.4g}, and was {lowest:.4g} before"
        return fault

    def confirms(self) -> bool:
        """Returns whether a checkpoint after the last step is confirmed."""
        if self._confirm_steps == 0:
            return True
        since = self._sound_since_fault
        return not self._was_left_out and (since is None or since >= self._confirm_steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` goes on from, as JSON can hold it."""
        return {
            "losses": list(self._losses),
            "lowest_loss": self._lowest_loss,
            "param_norms": list(self._param_norms),
            "update_norms": list(self._update_norms),
            "sound_since_fault": self._sound_since_fault,
        }

    def from_dict(self, saved: dict[str, Any] | None) -> None:
        """Goes on from a confirmed checkpoint.

        Args:
            saved: What `to_dict` returned then; None if it is not known, or not of the same data.
        """
        saved = _NOTHING_KNOWN | (saved or {})  # Versions before lack some of it.
        self._losses = collections.deque(saved["losses"], _WINDOW)
        self._lowest_loss = saved["lowest_loss"]
        self._param_norms = collections.deque(saved["param_norms"], _WINDOW)
        self._update_norms = collections.deque(saved["update_norms"], _WINDOW)
        self._sound_since_fault, self._was_left_out = saved["sound_since_fault"], False


def _find_infinite(metrics: dict[str, float], *names: str) -> str | None:
    return next((f"{x}={metrics[x]}" for x in names if not math.isfinite(metrics[x])), None)


def _mean(values: collections.deque[float], default: float) -> float:
    return math.fsum(values) / len(values) if values else default


def _deviation(values: collections.deque[float]) -> float:
    """The standard deviation by the differences of neighbours, which a trend does not add to."""
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(values)]
    return math.sqrt(math.fsum(squares) / (2 * len(squares))) if squares else 0.0
