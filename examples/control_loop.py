"""Run an exported policy in a control loop, without torch: numpy and onnxruntime are enough.

    co2lightning export PPO --output policy.onnx
    co2lightning predict PPO --output schedule.csv --observations observations.csv
    python examples/control_loop.py policy.onnx < observations.csv

Each line of standard input is a step: the columns that the policy's metadata names, in any order,
as the policy sees them. On a site they come from the meters, in kW and kWh: with `--measured` at
the end they are put into the scales that the file holds. The set points go to the chargers and the
battery. A rule's file (`export rbc_c --env.site iquitos`) is run likewise.
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
    centre, spread = (np.array(json.loads(about[f"observation_{k}"])) for k in ("centre", "spread"))
    who = about.get("agent") or about["rule"]
    which = f", episode {about['episode']}" if "agent" in about else f": {about['in_words']}"
    print(f"# {who} of {about['site']}{which}", file=sys.stderr)

    print("time,ev_kw,battery_kw")
    for step in csv.DictReader(sys.stdin):
        if missing := [name for name in names if not step.get(name)]:
            sys.exit(f"{step.get('time')}: no value of {missing[0]}")
        seen = np.array([float(step[name]) for name in names])
        if not np.isfinite(seen).all():
            sys.exit(f"{step['time']}: a sensor gave no number")
        if "--measured" in sys.argv:
            seen = np.divide(seen - centre, spread, out=np.zeros_like(seen), where=spread > 0)
        observation = seen.astype(np.float32)[np.newaxis]
        (((ev_kw, battery_kw),),) = session.run(["power_kw"], {"observation": observation})
        print(f"{step['time']},{ev_kw:.2f},{battery_kw:.2f}", flush=True)


if __name__ == "__main__":
    main()
