"""How far every agent gets on every site: held-out weeks, several seeds, beside rules and optimum.

    python benchmarks/sites.py --sites iquitos,iquitos-flat,path/to/folder --seeds 3 \
        --output docs/sites.json --figure docs/sites.png

Trains every shipped recipe as it is, but for the site, with `co2lightning fit`, each run a process
with one torch thread in a temporary directory. Checkpoints are then evaluated without exploration
on the site's held-out stretches, as `co2lightning test` does: what a run started from, some
episodes, and `best`, the one that training weeks say is best; drivers' true departures and energies
are known unless --announced is given. Prints the table that stands in the README. With --price SEED
each site gets an hourly price, drawn, told at 13:00 for the next day, and cost is the objective.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from co2lightning import __version__
from co2lightning.agents import AGENTS
from co2lightning.agents.load import load_agent, policy_of
from co2lightning.report.looks import agent_colour
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import TITLES, Evaluation, beside, evaluate, summarise, violations
from co2lightning.sim.mpc_stretches import play_mpc
from co2lightning.site.load import load_site
from co2lightning.site.model import DAY_H, Site
from knowledge import invented_price

EPISODES = (1, 3, 10, 30, 100, 200, 300)
IN_TABLE = (10, 30, 100)  # and a run's last
NEAR = 0.01  # of the gap: training longer brings no more than that

Run = dict[str, Any]


def main() -> int:
    """Train, evaluate, write the results, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description="Every agent on every site.")
    parser.add_argument(
        "--sites", default="iquitos,iquitos-flat", help="shipped sites or folders, comma separated"
    )
    parser.add_argument(
        "--agents",
        default=",".join(AGENTS),
        help="recipes, comma separated: PPO is ppo.yaml; PPO:30 gives it 30 episodes, PPO:30:5 "
        "five seeds too",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="of an agent that names none: 0, 1, ..."
    )
    parser.add_argument("--episodes", type=int, default=100, help="of a run that names none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; times are for 1")
    parser.add_argument("--announced", action="store_true", help="only what drivers say is known")
    parser.add_argument("--mpc", action="store_true", help="model predictive control, too")
    parser.add_argument("--price", type=int, metavar="SEED", help="draw a price and settle it")
    parser.add_argument("--output", type=Path, help="results as JSON")
    parser.add_argument("--figure", type=Path, help="a PNG")
    given = parser.parse_args()
    agents: dict[str, tuple[int, int]] = {}  # episodes and seeds
    for recipe in given.agents.split(","):
        name, *own = recipe.split(":")
        episodes, seeds = map(int, own + [given.episodes, given.seeds][len(own) :])
        agents[name] = episodes, seeds
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sites.py", *_flags(given, agents)]),
        "settled": "kg CO2" if given.price is None else "cost",
        "machine": machine(),
        "versions": versions(),
        "sites": {},
    }
    broken: list[str] = []
    for place in given.sites.split(","):
        with tempfile.TemporaryDirectory() as where:
            folder = place if given.price is None else _priced(place, given.price, Path(where))
            found, wrong = _site(folder, agents, given, Path(where))
        results["sites"][found["name"]] = found
        broken += wrong
        if given.output:  # whatever becomes of the next site
            given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if given.figure:
        _draw(results, given.figure)
    for line in broken:
        print(f"error: the optimum is no bound, a defect: {line}", file=sys.stderr)
    return 1 if broken else 0


def _flags(given: argparse.Namespace, agents: dict[str, tuple[int, int]]) -> list[str]:
    names = [Path(place).name for place in given.sites.split(",")]
    flags = [f"--sites {','.join(names)}"]
    flags += ["--agents " + ",".join(f"{a}:{n}:{seeds}" for a, (n, seeds) in agents.items())]
    flags += [f"--jobs {given.jobs}"]
    flags += [] if given.price is None else [f"--price {given.price}"]
    return [*flags, *(f"--{name}" for name in ("announced", "mpc") if getattr(given, name))]


def _priced(place: str, seed: int, where: Path) -> str:
    """Copy a site and give it a drawn price, known ahead from 13:00 on; returns the folder."""
    site = load_site(place)
    folder = where / site.name
    shutil.copytree(site.directory, folder)
    (file,) = folder.glob("series.csv*")
    series = pd.read_csv(file)
    series["price_per_kwh"] = invented_price(site, seed)
    series.to_csv(file, index=False)
    described = folder / "site.yaml"
    known = yaml.safe_load(described.read_text(encoding="utf-8"))
    known |= {"known_ahead": {"price_per_kwh": "13:00"}, "currency": "EUR"}
    described.write_text(yaml.safe_dump(known, sort_keys=False), encoding="utf-8")
    return str(folder)


def _site(
    place: str, agents: dict[str, tuple[int, int]], given: argparse.Namespace, where: Path
) -> tuple[dict[str, Any], list[str]]:
    """Train every agent on a site; returns all figures, and where the optimum was no bound."""
    objective = "co2" if given.price is None else "cost"
    site = load_site(place, objective=objective, announced=given.announced)
    references = evaluate(None, site)
    if given.mpc:
        references = beside(references, site, "mpc", play_mpc(site))
    broken = violations(references)
    fixed = ["--env.site", str(Path(place).resolve()) if Path(place).is_dir() else place]
    fixed += ["--env.announced", str(given.announced).lower(), "--env.objective", objective]
    names = [
        (agent, seed, episodes)
        for agent, (episodes, seeds) in agents.items()
        for seed in range(seeds)
    ]
    one = partial(_one, fixed, where, (place, objective, given.announced), references)
    runs: list[Run] = []
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for run, wrong in pool.map(one, names):
            runs.append(run)
            broken += wrong
    return {
        "name": site.name,
        "sha256": site.sha256,
        "stretches": list(references.days),
        "days": references.n_days.tolist(),
        "best_rule": references.best,
        "references": {
            name: _figures(references, name) for name in references.policies if name != "agent"
        },
        "agents": {agent: [run for run in runs if run["agent"] == agent] for agent in agents},
    }, broken


_load = lru_cache(maxsize=1)(load_site)


def _one(
    fixed: list[str],
    where: Path,
    of_site: tuple[str, str, bool],
    references: Evaluation,
    name: tuple[str, int, int],
) -> tuple[Run, list[str]]:
    """Train and evaluate one run, in a process of its own; returns what `_site` returns of it."""
    torch.set_num_threads(1)
    run = _train(*name, fixed, where)
    place, objective, announced = of_site
    site = _load(place, objective=objective, announced=announced)
    return run, [] if "failed" in run else _add_figures(run, site, references, where)


def _train(agent: str, seed: int, episodes: int, fixed: list[str], where: Path) -> Run:
    """Train one run from its recipe in a process of its own; returns what is known of it."""
    name = f"{agent}-{seed}"
    command = [sys.executable, "-m", "co2lightning", "fit", "--config", f"{agent.lower()}.yaml"]
    command += ["--episodes", str(episodes), "--seed_everything", str(seed), "--name", name]
    command += [*fixed, "--threads", "1"]
    began = time.time()
    with (where / f"{name}.txt").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            command,
            cwd=where,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        error = said.read().strip()[-300:]
    seconds = time.time() - began
    # Of a machine that is shared only the time on its cores can be compared.
    share = (used.ru_utime + used.ru_stime) / seconds
    run: Run = {"agent": agent, "seed": seed, "began": began, "share": share}
    if process.returncode:
        run["failed"] = f"exit code {process.returncode}: {error}"
    told = run.get("failed", f"{share * seconds:.0f} CPU-s in {seconds:.0f} s")
    print(f"{fixed[1]}: {name}: {told}", file=sys.stderr, flush=True)
    return run


def _add_figures(run: Run, site: Site, references: Evaluation, where: Path) -> list[str]:
    """Evaluate a run's checkpoints; returns the stretches in which the optimum was no bound."""
    files = TrainingCheckpoint(where / "checkpoints" / f"{run['agent']}-{run['seed']}")
    last = files.get_next_episode() - 1
    broken: list[str] = []
    run["episodes"], began, share = {}, run.pop("began"), run.pop("share")
    evaluated = files.best_evaluated()
    run["best"] = last if evaluated is None else evaluated[1]
    # What it started from is episode 0.
    for episode in sorted({0, *(e for e in EPISODES if e < last), run["best"], last}):
        path = files.path(episode)
        content = files.read(path)
        evaluation = evaluate(policy_of(load_agent(content, path), site), site, references)
        broken += violations(evaluation)
        seconds = share * (path.stat().st_mtime - began)
        run["episodes"][str(episode)] = _figures(evaluation, "agent") | {"seconds": seconds}
    final, best = run["episodes"][str(last)], references.compared(references.best).sum()
    reached = [row for e, row in run["episodes"].items() if int(e) in {*EPISODES, last}]
    run["seconds"] = {
        "best_rule": _first(reached, lambda row: sum(row["compared"]) < best),
        "near_final": _first(
            reached,
            lambda row: (
                None not in (row["gap_closed"], final["gap_closed"])
                and row["gap_closed"] >= final["gap_closed"] - NEAR
            ),
        ),
        "all": final["seconds"],
    }
    return broken


def _first(rows: list[dict[str, Any]], reached: Any) -> float | None:
    """Return the seconds until the first evaluated episode that reached something."""
    return next((row["seconds"] for row in rows if reached(row)), None)


def _figures(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Return a policy's figures a day, and of each stretch what it settles at, vs RBC C too."""
    summary, own = summarise(evaluation)[name], evaluation.policies[name]
    days = evaluation.hours / DAY_H
    against = (evaluation.compared(name) - evaluation.compared("rbc_c")) / days
    return {
        "a_day": float(own.settled.sum() / days.sum()),
        "gap_closed": summary.gap_closed,
        "unmet_kwh": summary.unmet_kwh,
        "compared": evaluation.compared(name).tolist(),
        "vs_rbc_c_a_day": np.round(against, 3).tolist(),
    }


def _median(values: list[float | None], form: str) -> str:
    """Return the median, the lowest and the highest of what the seeds gave."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        missing = len(values) - len(known)
        return f"not in {missing} of {len(values)}" if known else "-"
    low, high = format(min(known), form), format(max(known), form)
    median = format(statistics.median(known), form)
    return median if low == high else f"{median} ({low} to {high})"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table: the median over the seeds, lowest to highest.

    Of the last episode, or of what has none, are the columns that name no episode.
    """
    runs = [
        run for site in results["sites"].values() for own in site["agents"].values() for run in own
    ]
    lasts = {_last(run) for run in runs if "failed" not in run}
    episodes = sorted({e for e in IN_TABLE if e < max(lasts, default=0)} | lasts)
    shares = ["start", *map(str, episodes), "best"]
    titles = [
        "site",
        "policy",
        "seeds",
        *(f"gap closed, % {'at ' if name.isdigit() else ''}{name}" for name in shares),
    ]
    titles += [f"{results['settled']} a day", "weeks below RBC C", "unmet, kWh a day"]
    titles += ["CPU-s to beat the best rule", "CPU-s to 1 % of its last"]
    lines = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    for name, site in results["sites"].items():
        for agent, own in site["agents"].items():
            if failed := [run["failed"] for run in own if "failed" in run]:
                lines.append([name, agent, str(len(own)), failed[0], *[""] * (len(titles) - 4)])
                continue
            last = [run["episodes"][str(_last(run))] for run in own]
            cells = [_median([_share(run, which) for run in own], ".1f") for which in shares]
            seconds = ("best_rule", "near_final")
            cells += _cells(last)
            cells += [_median([run["seconds"][key] for run in own], ".0f") for key in seconds]
            lines.append([name, agent, str(len(own)), *cells])
        for key, of in site["references"].items():
            share = _median([_percent(of)], ".1f")
            empty = [""] * (len(shares) - 1)
            lines.append([name, TITLES.get(key, key), "", *empty, share, *_cells([of]), "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _last(run: Run) -> int:
    return max(map(int, run["episodes"]))


def _share(run: Run, which: str) -> float | None:
    """Return the share of the gap at an episode, `start` or `best`, in %; None where unknown."""
    episode = {"start": 0, "best": run["best"]}.get(which, which)
    found = run["episodes"].get(str(episode))
    return found and _percent(found)


def _percent(figures: dict[str, Any]) -> float | None:
    return None if figures["gap_closed"] is None else 100.0 * figures["gap_closed"]


def _cells(own: list[dict[str, Any]]) -> list[str]:
    weeks = [week for row in own for week in row["vs_rbc_c_a_day"]]
    return [
        _median([row["a_day"] for row in own], ".2f"),
        f"{sum(week < 0 for week in weeks)} of {len(weeks)}",
        f"{max(row['unmet_kwh'] for row in own):.3f}",
    ]


def _draw(results: dict[str, Any], path: Path) -> None:
    """Draw the share of the gap against episodes, a panel for each site."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    mpl.rcParams.update({"font.size": 10})
    sites = results["sites"]
    figure, panels = plt.subplots(
        -(-len(sites) // 2),
        min(2, len(sites)),
        figsize=(9.0, 3.6 * -(-len(sites) // 2)),
        dpi=150,
        layout="constrained",
        squeeze=False,
    )
    for axes in panels.flat[len(sites) :]:
        axes.set_visible(False)
    for axes, (name, site) in zip(panels.flat, sites.items(), strict=False):
        shown: list[float] = []
        for agent, runs in site["agents"].items():
            good = [run["episodes"] for run in runs if "failed" not in run]
            if not good or any(row["gap_closed"] is None for run in good for row in run.values()):
                continue
            # One run's best episode is not another's.
            episodes = sorted(int(e) for e in good[0] if e != "0" and all(e in run for run in good))
            shares = np.array([[run[str(e)]["gap_closed"] for e in episodes] for run in good])
            colour, median = agent_colour(agent), np.median(shares, axis=0)
            axes.fill_between(episodes, shares.min(0), shares.max(0), color=colour, alpha=0.18)
            axes.plot(episodes, median, color=colour, marker="o", markersize=3, label=agent)
            shown += median.tolist()
        rules: dict[float, list[str]] = {}  # those that all but coincide share a label
        for rule in ("rbc_b", "rbc_c", "mpc"):
            share = site["references"].get(rule, {}).get("gap_closed")
            if share is not None and shown and share >= min(shown) - 0.3:
                near = [other for other in rules if abs(other - share) < 0.01]
                rules.setdefault([*near, share][0], []).append(TITLES.get(rule, "MPC"))
                axes.axhline(share, color="#666666", linestyle="--", linewidth=0.9, zorder=1)
        for share, titles in rules.items():
            axes.annotate(
                ", ".join(titles),
                xy=(1.0, share),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axhline(1.0, color="#666666", linewidth=0.9, zorder=1)
        axes.set_title(f"{name}, {len(site['days'])} held-out stretches", fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("episodes")
        axes.set_ylabel("share of the gap closed")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """Return what the times depend on; no name of a host."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [li for li in info.read_text().splitlines() if li.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions the results depend on."""
    packages = {name: version(name) for name in ("torch", "lightning", "numpy", "scipy")}
    return {"python": platform.python_version(), "co2lightning": __version__, **packages}


if __name__ == "__main__":
    sys.exit(main())
