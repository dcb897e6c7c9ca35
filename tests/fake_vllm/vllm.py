"""
The part of vLLM that TRL calls in colocate mode, generating with transformers. For tests: what it cannot show is said
in docs/limitations.md.

Like vLLM it seeds the global generators when it is made and samples from them, loses its weights when it sleeps at
level 2, and reads them from the disk on `reload_weights`. `EVENTS` holds what was called, in order.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed


__version__ = "0.23.0"
EVENTS = []


@dataclass
class SamplingParams:
    n: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int


class RequestOutput(SimpleNamespace):
    """`prompt_token_ids`, and `outputs` with `token_ids` and `logprobs`."""


class LLM:
    def __init__(self, model, *, seed, max_model_len, enable_sleep_mode, distributed_executor_backend, **settings):
        assert distributed_executor_backend == "external_launcher"
        set_seed(seed)
        self.path = model
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.awake = {"weights", "kv_cache"}
        self.enable_sleep_mode = enable_sleep_mode
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len or self.model.config.max_position_embeddings),
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
        )
        self.loaded = set()
        EVENTS.append({"event": "made", "seed": seed, **{name: settings[name] for name in ("tensor_parallel_size",)}})

    @torch.no_grad()
    def _load_weights(self, weights):
        assert "weights" in self.awake, "weights were written to memory that is given away"
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)
            self.loaded.add(name)

    def reset_prefix_cache(self):
        assert self.loaded == dict(self.model.named_parameters()).keys(), "not all weights were pushed"
        self.loaded = set()
        EVENTS.append({"event": "push"})

    def collective_rpc(self, method):
        assert method == "reload_weights"
        self._load_weights(AutoModelForCausalLM.from_pretrained(self.path).named_parameters())
        self.loaded = set()
        EVENTS.append({"event": "reload"})

    @torch.no_grad()
    def sleep(self, level):
        assert self.enable_sleep_mode and level == 2
        for parameter in self.model.parameters():
            parameter.fill_(torch.nan)
        self.awake = set()
        EVENTS.append({"event": "sleep"})

    def wake_up(self, tags):
        self.awake |= set(tags)
        EVENTS.append({"event": f"wake {' '.join(tags)}"})

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"} and sampling_params.n == 1 and sampling_params.logprobs == 0
        seed = torch.initial_seed()
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        config = self.model.config
        ids = pad_sequence(
            [torch.tensor(prompt) for prompt in prompts], True, config.pad_token_id, padding_side="left"
        )
        mask = pad_sequence([torch.ones(len(prompt)).long() for prompt in prompts], True, 0, padding_side="left")
        params = {name: getattr(sampling_params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                **params,
                do_sample=True,
                repetition_penalty=sampling_params.repetition_penalty,
                max_new_tokens=sampling_params.max_tokens,
                pad_token_id=config.pad_token_id,
                eos_token_id=config.eos_token_id,
                output_scores=True,
                return_dict_in_generate=True,
            ),
        )
        logps = torch.stack(made.scores, 1).log_softmax(2)
        outputs = []
        for prompt, completion, of_tokens in zip(
            prompts, made.sequences[:, ids.shape[1] :].tolist(), logps, strict=True
        ):
            if config.eos_token_id in completion:
                completion = completion[: completion.index(config.eos_token_id) + 1]
            each = [
                {token: SimpleNamespace(logprob=of_tokens[i, token].item(), rank=1)}
                for i, token in enumerate(completion)
            ]
            output = SimpleNamespace(token_ids=completion, logprobs=each)
            outputs.append(RequestOutput(prompt_token_ids=prompt, outputs=[output]))
        pairs = [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
        EVENTS.append({"event": "generate", "seed": seed, "pairs": pairs})
        return outputs


def _absent(*args, **kwargs):
    raise NotImplementedError("the stand-in has no server mode")


# TRL imports these names, and uses them in server mode alone
for _module, _names in {
    "vllm.sampling_params": ["StructuredOutputsParams"],
    "vllm.utils.network_utils": ["get_ip"],
    "vllm.distributed.utils": ["StatelessProcessGroup"],
    "vllm.distributed.device_communicators.pynccl": ["PyNcclCommunicator"],
    "vllm.distributed.weight_transfer.nccl_engine": ["NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine"],
}.items():
    for _end in range(2, _module.count(".") + 2):
        _part = ".".join(_module.split(".")[:_end])
        sys.modules.setdefault(_part, ModuleType(_part))
    vars(sys.modules[_module]).update(dict.fromkeys(_names, _absent))
