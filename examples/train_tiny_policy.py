"""Trains the tiny policy of the examples: a Qwen2-shaped character model of under a million parameters, from scratch.

It sees generated chains only, never GSM8K. The first phase learns the arithmetic from clean chains. The second phase
goes on with chains that have wrong results, more often for harder steps. The model then samples many wrong numbers,
while its greedy completions stay right. So its success at temperature 1 is lower than greedy success, as in a base
model, and GRPO can improve it.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch
from equations import equations_reward, generate_chains, random_chain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


CHARACTERS = "0123456789+-*/().;="
MAX_LENGTH = 256


def build_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; nothing is added when a prompt is encoded, and decoding joins without spaces.

    Byte-pair encoding without merges, since AutoTokenizer of transformers 5 rebuilds the tokenizer of any Qwen2 model
    as byte-pair encoding. So the loaded tokenizer is the saved one.
    """
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> Qwen2ForCausalLM:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=64, **ids)
    return model


def difficulty(left: str) -> float:
    """0 for a step of the times tables, 1 for the hardest: what counts is the digits other than trailing zeros."""
    numbers = re.findall(r"\d*\.?\d+", left)
    digits = sum(len(number.replace(".", "").strip("0")) for number in numbers)
    return min(1.0, max(0.0, (digits - 2) / 4))


def corrupt(result: str, rng: random.Random) -> str:
    """A plausible wrong number: a digit changed, off by a little or by ten, a zero or a digit too many or too few."""
    digits = [i for i, char in enumerate(result) if char.isdigit()]
    kind = rng.random()
    if kind < 0.45:
        i = rng.choice(digits)
        wrong = result[:i] + rng.choice("0123456789") + result[i + 1 :]
    elif kind < 0.8 and "." not in result:
        wrong = str(abs(int(result) + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 3, 5, 10, 10, 20, 100))))
    elif kind < 0.9:
        wrong = result + "0" if rng.random() < 0.5 else result[:-1]
    else:
        i = rng.choice(digits)
        wrong = result[:i] + rng.choice("123456789") + result[i:]
    if not wrong or wrong[-1] == "." or (len(wrong) > 1 and wrong[0] == "0" and wrong[1] != "."):
        return corrupt(result, rng)  # not how a number is written
    return wrong if wrong != result else corrupt(result, rng)


def make_batches(rng: random.Random, tokenizer, batch_size: int, noise: tuple[float, float] | None, count: int = 50):
    """Yields `count` batches, each of chains of one length so that little is padding. The loss is on results only."""
    char_id = {char: tokenizer.convert_tokens_to_ids(char) for char in CHARACTERS}
    rows = []
    for _ in range(batch_size * count):
        steps = random_chain(rng)
        results = []
        for left, result in steps:
            # The prompt keeps the true later steps: only what the model is asked to write is wrong.
            wrong = noise and rng.random() < noise[0] + (noise[1] - noise[0]) * difficulty(left)
            results.append(corrupt(result, rng) if wrong else result)
        prompt = [char_id[char] for char in ";".join(left for left, _ in steps) + "="]
        completion = [char_id[char] for char in ";".join(results)] + [tokenizer.eos_token_id]
        rows.append((prompt + completion, [-100] * len(prompt) + completion))
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        width = max(len(ids) for ids, _ in batch)
        ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch]
        labels = [labels + [-100] * (width - len(labels)) for _, labels in batch]
        yield torch.tensor(ids), torch.tensor(labels)


def fit(model, batches, steps: int, lr: float, after_step) -> None:
    """
    Trains on what `batches()` yields, again and again; `after_step(step, loss, seconds)` is called after every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    model.train()
    step, started = 0, time.time()
    while step < steps:
        for ids, labels in batches():
            # Padding is on the right, so that causal attention alone keeps it out.
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            after_step(step, loss, time.time() - started)
            if step == steps:
                break


def train(model, tokenizer, steps: int, lr: float, noise: tuple[float, float] | None, args, seed: int) -> None:
    rng = random.Random(seed)

    def after_step(step, loss, seconds):
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} seconds {seconds:.0f}", flush=True)
        if args.eval_every and step % args.eval_every == 0:
            print(json.dumps(evaluate(model, tokenizer, generate_chains(300, seed=10_000))), flush=True)
            model.train()

    fit(model, lambda: make_batches(rng, tokenizer, args.batch_size, noise), steps, lr, after_step)


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], do_sample: bool, batch_size: int = 256):
    """Completions of the prompts. Prompts of like length go together, so that short ones do not wait for long ones."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            # A chain's results are never longer than its prompt by more than this; a stray sample is cut there.
            max_new_tokens=batch["input_ids"].shape[1] + 8,
            do_sample=do_sample,
        )
        completions = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, completions, strict=True):
            texts[i] = text
    return texts


def evaluate(model, tokenizer, rows, num_samples: int = 8) -> dict[str, float]:
    """Sampled success (temperature 1), greedy success, and the share of prompts that the samples split on."""
    prompts, answers = list(rows["prompt"]), list(rows["answer"])
    greedy = equations_reward(generate(model, tokenizer, prompts, do_sample=False), answers)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    repeated_answers = [answer for answer in answers for _ in range(num_samples)]
    sampled = torch.tensor(equations_reward(generate(model, tokenizer, repeated, do_sample=True), repeated_answers))
    rate = sampled.view(len(prompts), num_samples).mean(dim=1)
    return {
        "sampled": round(rate.mean().item(), 4),
        "greedy": round(sum(greedy) / len(greedy), 4),
        "learnable": round(((rate > 0) & (rate < 1)).float().mean().item(), 4),
    }


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes the name of a class of its own; this is the one that every version knows.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--output_dir", type=Path, default=here / "assets" / "tiny-policy")
    parser.add_argument("--init_from", type=Path, help="start the second phase from this model and skip the first")
    parser.add_argument("--clean_dir", type=Path, help="also save the model between the phases here")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--clean_steps", type=int, default=4000)
    parser.add_argument("--clean_lr", type=float, default=3e-3)
    parser.add_argument("--noisy_steps", type=int, default=500)
    parser.add_argument("--noisy_lr", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, nargs=2, default=(0.25, 0.85), metavar=("EASY", "HARD"))
    parser.add_argument("--eval_every", type=int, default=1000, help="0 for never")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    if args.init_from:
        model = Qwen2ForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
    else:
        model = build_model(tokenizer, args.hidden_size, args.num_layers)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train(model, tokenizer, args.clean_steps, args.clean_lr, None, args, seed=args.seed + 1)
        if args.clean_dir:
            save(model, tokenizer, args.clean_dir)
    if args.noisy_steps:
        torch.manual_seed(args.seed)  # the same second phase with and without --init_from
        train(model, tokenizer, args.noisy_steps, args.noisy_lr, tuple(args.noise), args, seed=args.seed + 2)
    save(model, tokenizer, args.output_dir)
    print(json.dumps(evaluate(model, tokenizer, generate_chains(300, seed=10_001))))


if __name__ == "__main__":
    main()
