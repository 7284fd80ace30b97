"""Generate the shipped sites: `python -m co2lightning.sites.build [--output DIR]`.

Weather, vehicles and building load are drawn once from one seed for the year 2025; both sites
meet the same days and differ in equipment, building load and carbon intensity only. Running it
again gives the same files. It needs pvlib (the extra `site`); reading a site does not.

Shapes: D days, T = 96 steps of 15 min a day. Hours are local and taken at the middle of a step.
"""

import argparse
import gzip
import sys
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from co2lightning.errors import UserError
from co2lightning.site.load import load_site
from co2lightning.site.model import Floats, Site
from co2lightning.terminal import say

T, STEP_H = 96, 0.25
_SEED = 2025
_FIRST_DAY = date(2025, 1, 1)
_N_DAYS = 365
_LATITUDE, _LONGITUDE, _ALTITUDE_M = -3.75, -73.25, 104.0
_TIMEZONE, _UTC_OFFSET = "America/Lima", "-05:00"
_CARBON_MEAN_KG_PER_KWH = 0.4521
_TARGET_SOC, _CHARGER_EFFICIENCY = 0.95, 0.92
_MID_STEP_H = (np.arange(T) + 0.5) * STEP_H


@dataclass(frozen=True)
class _Preset:
    """What makes one shipped site differ from the other."""

    name: str
    title: str
    pv_kwp: float
    battery_kwh: float
    night_kw: float
    day_kw: float
    evening_kw: float
    merit: bool


PRESETS = (
    _Preset("iquitos", "dirty diesel peakers in the evening", 660, 580, 31, 24, 45, merit=True),
    _Preset("iquitos-flat", "constant carbon intensity", 700, 700, 37, 29, 52, merit=False),
)


@dataclass(frozen=True)
class _Waves:
    """Arrivals of one kind over the day: three waves, each with its share, time and dwell."""

    count: float
    share: tuple[float, float, float]
    mean_h: tuple[float, float, float]
    sd_h: tuple[float, float, float]
    dwell_h: tuple[float, float, float]
    dwell_cv: float


_DAY_WAVES = {
    "moto": _Waves(
        190, (0.15, 0.35, 0.50), (8.5, 13.5, 18.3), (1.2, 1.6, 1.3), (5.0, 4.0, 3.5), 0.45
    ),
    "mototaxi": _Waves(
        26, (0.20, 0.45, 0.35), (8.0, 13.5, 18.5), (1.0, 1.4, 1.2), (3.5, 3.5, 3.5), 0.35
    ),
}


def ar1(rng: np.random.Generator, shape: tuple[int, int], rho: float) -> Floats:
    """Draw AR(1) rows with stationary variance 1: x_t = rho x_(t-1) + sqrt(1 - rho^2) e_t."""
    x = rng.standard_normal(shape)
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * x[:, t]
    return x


def clear_sky_index(rng: np.random.Generator) -> Floats:
    """Draw the clear-sky index kc [D, T].

    kc = 1.10 sigmoid(m_d + 1.15 x_t + conv(h)): clouds that last about an hour, days that
    resemble their neighbours, a dry season from June to September, and afternoon convection. The
    form follows Munkhammar & Widen 2018 and Assuncao et al. 2003; the numbers are assumptions.
    """
    months = np.array([(_FIRST_DAY + timedelta(days=d)).month for d in range(_N_DAYS)])
    season = np.where((months >= 6) & (months <= 9), 1.15, 0.80)
    day_mean = season + 0.85 * ar1(rng, (1, _N_DAYS), 0.3)[0]
    x = ar1(rng, (_N_DAYS, T), float(np.exp(-STEP_H / 1.0)))
    convection = -0.55 * np.exp(-(((_MID_STEP_H - 15) / 1.8) ** 2) / 2)
    z = day_mean[:, None] + 1.15 * x + convection
    return np.clip(1.10 / (1 + np.exp(-z)), 0.05, 1.10)


def solar(kc: Floats) -> Floats:
    """Compute the AC power of 1 kWp DC under clear-sky index `kc`, with pvlib.

    Args:
        kc: Clear-sky index [D, T].

    Returns:
        Clear-sky GHI (W/m2), GHI (W/m2), clear-sky AC power (kW/kWp), AC power (kW/kWp), [4, D, T].
    """
    import pandas as pd
    from pvlib.inverter import pvwatts as inverter_pvwatts
    from pvlib.irradiance import erbs, get_extra_radiation, get_total_irradiance
    from pvlib.location import Location
    from pvlib.pvsystem import pvwatts_dc, pvwatts_losses
    from pvlib.temperature import TEMPERATURE_MODEL_PARAMETERS, sapm_cell

    n_days = len(kc)
    start = pd.Timestamp(f"{_FIRST_DAY}T00:00{_UTC_OFFSET}") + pd.Timedelta(minutes=7.5)
    times = pd.date_range(start, periods=n_days * T, freq="15min").tz_convert(_TIMEZONE)
    place = Location(_LATITUDE, _LONGITUDE, _TIMEZONE, _ALTITUDE_M)
    sun = place.get_solarposition(times)
    clear_sky = place.get_clearsky(times, model="ineichen", solar_position=sun)
    ghi_clear = pd.Series(clear_sky["ghi"], times)
    dni_extra = get_extra_radiation(times)
    zenith = sun["apparent_zenith"]
    thermal = TEMPERATURE_MODEL_PARAMETERS["sapm"]["close_mount_glass_glass"]

    def ac_kw_per_kwp(ghi: pd.Series) -> Floats:
        split = erbs(ghi, sun["zenith"], times)
        light = split["dni"], ghi, split["dhi"]
        plane = get_total_irradiance(
            10, 0, zenith, sun["azimuth"], *light, dni_extra=dni_extra, model="haydavies"
        )
        poa = plane["poa_global"].fillna(0.0)
        cell_c = sapm_cell(poa, 28.0, 1.5, **thermal)
        dc_kw = pvwatts_dc(poa, cell_c, 1.0, -0.0035) * (1 - pvwatts_losses() / 100)
        ac_kw = inverter_pvwatts(dc_kw, 1 / 1.2 / 0.96, eta_inv_nom=0.96)
        return np.maximum(np.nan_to_num(np.asarray(ac_kw)), 0.0)

    ghi = ghi_clear * kc.ravel()
    series = [ghi_clear, ghi, ac_kw_per_kwp(ghi_clear), ac_kw_per_kwp(ghi)]
    return np.stack(series).reshape(4, n_days, T)


def building_load_kw(preset: _Preset, noise: Floats) -> Floats:
    """Compute the building load [D, T] in kW from the preset's levels and noise of mean 1."""
    night, day, evening = preset.night_kw, preset.day_kw, preset.evening_kw
    level_kw = [night, night, day, day, evening, evening, night]
    return np.interp(_MID_STEP_H, [0, 5, 6.5, 17, 18.5, 22, 24], level_kw) * noise


def carbon_kg_per_kwh(preset: _Preset) -> Floats:
    """Compute the carbon intensity of one day [T], of mean 0.4521 kg/kWh."""
    if not preset.merit:
        return np.full(T, _CARBON_MEAN_KG_PER_KWH)
    level = [0.85, 0.85, 0.95, 0.95, 1.45, 1.45, 0.85, 0.85]
    shape = np.interp(_MID_STEP_H, [0, 5, 6.5, 17, 18.25, 22.25, 23.5, 24], level)
    return _CARBON_MEAN_KG_PER_KWH * shape / shape.mean()


def lognormal(rng: np.random.Generator, mean: Floats | float, cv: float, n: int) -> Floats:
    """Draw `n` lognormal values with the given mean and coefficient of variation."""
    variance = np.log1p(cv**2)
    return np.exp(np.log(mean) - variance / 2 + np.sqrt(variance) * rng.standard_normal(n))


def vehicles(rng: np.random.Generator) -> list[tuple[int, str, int, int, float, float]]:
    """Draw every vehicle that comes, also those that find no free socket.

    Returns:
        Rows (day, socket type, arrival step, departure step, energy in kWh at the meter, kW), in
        order of arrival.
    """
    rows: list[tuple[int, str, int, int, float, float]] = []
    day_factors = lognormal(rng, 1.0, 0.10, _N_DAYS)
    for day, factor in enumerate(day_factors):
        arrivals: list[tuple[float, float, str]] = []  # arrival h, departure h, socket type
        for kind, count, leave_h in (("moto", 95, 11.5), ("mototaxi", 15, 11.0)):
            n = rng.poisson(count * factor)
            arrival_h = np.abs(rng.normal(3.0, 1.6, n))
            departure_h = rng.normal(leave_h, 1.2, n)
            arrivals += [(a, d, kind) for a, d in zip(arrival_h, departure_h, strict=True)]
        for kind, waves in _DAY_WAVES.items():
            n = rng.poisson(waves.count * factor)
            wave = rng.choice(3, n, p=waves.share)
            arrival_h = rng.normal(np.array(waves.mean_h)[wave], np.array(waves.sd_h)[wave])
            dwell_h = lognormal(rng, np.array(waves.dwell_h)[wave], waves.dwell_cv, n)
            arrivals += [(a, a + d, kind) for a, d in zip(arrival_h, dwell_h, strict=True)]
        for arrival_h, departure_h, kind in sorted(arrivals):
            moto = kind == "moto"
            pack_kwh = 3.24 * (2 if rng.random() < 0.40 else 1) if moto else 7.5
            max_kw = 2.0 if moto else 3.0
            arrival_h = min(max(arrival_h, 0.0), 23.75)
            departure_h = max(departure_h, arrival_h + (0.75 if moto else 1.0))
            first = int(arrival_h / STEP_H)
            last = min(max(int(np.ceil(departure_h / STEP_H)), first + 2), T)
            energy_kwh = max(pack_kwh * (_TARGET_SOC - rng.beta(2, 3.5)) / _CHARGER_EFFICIENCY, 0.2)
            energy_kwh = min(energy_kwh, 0.98 * max_kw * STEP_H * (last - first))
            # Rounded down, so that rounding never asks for more than the window allows.
            rows.append((day, kind, first, last, np.floor(energy_kwh * 1000) / 1000, max_kw))
    return rows


def timestamp(day: int, step: int) -> str:
    """Write the local time of a step's beginning; step 96 is the next midnight."""
    day, step = day + step // T, step % T
    return f"{_FIRST_DAY + timedelta(days=day)}T{step // 4:02d}:{step % 4 * 15:02d}{_UTC_OFFSET}"


def _site_yaml(preset: _Preset) -> str:
    return f"""\
# Charging site at Iquitos, Peru: {preset.title}.
# Written by `python -m co2lightning.sites.build`: one draw of the year 2025 with the seed below.
# The format is explained in docs/site-format.md.
name: {preset.name}
latitude: {_LATITUDE}
longitude: {_LONGITUDE}
altitude_m: {_ALTITUDE_M:g}
timezone: {_TIMEZONE}
pv_kwp: {preset.pv_kwp:g}  # DC
grid_kw: 500
charger_efficiency: {_CHARGER_EFFICIENCY}
seed: {_SEED}
battery:
  capacity_kwh: {preset.battery_kwh:g}
  power_kw: 250  # on the AC side
  charge_efficiency: 0.95
  discharge_efficiency: 0.95
  soc_min: 0.10
  soc_max: 0.95
  start_soc_min: 0.30
  start_soc_max: 0.70
sockets:
  - {{name: moto, count: 112, max_kw: 2.0}}
  - {{name: mototaxi, count: 16, max_kw: 3.0}}
held_out: {{every_weeks: 6, first: 6}}  # the 6th, 12th, 18th ... week is kept for testing
"""


def _write_gz(path: Path, lines: list[str]) -> None:
    """Write lines with gzip, with no time stamp or file name inside, so that bytes repeat."""
    path.write_bytes(gzip.compress("".join(f"{x}\n" for x in lines).encode(), 9, mtime=0))


def _build(output: Path) -> list[str]:
    """Write a folder for each site below `output`; returns lines that summarise the year."""
    seeds = np.random.SeedSequence(_SEED).spawn(3)
    weather_rng, vehicle_rng, load_rng = (np.random.default_rng(seed) for seed in seeds)
    kc = clear_sky_index(weather_rng)
    try:
        sun = solar(kc)
    except ModuleNotFoundError as error:
        raise UserError(
            f"building the sites needs {error.name}: pip install 'co2lightning[site]'"
        ) from error
    session_lines = ["session_id,socket_type,arrival,departure,energy_kwh,max_kw"] + [
        f"v{i:06d},{kind},{timestamp(day, first)},{timestamp(day, last)},{energy:.3f},{max_kw:g}"
        for i, (day, kind, first, last, energy, max_kw) in enumerate(vehicles(vehicle_rng), start=1)
    ]
    load_noise = np.exp(0.05 * load_rng.standard_normal((_N_DAYS, T)) - 0.05**2 / 2)
    times = [timestamp(d, t) for d in range(_N_DAYS) for t in range(T)]
    lines = _weather_summary(kc, sun)
    for preset in PRESETS:
        folder = output / preset.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.yaml").write_text(_site_yaml(preset), encoding="utf-8", newline="\n")
        pv_kw = (preset.pv_kwp * sun[3]).ravel()
        load_kw = building_load_kw(preset, load_noise).ravel()
        carbon = np.tile(carbon_kg_per_kwh(preset), _N_DAYS)
        rows = zip(times, pv_kw, load_kw, carbon, strict=True)
        series_lines = ["time,pv_kw,load_kw,carbon_kg_per_kwh"] + [
            f"{time},{pv:.3f},{load:.3f},{kg:.6f}" for time, pv, load, kg in rows
        ]
        _write_gz(folder / "series.csv.gz", series_lines)
        _write_gz(folder / "sessions.csv.gz", session_lines)
        lines.append(_site_summary(load_site(folder)))
    return lines


def _weather_summary(kc: Floats, sun: Floats) -> list[str]:
    """Summarise the weather, [D, T] and [4, D, T], in the figures of the site's description."""
    ghi_clear, ghi, ac_clear, ac = sun
    daily = ghi.sum(1) / ghi_clear.sum(1)
    light = (_MID_STEP_H > 7) & (_MID_STEP_H < 17)
    now, following = kc[:, light][:, :-1].ravel(), kc[:, light][:, 1:].ravel()
    per_day = STEP_H / _N_DAYS
    return [
        f"GHI clear {ghi_clear.sum() * per_day / 1000:.2f}, actual "
        f"{ghi.sum() * per_day / 1000:.2f} kWh/m2/day",
        f"AC clear {ac_clear.sum() * per_day:.2f} kWh/kWp/day, actual "
        f"{ac.sum() * STEP_H:.0f} kWh/kWp/year, highest {ac.max():.2f} kW/kWp",
        f"kc 07:00-17:00: mean {kc[:, light].mean():.2f}, 15-min sd {kc[:, light].std():.2f}, "
        f"lag-1 {np.corrcoef(now, following)[0, 1]:.2f}; daily (by energy) mean "
        f"{daily.mean():.2f}, sd {daily.std():.2f}",
    ]


def _site_summary(site: Site) -> str:
    """Summarise what a controller meets at a site on an average day."""
    n = len(site.days)
    return (
        f"{site.name}: {len(site.sessions.socket) / n:.1f} vehicles admitted, "
        f"{site.turned_away.sum() / n:.1f} turned away, "
        f"{site.sessions.energy_kwh.sum() / n:.0f} kWh of charging, "
        f"{site.load_kw.sum() * STEP_H / n:.0f} kWh building load, "
        f"{site.pv_kw.sum() * STEP_H / n:.0f} kWh PV a day, mean carbon intensity "
        f"{site.carbon_kg_per_kwh.mean():.4f} kg/kWh"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the generator as a command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m co2lightning.sites.build", description="Generate the shipped sites."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sites"), help="directory for the site folders"
    )
    try:
        say(*_build(parser.parse_args(argv).output))
    except UserError as error:
        say(str(error), err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
