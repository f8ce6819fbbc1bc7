import errno
import io
import json
import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from training import metric_writers


def _masked_crc(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _events(directory):
    """Every event of the event files, read by the TFRecord framing: length, crc, data, crc."""
    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            header, (length,) = data[:8], struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            crcs = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length :][:4])
            assert crcs == (_masked_crc(header), _masked_crc(body))
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def _values(directory):
    return [(event.step, value) for event in _events(directory) for value in event.summary.value]


def test_writes_without_tensorflow(tmp_path):
    assert "tensorflow" not in sys.modules
    import clu.metric_writers

    assert clu.metric_writers.interface.MetricWriter is metric_writers.interface.MetricWriter
    writer = metric_writers.create_writer(tmp_path)
    writer.write_scalars(1, {"loss": np.float32(0.1), "rate": 3})
    writer.close()
    assert "tensorflow" not in sys.modules


def test_scalars_reach_tensorboard_and_the_lines_bit_for_bit(tmp_path):
    writer = metric_writers.create_writer(tmp_path)
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    for step, value in enumerate(values, start=1):
        writer.write_scalars(step, {"loss": float(value), "steps": step})
    writer.flush()
    lines = metric_writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    np.testing.assert_array_equal(np.array([line["loss"] for line in lines], np.float32), values)
    losses = [
        (step, value.simple_value)
        for step, value in _values(tmp_path / "tensorboard")
        if value.tag == "loss"
    ]
    assert losses == [(step, float(value)) for step, value in enumerate(values, start=1)]
    writer.close()


def test_other_kinds_reach_tensorboard(tmp_path):
    writer = metric_writers.TensorBoardWriter(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    writer.write_images(2, {"batch": picture, "one": picture[0]})
    writer.write_texts(3, {"sample": "def f(): return 'é'"})
    writer.write_histograms(4, {"weights": np.array([0.0, 1.0, 1.0, 4.0])}, {"weights": 4})
    writer.write_hparams({"rate": 0.5, "name": "tiny", "remat": True, "mesh": (2, 4)})
    writer.write_videos(5, {"clip": np.zeros((1, 2, 4, 4, 3))})
    writer.close()
    found = {value.tag: (step, value) for step, value in _values(tmp_path)}

    for tag, expected in [("batch/0", 0), ("batch/1", 1), ("one", 0)]:
        step, value = found[tag]
        decoded = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
        assert step == 2
        np.testing.assert_array_equal(decoded, picture[expected])
    step, text = found["sample/text_summary"]
    assert (step, text.tensor.string_val[0].decode()) == (3, "def f(): return 'é'")
    step, histogram = found["weights"]
    assert (step, histogram.histo.num, histogram.histo.sum) == (4, 4, 6)
    assert histogram.histo.max == 4
    content = found["_hparams_/session_start_info"][1].metadata.plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["rate"].number_value == 0.5
    assert hparams["name"].string_value == "tiny"
    assert hparams["remat"].bool_value
    assert hparams["mesh"].string_value == "(2, 4)"


def test_a_resumed_run_leaves_no_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = metric_writers.create_writer(tmp_path)
    for step in range(1, 8):
        first.write_scalars(step, {"loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing

    second = metric_writers.create_writer(tmp_path, first_step=5)
    for step in range(5, 10):
        second.write_scalars(step, {"loss": 10.0 + step})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines] == [1, 2, 3, 4, 15, 16, 17, 18, 19]
    starts = [
        event.step
        for event in _events(tmp_path / "tensorboard")
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [5]  # tells TensorBoard to drop steps 5 to 7 of the first file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_errors_of_the_background_thread_are_raised(tmp_path, monkeypatch):
    writer = metric_writers.create_writer(tmp_path)

    def full(self, step, scalars):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metric_writers.JsonLinesWriter, "write_scalars", full)
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.raises(Exception, match="No space left on device"):
        writer.flush()
