"""Preference losses: TRL's own numbers, the running mean of rewards, and options that mean nothing."""

import json
import math

import pytest
import torch

from ivl.data.processor import Processor
from ivl.finetune.objectives import DPO, MEASURES, MPO, PairLogProbs, Preference, PreferenceObjective
from ivl.lit.training.preference import means
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.finetune.record_trl import CASES, GRADIENTS, RECORDED, batch_of, folders, record


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl")
    policy, reference = folders(root)
    loaded = [InternVL.from_pretrained(path) for path in (policy, reference)]
    return root, Processor.from_pretrained(policy), *loaded


def options_of(name: str) -> Preference:
    # TRL's quality loss has no running mean any more; see `test_the_quality_loss_is_about_the_mean_of_all_rewards`
    return Preference(mpo=MPO(shift="none")) if name.startswith("mpo") else Preference(dpo=DPO(loss=name))


def check_against(recorded: dict, models, name: str) -> None:
    root, processor, policy, reference = models
    batch, objective = batch_of(processor, root, CASES[name][2]), PreferenceObjective(options_of(name))
    policy.zero_grad()
    with torch.no_grad():
        base = reference(**batch).row_losses
    out = policy(**batch)
    pairs = PairLogProbs.of(out.row_losses, base, out.row_tokens)
    loss = objective.losses(pairs).mean()
    loss.backward()
    chosen, rejected = (rewards.mean().item() for rewards in pairs.rewards(0.1))
    expected = recorded[name]
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    assert (chosen, rejected) == pytest.approx((expected["chosen"], expected["rejected"]), abs=1e-5)
    for end in GRADIENTS:
        (gradient,) = [p.grad for n, p in policy.language_model.named_parameters() if n.endswith(end)]
        assert float(gradient.double().norm()) == pytest.approx(expected["gradients"][end], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_rewards_and_gradients_are_trl_s(models, name):
    check_against(json.loads(RECORDED.read_text()), models, name)


@pytest.mark.slow
def test_trl_still_computes_what_is_recorded(models):
    pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[trl]"')
    recorded = record()
    for name in CASES:
        check_against(recorded, models, name)


def pairs(*rewards: tuple[float, float], beta: float = 0.1) -> PairLogProbs:
    """Pairs of these rewards; answers of two and four tokens."""
    chosen, rejected = (torch.tensor(column) / beta for column in zip(*rewards))
    zero, two = torch.zeros(len(rewards)), torch.full((len(rewards),), 2.0)
    return PairLogProbs(chosen, rejected, zero, zero, two, 2 * two)


def test_the_quality_loss_is_about_the_mean_of_all_rewards(tmp_path):
    options = Preference(mpo=MPO(dpo=0, sft=0, bco=1))
    objective = PreferenceObjective(options)
    objective.losses(pairs((3.0, 1.0)))
    loss = objective.losses(pairs((0.5, -0.5), (2.0, 0.0)))
    shift = (3 + 1 + 0.5 - 0.5 + 2 + 0) / 6
    expected = [
        -math.log(1 / (1 + math.exp(shift - c))) - math.log(1 / (1 + math.exp(r - shift)))
        for c, r in ((0.5, -0.5), (2.0, 0.0))
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    torch.save(objective.state_dict(), tmp_path / "state.pt")
    again = PreferenceObjective(options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.losses(pairs((1.0, 0.0))), objective.losses(pairs((1.0, 0.0))))
    before = objective.state_dict()["rewards"]
    with torch.no_grad():
        objective.losses(pairs((9.0, 9.0)))
    objective.losses(pairs((float("nan"), float("inf"))))
    assert torch.equal(objective.state_dict()["rewards"], before), "held-out pairs and spoilt ones leave no trace"


def test_the_mean_of_rewards_is_of_all_processes():
    objective = PreferenceObjective(Preference(mpo=MPO()))
    objective.losses(pairs((3.0, 1.0)), lambda values: values + torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert objective.state_dict()["rewards"].tolist() == pytest.approx([6.0, 4.0])


def test_label_smoothing_and_measures():
    loss = PreferenceObjective(Preference(dpo=DPO(label_smoothing=0.1))).losses(pairs((1.0, 0.0)))
    assert float(loss) == pytest.approx(-0.9 * math.log(1 / (1 + math.exp(-1))) - 0.1 * math.log(1 / (1 + math.exp(1))))
    objective = PreferenceObjective(Preference(dpo=DPO()))
    values = means(objective.measures(pairs((3.0, 1.0), (0.0, 1.0))))
    assert tuple(values) == MEASURES
    assert list(values.values()) == pytest.approx([1.5, 1.0, 0.5, 0.5, -(40 / 6 + 10 / 6) / 2])
    assert means(torch.zeros(len(MEASURES) + 1)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Preference(), "expected sft, dpo or mpo"),
        (Preference(DPO(), MPO()), "found both dpo and mpo or neither"),
        (Preference(DPO(beta=0)), "dpo.beta: expected above 0, found 0"),
        (Preference(DPO(label_smoothing=0.5)), "label_smoothing: expected 0 to 0.5"),
        (Preference(DPO(label_smoothing=0.1, loss="ipo")), "is of the sigmoid loss"),
        (Preference(mpo=MPO(dpo=0, bco=0, sft=0)), "expected weights of at least 0, and one of them above"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PreferenceObjective(options)
