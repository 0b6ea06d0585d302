import pytest

from xlstm.trainer.logger.base_logger import Logger, LoggerConfig, Loggers


class _Recorder(Logger):
    def __init__(self, events, name):
        self.events, self.name = events, name

    def log(self, step, row):
        self.events.append((self.name, "log", step, row))

    def progress(self, step):
        self.events.append((self.name, "progress", step))

    def close(self):
        self.events.append((self.name, "close"))


def test_several_loggers_are_as_one():
    events = []
    loggers = Loggers([_Recorder(events, "a"), Logger(), _Recorder(events, "b")])
    loggers.progress(1)
    loggers.log(1, {"loss": 2.0})
    assert events == [
        ("a", "progress", 1),
        ("b", "progress", 1),
        ("a", "log", 1, {"loss": 2.0}),
        ("b", "log", 1, {"loss": 2.0}),
    ]
    loggers.close()
    assert sorted(events[4:]) == [("a", "close"), ("b", "close")]


def test_a_logger_that_cannot_be_closed_does_not_keep_others_open():
    class Failing(Logger):
        def close(self):
            raise OSError("No space left on device")

    events = []
    with pytest.raises(OSError, match="No space left"):
        Loggers([Failing(), _Recorder(events, "a")]).close()
    assert events == [("a", "close")]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 0}, r"logger\.interval=0: it must be at least 1"),
        ({"sample_tokens": -1}, r"logger\.sample_tokens=-1"),
        ({"sample_temperature": -0.5}, r"logger\.sample_temperature=-0\.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoggerConfig(**options)
