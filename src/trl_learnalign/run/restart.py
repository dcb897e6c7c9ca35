"""The weights that training started with, for `after_warmup="restart"`."""

from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file

from ..ground.disk import make_directory, write_atomically
from ..ground.peers import Peers


def check_restart(host) -> None:
    """
    Check that training can start over.

    Raises:
        `ValueError`: weights that are sharded, or a reference policy that follows them.
    """
    if host.is_sharded:
        raise ValueError(
            "`after_warmup='restart'` is not supported with FSDP or DeepSpeed, which keep weights of their own. Use "
            "`after_warmup='continue'`."
        )
    if host.args.sync_ref_model:
        raise ValueError(
            "`after_warmup='restart'` goes back to the first weights, but with `sync_ref_model=True` the reference "
            "policy of the KL term has followed the warm-up and would stay there. Set `sync_ref_model=False`, or use "
            "`after_warmup='continue'`."
        )


def save_initial_weights(host, file: Path) -> None:
    """
    Write the trainable weights. All processes call this.

    Raises:
        `ValueError`: the optimizer has a state already.
    """
    if host.trainer.optimizer.optimizer.state:
        raise ValueError(
            "`after_warmup='restart'` starts over with a fresh optimizer, but the optimizer given to the trainer "
            "has a state already. Pass a fresh one, or use `after_warmup='continue'`."
        )
    if host.accelerator.is_main_process:
        make_directory(file.parent)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _trainable(host).items()}
        write_atomically(file, lambda temporary: save_file(tensors, temporary))


def restart(host, file: Path) -> None:
    """
    Set the weights that `save_initial_weights` wrote, and an empty optimizer state. The learning rate goes on by its
    schedule. All processes call this.

    Raises:
        `FileNotFoundError`: there are none.
    """
    saved = {}
    with Peers(host.accelerator) as peers:
        if host.accelerator.is_main_process:
            if not file.is_file():
                raise FileNotFoundError(
                    f"'{file}' is missing, which holds the weights that `after_warmup='restart'` goes "
                    "back to. Put it back, or start a new run."
                )
            saved = load_file(file)
        peers.wait()
    with torch.no_grad():
        for name, parameter in _trainable(host).items():
            if saved:
                parameter.copy_(saved[name])
            broadcast(parameter.data)
    host.trainer.optimizer.optimizer.state.clear()
    host.weights_were_set()


def _trainable(host):
    return {name: parameter for name, parameter in host.model.named_parameters() if parameter.requires_grad}
