"""The generator of the shipped sites: same seed, same files, and the described climate."""

from __future__ import annotations

import builtins
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from co2lightning.sites import build

# pvlib 0.16 with pandas 3.1; theirs to change.
PVLIB_WARNING = "ignore:DatetimeIndex.dayofyear is deprecated"
SHIPPED = Path(build.__file__).parent


@pytest.mark.filterwarnings(PVLIB_WARNING)
@pytest.mark.slow
def test_rebuilding_gives_the_shipped_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contents, not gzip bytes, are compared: another zlib may pack differently."""
    assert build.main(["--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "GHI clear 6.53, actual 4.45 kWh/m2/day"
    assert lines[1].startswith("AC clear 4.65 kWh/kWp/day, actual 1186 kWh/kWp/year")
    for preset in build.PRESETS:
        new, old = tmp_path / preset.name, SHIPPED / preset.name
        assert (new / "site.yaml").read_bytes() == (old / "site.yaml").read_bytes()
        for name in ("series.csv.gz", "sessions.csv.gz"):
            fresh = gzip.decompress((new / name).read_bytes())
            assert fresh == gzip.decompress((old / name).read_bytes()), f"{preset.name}/{name}"


def test_shipped_files_are_small_and_carry_no_time_stamp() -> None:
    for path in SHIPPED.glob("*/*.gz"):
        data = path.read_bytes()
        assert len(data) < 2_000_000
        assert data[3:8] == bytes(5), "no file name flag, mtime 0"


def test_clear_sky_index_has_the_described_statistics() -> None:
    kc = build.clear_sky_index(np.random.default_rng(1))
    light = kc[:, 28:68]
    assert kc.shape == (365, 96)
    assert (kc.min(), kc.max()) >= (0.05, 0.05)
    assert kc.max() <= 1.10
    assert light.mean() == pytest.approx(0.68, abs=0.04)
    assert light.std() == pytest.approx(0.28, abs=0.03)
    lag1 = np.corrcoef(light[:, :-1].ravel(), light[:, 1:].ravel())[0, 1]
    assert lag1 == pytest.approx(0.86, abs=0.03)


def test_ar1_is_stationary() -> None:
    x = build.ar1(np.random.default_rng(2), (20_000, 3), 0.6)
    assert x.var(0) == pytest.approx([1, 1, 1], abs=0.05)
    assert (x[:, 1] * x[:, 2]).mean() == pytest.approx(0.6, abs=0.03)


@pytest.mark.filterwarnings(PVLIB_WARNING)
def test_solar_follows_the_clear_sky_index() -> None:
    clear_ghi, ghi, clear, actual = build.solar(np.full((2, 96), 0.5))
    assert ghi == pytest.approx(0.5 * clear_ghi)
    assert clear_ghi.sum() * 0.25 / 2000 == pytest.approx(6.5, abs=0.5)
    assert actual.min() == 0
    assert np.all(actual[clear > 0.1] < clear[clear > 0.1])
    assert 44 <= clear[0].argmax() <= 51  # local solar noon
    # The sun is up 05:48-18:05; the panel looks away from it in January and the inverter sleeps.
    assert np.flatnonzero(clear[0])[[0, -1]].tolist() == pytest.approx([24, 71], abs=1)


def test_carbon_presets() -> None:
    merit, flat = (build.carbon_kg_per_kwh(p) for p in build.PRESETS)
    assert merit.mean() == pytest.approx(0.4521)
    assert flat == pytest.approx([0.4521] * 96)
    shape = merit / merit[0] * 0.85
    assert shape[[0, 30, 80, 95]] == pytest.approx([0.85, 0.95, 1.45, 0.85])


def test_building_load_levels() -> None:
    load = build.building_load_kw(build.PRESETS[0], np.ones((1, 96)))[0]
    assert load[[0, 40, 80]] == pytest.approx([31, 24, 45])
    assert load[95] == pytest.approx(31 + 14 * 0.125 / 2)


def test_vehicles_keep_the_described_limits() -> None:
    rows = build.vehicles(np.random.default_rng(3))
    day, kind, first, last, energy_kwh, max_kw = (np.array(c) for c in zip(*rows, strict=True))
    assert len(rows) / 365 == pytest.approx(326, rel=0.02)
    assert (kind == "moto").mean() == pytest.approx(285 / 326, abs=0.01)
    assert np.all(np.lexsort((first, day)) == np.arange(len(rows)))
    assert np.all((first >= 0) & (first < last) & (last <= 96))
    assert np.all((last - first >= 2) | (last == 96))
    assert np.all(energy_kwh <= 0.98 * max_kw * 0.25 * (last - first))
    assert energy_kwh.min() >= 0.2
    assert set(max_kw[kind == "moto"]) == {2.0}
    assert set(max_kw[kind == "mototaxi"]) == {3.0}


def test_lognormal_has_the_given_mean_and_spread() -> None:
    x = build.lognormal(np.random.default_rng(4), 5.0, 0.45, 200_000)
    assert x.mean() == pytest.approx(5, rel=0.01)
    assert x.std() == pytest.approx(5 * 0.45, rel=0.02)


def test_timestamp_of_step_96_is_the_next_midnight() -> None:
    assert build.timestamp(0, 33) == "2025-01-01T08:15-05:00"
    assert build.timestamp(0, 96) == "2025-01-02T00:00-05:00"


def test_without_pvlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def no_pvlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pvlib"):
            raise ModuleNotFoundError("No module named 'pvlib'", name="pvlib")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pvlib)
    assert build.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "building the sites needs pvlib: pip install 'co2lightning[site]'\n"
    )
    assert not list(tmp_path.iterdir())
