"""Published ways to choose prompts by the rewards of training, one file each, by the names of their papers."""

from .adept import ADEPT, ADEPTThompson
from .bandit import DUMP, SEC
from .base import Published
from .dps import DPS
from .greso import GRESO
from .insight import InSight
from .lfr import LFR
from .mopps import MoPPS
from .pools import Pools


# By the name that `LearnAlignConfig(schedule=...)` has for them
PUBLISHED: dict[str, type[Published]] = {
    "mopps": MoPPS,
    "insight": InSight,
    "dps": DPS,
    "greso": GRESO,
    "pools": Pools,
    "sec": SEC,
    "dump": DUMP,
    "lfr": LFR,
    "adept": ADEPT,
    "adept_thompson": ADEPTThompson,
}

__all__ = [
    *("ADEPT", "DPS", "DUMP", "GRESO", "LFR", "PUBLISHED", "SEC"),
    *("ADEPTThompson", "InSight", "MoPPS", "Pools", "Published"),
]
