"""The curriculum as an object for any training loop: features of anything, states as bytes, groups known by a row."""

import numpy as np
import pytest
from test_curriculum import assert_equal

from trl_learnalign.curriculum import Group, OnlineCurriculum, make_features, pack, unpack
from trl_learnalign.curriculum.rewards import DecidedBy, read_rewards


def test_features_are_a_constant_and_what_is_known():
    random = np.random.default_rng(0)
    lengths, sources = random.integers(1, 90, 50), random.choice(["web", "book", "code"], 50)
    features = make_features(lengths, sources)
    assert features.dtype == np.float16 and features.shape == (50, 5) and (features[:, 0] == 1).all()
    expected = (lengths - lengths.mean()) / lengths.std()
    np.testing.assert_allclose(features[:, 1], expected, atol=2e-3)
    assert (features[:, 2:].sum(1) == 1).all()
    for column, name in zip(features[:, 2:].T, ("book", "code", "web"), strict=True):
        assert (column == (sources == name)).all()


def test_of_embeddings_the_first_components():
    """Whatever the scale of a dimension; distances along the first components are kept best."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((300, 3))
    embeddings = hidden @ random.standard_normal((3, 40)) * 10.0 ** random.integers(-3, 4, 40)
    features = make_features(embeddings, components=8).astype(float)
    assert features.shape == (300, 4)  # more dimensions than three there are not
    fitted = np.linalg.lstsq(features, hidden, rcond=None)[0]
    assert np.abs(features @ fitted - hidden).max() < 0.02
    assert abs(features[:, 1].std() - 1) < 0.01 and (np.diff(features[:, 1:].std(0)) < 0).all()
    assert make_features(embeddings, components=2).shape == (300, 3)


def test_many_rows_are_projected_on_the_components_of_a_sample():
    values = np.random.default_rng(0).standard_normal((5000, 2)) * [3, 1]
    features = make_features(values).astype(float)
    np.testing.assert_allclose(features.mean(0)[1:], 0, atol=0.05)
    assert abs(features[:, 1].std() - 1) < 0.05


def test_what_says_nothing_is_no_column():
    assert make_features(np.full(9, 3.0), np.array(["same"] * 9), np.zeros((9, 4))).shape == (9, 1)


@pytest.mark.parametrize(
    "parts, words",
    [
        ((), "at least one"),
        ((np.zeros(3), np.zeros(4)), r"\(3,\), \(4,\)"),
        ((np.zeros((2, 2, 2)),), r"\(2, 2, 2\)"),
        ((np.zeros(0),), r"\(0,\)"),
        ((np.array([1.0, 2.0]), np.array([[1.0, 0.0], [np.nan, 0.0]])), "Part 1 .* row 1"),
        ((np.array([str(i) for i in range(300)]),), "300 different texts"),
        ((np.array([["a", "b"], ["c", "d"]]),), "table of texts"),
    ],
)
def test_parts_that_make_no_features(parts, words):
    with pytest.raises(ValueError, match=words):
        make_features(*parts)


def curriculum_of(seed=0, size=60):
    features = make_features(np.random.default_rng(1).standard_normal(size))
    return OnlineCurriculum(features, group_size=4, seed=seed)


def learn(curriculum, random, chunks=6):
    for _ in range(chunks):
        draws = curriculum.choose(8)
        curriculum.observe(
            [Group(draw.number, draw.row, (random.random((4, 1)) < 0.4).astype(float)) for draw in draws]
        )
        curriculum.tick(1)


def test_a_state_as_bytes_goes_on_alike():
    first, second = curriculum_of(), curriculum_of()
    learn(first, np.random.default_rng(2))
    first.choose(3)  # in flight
    content = pack(first.state_dict())
    second.load_state_dict(unpack(content))
    assert isinstance(content, bytes)
    for one in (first, second):
        learn(one, np.random.default_rng(3))
    assert_equal(first.state_dict(), second.state_dict())
    assert [draw.row for draw in first.choose(9)] == [draw.row for draw in second.choose(9)]


def test_bytes_that_are_no_state():
    content = pack(curriculum_of().state_dict())
    for damaged in (b"", b"nothing", content[: len(content) // 2], content[:-40]):
        with pytest.raises(ValueError, match="damaged"):
            unpack(damaged)
    with pytest.raises(TypeError, match=r"\['x'\].* is a set"):
        pack({"x": {1}})
    with pytest.raises(TypeError, match="array of object"):
        pack({"x": np.array([None])})


def test_a_group_that_is_known_by_its_row_belongs_to_the_earliest_draw():
    curriculum = curriculum_of(size=6)
    draws = curriculum.choose(9)  # some rows twice, as there are but six
    of = {row: [draw.number for draw in draws if draw.row == row] for row in range(6)}
    twice = next(row for row, numbers in of.items() if len(numbers) > 1)
    assert curriculum.number_of(twice) == of[twice][0]
    curriculum.observe([Group(of[twice][0], twice, np.ones((4, 1)))])
    assert curriculum.number_of(twice) == of[twice][1]
    never = [row for row, numbers in of.items() if not numbers]
    assert all(curriculum.number_of(row) is None for row in [*never, 77])


def test_the_first_function_that_gave_a_reward_decides():
    rewards = np.array([[[np.nan, 0.0, 9.0], [1.0, 0.0, 9.0], [np.nan, np.nan, 9.0]]])
    deciding, advantages = DecidedBy((0, 1))(rewards)
    np.testing.assert_array_equal(deciding, [[0.0, 1.0, np.nan]])
    np.testing.assert_allclose(advantages, read_rewards(rewards)[1])


def test_the_report_of_a_loop_of_ones_own(tmp_path):
    from datasets import Dataset

    from trl_learnalign.report.online_page import rewrite_online_report, write_curriculum_report

    random = np.random.default_rng(0)
    sources = random.choice(["exams", "exercises"], 60)
    curriculum = OnlineCurriculum(make_features(sources), group_size=4, kinds=(sources == "exercises").astype(int))
    texts = [f"question {row}" for row in range(60)]
    with pytest.raises(ValueError, match="has observed no group yet"):
        write_curriculum_report(curriculum, tmp_path, texts)
    for _ in range(20):
        draws = curriculum.choose(4)
        rewards = (
            random.random((4, 4, 1)) < 0.5 * (sources[[draw.row for draw in draws]] == "exercises")[:, None, None]
        )
        curriculum.observe(
            [Group(draw.number, draw.row, part.astype(float)) for draw, part in zip(draws, rewards, strict=True)]
        )
        curriculum.tick(1)
    with pytest.raises(ValueError, match="59 prompts were given, but the curriculum has 60 rows"):
        write_curriculum_report(curriculum, tmp_path, texts[:59])
    names = ["exams", "exercises"]
    page = write_curriculum_report(curriculum, tmp_path / "new", texts, kind_names=names, name="my policy")
    text = page.read_text()
    assert (
        "LearnAlign online, step 20<" in text and "my policy, 60 prompts" in text and "The plan of the run" not in text
    )
    kinds = {one["name"]: one for one in curriculum.report(names)["run"]["kinds"]}
    assert kinds["exams"]["groups"] + kinds["exercises"]["groups"] == 80 and kinds["exams"]["live"] == 0
    assert all(name in text for name in names)
    rows = Dataset.from_dict({"prompt": texts, "answer": ["42"] * 60})
    write_curriculum_report(curriculum, tmp_path, rows, kind_names=names, max_steps=30)
    assert "step 20 of 30" in rewrite_online_report(tmp_path).read_text()
