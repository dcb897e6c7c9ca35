"""The configuration: what it refuses, and that it parses beside TRL's own."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from trl_learnalign import LearnAlignConfig
from trl_learnalign.choice.idle import ACTING
from trl_learnalign.ground.knobs import explain, explanations


ROOT = Path(__file__).parent.parent
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
        ("gradient_direction", "sign", "must be one of plain, adam"),
        ("target_checkpoints", [], "must be a list of one or more directories, each once, but is \\[\\]"),
        ("target_checkpoints", ["a", "a"], "each once, but is"),
        ("after_warmup", "stop", "must be one of continue, restart"),
        ("success_threshold", float("nan"), "must be a finite number, but is nan"),
        ("success_threshold", "1", "must be a finite number, but is '1'"),
        ("review_every", 1, "`review_every` is 1, but must be at least 2. Use None for passes that have all"),
        ("replay_groups", 0, "`replay_groups` is 0"),
        ("reselect_every", 0, "`reselect_every` is 0.*must be positive"),
        ("reselect_every", float("inf"), "must be a finite number"),
    ],
)
def test_bad_values_are_refused_at_once(field, value, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**{field: value})


OWN = {"score": len, "score_measures": ["rollouts"]}
ROLLED_OUT = ({"score": "learnability"}, {"score": "learnalign"}, OWN, {"schedule": "online"})
FREE = ({"score": "random"}, {"score": "column:grade"}, {"score": len})
SELECTED = (*FREE, *ROLLED_OUT[:3])
ANY = (*SELECTED, ROLLED_OUT[3])
GRADIENTS = ({"score": "alignment"}, {"score": "learnalign", "learnability": "variance"})
ANSWERED = ({"score": "confidence"}, {"score": len, "score_measures": ["likelihood"]})
OTHERWISE = {"score": "learnability"}
TARGETED = ({"score": "target_alignment", "target_dataset": "target.jsonl"},)
METHOD = {"schedule": "mopps"}  # a published one
# Of each field another value, with what it acts, and with what it has no effect
EFFECTS = {
    "num_prompts": (5, SELECTED, (*ROLLED_OUT[3:], METHOD)),
    "warmup_prompts": (5, SELECTED, ROLLED_OUT[3:]),
    "num_rollouts": (4, ROLLED_OUT[:3], (*FREE, *ROLLED_OUT[3:])),
    "rollouts": ("racing", ROLLED_OUT[:3], (*FREE, *ROLLED_OUT[3:])),
    "rollout_batch_prompts": (4, ROLLED_OUT[:3], (*FREE, *ROLLED_OUT[3:])),
    "score": ("learnability", ({}, ROLLED_OUT[3]), (METHOD,)),
    "score_measures": (["rollouts"], FREE[2:], ()),
    "answer_column": ("answer", ANSWERED, ANY),
    "judge_model": ("judge", ({"score": "ask"}, {"score": len, "score_measures": ["ask"]}), ANY),
    "learnability": ("variance", ROLLED_OUT, (*FREE, METHOD)),
    "success_threshold": (
        0.5,
        (*ROLLED_OUT, METHOD, {"learnability": "variance"}),
        (*FREE, {"schedule": "online", "learnability": "variance"}),
    ),
    "success_reward": ("right", (*ROLLED_OUT, METHOD, {"score": "random", "review_every": 2}), FREE),
    "gradient_rollouts": ("one_correct", GRADIENTS, (*FREE, OTHERWISE, OWN, *ROLLED_OUT[3:])),
    "projection_dim": (None, GRADIENTS, (*FREE, OTHERWISE, OWN, *ROLLED_OUT[3:])),
    "max_tokens_per_batch": (50, GRADIENTS, (*FREE, OTHERWISE, OWN, *ROLLED_OUT[3:])),
    "candidate_prompts": (2000, SELECTED, ROLLED_OUT[3:]),
    "candidate_score": ("random", ({"candidate_prompts": 2000},), ()),
    "reselect_every": (2.0, SELECTED, ROLLED_OUT[3:]),
    "review_every": (3, SELECTED, (*ROLLED_OUT[3:], METHOD)),
    "after_warmup": ("restart", SELECTED, ({"warmup_prompts": 0}, *ROLLED_OUT[3:])),
    "deduplicate": (True, ANY, ()),
    "target_dataset": ("target.jsonl", ({"score": "target"}, {"score": "influence"}), ()),
    "target_column": (
        "task",
        ({"score": "target", "target_dataset": "target.jsonl"}, {"score": "target", "schedule": "online"}),
        (),
    ),
    "target_checkpoints": (["run/checkpoint-1"], TARGETED, (OTHERWISE, {}, *ROLLED_OUT[3:])),
    "gradient_direction": ("adam", TARGETED, (OTHERWISE, {}, *ROLLED_OUT[3:])),
    "where": ("row < 3", (*ANY, METHOD), ()),
    "quota_column": ("source", SELECTED, ROLLED_OUT[3:]),
    "quota": ("equal", ({"quota_column": "source"},), ({}, *ROLLED_OUT[3:])),
    "diversity": ("hidden_states", SELECTED[1:], ({"score": "random"}, *ROLLED_OUT[3:])),
    "take": ("proportional", SELECTED[1:], ({"score": "random"}, *ROLLED_OUT[3:])),
    "prompt_order": ("ranked", SELECTED, ROLLED_OUT[3:]),
    "fold": (7, ({"prompt_order": "folding"},), ({}, {"prompt_order": "ranked"}, *ROLLED_OUT[3:])),
    "save_rollouts": (True, (*ROLLED_OUT, METHOD), FREE),
    "write_report": (False, ANY, ()),
    "selection_seed": (3, ANY, ()),
    "schedule": ("online", ({},), ()),
    "prompt_features": (False, ROLLED_OUT[3:], (*SELECTED, METHOD)),
    "group_column": ("source", (*ROLLED_OUT[3:], {"schedule": "sec"}, {"schedule": "dump"}), (*SELECTED, METHOD)),
    "pass_rate_column": ("rate", ROLLED_OUT[3:], (*SELECTED, METHOD)),
    "drop_dead_groups": (False, ROLLED_OUT[3:], SELECTED),
    "max_refills": (2, (*ROLLED_OUT[3:], METHOD), (*SELECTED, {"schedule": "adept"})),
    "replay_share": (0.5, (*ROLLED_OUT[3:], METHOD), SELECTED),
    "replay_groups": (8, ({"schedule": "online", "replay_share": 0.5},), (*SELECTED, METHOD)),
}


@pytest.mark.parametrize("field", dataclasses.fields(LearnAlignConfig), ids=lambda field: field.name)
def test_every_setting_has_an_effect_or_is_refused(field):
    value, acting, idle = EFFECTS[field.name]
    assert value != field.default
    for others in acting:
        made = LearnAlignConfig(**others | {field.name: value})
        assert getattr(made, field.name) == value
    for others in idle:
        LearnAlignConfig(**others)
        words = rf"`{field.name}` is {re.escape(repr(value))}, but has no effect with.*Leave it out, or \w+ "
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                LearnAlignConfig(**others | {field.name: value})
                said = str(warned[-1].message)  # only the score makes it idle
                assert "with `score=" in said
            except ValueError as error:
                said = str(error)
                assert "with `score=" not in said
        assert re.search(words, said)
    assert bool(idle) == (field.name in ACTING) or field.name in ("score_measures", "target_dataset", "target_column")


def test_values_without_effect_are_no_changes():
    assert LearnAlignConfig().changes(LearnAlignConfig().to_dict() | {"fold": 7, "quota": "equal"}) == {}
    folded = LearnAlignConfig(prompt_order="folding")
    assert folded.changes(LearnAlignConfig().to_dict() | {"fold": 7}) == {
        "prompt_order": ("shuffle", "folding"),
        "fold": (7, 3),
    }


def test_every_field_is_explained_once_with_its_type_and_default():
    """In the docstring of the class, of which help and docs/configuration.md (see test_docs.py) are made."""
    parameters = inspect.getdoc(LearnAlignConfig).partition("Parameters:\n")[2].partition("\nRaises:")[0]
    heads = re.findall(r"^    (\w+) \((.*), \*optional\*(?:, defaults to `(.*)`)?\):\n        \S", parameters, re.M)
    fields = dataclasses.fields(LearnAlignConfig)
    assert [name for name, *_ in heads] == [field.name for field in fields] == list(explanations(LearnAlignConfig))
    for field, (name, kinds, default) in zip(fields, heads, strict=True):
        assert eval(default or "None") == field.default, name
        annotation = LearnAlignConfig.__annotations__[name]  # a TrlParser overwrites `field.type`
        kind = next(iter(typing.get_args(annotation)), annotation)
        kind = str if isinstance(kind, str) or typing.get_origin(kind) is typing.Literal else kind
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


@pytest.mark.slow
def test_an_editor_knows_the_configuration():
    """`typed_user.py` has right uses and wrong ones; `make lint` checks it as well."""
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "tests/typed_user.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"MYPYPATH": "src"})
    assert done.returncode == 0, done.stdout + done.stderr


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
