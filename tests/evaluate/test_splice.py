import math

import pytest
import torch

from gsae.evaluate import splice as module
from gsae.evaluate.splice import (
    EvaluationBatch,
    Targets,
    cross_entropy,
    cross_entropy_of_one,
    find_targets,
    loss_recovered,
    splice,
    splice_metrics,
    spliced_losses,
)
from gsae.evaluate.sums import RunSums, SiteSums


def test_targets_stand_in_the_segment_of_their_context():
    # Two segments of one document, one of another, padding
    batch = EvaluationBatch(
        tokens=torch.tensor([[9, 1, 2, 9, 3, 9, 4, 0, 0]]),
        positions=torch.tensor([[0, 1, 2, 0, 1, 0, 1, 0, 1]]),
        documents=torch.tensor([[5, 5, 5, 5, 5, 6, 6, -1, -1]]),
        blocks=torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1, -1]]),
    )
    found = find_targets(batch)
    assert found.rows.tolist() == [0, 1, 3, 5]
    assert found.tokens.tolist() == [1, 2, 3, 4]
    assert batch.num_tokens == 7


def test_rows_of_the_second_context_are_counted_on():
    ones = torch.ones(2, 3, dtype=torch.int64)
    found = find_targets(EvaluationBatch(torch.arange(6).view(2, 3), torch.arange(3).expand(2, 3), ones, ones))
    assert found.rows.tolist() == [0, 1, 3, 4]
    assert found.tokens.tolist() == [1, 2, 4, 5]
    assert found.at_rows(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 0, 3, 4, 0]


def test_kept_rows_are_replaced_in_the_llms_type():
    x = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]], dtype=torch.bfloat16)
    kept = torch.tensor([[True, False, True]])
    found = splice(x, torch.tensor([[10.0, 20], [30, 40], [1.001, 60]], dtype=torch.float64), kept)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[[10, 20], [3, 4], [1, 60]]]
    assert splice(x, torch.zeros(2), kept).tolist() == [[[0, 0], [3, 4], [0, 0]]]


@pytest.fixture
def three_targets() -> Targets:
    return Targets(rows=torch.tensor([0, 1, 3]), tokens=torch.tensor([0, 1, 1]), num_rows=4)


def test_cross_entropy_and_kl_by_hand(three_targets, monkeypatch):
    monkeypatch.setattr(module, "SLICE_LOGITS", 4)  # two rows a slice
    clean = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.5, 0.5]]], dtype=torch.float64).log()
    spliced = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64).log() + 3
    assert cross_entropy(clean, three_targets).tolist() == pytest.approx([math.log(2), -math.log(0.75), math.log(2)])
    found = spliced_losses(spliced, clean, three_targets)
    assert found.ce.tolist() == pytest.approx([math.log(2), -math.log(0.25), -math.log(0.8)])
    # 0.25 ln (0.25 / 0.75) + 0.75 ln (0.75 / 0.25) = 0.5 ln 3; 0.5 ln (0.5 / 0.2) + 0.5 ln (0.5 / 0.8) = 0.5 ln (0.25 / 0.16)
    assert found.kl.tolist() == pytest.approx([0, 0.5 * math.log(3), 0.5 * math.log(0.25 / 0.16)])


def test_kl_of_equal_logits_is_exactly_zero(three_targets):
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = spliced_losses(logits, logits, three_targets)
    assert found.kl.tolist() == [0, 0, 0]
    assert found.ce.equal(cross_entropy(logits, three_targets))


def test_losses_of_bfloat16_logits_are_float32(three_targets):
    logits = torch.tensor([[[0.0, 1], [0, 1], [0, 1], [0, 1]]], dtype=torch.bfloat16)
    found = cross_entropy(logits, three_targets)
    assert found.dtype == torch.float32
    assert found[0].item() == pytest.approx(math.log(1 + math.e), rel=1e-6)


def test_one_row_of_logits_serves_all_targets(three_targets):
    row = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    assert cross_entropy_of_one(row, three_targets).tolist() == pytest.approx([math.log(4), math.log(4 / 3), math.log(4 / 3)])


def test_a_batch_without_targets_has_no_losses():
    none = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 4)
    logits = torch.zeros(1, 4, 2)
    assert cross_entropy(logits, none).shape == spliced_losses(logits, logits, none).kl.shape == (0,)


def test_loss_recovered_is_one_for_the_identity_zero_for_the_ablation_and_not_clamped():
    clean, ablated = torch.tensor(2.0), torch.tensor(6.0)
    assert [loss_recovered(clean, torch.tensor(ce), ablated).item() for ce in (2.0, 3.0, 6.0, 8.0, 1.0)] == [1, 0.75, 0, -0.5, 1.25]


def test_metrics_come_from_totals():
    def tensor(value):
        return torch.tensor(value, dtype=torch.float64)

    names = SiteSums.__dataclass_fields__
    losses = {"targets": 10, "ce_clean": 20, "ce_zero": 60, "ce_mean": 40, "ce_zero_all_rows": 100, "ce_mean_all_rows": 120}
    site = SiteSums(**{name: tensor(float(losses.get(name, 0))) for name in names})
    run = RunSums(**{name: tensor({"ce_spliced": 25.0, "kl": 4.0}.get(name, 0.0)) for name in RunSums.__dataclass_fields__})
    found = {name: value.item() for name, value in vars(splice_metrics(site, run)).items()}
    assert found == pytest.approx(
        {
            "ce_clean": 2,
            "ce_spliced": 2.5,
            "ce_zero": 6,
            "ce_mean": 4,
            "ce_zero_all_rows": 10,
            "ce_mean_all_rows": 12,
            "delta_ce": 0.5,
            "kl": 0.4,
            "loss_recovered": 1 - 5 / 40,
            "loss_recovered_mean": 1 - 5 / 20,
            "loss_recovered_all_rows": 1 - 5 / 80,
            "loss_recovered_mean_all_rows": 1 - 5 / 100,
        }
    )
