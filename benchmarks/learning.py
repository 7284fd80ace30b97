"""How fast and how far the agents learn: held-out CO2 against episodes, over several seeds.

    python benchmarks/learning.py --agents A2C:100,SAC:100,PPO:100,PPO-long:300 --seeds 3 \
        --output docs/results.json --figure docs/results.png

Trains every shipped recipe as it is with `co2lightning fit`, each run a process with one torch
thread, in a temporary directory. Checkpoints are then evaluated without exploration on the site's
held-out stretches, beside the rules and the perfect-foresight optimum, as `co2lightning test` does.
Prints the table that stands in the README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from co2lightning.agents import AGENTS
from co2lightning.agents.load import load_agent, policy_of
from co2lightning.report.looks import agent_colour
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import (
    TITLES,
    Evaluation,
    evaluate,
    mean_interval,
    summarise,
    violations,
)
from co2lightning.site.load import load_site
from co2lightning.site.model import DAY_H, Site

EPISODES = (1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
IN_TABLE = (10, 30, 100, 300)  # and a run's last
FIGURES = ("co2_kg", "gap_closed", "vs_rbc_b_kg", "vs_rbc_b_kg_interval", "unmet_kwh")
REFERENCE_FIGURES = ("co2_kg", "gap_closed", "vs_rbc_b_kg", "unmet_kwh")

Run = dict[str, Any]


def main() -> int:
    """Train, evaluate, write the results, print the table, draw the figure."""
    parser = argparse.ArgumentParser(
        description="Held-out CO2 of the shipped recipes against training episodes."
    )
    parser.add_argument(
        "--agents",
        default=",".join(AGENTS),
        help="recipes, comma separated: PPO is ppo.yaml; PPO:30 gives it 30 episodes",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each agent: seeds 0, 1, ...")
    parser.add_argument("--episodes", type=int, default=100, help="of a run that names none")
    parser.add_argument("--site", default="iquitos", help="a shipped site")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--output", type=Path, help="results as JSON")
    parser.add_argument("--figure", type=Path, help="a PNG")
    arguments = parser.parse_args()
    chosen = [recipe.partition(":") for recipe in arguments.agents.split(",")]
    agents = {name: int(episodes or arguments.episodes) for name, _, episodes in chosen}
    torch.set_num_threads(1)
    site = load_site(arguments.site)
    references = evaluate(None, site)
    broken = violations(references)
    with tempfile.TemporaryDirectory() as place:
        names = [(agent, seed) for agent in agents for seed in range(arguments.seeds)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            runs = list(
                pool.map(lambda n: train(n[0], n[1], agents[n[0]], site, Path(place)), names)
            )
        for run in runs:
            broken += add_figures(run, site, references, Path(place))
    results: dict[str, Any] = {
        "command": "python benchmarks/learning.py --agents "
        f"{','.join(f'{name}:{episodes}' for name, episodes in agents.items())} --seeds "
        f"{arguments.seeds} --site {site.name} --jobs {arguments.jobs}",
        "machine": machine(),
        "versions": versions(),
        "site": {
            "name": site.name,
            "sha256": site.sha256,
            "stretches": list(references.days),
            "days": references.n_days.tolist(),
        },
        "references": {
            name: {key: figures[key] for key in REFERENCE_FIGURES}
            for name, figures in all_figures(references).items()
        },
        "agents": {
            agent: {
                "summary": spread([run for run in runs if run["agent"] == agent]),
                "runs": [run for run in runs if run["agent"] == agent],
            }
            for agent in agents
        },
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if arguments.figure:
        draw(results, arguments.figure)
    for line in broken:
        print(f"error: the optimum is no bound, a defect: {line}", file=sys.stderr)
    return 1 if broken else 0


def train(agent: str, seed: int, episodes: int, site: Site, place: Path) -> Run:
    """Train one run from its recipe in a process of its own; returns what is known of it."""
    name = f"{agent}-{seed}"
    command = [sys.executable, "-m", "co2lightning", "fit", "--config", f"{agent.lower()}.yaml"]
    command += ["--episodes", str(episodes), "--seed_everything", str(seed), "--name", name]
    command += ["--env.site", site.name, "--threads", "1"]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{name} ended with exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    print(f"{name}: {episodes} episodes in {seconds:.0f} s", file=sys.stderr, flush=True)
    return {"agent": agent, "seed": seed, "seconds": round(seconds, 1)}


def add_figures(run: Run, site: Site, references: Evaluation, place: Path) -> list[str]:
    """Evaluate a run's checkpoints; returns the stretches in which the optimum was no bound."""
    files = TrainingCheckpoint(place / "checkpoints" / f"{run['agent']}-{run['seed']}")
    last = files.get_next_episode() - 1
    broken: list[str] = []
    run["episodes"] = {}
    for episode in sorted({*(e for e in EPISODES if e < last), last}):
        path = files.path(episode)
        content = files.read(path)
        evaluation = evaluate(policy_of(load_agent(content, path), site), site, references)
        broken += violations(evaluation)
        summary = all_figures(evaluation)["agent"]
        run["episodes"][str(episode)] = {key: summary[key] for key in FIGURES}
        run["config"] = content["run"]["config"]
    return broken


def all_figures(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return each policy's summary, and what it emits against RBC B on the same stretches."""
    found = {name: summary._asdict() for name, summary in summarise(evaluation).items()}
    days = evaluation.hours / DAY_H
    for name, own in evaluation.policies.items():
        difference_kg = own.co2_kg - evaluation.policies["rbc_b"].co2_kg
        found[name]["vs_rbc_b_kg"] = float(difference_kg.sum() / days.sum())
        found[name]["vs_rbc_b_kg_interval"] = mean_interval(difference_kg / days)[1]
    return found


def spread(runs: list[Run]) -> dict[str, Any]:
    """Return median, lowest and highest of each figure over the seeds, per episode."""
    return {
        episode: {
            key: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for key in FIGURES
            if None not in (values := [run["episodes"][episode][key] for run in runs])
        }
        for episode in runs[0]["episodes"]
    }


def title(agent: str, results: dict[str, Any]) -> str:
    """Return an agent's name; one that gives powers instead of weighing moves is named so."""
    config = results["agents"][agent]["runs"][0]["config"]
    return agent if config.get("env.action") == "moves" else f"{agent} (powers)"


def held_out(results: dict[str, Any]) -> str:
    """Return in words what was held out."""
    days = results["site"]["days"]
    weeks = set(days) == {7}
    return f"{len(days)} held-out {'weeks' if weeks else 'stretches'}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table: the median over the seeds, lowest to highest."""
    lines = [
        "| policy | episodes | CO2, kg a day | against RBC B, kg a day | surely below it "
        "| gap closed | unmet, kWh a day |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def cell(figures: dict[str, float] | None, form: str) -> str:
        if figures is None:
            return ""
        median, low, high = (format(figures[key], form) for key in ("median", "min", "max"))
        return f"{median} ({low} to {high})"

    for agent, entry in results["agents"].items():
        last = max(map(int, entry["summary"]))
        for episode, figures in entry["summary"].items():
            if int(episode) not in (*IN_TABLE, last):
                continue
            # The 95 % interval of the paired difference lies below 0.
            runs = [run["episodes"][episode] for run in entry["runs"]]
            known = [run for run in runs if run["vs_rbc_b_kg_interval"] is not None]
            better = [run["vs_rbc_b_kg"] + run["vs_rbc_b_kg_interval"] < 0.0 for run in known]
            cells = [
                cell(figures["co2_kg"], ".1f"),
                cell(figures["vs_rbc_b_kg"], "+.1f"),
                f"{sum(better)} of {len(better)} seeds" if better else "",
                cell(figures.get("gap_closed"), ".1%"),
                f"{figures['unmet_kwh']['max']:.3f}",
            ]
            lines.append(f"| {title(agent, results)} | {episode} | {' | '.join(cells)} |")
    for name, figures in results["references"].items():
        gap = figures["gap_closed"]
        cells = [
            f"{figures['co2_kg']:.1f}",
            "" if name == "rbc_b" else f"{figures['vs_rbc_b_kg']:+.1f}",
            "",
            "" if gap is None else f"{gap:.1%}",
            f"{figures['unmet_kwh']:.3f}",
        ]
        lines.append(f"| {TITLES[name]} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw held-out CO2 against episodes: median and range over seeds, and the references."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    mpl.rcParams.update({"font.size": 11})
    figure, axes = plt.subplots(figsize=(8.0, 4.6), dpi=150, layout="constrained")
    last = 1
    for agent, entry in results["agents"].items():
        episodes = [int(episode) for episode in entry["summary"]]
        figures = [row["co2_kg"] for row in entry["summary"].values()]
        colour = agent_colour(agent.partition("-")[0])  # PPO-long is a recipe of PPO
        axes.fill_between(
            episodes,
            [f["min"] for f in figures],
            [f["max"] for f in figures],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(
            episodes,
            [f["median"] for f in figures],
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            label=title(agent, results),
        )
        last = max(last, *episodes)
    references = {name: f["co2_kg"] for name, f in results["references"].items()}
    # Not from 0: what tells the better policies apart lies just above the optimum.
    bottom = 50.0 * (0.65 * references["optimum"] // 50.0)
    axes.set_ylim(bottom, max(1.1 * references["uncontrolled"], axes.get_ylim()[1]))
    for name, co2_kg in references.items():
        dashed = "-" if name == "optimum" else "--"
        axes.axhline(co2_kg, color="#666666", linestyle=dashed, linewidth=0.9, zorder=1)
        axes.annotate(
            f"{TITLES[name]} {co2_kg:.0f}",
            xy=(1.0, co2_kg),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color="#444444",
            fontsize=10,
        )
    if last > 1:
        axes.set_xscale("log")
        axes.set_xlim(0.95, last * 1.05)
        shown = {e for e in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if e <= 0.8 * last}
        axes.set_xticks(sorted({*shown, last}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training episodes")
    axes.set_ylabel(f"CO2 in {held_out(results)}, kg a day")
    axes.spines[["top", "right"]].set_visible(False)
    seeds = len(next(iter(results["agents"].values()))["runs"])
    figure.suptitle(
        f"Site {results['site']['name']}, {held_out(results)}; "
        f"line: median of {seeds} seeds, band: lowest to highest",
        fontsize=11,
    )
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderaxespad=0.2
    )
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
    packages = ("co2lightning", "torch", "lightning", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    sys.exit(main())
