"""Run an exported policy in a control loop, without torch: numpy and onnxruntime are enough.

    co2lightning export PPO --output policy.onnx
    co2lightning predict PPO --output schedule.csv --observations observations.csv
    python examples/control_loop.py policy.onnx < observations.csv

Each line of standard input is what is known at the beginning of a step of 15 minutes: the columns
that the policy's metadata names, in any order. Here they come from a file that `predict` wrote; on
a site they come from the meters, and the set points go to the chargers and the battery.
"""

import csv
import json
import sys

import numpy as np
import onnxruntime


def main() -> None:
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["observation_names"])
    low = np.array(json.loads(about["observation_low"]), dtype=np.float32)
    high = np.array(json.loads(about["observation_high"]), dtype=np.float32)
    print(f"# {about['agent']} of {about['site']}, episode {about['episode']}", file=sys.stderr)

    print("time,ev_kw,battery_kw")
    for measured in csv.DictReader(sys.stdin):
        missing = [name for name in names if not measured.get(name)]
        if missing:
            sys.exit(f"{measured.get('time')}: no value of {missing[0]}")
        observation = np.array([[float(measured[name]) for name in names]], dtype=np.float32)
        if not np.isfinite(observation).all():
            sys.exit(f"{measured['time']}: a sensor gave no number")
        (power_kw,) = session.run(["power_kw"], {"observation": observation.clip(low, high)})
        ev_kw, battery_kw = power_kw[0]
        print(f"{measured['time']},{ev_kw:.2f},{battery_kw:.2f}", flush=True)


if __name__ == "__main__":
    main()
