from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gsae.evaluate.sums import Sums, definitions, find_membership


@dataclass(frozen=True)
class TwoSums(Sums):
    rows: Tensor
    offset: Tensor


def test_values_add_up_within_their_block_and_padding_in_none():
    blocks = torch.tensor([[4, 4, 2], [2, -1, -1]])
    membership = find_membership(blocks)
    assert membership.blocks.tolist() == [2, 4]
    values = TwoSums(torch.tensor([1.0, 2, 4, 8, 16, 32]).double(), torch.arange(12.0).double().view(6, 2))
    sums = values.by_block(membership.matrix)
    assert sums.rows.tolist() == [12, 3]  # 4 + 8 of block 2; 1 + 2 of block 4
    assert sums.offset.tolist() == [[10, 12], [2, 4]]  # rows (4, 5) + (6, 7); (0, 1) + (2, 3)


def test_batches_add_to_their_blocks_only():
    part = TwoSums(torch.tensor([1.0, 2.0]).double(), torch.tensor([[1.0], [2.0]]).double())
    sums = part.zeros(4)
    sums.add(torch.tensor([3, 1]), part)
    sums.add(torch.tensor([1, 0]), part)
    assert sums.rows.tolist() == [2, 3, 0, 1]
    assert sums.total().rows.item() == 6
    assert sums.total().offset.tolist() == [6]


def test_a_draw_weights_blocks():
    sums = TwoSums(torch.tensor([1.0, 10.0]).double(), torch.tensor([[1.0, 0], [0, 10]]).double())
    drawn = sums.drawn(torch.tensor([[2.0, 0], [1, 1]]).double())
    assert drawn.rows.tolist() == [2, 11]
    assert drawn.offset.tolist() == [[2, 0], [1, 10]]


def test_a_definition_stands_at_its_field():
    @dataclass(frozen=True)
    class Metrics:
        l0: Annotated[float, "features on"]

    assert definitions(Metrics) == {"l0": "features on"}
