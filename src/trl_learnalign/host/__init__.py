"""The only modules that use private parts of a trainer. The other modules see a [`Host`]."""

import inspect
from importlib import import_module
from importlib.metadata import version

from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from .grpo import GRPOHost
from .names import ALWAYS, ROLES
from .rloo import RLOOHost
from .trl import Host


__all__ = ["GRPOHost", "Host", "RLOOHost", "check_kind", "find_host", "register_host"]

_HOSTS: dict[type, type[Host]] = {GRPOTrainer: GRPOHost, RLOOTrainer: RLOOHost}
# Known by name: not every version of TRL has the class, and importing an experimental one warns
_EXPERIMENTAL = {
    ("trl.experimental.sdpo.sdpo_trainer", "SDPOTrainer"): (".sdpo", "SDPOHost"),
    ("trl.experimental.async_grpo.async_grpo_trainer", "AsyncGRPOTrainer"): (".async_grpo", "AsyncGRPOHost"),
}


def register_host(trainer_class: type[Trainer], host_class: type[Host]) -> None:
    """
    Serve trainers of a class by a host of one's own. A subclass is served by the host of its nearest registered base.

    Args:
        trainer_class (`type`): the class of trainers.
        host_class (`type`): a subclass of [`Host`]. To register a host of a base class again, such as `GRPOHost`, says
            that gradients of its loss are those of the subclass.

    Raises:
        `TypeError`: no class of trainers, no class of hosts, or one that lacks a method or its `names`.
    """
    for given, base in ((trainer_class, Trainer), (host_class, Host)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(f"`register_host` takes a subclass of Trainer and a subclass of Host, but got {given!r}.")
    kind = host_class.__name__
    if inspect.isabstract(host_class):
        raise TypeError(
            f"`register_host` got {kind}, which has no method {', '.join(sorted(host_class.__abstractmethods__))}, "
            "which every host needs. Write it."
        )
    names = getattr(host_class, "names", None)
    if not isinstance(names, dict) or ALWAYS not in names or names.keys() - ROLES.keys():
        raise TypeError(
            f"`names` of the host {kind} is {names!r}, but must be a dict of the names that each role needs, by "
            f"{', '.join(map(repr, ROLES))}; the first is needed. Correct it."
        )
    _HOSTS[trainer_class] = host_class


def check_kind(kind: type, asynchronous: bool = False) -> type[Host]:
    """
    Return the class of hosts for a class of trainers.

    Args:
        kind (`type`): of trainers.
        asynchronous (`bool`, *optional*, defaults to `False`): whether they must generate while they train, or must
            not.

    Raises:
        `TypeError`: no host is registered for the class nor for its bases; or the trainers are of the other sort.
    """
    found = _HOSTS[_served(kind)]
    if found.is_asynchronous and not asynchronous:
        raise TypeError(
            f"{kind.__name__} generates in another process while it trains, which LearnAlignMixin and "
            "LearnAlignCallback do not serve. Put LearnAlignAsyncMixin before the trainer's class instead."
        )
    if asynchronous and not found.is_asynchronous:
        raise TypeError(
            f"{kind.__name__} is no asynchronous trainer, but LearnAlignAsyncMixin serves AsyncGRPOTrainer alone. Put "
            "LearnAlignMixin before the trainer's class instead."
        )
    return found


def find_host(trainer: Trainer) -> Host:
    """
    Return a host for a trainer.

    Raises:
        `TypeError`: no host is registered for its class.
        `RuntimeError`: a version of TRL that lacks what is used here.
    """
    served = _served(type(trainer))
    host = _HOSTS[served](trainer)
    host.served = served
    return host


def _served(kind: type) -> type:
    """Return the nearest registered class that `kind` is, or inherits from."""
    for base in kind.__mro__:
        if base not in _HOSTS and (base.__module__, base.__name__) in _EXPERIMENTAL:
            module, name = _EXPERIMENTAL[base.__module__, base.__name__]
            try:
                _HOSTS[base] = getattr(import_module(module, __name__), name)
            except ImportError as error:  # TRL has moved what the host is made of
                raise _other_version(base) from error
        if base in _HOSTS:
            return base
        if base.__name__ == "AsyncGRPOTrainer" and base.__module__.startswith("trl."):  # not where it was
            raise _other_version(base)
    raise TypeError(
        "LearnAlign works on a trl.GRPOTrainer, a trl.RLOOTrainer, a trl.experimental.sdpo.SDPOTrainer and trainers "
        f"that a host is registered for, but got a {kind.__name__}. Pass one of these, or register a host with "
        "`trl_learnalign.host.register_host`."
    )


def _other_version(kind: type) -> RuntimeError:
    return RuntimeError(
        f"The {kind.__name__} of TRL {version('trl')} has other parts than those of TRL 1.16, the newest version that "
        "LearnAlign was tried with. (TRL 1.18 moved and renamed parts of AsyncGRPOTrainer.) Use `pip install "
        "'trl<1.17'`."
    )
