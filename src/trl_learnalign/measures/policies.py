"""The policies whose gradients are aligned with a target: that of the trainer, or those of checkpoints."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..gradients.adam import Moments
from ..gradients.layers import clean_name
from ..ground.store import Log
from ..host import Host
from ..run.checkpoints import damage


if TYPE_CHECKING:
    from ..config import LearnAlignConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Policy:
    """
    A policy whose gradients are taken.

    Attributes:
        host ([`Host`]): of the trainer.
        checkpoint (`Path`, *optional*): that has its weights and Adam's state; `None` for the trainer's own.
        share (`float`): of its cosines in the alignment, eta_c / sum_c eta_c.
        place (`int`): among the checkpoints.
    """

    host: Host
    checkpoint: Path | None = None
    share: float = 1.0
    place: int = 0

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Give the trainer's adapter these weights. On exit it has its own again, bit by bit."""
        if self.checkpoint is None:
            yield
            return
        parameters, theirs = _trainable(self.host), self.weights()
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            _set(parameters, theirs)
            yield
        finally:
            _set(parameters, own)

    def weights(self) -> dict[str, torch.Tensor]:
        """
        Read the weights of the checkpoint's adapter, by the names of the trainer's parameters.

        Raises:
            `ValueError`: they are not there, or of another adapter.
        """
        file, adapter = self._file(ADAPTER_SAFE_WEIGHTS_NAME), self.host.model.active_adapter
        saved = load_file(file) if file.is_file() else {}
        found = {}
        for name, parameter in _trainable(self.host).items():
            found[name] = saved.get(name.replace(f".{adapter}.", "."), torch.empty(0))
            if (shape := found[name].shape) != parameter.shape:
                raise ValueError(
                    f"`target_checkpoints` has '{self.checkpoint}', whose {file.name} does not fit the adapter of the "
                    f"trainer: `{name}` has the shape {tuple(parameter.shape)} here and "
                    f"{tuple(shape) if len(shape) > 1 else 'is missing'} there. Name checkpoints of the same "
                    "`peft_config`."
                )
        return found

    def moments(self) -> dict[str, Moments]:
        """
        Return Adam's state of every layer whose gradient is taken, by the names of [`PromptGradients`].

        Raises:
            `ValueError`: there is none.
        """
        found, reason = (self._own_states if self.checkpoint is None else self._saved_states)()
        moments = {}
        for name, parameter in _trainable(self.host).items():
            state, group = found.get(name, ({}, {}))
            whole = {*state} == {*_STATE} and all(state[part].shape == parameter.shape for part in _STATE[1:])
            if not whole or not {"betas", "eps"} <= {*group}:
                raise ValueError(
                    f"`gradient_direction` is 'adam', but {reason or f'`{name}` has the state {sorted(state)}'}. "
                    "Train with `optim='adamw_torch'` (or `'adamw_torch_fused'`) before the selection "
                    "(`warmup_prompts`), or name checkpoints with an optimizer in `target_checkpoints`; or use "
                    "`gradient_direction='plain'`."
                )
            mean, square = (state[part].to(parameter.device) for part in _STATE[1:])
            layer = name.removesuffix(".weight")
            moments[layer] = Moments(mean, square, int(state["step"]), tuple(group["betas"]), group["eps"])
        return moments

    def digest(self, adam: bool) -> list:
        """Return what the weights of a checkpoint, and Adam's state, are known by."""
        digests: list[Any] = []
        if self.checkpoint is not None:
            names = (ADAPTER_SAFE_WEIGHTS_NAME, *[OPTIMIZER_NAME] * adam)
            digests = [self.share, *(hashlib.sha256(self._file(name).read_bytes()).hexdigest() for name in names)]
        elif adam:
            for name, state in self.moments().items():
                parts = (part.detach().float().cpu().contiguous().numpy().tobytes() for part in state[:2])
                digests.append([name, *(hashlib.sha256(part).hexdigest() for part in parts), *state[2:]])
        return digests

    def log(self, log: Log) -> Log:
        """Open the log for its features within that of the measure."""
        return log if self.checkpoint is None else log.inside(f"checkpoint-{self.place}")

    def _file(self, name):
        assert self.checkpoint is not None
        adapter = self.host.model.active_adapter
        inside = name == ADAPTER_SAFE_WEIGHTS_NAME and adapter != "default"
        return self.checkpoint / adapter / name if inside else self.checkpoint / name

    def _own_states(self):
        optimizer = self.host.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # within Accelerate's
        if not isinstance(optimizer, torch.optim.Adam):  # of which AdamW is a subclass
            return {}, f"the optimizer is {'not made yet' if optimizer is None else f'a {type(optimizer).__name__}'}"
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        parameters = _trainable(self.host).items()
        found = {name: (optimizer.state.get(one, {}), groups.get(id(one), {})) for name, one in parameters}
        return found, "" if optimizer.state else "the optimizer has taken no step yet"

    def _saved_states(self):
        file = self._file(OPTIMIZER_NAME)
        if not file.is_file():
            return {}, f"'{file}' is missing"
        saved = torch.load(file, map_location="cpu", weights_only=True)
        names = list(_trainable(self.host))
        groups = [group for group in saved["param_groups"] if group["params"]]
        if len(groups) != 1 or len(groups[0]["params"]) != len(names):  # then the order does not tell which is which
            return {}, f"'{file}' has {len(groups)} groups of parameters in place of one of {len(names)}"
        numbers = zip(names, groups[0]["params"], strict=True)
        return {name: (saved["state"].get(number, {}), groups[0]) for name, number in numbers}, ""


def policies(host: Host, config: "LearnAlignConfig") -> list[Policy]:
    """
    Return the policies whose gradients are aligned with the target.

    Raises:
        `ValueError`: a checkpoint is not complete, or its learning rate is not known.
    """
    if config.target_checkpoints is None:
        return [Policy(host)]
    paths = [Path(path) for path in config.target_checkpoints]
    for path in paths:
        if (reason := damage(path)) is not None:
            raise ValueError(
                f"`target_checkpoints` has '{path}', which is not complete: {reason}. Name directories that the "
                "trainer has saved (`save_strategy='steps'`)."
            )
    rates = _learning_rates(paths)
    return [Policy(host, path, rates[place] / sum(rates), place) for place, path in enumerate(paths)]


def made_at(host: Host, config: "LearnAlignConfig", adam: bool) -> dict[str, Any]:
    """Return what the gradients for a target depend on besides the trainer's weights, see [`Measure.key`]."""
    found = [one.digest(adam) for one in policies(host, config)] if "target-gradients" in config.measures else []
    return {"policies of the target": found} if any(found) else {}


def is_adam(config: "LearnAlignConfig") -> bool:
    """Tell if the pool's gradients are turned into Adam's steps. `learnalign` never does it, see docs/methods.md."""
    return config.gradient_direction == "adam" and "target-gradients" in config.measures


def check_policies(host: Host, config: "LearnAlignConfig", now: bool) -> None:
    """
    Check that the policies can be differentiated; `now`: not only later, when training has saved and stepped.

    Raises:
        `ValueError`: no adapter, sharded weights, checkpoints that are not there, or no state of Adam.
    """
    adam = is_adam(config)
    if "target-gradients" not in config.measures or not (adam or config.target_checkpoints):
        return
    if not host.has_adapter or host.is_sharded:
        have = "have a state sharded over the processes" if host.has_adapter else "are not those of an adapter"
        raise ValueError(
            "`gradient_direction='adam'` and `target_checkpoints` are for a LoRA adapter (`peft_config`) that is not "
            f"sharded, but the weights of this trainer {have}. Leave them out."
        )
    paths = [Path(path) for path in config.target_checkpoints or ()]
    own = Path(host.args.output_dir).resolve()  # which may come to hold some
    for path in paths:
        if not path.is_dir() and (now or own not in path.resolve().parents):
            raise ValueError(
                f"`target_checkpoints` has '{path}', but there is no such directory. Name checkpoints that a trainer "
                "has saved, or that this one saves before the selection."
            )
    if now:
        for policy in policies(host, config):
            if policy.checkpoint is not None:
                policy.weights()
            if adam:
                policy.moments()


def _learning_rates(paths):
    """
    Return the mean learning rate of the steps before each checkpoint and after the one before it, as LESS takes it
    over an epoch.
    """
    states = [json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8")) for path in paths]
    steps, rates = [state["global_step"] for state in states], []
    for path, state, step in zip(paths, states, steps, strict=True):
        after = max((other for other in steps if other < step), default=0)
        logged = [
            entry["learning_rate"]
            for entry in state.get("log_history", ())
            if "learning_rate" in entry and after < entry["step"] <= step
        ]
        rates.append(sum(logged) / max(len(logged), 1))
        if rates[-1] <= 0:
            raise ValueError(
                f"`target_checkpoints` has '{path}', but its {TRAINER_STATE_NAME} names no learning rate above 0 of "
                f"the steps {after + 1} to {step}, by which its gradients are weighted. Train with smaller "
                "`logging_steps`, or leave it out."
            )
    return rates


def _trainable(host) -> dict[str, torch.nn.Parameter]:
    return {
        clean_name(name): parameter for name, parameter in host.model.named_parameters() if parameter.requires_grad
    }


def _set(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
