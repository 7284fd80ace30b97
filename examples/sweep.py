"""Search a recipe's settings with Optuna, on as many processes and machines as one likes.

    pip install -c constraints.txt '.[sweep]'
    python examples/sweep.py --trials 20 --episodes 30        # run it once per core or GPU

Every process takes trials from one database. A trial is a run of its own, `sweep-0007`, and each
of its episodes is on disk: when a process is killed its heart stops beating, another one takes the
trial up, and training goes on after the last whole episode. Judged is CO2 on the training days, as
a share of the same days without control; the held-out days stay unseen until `co2lightning test`.
"""

from __future__ import annotations

import argparse

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

import co2lightning

LAST = 5  # episodes whose mean is judged: one episode's days may be easy


def settings(trial: optuna.Trial) -> dict[str, object]:
    """Return what a trial tries; add what you want to search."""
    return {
        "model.learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "model.ent_coef": trial.suggest_float("ent_coef", 0.0, 0.1),
    }


def main() -> None:
    """Run trials until all are done."""
    parser = argparse.ArgumentParser(description="Search settings; run it as often as you like.")
    parser.add_argument("--storage", default="sqlite:///sweep.db", help="PostgreSQL on a cluster")
    parser.add_argument("--name", default="sweep", help="of the study and, numbered, its runs")
    parser.add_argument("--config", default="ppo.yaml")
    parser.add_argument("--trials", type=int, default=20, help="of all processes together")
    parser.add_argument("--episodes", type=int, default=30, help="of a trial")
    parser.add_argument("--num_envs", type=int, default=256)
    parser.add_argument("--heartbeat_s", type=int, default=30, help="dead after three of them")
    arguments = parser.parse_args()

    def objective(trial: optuna.Trial) -> float:
        name = trial.user_attrs.get("run", f"{arguments.name}-{trial.number:04d}")
        trial.set_user_attr("run", name)  # whoever takes a dead trial up finds its run by it
        co2lightning.fit(
            {
                "config": arguments.config,
                "name": name,
                "ckpt_path": "last",
                "total_episodes": arguments.episodes,
                "env.num_envs": arguments.num_envs,
                **settings(trial),
            }
        )
        run = co2lightning.TrainingCheckpoint(f"checkpoints/{name}")
        rows = [row for session in run.load_history()["trainings"] for row in session["metrics"]]
        shares = [row["co2_vs_uncontrolled"] for row in rows[-LAST:]]
        return sum(shares) / len(shares)

    storage = RDBStorage(
        arguments.storage,
        heartbeat_interval=arguments.heartbeat_s,
        grace_period=3 * arguments.heartbeat_s,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.create_study(study_name=arguments.name, storage=storage, load_if_exists=True)
    while len(study.get_trials(states=(TrialState.COMPLETE,))) < arguments.trials:
        study.optimize(objective, n_trials=1)
    best = study.best_trial
    print(f"best: {best.user_attrs['run']} with {best.value:.3f}, {best.params}")


if __name__ == "__main__":
    main()
