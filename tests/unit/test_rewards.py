from __future__ import annotations

import numpy as np
import pytest
import torch

from ctrlray import config
from ctrlray.errors import ConfigError, DataError
from ctrlray.rewards.hf import HFScorer
from ctrlray.rewards.registry import FunctionScorer, build
from ctrlray.rewards.rows import score_rows
from tests.fakes import tiny_tokenizer

CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]
TEXTS = ["short", "a much longer answer than the others", "x", "<|im_end|> special", "same"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_classifier_scores_do_not_depend_on_the_batch(classifier):
    reward = config.HFReward(model=str(classifier), attributes=("kind", "brief"), batch_size=2)
    scorer = HFScorer(reward)
    together = scorer(CHATS, TEXTS)
    for i in range(5):
        alone = scorer([CHATS[i]], [TEXTS[i]])
        for name in ("kind", "brief"):
            assert together[name][i] == pytest.approx(alone[name][0], abs=2e-2)
    order = [3, 0, 4, 1, 2]
    shuffled = scorer([CHATS[i] for i in order], [TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled["kind"], together["kind"][order], atol=2e-2)
    assert np.std(together["kind"]) > 0


def test_classifier_with_another_number_of_outputs_is_refused(classifier):
    with pytest.raises(ConfigError, match="has 2 outputs"):
        HFScorer(config.HFReward(model=str(classifier), attributes=("one",)))


def function(target, *attributes):
    return config.FunctionReward(target=target, attributes=attributes)


def test_function_gives_several_attributes_at_once():
    made = build(function("tests.fakes:length_reward", "brevity", "variety"))
    assert made(CHATS[:2], ["ab", "aaa"])["brevity"].tolist() == [-2.0, -3.0]
    assert made(CHATS[:2], ["ab", "aaa"])["variety"].tolist() == [2.0, 1.0]


class Scorers:
    @staticmethod
    def words(prompts, responses):
        assert [p[-1]["role"] for p in prompts] == ["user"] * len(responses)
        return [len(r.split()) for r in responses]


def test_a_target_may_lie_in_a_class():
    assert build(function("tests.unit.test_rewards:Scorers.words", "words"))(CHATS[:2], ["a b", "c"])["words"].tolist() == [2, 1]


def test_function_errors_name_the_target():
    with pytest.raises(ConfigError, match="no_such_module"):
        FunctionScorer(function("no_such_module:f", "a"))
    with pytest.raises(ConfigError, match=r"tests\.fakes:absent"):
        FunctionScorer(function("tests.fakes:absent", "a"))
    with pytest.raises(DataError, match="gave"):
        build(function("tests.fakes:length_reward", "charm"))(CHATS, TEXTS)
    with pytest.raises(DataError, match=r"gave \['brevity', 'variety'\], the job file expects \['brevity', 'charm'\]"):
        build(function("tests.fakes:length_reward", "brevity", "charm"))(CHATS, TEXTS)


def test_a_reward_of_the_wrong_length_quarantines_its_rows():
    class Short:
        attributes = ("a",)

        def __call__(self, chats, texts):
            return {"a": np.zeros(3, np.float32)}

    _, errors = score_rows(Short(), CHATS, TEXTS)
    assert all("wrong_length" in e for e in errors)


def test_good_rows_of_a_raising_batch_keep_their_scores():
    columns, errors = score_rows(build(function("tests.fakes:faulty_reward", "a")), CHATS[:3], ["fine", "boom", "nan"])
    assert columns["a"][0] == 4.0 and errors[0] == ""
    assert "cannot read boom" in errors[1] and "not_finite" in errors[2]
