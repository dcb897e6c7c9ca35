"""GRPOTrainer's loss, as an objective of single rollouts, so that each prompt has its own gradient."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import use_adapter

from .groups import Row
from .names import RolloutTrainer


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")


def check_loss(trainer: RolloutTrainer, **settings: tuple[str, ...]) -> None:
    """Raise a `ValueError` for an attribute of the trainer that is not one of the values whose gradient is known."""
    for name, known in settings.items():
        value = getattr(trainer, name)
        if value not in known:
            raise ValueError(
                f"`{name}` is {value!r}, and its gradient is not implemented here, so it would differ from that of "
                f"training. Use one of {', '.join(known)}, or `score='learnability'`, which takes no gradients."
            )


def policy(trainer: RolloutTrainer) -> torch.nn.Module:
    """
    Return the policy to run. It is wrapped only under FSDP, where the wrapper has part of the weights: DDP's and
    DeepSpeed's would reduce gradients after every backward. DeepSpeed's ZeRO-3 gathers its weights in hooks of the
    layers themselves.
    """
    return trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model


def policy_objective(trainer: RolloutTrainer, rows: list[Row]) -> torch.Tensor:
    r"""
    Return the scalar whose gradient is that of the trainer's own loss, with the sign of an objective, summed over
    `rows`:

        sum_rows  weight / N  sum_t  (c_t + beta k_t)  log pi_theta(token t)

    over the tokens t that the loss mask keeps, with the factor before the logarithm held constant. A selection is
    on-policy, every ratio pi_theta / pi_old is 1, and what GRPOTrainer's losses leave then is a coefficient c_t, a
    factor k_t of the KL term and a divisor N. With A the advantage, T the number of tokens of the row that the loss
    mask keeps, and R_t = pi_ref / pi_theta:

    | `loss_type` | c_t | N |
    | --- | --- | --- |
    | grpo, sapo | A | T |
    | dapo, bnpo, dr_grpo | A | `max_completion_length` |
    | vespo | A (its weight phi(1) is 1) | `max_completion_length` |
    | cispo | min(1, `epsilon_high`) A | `max_completion_length` |
    | luspo | A | 1 |

    In training the divisor of dapo, cispo and vespo is the number of tokens of the whole batch, that of bnpo of the
    microbatch. Either is the same for all prompts of that batch, hence the constant that dr_grpo has. The other
    settings:

    - `top_entropy_quantile` less than 1: c_t is 0 for tokens of low entropy. The KL term keeps all tokens.
    - `importance_sampling_level="sequence"`: c_t is the row's mean of c_t, as the ratio is that of the mean
      log-probability. It makes a difference with `top_entropy_quantile` only, and none to cispo and vespo, whose
      ratios are constants.
    - KL term: k_t = R_t - 1. With `use_bias_correction_kl` the KL estimate K_t = R_t - log R_t - 1 is multiplied by
      the ratio, and k_t is R_t - 1 - K_t = log R_t; with the ratio of a sequence R_t - 1 - mean_t K_t.
    - `epsilon` and `delta` cut ratios other than 1. A `delta` less than 1 also cuts 1: then c_t is at most 0.
    - `use_liger_kernel` computes the same loss in another way.

    With `loss_type="grpo"` and `use_bias_correction_kl=False` this is Eq. 7 of the paper as printed. The entropy bonus
    (`entropy_coef`) and the router's auxiliary loss, which do not depend on rewards, are left out.
    """
    arguments = arguments_of(trainer, rows)
    mask = of_completions(arguments, rows, [row.loss_mask for row in rows])
    entropy_mask = None
    if any(row.entropy_mask is not None for row in rows):
        entropy_masks = [row.loss_mask if row.entropy_mask is None else row.entropy_mask for row in rows]
        entropy_mask = of_completions(arguments, rows, entropy_masks)
    advantages = torch.tensor([row.advantage for row in rows], device=mask.device)[:, None]
    weights = torch.tensor([row.weight for row in rows], device=mask.device)[:, None]
    reference = None
    if trainer.beta != 0.0:
        with torch.no_grad():
            reference = _reference_logps(trainer, arguments)
    logps = trainer._get_per_token_logps_and_entropies(policy(trainer), *arguments)[0].float()
    coefficients = _coefficients(trainer, advantages, logps.detach(), reference, mask, entropy_mask)
    return (weights / divisor(trainer, mask) * coefficients * logps * mask).sum()


def arguments_of(trainer: RolloutTrainer, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Return the arguments of TRL's forward: token ids, attention mask, and the number of last columns that hold all
    completions.
    """
    device = trainer.accelerator.device
    ids = [torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids])).long() for row in rows]
    # Padded on the right as a whole: prompts and completions padded apart, as in training, make more padding
    input_ids = pad_sequence(ids, True, trainer._tokenizer.pad_token_id).to(device)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0).to(device)
    return input_ids, attention_mask, input_ids.shape[1] - min(len(row.prompt_ids) for row in rows)


def of_completions(arguments: tuple, rows: list[Row], values: list) -> torch.Tensor:
    """Lay out a value for each completion token of each row where [`arguments_of`] puts the token; 0 elsewhere."""
    input_ids, _, keep = arguments
    padded = [torch.from_numpy(np.pad(own, (len(row.prompt_ids), 0))) for row, own in zip(rows, values, strict=True)]
    return pad_sequence(padded, True, 0).to(input_ids.device)[:, -keep:]


def _coefficients(trainer, advantages, logps, reference, mask, entropy_mask):
    """Return c_t + beta k_t of [`policy_objective`], of shape `(rows, T)` or `(rows, 1)`."""
    loss_type, args = trainer.loss_type, trainer.args
    sequence = trainer.importance_sampling_level == "sequence"
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    coefficients = advantages
    if loss_type == "cispo":
        coefficients = coefficients * min(1.0, trainer.epsilon_high)
    elif loss_type in CLIPPED and args.delta is not None and args.delta < 1:
        coefficients = coefficients.clamp(max=0)
    if entropy_mask is not None:
        coefficients = coefficients * entropy_mask
        if sequence and loss_type not in ("cispo", "vespo"):
            coefficients = coefficients.sum(1, keepdim=True) / tokens
    if reference is not None:
        log_ratios = reference - logps
        factors = log_ratios.exp() - 1
        if args.use_bias_correction_kl:
            estimate = factors - log_ratios
            factors = factors - ((estimate * mask).sum(1, keepdim=True) / tokens if sequence else estimate)
        coefficients = coefficients + trainer.beta * factors
    return coefficients


def divisor(trainer, mask):
    """Return N of [`policy_objective`]."""
    match trainer.loss_type:
        case "grpo" | "sapo":
            return mask.sum(1, keepdim=True).clamp(min=1)
        case "luspo":
            return 1
        case _:
            return trainer.max_completion_length or 1  # None: as long as the model goes on


def scale_of_tokens(trainer, tokens: float) -> float:
    """
    Return what N of [`policy_objective`] is to be divided by so that the gradient of a group is training's on that
    group alone: a constant stands for the number of a batch's tokens there. `tokens`: the mean of the group's rows.
    """
    counts = trainer.loss_type in ("dapo", "bnpo", "cispo", "vespo")
    return (trainer.max_completion_length or 1) / max(tokens, 1) if counts else 1.0


def _reference_logps(trainer, arguments):
    """Compute log-probabilities under pi_ref, found where GRPOTrainer finds it."""
    if trainer.ref_model is not None:
        return trainer._get_per_token_logps_and_entropies(trainer.ref_model, *arguments)[0].float()
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        return trainer._get_per_token_logps_and_entropies(policy(trainer), *arguments)[0].float()


@torch.no_grad()
def token_entropies(trainer: RolloutTrainer, rows: list[Row]) -> list[torch.Tensor]:
    """
    Compute entropies in nats of the policy where it drew the completion tokens of each row, of shape `(tokens,)`,
    float32.
    """
    arguments = input_ids, _, keep = arguments_of(trainer, rows)
    entropies = trainer._get_per_token_logps_and_entropies(policy(trainer), *arguments, compute_entropy=True)[1]
    entropies = entropies.float().cpu()
    starts = [len(row.prompt_ids) - (input_ids.shape[1] - keep) for row in rows]
    return [
        values[start : start + len(row.completion_ids)]
        for row, start, values in zip(rows, starts, entropies, strict=True)
    ]


def mark_high_entropies(rows: list[Row], entropies: list[torch.Tensor], share: float) -> None:
    """
    Set the `entropy_mask` of a group's rows: 1 for tokens kept by the loss mask whose entropy is at least the
    quantile 1 - `share` of those of the group, as GRPOTrainer does it with all tokens of a batch.
    """
    masks = [torch.as_tensor(row.loss_mask).bool() for row in rows]
    threshold = torch.quantile(torch.cat([own[mask] for own, mask in zip(entropies, masks, strict=True)]), 1 - share)
    for row, own, mask in zip(rows, entropies, masks, strict=True):
        row.entropy_mask = ((own >= threshold) & mask).to(torch.int8).numpy()
