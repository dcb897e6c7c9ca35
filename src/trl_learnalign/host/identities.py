"""Identities: all that a trainer's rollouts and gradients depend on besides its weights, in parts for JSON."""

from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset
from torch import nn
from transformers import Trainer

from ..data.rows import format_of
from ..ground.disk import digest
from ..ground.user_code import is_ours
from ..identity.contents import digest_of_tensors, tokenizer_content
from ..identity.objects import identify
from ..identity.seen import look, note, seen
from .names import ALWAYS, GENERATES
from .taps import own_function


# Fields of an adapter's configuration that scale its weights
_SCALING = ("peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")
# Fields of a model's configuration that training sets, or that say nothing about the policy
_UNUSED = ("use_cache", "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id", "quantization_config")
_HOST = "host"
_OF_PROMPTS = (_HOST, "`_tokenize_prompts`")  # code that makes tokens of prompts
_BEFORE_SHARDING: WeakKeyDictionary[Trainer, str] = WeakKeyDictionary()


def base_identity(host) -> dict:
    """
    Identify the model that the trainable weights belong to: name and revision, configuration, quantization, precision
    (also that of autocast), the kind of attention, how it is run, and a sample of each tensor that is not trained, the
    reference policy's included.

    Weights that FSDP shards are looked at before training begins, and so when the callback or the trainer is made; of
    those that are sharded at once (ZeRO-3) only names, types and shapes are known.
    """
    trainer, model = host.trainer, host.model
    config, reference = model.config, getattr(trainer, "ref_model", None)
    if host.is_sharded:
        if trainer not in _BEFORE_SHARDING:
            whole = trainer.optimizer is None
            _BEFORE_SHARDING[trainer] = _frozen(model, reference) if whole else "sharded"
        weights = _BEFORE_SHARDING[trainer]
    else:
        weights = _frozen(model, reference)
    quantization: Any = getattr(config, "quantization_config", None)
    generation = getattr(model, "generation_config", None)
    return {
        "name": config._name_or_path or config.model_type,
        "revision": getattr(config, "_commit_hash", None),
        "config": _document(config),
        "generation": None if generation is None else _document(generation),
        "quantization": identify(quantization if not hasattr(quantization, "to_dict") else quantization.to_dict()),
        "dtype": str(getattr(config, "dtype", None)),
        "mixed precision": [
            trainer.accelerator.mixed_precision,
            bool(getattr(trainer.args, "cast_lm_head_to_fp32", False)),
        ],
        "attention": getattr(config, "_attn_implementation", None),
        "vllm": getattr(trainer.args, "use_vllm", False) and trainer.args.vllm_mode,
        "weights": weights,
    }


def _frozen(model, reference):
    parts = [digest_of_tensors(model, lambda parameter: not parameter.requires_grad)]
    return digest(parts if reference is None else [*parts, digest_of_tensors(reference)])


def _document(config):
    values = config.to_dict()
    return identify({name: values[name] for name in sorted(values) if name[0] != "_" and name not in _UNUSED})


def prompt_identity(host, dataset: Dataset | None = None) -> dict:
    """
    Identify what makes tokens of the rows of a dataset, by default of the training dataset: the transform that makes
    the rows as the trainer reads them, the tokenizer, the chat template, the tools, and what a class of trainers or of
    hosts changes in this.
    """
    trainer = host.trainer
    tokenizer, processor = host.tokenizer, trainer.processing_class
    images = getattr(processor, "image_processor", None)
    template = [processor.chat_template, getattr(trainer, "chat_template", None)]
    return {
        "transform": _transform(host.dataset if dataset is None else dataset),
        "tokenizer": digest([tokenizer_content(tokenizer), None if images is None else identify(images.to_dict())]),
        "chat template": digest([template, identify(getattr(trainer.args, "chat_template_kwargs", None))]),
        "tools": [seen(tool).digest for tool in getattr(trainer, "tools", None) or ()],
        "trainer's own code": {
            name: seen(function).digest for name, function in _own_code(host).items() if name in _OF_PROMPTS
        },
    }


def _transform(dataset):
    made = format_of(dataset)
    function = _function_of(made)
    kept = {name: value for name, value in made.items() if function is None or name != "format_kwargs"}
    return digest([identify(kept), None if function is None else seen(function).digest]) if made else None


def _function_of(made):
    """Return the function that makes a dataset's rows, if one does."""
    return made["format_kwargs"].get("transform") if made else None


def identity(host) -> dict:
    """Identify what rollouts and gradients depend on besides the weights, the data and LearnAlign's own settings."""
    trainer = host.trainer
    settings = {name: getattr(trainer, name, None) for name in host.settings}
    settings |= {name: getattr(trainer.args, name, None) for name in host.arguments}
    if settings.get("generation_kwargs"):  # which may hold functions
        settings["generation_kwargs"] = seen(settings["generation_kwargs"]).digest
    settings["reward_weights"] = trainer.reward_weights.tolist()
    adapters = getattr(host.model, "peft_config", {})
    settings["adapters"] = {name: [getattr(one, field, None) for field in _SCALING] for name, one in adapters.items()}
    return {
        "generation": {name: digest(_plain(value)) for name, value in settings.items()},
        "environments": {name: seen(one).digest for name, one in (host.environments or {}).items()},
        "rollout_func": None if host.rollout_func is None else seen(host.rollout_func).digest,
        "own code": {name: seen(function).digest for name, function in _own_code(host).items()},
        "rewards": list(zip(host.reward_names, _rewards(trainer), strict=True)),
        "base model": host.base_identity(),
        "prompts": host.prompt_identity(),
    }


def _own_code(host) -> dict[str, Any]:
    """
    Find what makes tokens, rollouts and rewards and is not the registered class's own: methods that a subclass or the
    user has put in place of those that the host uses, and the class of a host from outside the package.
    """
    found: dict[str, Any] = {} if is_ours(type(host)) else {_HOST: type(host)}
    used = {host.generation_method, *host.names.get(ALWAYS, ()), *host.names.get(GENERATES, ())}
    for name in sorted(used | {name for name in dir(host.served) if "generate" in name}):
        function = own_function(host.trainer, name)
        registered = own_function(host.served, name)
        if callable(registered) and function is not registered and not is_ours(function):
            found[f"`{name}`"] = function
    return found


def _rewards(trainer):
    """Return a digest of each reward function; that of a reward model covers what makes its tokens."""
    processors = trainer.reward_processing_classes or [None] * len(trainer.reward_funcs)
    pairs = zip(trainer.reward_funcs, processors, strict=True)
    return [
        digest([seen(one).digest, identify(processor)]) if isinstance(one, nn.Module) else seen(one).digest
        for one, processor in pairs
    ]


def _plain(value):
    """Return a value as it is, if JSON can hold it, else its identity."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else identify(value)


def look_at_functions(host) -> None:
    """Look at functions before calls: what was changed by hand since the last calls makes other functions."""
    for _, function in _functions(host):
        look(function)


def note_functions(host) -> None:
    """Note functions after calls: what the calls changed does not make other functions."""
    for _, function in _functions(host):
        note(function)


def unidentified(host) -> list[str]:
    """List the user's functions that depend on something that cannot be identified, with what that is."""
    found = [(name, seen(function).unknown) for name, function in _functions(host)]
    return list(dict.fromkeys(f"{name} depends on {', '.join(parts)}" for name, parts in found if parts))


def _functions(host) -> list[tuple[str, object]]:
    """List the user's functions that selections and training call, each after its name in messages."""
    trainer = host.trainer
    named = zip(host.reward_names, trainer.reward_funcs, strict=True)
    found = [(f"the reward function `{name}`", function) for name, function in named]
    found += [("a tool", tool) for tool in getattr(trainer, "tools", None) or ()]
    found += [("an environment", one) for one in (host.environments or {}).values()]
    found.append(("`rollout_func`", host.rollout_func))
    found.append(("the transform of the training dataset", _function_of(format_of(host.dataset))))
    found.append(("`generation_kwargs`", trainer.args.generation_kwargs or None))
    found += [(f"the trainer's {name}", function) for name, function in _own_code(host).items()]
    return [(name, function) for name, function in found if function is not None]
