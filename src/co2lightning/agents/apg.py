"""Analytic policy gradient: descent through the site's own physics, with costates at the cut.

A window of a day is played with gradients, so one backward pass says how every weight changes what
the day costs. What is left at its end, stored or owed, is priced by a critic of derivatives, as in
dual heuristic programming (Werbos 1992): the same backward pass gives what a kWh that is stored or
owed at the window's beginning is worth, and two small networks learn that. No price is chosen.

Shapes: B windows, C columns of sockets, O features, R rows that are remembered.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from co2lightning.agents.actor_critic import weighted_mean
from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP
from co2lightning.agents.ranges import COUNT_OR_NONE, POSITIVE, SHARE, setting
from co2lightning.control.state import State
from co2lightning.errors import UserError
from co2lightning.learn import ranks
from co2lightning.learn.descent import Descent
from co2lightning.sim.days import SiteDays
from co2lightning.sim.interface import Environment
from co2lightning.sim.objective import objective
from co2lightning.site.model import DAY_H

_STAY = 7  # features of a vehicle's stay
_WIDTH = 32  # of the costates' networks
_ROWS = 1600  # remembered of batteries and as many of vehicles: 25 episodes of 64 windows
_FIRST = 0.8  # first costates, in mean prices
_STORED, _OWED = (0.0, 2.5), (-0.5, 4.0)  # where costates are believed, in mean prices
_COSTATES = 0.01  # weight of the costates' loss: below the policy's, to which gradients are clipped


class Windows(NamedTuple):
    """Where the windows of an episode begin; the loss is differentiated by the last two."""

    days: Tensor  # [B]
    soc: Tensor  # [B]
    more_kw: Tensor  # [B, C] 0: what vehicles are owed beyond what was recorded


class _Through(Descent):
    """Descends, and lets the agent remember what the windows' beginnings are worth."""

    agent: "APG"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, agent: "APG", optimizer: torch.optim.Optimizer, **how: Any) -> None:
        # A day's steps in one graph would take the compiler longer than all of the training.
        super().__init__(agent, optimizer, **{**how, "compiled": False})

    def gradient(self, batch: Windows) -> tuple[list[Tensor], dict[str, Tensor]]:
        loss, figures = self.agent.loss(batch)
        wanted = [*self.parameters, batch.soc, batch.more_kw]
        *gradients, by_soc, by_owed = torch.autograd.grad(loss, wanted, materialize_grads=True)
        self.agent.remember(by_soc, by_owed)
        return gradients, {name: figure.detach() for name, figure in figures.items()}


class APG(Agent):
    """Analytic policy gradient of windows of a site."""

    @dataclass(kw_only=True)
    class Settings(Agent.Settings):
        """What can be set of APG; nothing is compiled, and what is left counts undiscounted.

        Args:
            learning_rate: Of Adam, at episode 1; it falls along half a cosine.
            anneal_episodes: Episodes over which the learning rate shrinks; 0 keeps it.
            max_grad_norm: The gradient's norm is clipped to this.
        """

        learning_rate: float = setting(1e-2, POSITIVE)
        anneal_episodes: int = setting(100, COUNT_OR_NONE)
        anneal_to: float = setting(0.02, SHARE)
        max_grad_norm: float = setting(0.05, POSITIVE)

    settings: Settings  # pyright: ignore[reportIncompatibleVariableOverride]
    squashed = True
    first_action = 0.4, 0.6  # a softmax further out has hardly a slope
    descends = _Through

    def build(self) -> None:
        shape, n_seen = self.shape_of_networks(), self.observation_dim
        self.actor = MLP(n_seen, n_out=self.action_dim, output_gain=0.01, **shape)
        small = {**shape, "hidden": (_WIDTH,), "n_out": 1, "output_gain": 0.01}
        self.stored_costate = MLP(n_seen, **small)
        self.owed_costate = MLP(n_seen + _STAY, **small)
        with torch.no_grad():
            self.stored_costate.last[1].fill_(_FIRST)
            self.owed_costate.last[1].fill_(_FIRST)
        # What windows' beginnings were worth: features, then the costate and its weight.
        self.register_buffer("of_stored", torch.zeros(_ROWS, n_seen + 2))
        self.register_buffer("of_owed", torch.zeros(_ROWS, n_seen + _STAY + 2))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.long))

    of_stored: Tensor
    of_owed: Tensor
    remembered: Tensor

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rate = self.settings.learning_rate
        return torch.optim.Adam(self.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)

    def annealed(self, value: float) -> float:
        """Return `value` shrunk along half a cosine with the absolute episode."""
        span = self.settings.anneal_episodes
        done = min(1.0, (self.episode - 1) / span) if span else 0.0
        least = self.settings.anneal_to
        return value * (least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done)))

    def segment_steps(self, horizon: int) -> int:
        return horizon

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's own output: nothing is tried at random."""
        return self.policy_mean(obs)

    # -- episodes ------------------------------------------------------------------------------

    def train_on(self, env: Environment) -> None:
        """Set the site the next `Trainer.fit` plays.

        Raises:
            UserError: It is no site, of which alone the physics can be differentiated.
        """
        if not isinstance(env, SiteDays):
            raise UserError(
                "APG descends through the physics of a site: give --env.site, or another agent "
                "for a Gymnasium environment"
            )
        super().train_on(env)

    @property
    def _site(self) -> SiteDays:
        assert isinstance(self.env, SiteDays)
        return self.env

    def draw_windows(self) -> Windows:
        """Return the windows of this episode, still to be played."""
        env = self._site
        env.to(self.device)
        days, soc = env.draw(self.episode_seed("days"), env.num_envs)
        soc = soc.to(self.device)
        more_kw = torch.zeros_like(env.recorded(days, soc).owed_kw)
        return Windows(days, soc.requires_grad_(), more_kw.requires_grad_())

    def training_step(self, episode: object, batch_idx: int) -> None:
        """Take one step of descent; `episode` is not begun, since the loss plays its windows."""
        self.between_segments()
        for minibatch in self.minibatches(self.draw_windows()):
            self.descent(minibatch)
            self.updates += 1
        self.env_steps += self._rewards.numel() * self.world_size
        none, all_ = torch.zeros_like(self._rewards), torch.ones_like(self._rewards)
        cut = torch.cat([none[1:], all_[:1]])
        self._outcomes.append((self._rewards, none, cut, all_))

    def loss(self, windows: Windows, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Play windows; return what they cost and leave, and how wrong costates have been.

        Costs are in days of the uncontrolled site; what is left unserved costs the mean price. The
        sum descends each part on its own: what prices the cut is a constant to the policy.
        """
        env = self._site
        carry = env.recorded(windows.days, windows.soc)
        owed_kw, true_kw = carry.owed_kw + windows.more_kw, carry.true_kw
        if true_kw is not None:
            true_kw = true_kw + windows.more_kw
        obs = env.begin_at(carry._replace(owed_kw=owed_kw, true_kw=true_kw))
        first, cost, rewards = env.state, 0.0, list[Tensor]()
        assert first is not None
        seen, stays = obs.detach(), stay_features(env, first).detach()
        self._starts = seen, stays, first.owed_kw.detach() > 0
        full, each_kw = _at_mean_price(env)
        for _ in range(env.horizon):
            state = env.state
            assert state is not None
            result = env.step(self.act(obs))
            cost = cost + objective(state, env.flows) + env.flows.unmet_kw * each_kw
            rewards.append(result.reward.detach())
            obs = result.obs
        self._rewards = torch.stack(rewards)
        stored, owed = self._costates(obs)
        carry = env.carry
        left = (owed * carry.truly_owed_kw).sum(1) * each_kw - stored * carry.soc * full
        costate_loss = self._costate_loss()
        loss = (cost + left).mean()
        figures = {"loss": loss, "left_at_end": left.mean(), "costate_loss": costate_loss}
        return loss + _COSTATES * costate_loss, figures

    # -- costates ------------------------------------------------------------------------------

    @torch.no_grad()
    def _costates(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a kWh is worth now that is stored [B] or owed [B, C], in mean prices."""
        env = self._site
        state = env.state
        assert state is not None
        stays = stay_features(env, state)
        each = seen.unsqueeze(1).expand(-1, stays.shape[1], -1)
        owed = self.owed_costate(torch.cat([each, stays], dim=2)).squeeze(2)
        return self.stored_costate(seen).squeeze(1).clamp(*_STORED), owed.clamp(*_OWED)

    def _costate_loss(self) -> Tensor:
        """Return how far the costates are from what is remembered."""
        both = (self.stored_costate, self.of_stored), (self.owed_costate, self.of_owed)
        stored, owed = (
            weighted_mean((network(rows[:, :-2]) - rows[:, -2:-1]).square(), rows[:, -1:])
            for network, rows in both
        )
        return stored + owed

    @torch.no_grad()
    def remember(self, by_soc: Tensor, by_owed: Tensor) -> None:
        """Remember what the beginnings of the played windows were worth.

        Args:
            by_soc: [B] the loss by what the batteries held.
            by_owed: [B, C] the loss by what the vehicles were owed.
        """
        seen, stays, present = self._starts
        full, each_kw = _at_mean_price(self._site)
        count = len(seen)  # the loss is a mean of so many
        nothing = torch.full_like(by_soc, torch.nan)
        stored = (-by_soc * count / full).clamp(*_STORED) if full else nothing
        owed = torch.where(present, (by_owed * count / each_kw).clamp(*_OWED), torch.nan)
        # As many vehicles as windows, any of them.
        lots = torch.rand(present.shape, generator=self.update_generator, device=self.device)
        lots = torch.where(present, lots, -1.0).flatten()
        some = lots.topk(min(count, len(lots))).indices
        window = some // present.shape[1]
        of_owed = torch.cat([seen[window], stays.flatten(0, 1)[some]], dim=1)
        tables = (self.of_stored, seen, stored), (self.of_owed, of_owed, owed.flatten()[some])
        for table, features, known in tables:
            rows = torch.cat([features, known.unsqueeze(1)], dim=1)
            rows = nn.functional.pad(rows, (0, 1), value=1.0)
            rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
            if self.world_size > 1:
                rows = ranks.together(rows)
            rows = rows[:_ROWS]
            places = (self.remembered + torch.arange(len(rows), device=self.device)) % _ROWS
            table[places] = rows
        self.remembered += count * self.world_size


def _at_mean_price(env: SiteDays) -> tuple[float, float]:
    """Return what a full battery costs at the mean price, and a kW owed in a step."""
    battery = env.site.battery
    capacity_kwh = battery.capacity_kwh if battery else 0.0
    return capacity_kwh * env.tables.kwh_cost, env.site.step_h * env.tables.kwh_cost


def stay_features(env: SiteDays, state: State) -> Tensor:
    """Return what prices what vehicles are owed [B, C, 7], steps in days.

    Steps left and needed, their ratio and difference; shares of them that are expected to be
    cheaper, by price and with sun; what is needed beyond the cheaper ones.
    """
    left = state.later_kw / state.power_kw + 1.0
    need = state.owed_kw / state.power_kw
    cheaper = env.observer.moves.cheaper.index_select(1, state.place).to(need)
    sunny, plain = cheaper[0], cheaper[-1]
    a_day = env.site.step_h / DAY_H
    features = (
        a_day * left,
        a_day * need,
        need / left,
        a_day * (left - need),
        plain / left,
        sunny / left,
        a_day * (need - plain),
    )
    return torch.stack(features, dim=2)
