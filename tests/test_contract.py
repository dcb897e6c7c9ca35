"""What a contributor may get wrong in a measure or a host, and what a measure is given: early errors, time, kinds."""

import pandas as pd
import pytest
from tiny import config, make_dataset, make_trainer
from trl import GRPOTrainer

from trl_learnalign import select_prompts
from trl_learnalign.host import GRPOHost, Host, names, register_host
from trl_learnalign.measures import MEASURES, Finding, Measure
from trl_learnalign.scores.builtin import SCORES, Score
from trl_learnalign.selection.dry_run import plan_selection


class Kinds(Measure):
    """A text for each prompt, found at the price of a forward."""

    name, columns = "kinds", ("kind",)
    seen: tuple = ()

    def run(self, context, rows, log):
        model = context.host.model
        self.seen = (*self.seen, (context.host.trainer.num_generations, model.training))
        return Finding(pd.DataFrame({"kind": ["even" if row % 2 == 0 else "odd" for row in rows]}, index=list(rows)))

    def made_up(self, table, num_rollouts, longest):
        return Finding(pd.DataFrame({"kind": "odd"}, index=table.index))


def by_row(table, align):
    return table.index.to_series() * 1.0


@pytest.fixture
def registered(monkeypatch):
    """Registers measures, and a score `mine` that requires them, for one test."""

    def register(*measures, requires=None, rank=by_row):
        for measure in measures:
            monkeypatch.setitem(MEASURES, measure.name, measure)
        wanted = [measure.name for measure in measures] if requires is None else requires
        monkeypatch.setitem(SCORES, "mine", Score(tuple(wanted), rank))

    return register


def select(path, cls=None, **settings):
    trainer = make_trainer(path, cls=cls, dataset=make_dataset(8), reward=lambda completions, **kwargs: 1 / 0)
    return select_prompts(trainer, config(score="mine", num_prompts=2, **settings))


def of(**attributes):
    """An object of a measure with some attributes changed."""
    return type("Mine", (Kinds,), attributes)()


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ([of(price="forwards")], "price of the measure 'kinds' is 'forwards', but must be one of none, forward, ro"),
        ([of(requires=("late",)), of(name="late", requires=("kinds",))], "measures kinds > late > kinds require each"),
        ([of(requires="rollouts")], r"`requires` of the measure 'kinds' is the text 'rollouts', .*`\('rollouts',\)`"),
        *(
            ([of(columns=(name,))], f"measure 'kinds' has a column '{name}', which the choice has as well.*Rename")
            for name in ("index", "rank", "score", "selected", "eligible", "quota_group")
        ),
        ([of(columns=("success_rate",))], "'success_rate', which the measure 'rollouts' has as well"),
        ([of(), of(name="others")], "measure 'others' has a column 'kind', which the measure 'kinds' has as well"),
        (
            [of(), of(name="others", columns=())],
            "tables of the measures 'kinds' and 'others' both have a column 'kind'",
        ),
    ],
)
def test_a_measure_that_is_wrong_is_named_before_anything_is_measured(tmp_path, registered, measures, message):
    registered(*measures)
    with pytest.raises(ValueError, match=message):
        select(tmp_path)
    assert not any(measure.seen for measure in measures)


def test_an_entry_that_is_wrong_is_named(tmp_path, registered, monkeypatch):
    registered(requires=["other"])
    for entry, message in (
        (Kinds(), "a Kinds under 'other', but its `name` is 'kinds'"),
        (type("Nameless", (Measure,), {})(), "a Nameless under 'other', but its `name` is None"),
        (Kinds, "under 'other', which is no object of a subclass of Measure"),
    ):
        monkeypatch.setitem(MEASURES, "other", entry)
        with pytest.raises(ValueError, match=message):
            select(tmp_path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda rows: Finding(pd.DataFrame({"kind": 1.0}, index=[*rows, 3])), "has row 3 twice.*Correct its `run`"),
        (lambda rows: Finding(pd.DataFrame({"kind": 1.0}, index=[*rows, 8])), "has row 8, which was not asked for"),
        (lambda rows: pd.DataFrame({"kind": 1.0}, index=rows), "'kinds' returned a DataFrame, but must return a Find"),
        (lambda rows: None, "'kinds' returned a NoneType, but must return a Finding"),
    ],
)
def test_a_result_that_cannot_be_joined_is_named(tmp_path, registered, found, message):
    registered(of(run=lambda self, context, rows, log: found(list(rows))))
    with pytest.raises(ValueError, match=message):
        select(tmp_path)


ROLES = {role: names.GRPO[role] for role in (names.ALWAYS, names.TRAINS)}


class Silent(GRPOTrainer):
    """A trainer whose host does not know how to generate."""


class SilentHost(GRPOHost):
    """Of the roles of GRPOTrainer's host all but that one."""

    names = ROLES
    books = ("_nowhere",)


def test_a_forward_takes_no_generation(tmp_path, registered):
    """And a condition may compare texts that are measured. The time is that of the measure, which has no clock."""
    register_host(Silent, SilentHost)
    kinds = Kinds()
    registered(kinds)
    chosen = select(tmp_path, Silent, where="kind == 'even'")
    assert chosen.indices == [6, 4] and chosen.scores["kind"].to_pylist() == ["even", "odd"] * 4
    assert list(chosen.provenance["seconds"]) == ["kinds"]
    assert kinds.seen == ((4, True),)
    with pytest.raises(ValueError, match="`where` is 'kind > 3', but its sides cannot be compared"):
        select(tmp_path, Silent, where="kind > 3")
    trainer = make_trainer(tmp_path, cls=Silent, dataset=make_dataset(8).add_column("answer", list("12345678")))
    assert len(select_prompts(trainer, config(score="confidence", answer_column="answer")).indices) == 8
    assert "kinds" in plan_selection(trainer, config(score="mine"))[0]
    with pytest.raises(ValueError, match="host of Silent does not know how to generate rollouts outside of training"):
        select_prompts(trainer, config(score="learnability"))


def test_a_host_that_is_not_whole_is_refused():
    class Abstract(Host):
        names = names.GRPO

    class Nameless(Host):
        def advantages(self, rewards, penalties):
            return rewards

    for host, message in (
        (Abstract, "got Abstract, which has no method advantages, which every host needs"),
        (Nameless, "`names` of the host Nameless is None, but must be a dict of the names that each role needs"),
        (
            type("Odd", (Nameless,), {"names": {"always": (), "generate": ()}}),
            "`names` of the host Odd is .*'generate'",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            register_host(Silent, host)


def test_a_measure_may_ask_for_another_score(tmp_path, registered, monkeypatch):
    """Of what is measured anyway; the provenance says why. A selection by a score of one's own is made again."""

    def asks(name, reason=None):
        def run(self, context, rows, log):
            found = Kinds.run(self, context, rows, log)
            return Finding(found.table, name, reason)

        return of(run=run)

    monkeypatch.setitem(SCORES, "backwards", Score(("kinds",), lambda table, align: -table.index.to_series() * 1.0))
    measure = asks("backwards", "all are of one kind")
    registered(measure, of(name="late", columns=("late",), run=lambda *args: 1 / 0, made_up=Measure.made_up))
    for times in (1, 2):
        chosen = select(tmp_path)
        assert chosen.indices == [0, 1] and chosen.measures == ("kinds",) and len(measure.seen) == times
        assert chosen.provenance["instead"] == {"score": "backwards", "reason": "all are of one kind"}
    for name, message in (
        ("learnability", "needs rollouts, but mine does not need that"),
        ("x", "but the scores are:"),
    ):
        registered(asks(name))
        with pytest.raises(ValueError, match=f"'kinds' asks to rank by '{name}' instead.*{message}"):
            select(tmp_path / name)
