"""What knowing more is worth at a site: a rule on the past alone, beside a provider, on the truth.

    python benchmarks/knowledge.py tests/sites/caltech-2019            # carbon and its provider
    python benchmarks/knowledge.py tests/sites/caltech-2019 --price 1  # invented, told at 13:00

Prints the share of the gap from uncontrolled to the optimum that is closed on held-out weeks: cheap
hours where vehicles charge, MPC (a minute or two for each line) where there are none. Nothing is
trained; what is fitted is the site's own forecast, on training days.
"""

import argparse
import functools
from dataclasses import replace

import numpy as np
import torch

from co2lightning.control.forecast import cheaper, forecast, provided, steps_per_lead
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Choice, Rule, rbc_c
from co2lightning.sim.evaluate import evaluate, summarise
from co2lightning.sim.mpc import mpc
from co2lightning.site.load import load_site
from co2lightning.site.model import Floats, Objective, Site


def invented_price(site: Site, seed: int) -> Floats:
    """Draw an hourly price [P] whose days differ: by level, by evening peak, and hour by hour."""
    rng = np.random.default_rng(seed)
    hours = site.local.astype("datetime64[h]")
    day = (hours.astype("datetime64[D]") - hours[0].astype("datetime64[D]")).astype(int)
    hour = hours.astype(int) % 24
    days = int(day.max()) + 1
    level, peak = rng.normal(0.15, 0.04, days), rng.uniform(0.0, 0.2, days)
    each = rng.normal(0.0, 0.03, (days, 24))
    evening = np.exp(-(((hour - 19) / 2.5) ** 2))
    return (level[day] + peak[day] * evening + each[day, hour]).round(4)


def rule_of(site: Site) -> Rule:
    """Return the rule that goes by what a site knows."""
    if not len(site.sessions.arrival):
        return mpc(site)
    own = Choice("cheap", greedy=site.battery is not None)
    return functools.partial(rbc_c, own, outlook_of(site))


def at_its_word(site: Site) -> Rule:
    """Return cheap hours on what the provider says of carbon, and where it says nothing the own."""
    told, each = (
        forecast(replace(site, provided={}), "carbon_kg_per_kwh").copy(),
        steps_per_lead(site),
    )
    for at in range(told.shape[1]):
        said, _ = provided(site, "carbon_kg_per_kwh", (at + 1) * each)
        told[:, at] = np.where(np.isnan(said), told[:, at], said)
    outlook = outlook_of(site)
    leads = (outlook.cheaper.shape[1] - 1) // each
    counts = torch.as_tensor(cheaper(site.carbon_kg_per_kwh, told[:, :leads], each))
    return functools.partial(rbc_c, Choice("cheap"), outlook._replace(cheaper=counts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("site")
    parser.add_argument("--price", type=int, metavar="SEED", help="invent a price and settle it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    site = load_site(options.site)
    if options.price is not None:
        price = invented_price(site, options.price)
        site = replace(
            site,
            price_per_kwh=price,
            objective=Objective(0.0, 1.0),
            known_ahead={"price_per_kwh": "13:00"},
        )
    past = replace(site, known_ahead={}, provided={})
    priced = ("price_per_kwh",) if options.price is not None else ("carbon_kg_per_kwh",)
    # Cheap hours look at the price alone, MPC at load and PV, too.
    net = () if len(site.sessions.arrival) else ("load_kw", "pv_kw")

    def knowing(columns: tuple[str, ...]) -> Site:
        return replace(site, provided={}, known_ahead=dict.fromkeys(columns, "always"))

    knowledge = {"from the past": past}
    if site.known_ahead or site.provided:
        knowledge["what the site is told"] = site
    knowledge[f"{', '.join(priced)} all known"] = knowing(priced)
    if net:
        knowledge["load and PV all known"] = knowing(net)
        knowledge["all known"] = knowing(priced + net)
    rules = {words: rule_of(known) for words, known in knowledge.items()}
    if site.provided.keys() & set(priced) and len(site.sessions.arrival):
        rules["provider at its word"] = at_its_word(site)
    references = evaluate(None, past)
    for words, rule in rules.items():
        share = summarise(evaluate(rule, past, references))["agent"].gap_closed
        print(f"{words:32} {'-' if share is None else f'{100 * share:5.1f} %'}", flush=True)


if __name__ == "__main__":
    main()
