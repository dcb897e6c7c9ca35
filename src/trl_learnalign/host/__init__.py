"""The only modules that use private parts of a trainer. The other modules see a [`Host`]."""

from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from .grpo import GRPOHost
from .rloo import RLOOHost
from .trl import Host


__all__ = ["Host", "check_kind", "find_host"]

_HOSTS = {GRPOTrainer: GRPOHost, RLOOTrainer: RLOOHost}


def check_kind(kind: type) -> type[Host]:
    """
    The host of a class of trainers.

    Raises:
        `TypeError`: neither a GRPOTrainer nor an RLOOTrainer.
    """
    for trainer, host in _HOSTS.items():
        if issubclass(kind, trainer):
            return host
    raise TypeError(f"LearnAlign works on a trl.GRPOTrainer or a trl.RLOOTrainer, but got a {kind.__name__}.")


def find_host(trainer: Trainer) -> Host:
    """
    The host of a trainer.

    Raises:
        `TypeError`: neither a GRPOTrainer nor an RLOOTrainer.
        `RuntimeError`: a version of TRL that lacks what is used here.
    """
    return check_kind(type(trainer))(trainer)
