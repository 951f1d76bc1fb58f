"""How mixers do on simulated domains (tests/support/simulated_world.py), in about a minute without any model.

    python tests/benchmarks/simulate_mixers.py --seeds 5 --steps 500 2000

For each kind of world: the mean loss of the learnable domains at the end, over the seeds, and in brackets how many of
the seeds are better than official's; then the share of all samples that went to noise. What wins here need not win on
text: the curves have no learning rate, no forgetting and no interference. It is for dropping ideas early.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from simulated_world import World

from megamix.mixing import make_mixer

WORLDS = {
    "no noise": {},
    "no noise, transfer": {"transfer": 0.2},
    "1 noise": {"noise": 1},
    "1 noise, transfer": {"noise": 1, "transfer": 0.2},
    "20 + 2 noise": {"num_learnable": 20, "noise": 2},
}
MIXERS = {
    "natural": {"name": "static"},
    "uniform": {"name": "static"},
    "official": {"name": "odm", "preset": "official"},
    "paper": {"name": "odm", "preset": "paper"},
    "exp3": {"name": "odm", "preset": "exp3"},
    "dataflex": {"name": "odm", "preset": "dataflex"},
    "recommended": {"name": "recommended"},
}


def run(name: str, world: World, steps: int) -> tuple[float, float]:
    """(mean loss of the learnable domains, share of noise)."""
    initial = np.ones(world.num_domains) if name == "uniform" else world.natural
    mixer = make_mixer(MIXERS[name], [f"d{i}" for i in range(world.num_domains)], initial)
    loss = world.train(mixer, steps)
    return loss, float(world.tokens[world.num_learnable :].sum() / world.tokens.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 2000])
    arguments = parser.parse_args()
    for steps in arguments.steps:
        print(f"{steps} steps".ljust(20) + "".join(name.rjust(14) for name in MIXERS))
        for title, options in WORLDS.items():
            found = {
                name: [run(name, World(seed, **options), steps) for seed in range(arguments.seeds)] for name in MIXERS
            }
            cells, shares = [], []
            for pairs in found.values():
                better = sum(mine < theirs for (mine, _), (theirs, _) in zip(pairs, found["official"], strict=True))
                cells.append(f"{np.mean([loss for loss, _ in pairs]):.3f} ({better})")
                shares.append(f"{np.mean([share for _, share in pairs]):.0%}")
            print(title.ljust(20) + "".join(cell.rjust(14) for cell in cells), flush=True)
            if options.get("noise"):
                print("  to noise".ljust(20) + "".join(share.rjust(14) for share in shares), flush=True)


if __name__ == "__main__":
    main()
