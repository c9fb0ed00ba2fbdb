"""Learned embeddings: only the chosen tokens' vectors change, and the module is as before."""

import pytest
import torch
from torch import nn

from benchmarks.common.textual_inversion import learned_embeddings

TOKENS = torch.tensor([[0, 3, 2, 3]])


def test_only_the_chosen_tokens_are_learned():
    module = nn.Embedding(5, 4).requires_grad_(False)
    plain = module(TOKENS)
    with learned_embeddings(module, [3, 4], initializer=1) as learned:
        assert [vector.tolist() for vector in learned] == [module.weight[1].tolist()] * 2
        vectors = module(TOKENS)
        assert torch.equal(vectors[0, [0, 2]], plain[0, [0, 2]])
        assert torch.equal(vectors[0, 1], learned[0]) and torch.equal(vectors[0, 3], learned[0])
        vectors.sum().backward()
        assert torch.equal(learned[0].grad, torch.full((4,), 2.0))
        assert not learned[1].grad.any()
    assert torch.equal(module(TOKENS), plain)


def test_an_error_puts_the_module_back():
    module = nn.Embedding(5, 4)
    with pytest.raises(KeyboardInterrupt), learned_embeddings(module, [3], initializer=1):
        raise KeyboardInterrupt
    assert not module._forward_hooks
