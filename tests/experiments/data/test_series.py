"""Windows of time series: where they start and end, and by what they are scaled."""

import datetime

import numpy as np
import pytest

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.errors import UserError

HOURS = 20 * 30 * 24
LENGTH, HORIZON = 512, 96


def written(folder, values, name="series.csv", hours=1):
    start = datetime.datetime(2016, 7, 1)
    times = (start + datetime.timedelta(hours=hours * i) for i in range(len(values)))
    rows = zip(times, values, strict=True)
    lines = [f"{time},{','.join(map(str, row))}" for time, row in rows]
    (folder / name).write_text("\n".join(["date,a,b", *lines]) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    hours = np.arange(HOURS + 100)
    values = np.stack([hours, 1 + hours % 24], axis=1).astype(float)
    written(folder, values)
    return registry.dataset("series_96", folder), values


def test_windows_are_followed_by_what_is_forecast(made):
    found, values = made
    train = values[: 12 * 30 * 24]
    scaled = ((values - train.mean(0)) / train.std(0)).astype(np.float32)
    assert found.num_classes == HORIZON
    ends = {
        "train": (0, 12 * 30 * 24),
        "held": (12 * 30 * 24 - LENGTH, 16 * 30 * 24),
        "test": (16 * 30 * 24 - LENGTH, HOURS),
    }
    for name, (first, last) in ends.items():
        images, labels = (getattr(found, f"{name}_{x}") for x in ("images", "labels"))
        count = last - first - LENGTH - HORIZON + 1
        assert images.shape == (count, LENGTH, 2)
        assert images.dtype == np.float32
        assert labels.shape == (count, HORIZON, 2)
        order = np.argsort(images[:, 0, 0])  # of hours, which grow
        assert (order == np.arange(count)).all() == (name != "train")
        for i in (0, 17, count - 1):
            at = first + i
            np.testing.assert_array_equal(images[order[i]], scaled[at : at + LENGTH])
            after = scaled[at + LENGTH : at + LENGTH + HORIZON]
            np.testing.assert_array_equal(labels[order[i]], after)


def test_the_first_windows_are_a_sample_of_all(made):
    found, _ = made
    starts = np.searchsorted(
        np.sort(found.train_images[:, 0, 0]), found.train_images[:64, 0, 0]
    )
    assert len({*(starts // LENGTH)}) > 10  # of 16 stretches without overlap
    np.testing.assert_allclose(starts.mean() / len(found.train_images), 0.5, atol=0.12)


def test_trials_are_judged_on_what_the_data_hold_out(made):
    found, _ = made
    tuning = load.for_tuning(found)
    np.testing.assert_array_equal(tuning.train_images, found.train_images)
    np.testing.assert_array_equal(tuning.test_labels, found.held_labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((HOURS, 2)), "constant over the first 12 months"),
        (np.ones((100, 2)), "has 100 hours after its first line; at least 14400"),
        (np.full((HOURS, 2), np.nan), "series 1 has no finite number in hour 1;"),
        (np.full((HOURS, 2), "x"), "series 1 has no finite number in hour 1;"),
    ],
)
def test_what_is_no_series_is_refused(values, message, tmp_path):
    written(tmp_path, values)
    with pytest.raises(UserError, match=message):
        registry.dataset("series_96", tmp_path)


@pytest.mark.parametrize(("hours", "shown"), [(-1, "-1"), (0.25, "0.25"), (0, "0")])
def test_dates_are_an_hour_apart(hours, shown, tmp_path):
    values = np.random.default_rng(0).normal(size=(HOURS, 2))
    written(tmp_path, values, hours=hours)
    with pytest.raises(UserError, match=f"its dates are {shown} hours later"):
        registry.dataset("series_96", tmp_path)


@pytest.mark.parametrize("date", ["17/7/2016", "x", ""])
def test_dates_in_another_format_are_not_checked(date, tmp_path):
    rows = np.random.default_rng(0).normal(size=(HOURS, 2))
    lines = ["date,0,1", *(f"{date},{a},{b}" for a, b in rows)]
    (tmp_path / "series.csv").write_text("\n".join(lines))
    assert registry.dataset("series_96", tmp_path).test_labels.shape[-1] == 2


def test_the_first_line_is_no_hour(tmp_path):
    written(tmp_path, np.random.default_rng(0).normal(size=(HOURS + 1, 2)))
    path = tmp_path / "series.csv"
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(UserError, match="its first line has a date; put a line of"):
        registry.dataset("series_96", tmp_path)


@pytest.mark.parametrize("content", ["", "date,a\n", "\n\n"])
def test_a_file_without_rows_is_refused(content, tmp_path):
    (tmp_path / "series.csv").write_text(content)
    with pytest.raises(UserError, match="has 0 hours after its first line"):
        registry.dataset("series_96", tmp_path)


def test_a_gap_is_shown_and_hours_that_are_not_used_may_have_some(tmp_path):
    values = np.random.default_rng(0).normal(size=(HOURS + 10, 3)).astype(object)
    values[HOURS + 5, 0] = "nan"
    written(tmp_path, values)
    assert registry.dataset("series_96", tmp_path).test_labels.shape[-1] == 3
    values[7_000, 1] = ""
    written(tmp_path, values)
    with pytest.raises(UserError, match="series 2 has no finite number in hour 7001;"):
        registry.dataset("series_96", tmp_path)
    path = tmp_path / "series.csv"
    text = path.read_text()
    path.write_text(text.replace("\n", ",1\n", 2))
    with pytest.raises(UserError, match=r"not a table of text: .*Line #2"):
        registry.dataset("series_96", tmp_path)
    path.write_text(text.replace(",", ";"))
    with pytest.raises(UserError, match="no series after the date; put commas"):
        registry.dataset("series_96", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("series_96", "csv"), ("text", "txt")])
def test_a_folder_is_no_file(name, kind, tmp_path):
    (tmp_path / f"a.{kind}").mkdir()
    with pytest.raises(UserError, match=rf"must hold one \.{kind} file, not 0"):
        registry.dataset(name, tmp_path)


def test_a_folder_without_one_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold one \.csv file, not 0"):
        registry.dataset("series_96", tmp_path)
    with pytest.raises(UserError, match="--data-dir is needed"):
        registry.dataset("series_96")


def test_the_linear_truth_is_found_by_least_squares_to_its_noise():
    """By networks that take the mean from a window and add it again, too."""
    found = registry.dataset("linear_series")
    assert found.train_images.shape == (10_000, LENGTH, 7)
    assert found.num_classes == HORIZON
    split = {}
    for part in ("train", "held", "test"):
        images, labels = (getattr(found, f"{part}_{x}") for x in ("images", "labels"))
        assert images.dtype == labels.dtype == np.float32
        assert labels.shape == (len(images), HORIZON, 7)
        windows, following = (np.asarray(x)[..., 0] for x in (images, labels))
        mean = windows.mean(1, keepdims=True)
        split[part] = windows - mean, following - mean
    truth, *_ = np.linalg.lstsq(*split["train"])
    for part in ("held", "test"):
        windows, following = split[part]
        error = np.mean((windows @ truth - following) ** 2)
        # 512 weights of 10,000 examples cost a twentieth more than the noise.
        np.testing.assert_allclose(
            error, 0.1**2 * (1 + 512 / (10_000 - 512)), rtol=0.02
        )
        assert np.mean(following**2) > 0.9


def test_the_linear_truth_reads_no_files(tmp_path):
    with pytest.raises(UserError, match="leave --data-dir out"):
        registry.dataset("linear_series", tmp_path)
