import jax
import jax.numpy as jnp

from xlstm.trainer.callbacks.profiling import ProfileCallback


def _train(directory, steps, start_step, num_steps):
    callback, state = ProfileCallback(str(directory), steps), jnp.zeros(8)
    callback.on_start(start_step, state)
    for step in range(start_step + 1, num_steps + 1):
        state = jax.jit(jnp.sin)(state)
        if callback.is_due(step):
            callback.on_step(step, state)
    callback.close()
    return sorted(path.name for path in directory.glob("*"))


def test_chosen_steps_are_traced(tmp_path):
    assert _train(tmp_path, (2, 3, 6), 0, 8) == ["step_2", "step_6"]
    for name in ("step_2", "step_6"):
        assert list((tmp_path / name).rglob("*.xplane.pb"))


def test_a_trace_ends_with_the_run_and_begins_where_it_goes_on(tmp_path):
    assert _train(tmp_path, (5, 6, 7), 4, 6) == ["step_5"]
    assert _train(tmp_path, (5, 6, 7), 6, 8) == ["step_5", "step_7"]


def test_a_trace_ends_a_step_later_if_its_last_step_is_rolled_back(tmp_path):
    callback, state = ProfileCallback(str(tmp_path), (2,)), jnp.zeros(8)
    callback.on_start(1, state)
    assert callback.is_due(2)  # But the step is rolled back, and `on_step` is not called.
    assert callback.is_due(3)
    callback.on_step(3, state)
    assert list((tmp_path / "step_2").rglob("*.xplane.pb"))
    assert not callback.is_due(4)


def test_no_step_is_none(tmp_path):
    assert _train(tmp_path, (), 0, 3) == []
