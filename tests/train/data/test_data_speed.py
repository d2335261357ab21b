"""The input benchmark runs both inputs to the end and tells what it measured."""

from dataclasses import replace

from PIL import Image

from tcpa.train.data.speed import describe, measure_input, write_photos


def test_input_speed(tmp_path) -> None:
    # No processes: the DataLoader's would be forked from a process with threads.
    speed = measure_input(24, rounds=2, batch_size=8, workers=0, folder=tmp_path)
    assert len(speed.loader) == len(speed.ours) == 2
    assert speed.ratio > 1
    assert speed.build_seconds > 0
    assert list(tmp_path.iterdir()) == [], "the photos were left behind"
    told = describe(replace(speed, loader=[100.0] * 3, ours=[1000.0, 1200.0, 9.0], workers=2))
    assert told.splitlines()[0] == (
        "input alone, 24 JPEGs of 500 x 375 to cpu: DataLoader with 2 workers 100 images/s, "
        "cache 1,000 images/s, 10.0 times as many"
    )
    assert told.splitlines()[1].startswith("building the cache once: ")


def test_photos_are_photos(tmp_path) -> None:
    paths = write_photos(tmp_path, 2)
    assert [path.name for path in paths] == ["00000.jpg", "00001.jpg"]
    with Image.open(paths[0]) as picture:
        assert (picture.format, picture.size) == ("JPEG", (500, 375))
    assert paths[0].read_bytes() != paths[1].read_bytes()
    # As large as a photo of that size: smooth colours alone would cost too little to decode.
    assert 50_000 < paths[0].stat().st_size < 250_000
