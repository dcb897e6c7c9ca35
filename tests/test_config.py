"""The configuration: what it refuses, and that it parses beside TRL's own."""

import dataclasses
import inspect
import re
import typing

import pytest
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from trl_learnalign import LearnAlignConfig
from trl_learnalign.knobs import explain, explanations


OTHERS = (ScriptArguments, GRPOConfig, ModelConfig)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_prompts", 0, "`num_prompts` is 0, but must be at least 1"),
        ("num_prompts", -3, "`num_prompts` is -3"),
        ("num_prompts", 2.5, "`num_prompts` must be an integer, but is 2.5"),
        ("num_prompts", True, "must be an integer, but is True"),
        ("num_prompts", None, "must be an integer, but is None"),
        ("warmup_prompts", -1, "`warmup_prompts` is -1.*Set it to 0"),
        ("num_rollouts", 1, "`num_rollouts` is 1.*two rollouts"),
        ("projection_dim", 0, "`projection_dim` is 0.*None for exact"),
        ("projection_dim", "8", "must be an integer, but is '8'"),
        ("candidate_prompts", 0, "`candidate_prompts` is 0"),
        ("candidate_prompts", 999, "smaller than `num_prompts` \\(1000\\)"),
        ("selection_seed", -1, "`selection_seed` is -1"),
        ("score", "learn", "`score` is .learn., but must be one of learnalign, alignment, learnability, target"),
        ("learnability", "std", "must be one of success_rate, variance"),
        ("gradient_rollouts", "some", "must be one of all, one_correct"),
        ("after_warmup", "stop", "must be one of continue, restart"),
        ("success_threshold", float("nan"), "must be a finite number, but is nan"),
        ("success_threshold", "1", "must be a finite number, but is '1'"),
        ("reselect_every", 0, "`reselect_every` is 0.*must be positive"),
        ("reselect_every", float("inf"), "must be a finite number"),
    ],
)
def test_bad_values_are_refused_at_once(field, value, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**{field: value})


def test_every_field_is_explained_once_with_its_type_and_default():
    """In the docstring of the class, of which help and docs/configuration.md (see test_docs.py) are made."""
    parameters = inspect.getdoc(LearnAlignConfig).partition("Parameters:\n")[2].partition("\nRaises:")[0]
    heads = re.findall(r"^    (\w+) \((.*), \*optional\*(?:, defaults to `(.*)`)?\):\n        \S", parameters, re.M)
    fields = dataclasses.fields(LearnAlignConfig)
    assert [name for name, *_ in heads] == [field.name for field in fields] == list(explanations(LearnAlignConfig))
    for field, (name, kinds, default) in zip(fields, heads, strict=True):
        assert eval(default or "None") == field.default, name
        annotation = LearnAlignConfig.__annotations__[name]  # a TrlParser overwrites `field.type`
        kind = (typing.get_args(annotation) or (annotation,))[0]
        assert kinds.startswith(f"`{kind.__name__ if isinstance(kind, type) else kind}`"), name
        assert (
            field.metadata["help"] % {} == explanations(LearnAlignConfig)[name].replace("%%", "%")
            and len(explanations(LearnAlignConfig)[name]) > 20
        )


def test_help_is_that_explanation_and_a_percent_sign_does_no_harm(capsys):
    shown = dataclasses.make_dataclass("Shown", [("share", int, dataclasses.field(default=1))])
    shown.__doc__ = "\n\n    Parameters:\n        share (`int`):\n            90 % of\n            all, |or| none.\n"
    explain(shown)
    with pytest.raises(SystemExit):
        TrlParser((shown, LearnAlignConfig)).parse_args_and_config(["-h"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "90 % of all, |or| none. (default: 1)" in printed
    assert f"{explanations(LearnAlignConfig)['warmup_prompts']} (default: 300)" in printed


def test_no_field_collides_with_those_of_trl():
    ours = {field.name for field in dataclasses.fields(LearnAlignConfig)}
    for other in OTHERS:
        assert not ours & {field.name for field in dataclasses.fields(other)}, other


def test_trl_parser_parses_all_together(tmp_path, capsys):
    parser = TrlParser((*OTHERS, LearnAlignConfig))
    arguments = ["--output_dir", str(tmp_path), "--warmup_steps", "3", "--seed", "5", "--num_prompts", "17"]
    arguments += ["--warmup_prompts", "4", "--projection_dim", "1024", "--reselect_every", "1.5", "--lora_r", "4"]
    script, grpo, model, ours = parser.parse_args_and_config([*arguments, "--save_rollouts", "--bf16", "false"])
    assert (grpo.warmup_steps, grpo.seed, model.lora_r) == (3, 5, 4)
    assert ours == LearnAlignConfig(17, 4, projection_dim=1024, reselect_every=1.5, save_rollouts=True)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args_and_config(["-h"])
    assert stop.value.code == 0 and "--gradient_rollouts" in capsys.readouterr().out


def test_yaml_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\nbf16: false\nnum_prompts: 5\nprojection_dim: null\nscore: alignment\n")
    *_, ours = TrlParser((*OTHERS, LearnAlignConfig)).parse_args_and_config(["--config", str(file)])
    assert ours == LearnAlignConfig(num_prompts=5, projection_dim=None, score="alignment")
