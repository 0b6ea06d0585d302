import numpy as np

from xlstm.tools.benchmarks.benchmark_slstm import measure


def test_all_are_timed_side_by_side():
    rows = measure(2, 3, 8, 2, repeats=2)
    assert list(rows) == ["sLSTM cell", "sLSTM layer", "LSTM of Flax", "recurrent products"]
    times = {name: row["microseconds_a_token"] for name, row in rows.items()}
    assert all(value > 0 for value in times.values())
    for name, row in rows.items():
        np.testing.assert_allclose(row["ratio_to_lstm"], times[name] / times["LSTM of Flax"])
        share = times["recurrent products"] / times[name]
        np.testing.assert_allclose(row["recurrent_products_fraction"], share)
