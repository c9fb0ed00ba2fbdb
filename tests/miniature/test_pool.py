"""Pictures in memory: taken up while they are drawn, each with its own captions."""

import numpy as np
import pytest
import torch

from miniature import pictures
from miniature.pictures import chunk_indices, chunk_paths, is_pair
from miniature.pool import PicturePool, Rows


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that "draws" a chunk of four singles and a pair; what is in a picture and its tokens is its number."""
    monkeypatch.setattr("miniature.pool.LOOK_EVERY", -1.0)

    def draw(chunk: int) -> None:
        for pairs, width in ((True, 16), (False, 8)):
            numbers = np.array([chunk * 10 + i for i in range(1 if pairs else 4)], np.uint8)
            pixels, tokens = chunk_paths(tmp_path, chunk, pairs)
            np.save(pixels, np.ones((len(numbers), 8, width, 3), np.uint8) * numbers[:, None, None, None])
            np.save(
                tokens,
                (numbers.astype(int)[:, None, None] * 100 + np.arange(3)[:, None] + np.zeros(77)).astype(np.uint16),
            )

    return tmp_path, draw


def test_a_pool_grows_and_keeps_pictures_with_their_captions(drawn):
    folder, draw = drawn
    draw(0)
    pool = PicturePool(folder, "cpu", lambda pixels: pixels.float().mean((1, 2, 3)))
    pool.grow()
    assert len(pool) == 5
    draw(1)
    draw(2)
    while len(pool) < 15:
        pool.grow(1)
    generator = torch.Generator().manual_seed(0)
    for pairs, there in ((False, {0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23}), (True, {0, 10, 20})):
        kept, tokens = pool.batch(200, generator, pairs)
        assert set(kept.tolist()) == there and tokens.shape == (200, 77)
        assert torch.equal(tokens[:, 0] // 100, kept.long())
        assert set((tokens[:, 0] % 100).tolist()) == {0, 1, 2}


def test_a_pool_of_singles_stops_at_its_size(drawn):
    folder, draw = drawn
    draw(0)
    pool = PicturePool(folder, "cpu", lambda pixels: pixels, kinds=(False,), most=4)
    pool.grow()
    draw(1)
    pool.grow()
    assert len(pool) == 4


def test_rows_grow():
    rows = Rows()
    for start in range(0, 40, 4):
        rows.add(torch.arange(start, start + 4))
    assert rows.count == 40 and torch.equal(rows[torch.arange(40)], torch.arange(40))


def test_a_chunk_is_drawn_with_its_captions(tmp_path):
    pictures._render_chunk(tmp_path, 0, 2, 10)
    assert pictures.drawn_chunks(tmp_path) == [0]
    from miniature.text import load_tokenizer, tokenize

    for pairs in (False, True):
        pixels, tokens = (np.load(path) for path in chunk_paths(tmp_path, 0, pairs))
        assert len(pixels) == len(tokens) == len(chunk_indices(0, pairs, 10))
        index = chunk_indices(0, pairs, 10)[0]
        assert is_pair(index) == pairs
        picture, caption = pictures.training_picture(index, draw_index=1)
        assert np.array_equal(pixels[0], picture)
        assert np.array_equal(tokens[0, 1], tokenize(load_tokenizer(), [caption])[0].numpy())
