"""The algebra on the core equals the algebra on the full matrices."""

from dataclasses import replace

import pytest
import torch

from hdb_core.adapters import Adapters
from hdb_core.basis import BasisRecipe
from hdb_core.errors import LayoutError, LiDBError
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import (
    About,
    LiDB,
    aligned,
    blend,
    core,
    cosine,
    cosines,
    delta_weight,
    expand,
    extend,
    inner,
    is_finite,
    norm,
    start_down,
    truncate,
    weighted_sum,
)
from hdb_core.recommended import FROM_PHOTO, FROM_PREDICTION, Strengths

close = torch.testing.assert_close
EXACT = {"atol": 2e-4, "rtol": 1e-5}


@pytest.fixture(params=[(12, 8), (28, 26)], ids=["basis", "narrow_layers"])
def recipe(request):
    return BasisRecipe(3, *request.param)  # the second is wider than the text layers


def dense(lidb):
    return [delta_weight(lidb, i) for i in range(len(lidb.layout.layers))]


def flat(lidb):
    return torch.cat([weight.flatten() for weight in dense(lidb)])


@pytest.mark.parametrize("rank", [1, 3])
def test_inner_products_norms_and_cosines(make_lidb, rank):
    a, b = make_lidb(0, rank), make_lidb(1, rank + 1)
    close(inner(a, b), torch.stack([(x * y).sum() for x, y in zip(dense(a), dense(b), strict=True)]), **EXACT)
    close(norm(a), flat(a).norm(), **EXACT)
    close(cosine(a, b), torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0), **EXACT)
    close(cosine(a, a), torch.ones_like(norm(a)), **EXACT)
    close(norm(a), core(a).norm(), **EXACT)


def test_expand_gives_the_factors_of_delta_weight(make_lidb):
    lidb = make_lidb(0, 3)
    factors = expand(lidb)
    assert list(factors) == [layer.name for layer in lidb.layout.layers]
    for layer, weight in zip(lidb.layout.layers, dense(lidb), strict=True):
        up, down = factors[layer.name]
        assert up.shape == (layer.out_features, 3) and down.shape == (3, layer.in_features)
        close(up @ down, weight)


def test_adapters_of_another_basis_or_model_are_refused(make_lidb):
    lidb = make_lidb(0, 3)
    fewer = replace(lidb.layout, layers=lidb.layout.layers[:-1])
    for recipe, layout in ((replace(lidb.basis, seed=lidb.basis.seed + 1), lidb.layout), (lidb.basis, fewer)):
        with pytest.raises(LiDBError, match=r"of another basis or model .*Make Adapters\("):
            expand(lidb, Adapters(recipe, layout))
    assert expand(lidb, Adapters(lidb.basis, lidb.layout)).keys() == expand(lidb).keys()


def test_truncation_is_the_best_approximation(make_lidb):
    lidb = make_lidb(0, 4)
    shorter = truncate(lidb, 2)
    assert shorter.rank == 2
    for weight, approximation in zip(dense(lidb), dense(shorter), strict=True):
        u, s, vh = torch.linalg.svd(weight)
        close(approximation, (u[:, :2] * s[:2]) @ vh[:2], **EXACT)


def test_canonical_form_keeps_the_person_and_forgets_the_factors(make_lidb):
    lidb = make_lidb(0, 3)
    mixed = LiDB(lidb.layout, lidb.basis, lidb.down * -7, lidb.up / -7)
    canonical, other = truncate(lidb, 3), truncate(mixed, 9)
    close(flat(canonical), flat(lidb), **EXACT)
    close(canonical.down, other.down)
    close(canonical.up, other.up)
    close(canonical.down.norm(dim=2), canonical.up.norm(dim=1))
    assert (canonical.down.norm(dim=2).diff(dim=1) <= 0).all()


def test_a_zero_person_has_a_canonical_form(make_lidb):
    lidb = make_lidb(0, 2)
    zero = truncate(LiDB(lidb.layout, lidb.basis, lidb.down, torch.zeros_like(lidb.up)), 1)
    assert zero.up.isfinite().all() and zero.down.isfinite().all()
    assert norm(zero) < 1e-12
    assert cosine(zero, lidb) == 0


def test_weighted_sums(make_lidb):
    a, b = make_lidb(0, 2), make_lidb(1, 1)
    total = weighted_sum([a, b], [0.25, -2.0])
    assert total.rank == 3
    close(flat(total), 0.25 * flat(a) - 2.0 * flat(b), **EXACT)
    close(flat(weighted_sum([a, b], [0.25, -2.0], rank=2)), flat(truncate(total, 2)), **EXACT)


def more_layers(layout):
    extra = Layer("unet.up_blocks.0.resnets.0.conv1", 36, 5)
    return Layout(layout.family, (layout.layers[0], extra, *layout.layers[1:]))


def test_a_person_on_more_layers_is_the_same(make_lidb):
    lidb = make_lidb(0, 2)
    wider = extend(lidb, more_layers(lidb.layout))
    assert wider.layout.has_convolutions and not lidb.layout.has_convolutions
    close(delta_weight(wider, 0), delta_weight(lidb, 0))
    assert not delta_weight(wider, 1).any() and wider.down[1].any()
    close(delta_weight(wider, 2), delta_weight(lidb, 1))
    assert extend(wider, wider.layout) is wider
    with pytest.raises(LayoutError, match="another model"):
        extend(wider, lidb.layout)
    part = LiDB(Layout("sd1", lidb.layout.layers[:8]), lidb.basis, lidb.down[:8], lidb.up[:8])
    with pytest.raises(LayoutError, match="The connected MODEL was made for another model"):
        extend(part, lidb.layout)


def test_a_sum_has_the_layers_of_the_one_with_most(make_lidb):
    a, b = make_lidb(0, 2), make_lidb(1, 1)
    wider = extend(a, more_layers(a.layout))
    for total in (weighted_sum([wider, b], [0.5, 2.0]), weighted_sum([b, wider], [2.0, 0.5])):
        assert total.layout == wider.layout
        close(delta_weight(total, 2), 0.5 * delta_weight(a, 1) + 2.0 * delta_weight(b, 1))


def test_a_sum_of_many_stays_exact_at_full_rank(make_lidb):
    people = [make_lidb(seed, 3) for seed in range(12)]
    total = weighted_sum(people, [1.0] * 12)
    assert total.rank == total.basis.max_rank < 36
    close(flat(total), sum(flat(p) for p in people), **EXACT)


def test_gradients_flow_into_both_factors(make_lidb):
    lidb = make_lidb(0, 2)
    lidb.down.requires_grad_(), lidb.up.requires_grad_()
    tracked = LiDB(lidb.layout, lidb.basis, lidb.down, lidb.up)
    delta_weight(tracked, 1).square().sum().backward()
    for factor in (lidb.down, lidb.up):
        assert factor.grad[1].abs().sum() > 0
        assert factor.grad[0].abs().sum() == 0


def test_start_down_is_orthonormal_and_has_no_effect_beyond_narrow_layers():
    layout = Layout("sd1", (Layer("unet.a", 40, 30), Layer("unet.b", 2, 30)))
    start = start_down(BasisRecipe(0, 12, 8), layout, 3)
    close(start[0] @ start[0].T, torch.eye(3))
    close(start[1] @ start[1].T, torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_memory_is_that_of_the_factors(make_lidb):
    lidb = make_lidb(0, 2)
    assert lidb.get_ram_usage() == 4 * lidb.num_values
    assert lidb.num_values == len(lidb.layout.layers) * 2 * (lidb.basis.down_dim + lidb.basis.up_dim)


@pytest.mark.parametrize("shapes", [((16, 2, 12), (16, 8, 3)), ((16, 0, 12), (16, 8, 0)), ((15, 2, 12), (15, 8, 2))])
def test_shapes_that_do_not_fit_are_refused(toy, shapes):
    down, up = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(LiDBError, match="Expected down"):
        LiDB(toy.layout, BasisRecipe(0, 12, 8), down, up)


def test_strangers_are_refused(make_lidb):
    lidb = make_lidb(0, 1)
    other_basis = LiDB(lidb.layout, BasisRecipe(9, lidb.basis.down_dim, lidb.basis.up_dim), lidb.down, lidb.up)
    fewer = Layout(lidb.layout.family, lidb.layout.layers[1:])
    other_model = LiDB(fewer, lidb.basis, lidb.down[1:], lidb.up[1:])
    with pytest.raises(LiDBError, match=r"different bases .*; a random basis of .* with seed 9"):
        cosine(lidb, other_basis)
    with pytest.raises(LiDBError, match="different models"):
        weighted_sum([lidb, other_model], [1.0, 1.0])
    with pytest.raises(LiDBError, match="one weight"):
        weighted_sum([lidb], [])
    with pytest.raises(LiDBError, match="at least 1"):
        truncate(lidb, 0)
    with pytest.raises(LiDBError, match="at least 1"):
        weighted_sum([lidb], [1.0], rank=0)


@pytest.mark.parametrize(("share", "larger"), [(0.25, "first"), (0.5, "first"), (0.75, "second")])
def test_a_blend_is_applied_as_its_persons_are(make_lidb, share, larger):
    one, other = (
        replace(make_lidb(seed, 2), about=About(made_from, token=token, name=token, strengths=strengths))
        for seed, made_from, token, strengths in (
            (0, FROM_PHOTO, "first", Strengths(0.2, 0.4, 4.0)),
            (1, FROM_PREDICTION, "second", Strengths(1.0, 0.8, 2.0)),
        )
    )
    both = blend(one, other, share)
    close(core(both), (1 - share) * core(one) + share * core(other), **EXACT)
    assert both.about.strengths == pytest.approx((0.2 + 0.8 * share, 0.4 + 0.4 * share, 4 - 2 * share))
    made_from = FROM_PHOTO if larger == "first" else FROM_PREDICTION
    assert (both.about.made_from, both.about.token, both.about.name) == (made_from, larger, "")


def test_cosines_of_blocks_are_those_of_the_full_matrices(make_lidb):
    a, b = make_lidb(0, 2), make_lidb(1, 3)
    text = torch.tensor([layer.is_text for layer in b.layout.layers])
    found = cosines(a, b)
    assert list(found) == sorted({layer.block for layer in a.layout.layers})
    for name, value in found.items():
        own = [i for i, layer in enumerate(a.layout.layers) if layer.block == name]
        one, other = (torch.cat([delta_weight(lidb, i).flatten() for i in own]) for lidb in (a, b))
        assert value == pytest.approx(float(torch.nn.functional.cosine_similarity(one, other, dim=0)), abs=1e-4)
    assert cosines(a, a) == pytest.approx(dict.fromkeys(found, 1.0))
    untrained = replace(b, up=b.up * ~text[:, None, None])
    assert "text encoder" in found and "text encoder" not in cosines(a, untrained)


@pytest.mark.parametrize("shares", [(1 / 2, 1 / 3), (0.3, 0.9, 0.25), (0.5, 1 / 3, 1 / 4)])
def test_a_chain_of_blends_is_the_weighted_sum_of_all(make_lidb, shares):
    """So a blend of more than two needs no node of its own: the n-th person of equal ones has the share 1/n."""
    people = [make_lidb(seed, 1) for seed in range(len(shares) + 1)]
    people = [
        replace(p, about=replace(p.about, strengths=Strengths(0.1 * i, 0.2, 1 + i))) for i, p in enumerate(people)
    ]
    weights, chained = [1.0], people[0]
    for share, person in zip(shares, people[1:], strict=True):
        weights = [(1 - share) * weight for weight in weights] + [share]
        chained = blend(chained, person, share)
    close(core(chained), sum(w * core(p) for w, p in zip(weights, people, strict=True)), **EXACT)
    assert chained.about.strengths.guidance == pytest.approx(sum(w * (1 + i) for i, w in enumerate(weights)))
    if shares == (1 / 2, 1 / 3):
        assert weights == pytest.approx([1 / 3] * 3)


def test_persons_with_and_without_convolutions_are_compared(make_lidb):
    small = make_lidb(0)
    layout = Layout("sd1", (*small.layout.layers, Layer("unet.down_blocks.0.resnets.0.conv1", 288, 32)))
    wide = extend(small, layout)
    for pair in ((small, wide), (wide, small)):
        one, other = aligned(pair)
        assert one.layout == other.layout == layout
        assert float(cosine(one, other)) == pytest.approx(1)
    with pytest.raises(LiDBError, match="different models"):
        aligned(
            [
                small,
                replace(small, layout=Layout("sd1", small.layout.layers[:-1]), down=small.down[:-1], up=small.up[:-1]),
            ]
        )


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e10, 1e17])
def test_weak_and_strong_people_are_compared_as_others_are(make_lidb, scale):
    one = make_lidb(0)
    other = replace(one, down=one.down * scale, up=-one.up * scale)
    assert is_finite(other)
    for pair in ((one, other), (other, other)):
        sign = 1 if pair[0] is other else -1
        assert float(cosine(*pair)) == pytest.approx(sign, abs=1e-3)
        assert set(cosines(*pair)) == set(cosines(one, one))
        assert list(cosines(*pair).values()) == pytest.approx([sign] * len(cosines(one, one)), abs=1e-3)
