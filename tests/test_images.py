"""Prompts with images: chosen where no gradient is taken, refused where one is, from wherever they come."""

import re

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import config, grpo_args, lora, make_tokenizer, online, parity_reward, tool_calls
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trl_learnalign import LearnAlignGRPOTrainer, LearnAlignSampler, Selection, select_prompts


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of experimental features

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% for c in m.get('tool_calls') or [] %}u{{ c['function']['name'] }}{{ c['function']['arguments'] }}{% endfor "
    "%}+{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
# Any digit is a call of a tool, so that a random policy makes some
RESPONSES = tool_calls("look", "(?P<number>[0-9])")


def picture(number):
    return Image.new("RGB", (8, 8), (number % 256, 10, 10))


def make_processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.response_template = RESPONSES
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


class Model(LlavaForConditionalGeneration):
    """Takes an argument that TRL passes where a tool has shown an image."""

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, token_type_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)


def make(path, choice, images=False, cls=LearnAlignGRPOTrainer, **kwargs):
    processor = make_processor()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Model(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                **sizes, num_hidden_layers=1, image_size=8, patch_size=4, projection_dim=16
            ),
            text_config=Qwen2Config(
                **sizes,
                vocab_size=len(processor.tokenizer),
                num_hidden_layers=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
            ),
            image_token_index=image_token,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    )
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(8)]
    if images:
        rows = [row | {"image": picture(i)} for i, row in enumerate(rows)]
    return cls(
        model=model,
        args=grpo_args(
            path, max_steps=2, max_completion_length=40, generation_kwargs={"suppress_tokens": [image_token]}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora(target_modules=["q_proj", "v_proj"]),
        train_sampler=LearnAlignSampler(choice),
        **({"reward_funcs": parity_reward} | kwargs),
    )


def train(path, images=False, score="learnability", **kwargs):
    trainer = make(path, config(num_prompts=4, warmup_prompts=0, score=score), images, **kwargs)
    if "tools" in kwargs:  # TRL 1.8 cannot train on images that tools show
        return select_prompts(trainer, trainer._get_train_sampler().config)
    trainer.train()
    assert trainer.state.global_step == 2
    return Selection.load(next((path / "learnalign").glob("step-*")))


def last_parity(completions, **kwargs):
    return [float(sum(map(ord, str(completion))) % 2) for completion in completions]


class Shows:
    """Begins every rollout with a picture."""

    def reset(self, **kwargs):
        return [{"type": "image", "image": picture(7)}]


def look(number: str) -> list:
    """
    Shows a picture.

    Args:
        number: of the picture
    """
    return [{"type": "image", "image": picture(int(number))}]


SOURCES = {
    "column": {"images": True},
    "environment": {"environment_factory": Shows, "reward_funcs": last_parity},
    "tool": {"tools": [look], "reward_funcs": last_parity},
}


@pytest.mark.parametrize("source", SOURCES)
def test_prompts_with_images_are_selected_without_gradients(tmp_path, source):
    selection = train(tmp_path, **SOURCES[source])
    assert len(selection.indices) == 4 and selection.num_learnable() >= 4


class Looks(LearnAlignGRPOTrainer):
    """Notes number and picture of each prompt that it trains on."""

    def _compute_loss(self, model, inputs):
        for ids, pixels in zip(inputs["prompt_ids"], inputs["pixel_values"], strict=True):
            number = int(re.search("([0-9])[+]", self.processing_class.decode(ids).replace(" ", ""))[1])
            vars(self).setdefault("seen", []).append((number, round(pixels[0].mean().item(), 3)))
        return super()._compute_loss(model, inputs)


def test_a_refilled_batch_has_the_pictures_of_its_prompts(tmp_path):
    def odd(prompts, completions, **kwargs):
        numbers = [int(prompt[0]["content"][-1]["text"][0]) for prompt in prompts]
        return [float(number % 2 and place % 2) for place, number in enumerate(numbers)]

    trainer = make(tmp_path, online(max_refills=9), True, Looks, reward_funcs=odd)
    trainer.train()
    red = {i: trainer.processing_class.image_processor(picture(i), return_tensors="pt") for i in range(8)}
    assert len(trainer.seen) == 32 and all(number % 2 for number, _ in trainer.seen)
    assert all(value == round(red[i]["pixel_values"][0, 0].mean().item(), 3) for i, value in trainer.seen)
    assert sum(entry.get("learnalign/refills", 0) for entry in trainer.state.log_history) > 0
    with pytest.raises(ValueError, match="Rollouts with num_images, pixel_values cannot be kept for replay"):
        make(tmp_path / "replay", online(replay_share=0.5), True).train()


@pytest.mark.parametrize("source", ["environment", "tool"])
def test_images_that_are_in_no_column_are_refused_where_gradients_are_wanted(tmp_path, source):
    calls = []

    def counted(completions, **kwargs):
        calls.append(completions)
        return last_parity(completions)

    with pytest.raises(ValueError, match="The rollouts have images.*score='learnability'"):
        train(tmp_path, score="learnalign", **(SOURCES[source] | {"reward_funcs": counted}))
    assert len(calls) == 1  # at the first batch
