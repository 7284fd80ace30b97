"""The seed of every draw: (seed, episode, rank)."""

import numpy as np
import torch


def episode_seed(seed: int, episode: int, rank: int, stream: str) -> int:
    """Return the seed of one stream of draws in one episode on one rank.

    Streams ("days", "noise", "updates", ...) are independent; nothing depends on what was drawn
    before, so an episode can be replayed alone and no generator state need be stored.
    """
    entropy = [seed, episode, rank, *stream.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def episode_generator(
    seed: int, episode: int, rank: int, stream: str, device: torch.device
) -> torch.Generator:
    """Return a generator on `device` for one stream of draws in one episode on one rank."""
    generator = torch.Generator(device=device)
    return generator.manual_seed(episode_seed(seed, episode, rank, stream))
