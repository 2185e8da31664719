"""Adapters as values: sums are exact, cuts are optimal, and what has no answer is refused with its reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from adapters import answers_of, load, logits_of, random_adapter, updates, write_random
from layers import relative_difference
from peft import PeftModel
from peft.utils import merge_utils
from tiny import tiny_base

from lora_cli.errors import DivergedError, ModelError, RecipeError
from lora_cli.lora import sparse
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.algebra import METHODS, How, Term, compose, plain_config, resize, spectra
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import generator_for
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.ranks import by_budget, by_energy, by_number
from lora_cli.lora.switch import switch

EXACT = 1e-6
DENSE = [name for name, method in METHODS.items() if method.combine]

# What may differ between two adapters of one base: nothing of it may matter
OTHERS = {
    "another rank": {"r": 7, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 9},
    "other targets": {"targets": "o"},
    "patterns": {"rank_pattern": {r"(h|layers)\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 5}},
    "ranks above the width": {"r": 30},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: tiny_base(tmp_path_factory.mktemp(name) / "base", name) for name in ("llama", "gpt2", "llama-tied")}


def other(base, name: str, **settings) -> Adapter:
    settings = {"targets": "all-linear", "seed": 2} | OTHERS[name] | settings
    return random_adapter(base, **settings)


def weighted(adapters, weights) -> dict[str, torch.Tensor]:
    """Σ wᵢ ΔWᵢ, the plain way."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, update in updates(adapter).items():
            total[path] = total.get(path, 0) + weight * update
    return total


def assert_same_updates(found: Adapter, expected: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    got = updates(found)
    assert got.keys() == expected.keys()
    for path in expected:
        assert relative_difference(got[path], expected[path]) <= tolerance, path


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.5)])
@pytest.mark.parametrize("name", OTHERS)
def test_the_linear_sum_is_the_sum_of_the_updates(name, weights, bases):
    adapters = [random_adapter(bases["llama"]), other(bases["llama"], name)]

    found, fits = compose([Term(a, w) for a, w in zip(adapters, weights, strict=True)])

    assert_same_updates(found, weighted(adapters, weights))
    assert all(fit.error < 1e-6 for fit in fits.values())


@pytest.mark.parametrize("base", ["llama", "gpt2", "llama-tied"])
def test_the_model_with_the_sum_answers_as_with_both_updates_in_its_weights(base, bases):
    head = ["lm_head"] if base == "llama-tied" else []
    adapters = [random_adapter(bases[base]), other(bases[base], "rslora", targets=["c_attn|q_proj", *head])]
    model = load(bases[base])
    with torch.no_grad():
        for path, update in weighted(adapters, (0.5, -1.5)).items():
            layer = model.get_submodule(path)
            stored = update.float().T if base == "gpt2" else update.float()
            layer.weight = torch.nn.Parameter(layer.weight + stored)

    found, _ = compose([Term(adapters[0], 0.5), Term(adapters[1], -1.5)])

    for got, expected in zip(logits_of(bases[base], found), answers_of(model), strict=True):
        assert relative_difference(got, expected) <= 5e-6


def test_three_can_be_added_and_the_order_does_not_matter(bases):
    adapters = [random_adapter(bases["llama"]), *(other(bases["llama"], name) for name in ("rslora", "other targets"))]

    forward, _ = compose([Term(a) for a in adapters])
    backward, _ = compose([Term(a) for a in reversed(adapters)])

    assert_same_updates(forward, updates(backward))


def test_a_rank_never_grows_above_the_width_of_its_weight(bases):
    found, fits = compose(
        [Term(random_adapter(bases["llama"], r=20)), Term(random_adapter(bases["llama"], r=30, seed=2))]
    )

    ranks = {path: len(factors.A) for path, factors in found.layers.items()}
    assert ranks["model.layers.0.self_attn.k_proj"] == 16  # [16, 32]
    assert ranks["model.layers.0.self_attn.q_proj"] == 32
    assert all(fit.error < 1e-6 for fit in fits.values())


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_a_sum_cut_to_a_rank_is_the_best_of_that_rank(method, bases):
    adapters = [random_adapter(bases["llama"]), other(bases["llama"], "another rank")]

    found, fits = compose([Term(a) for a in adapters], How(method, r=5))

    for path, update in weighted(adapters, (1, 1)).items():
        S = torch.linalg.svdvals(update)
        assert len(found.layers[path].A) == 5
        assert torch.linalg.norm(update - updates(found)[path]) == pytest.approx(S[5:].norm().item(), rel=1e-4)
        assert fits[path].error == pytest.approx((S[5:].norm() / S.norm()).item(), rel=1e-6)


def test_svd_keeps_the_largest_rank_of_one_unless_told(bases):
    found, _ = compose([Term(random_adapter(bases["llama"])), Term(other(bases["llama"], "another rank"))], How("svd"))

    assert {len(factors.A) for factors in found.layers.values()} == {7}


def test_an_adapter_minus_itself_does_nothing(bases):
    adapter = random_adapter(bases["llama"])

    found, _ = compose([Term(adapter, 1.0), Term(adapter, -1.0)])

    with pytest.raises(DivergedError):
        found.check_alive()


def test_a_weight_of_zero_leaves_an_adapter_out(bases):
    adapter = random_adapter(bases["llama"], "q")

    found, _ = compose([Term(adapter), Term(other(bases["llama"], "rslora"), 0.0)])

    assert_same_updates(found, updates(adapter))
    found.check_fits(load(bases["llama"]))


def pair_of_updates() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(12, 20, generator=generator) for _ in range(3)]


def ties_by_hand(matrices, weights, density) -> torch.Tensor:
    """Entry by entry, as algorithm 1 of the paper says it."""
    kept = int(density * matrices[0].numel())
    trimmed = []
    for matrix, weight in zip(matrices, weights, strict=True):
        least = matrix.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append([weight * x if abs(x) >= least else 0.0 for x in matrix.flatten().tolist()])
    merged = []
    for entries in zip(*trimmed, strict=True):
        total = sum(entries)
        agree = [x for x in entries if x * total > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged).view_as(matrices[0])


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.3, 1.2), (1, -1, 0.5)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers_algorithm(weights, density):
    found = sparse.ties(pair_of_updates(), weights, density)

    torch.testing.assert_close(found, ties_by_hand(pair_of_updates(), weights, density))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_and_magnitude_are_pefts_where_all_weigh_the_same(density):
    """With other weights PEFT elects the signs without them, so that a negative weight votes for what it takes off."""
    matrices, weights = pair_of_updates(), torch.tensor([0.7, 0.7, 0.7])

    torch.testing.assert_close(
        sparse.ties(matrices, weights.tolist(), density), merge_utils.ties(matrices, weights, density)
    )
    torch.testing.assert_close(
        sparse.magnitude(matrices, [0.2, -1.0, 3.0], density),
        merge_utils.magnitude_prune(matrices, torch.tensor([0.2, -1.0, 3.0]), density),
    )


# Ours and PEFT's word for it where the two define the same; PEFT's other types act on A and B apart
SAME_IN_PEFT = {
    "linear": ("cat", How("linear"), (0.7, -0.4)),
    "linear cut": ("svd", How("linear", r=5), (0.7, -0.4)),
    "svd": ("svd", How("svd", r=5), (0.7, -0.4)),
    "ties": ("ties_svd", How("ties", r=16, density=0.3), (0.7, 0.7)),
    "magnitude": ("magnitude_prune_svd", How("magnitude", r=16, density=0.3), (0.7, -0.4)),
    "dare": ("dare_linear_svd", How("dare", r=16, density=1.0), (0.7, -0.4)),  # of less, each draws its own
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1:UserWarning")
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("case", SAME_IN_PEFT)
def test_what_peft_makes_of_the_same_adapters_is_what_we_make(case, base, bases, tmp_path):
    """`add_weighted_adapter` on two adapters of different ranks, scales and targets."""
    theirs, how, weights = SAME_IN_PEFT[case]
    one = write_random(tmp_path / "a", bases[base], r=6)
    two = write_random(tmp_path / "b", bases[base], "qo", r=3, use_rslora=True, seed=2)
    model = PeftModel.from_pretrained(load(bases[base]), one, adapter_name="a")
    model.load_adapter(two, "b")
    r = {"svd_rank": how.r} if how.r else {}
    model.add_weighted_adapter(["a", "b"], list(weights), "ab", combination_type=theirs, density=how.density, **r)

    terms = [Term(load_adapter(folder), weight) for folder, weight in zip((one, two), weights, strict=True)]
    found, _ = compose(terms, how)

    for path, update in updates(found).items():
        layer = model.base_model.model.get_submodule(path)
        delta = layer.get_delta_weight("ab").detach()
        assert relative_difference(update, delta.T if layer.fan_in_fan_out else delta) <= 2e-5, path


def test_dare_drops_by_its_seed_and_keeps_the_mean():
    [update, *_] = pair_of_updates()
    large = update.repeat(40, 40)

    found = sparse.dare([large], [1.0], 0.25, generator_for(0, "x"))
    again = sparse.dare([large], [1.0], 0.25, generator_for(0, "x"))
    other_seed = sparse.dare([large], [1.0], 0.25, generator_for(1, "x"))

    assert torch.equal(found, again)
    assert not torch.equal(found, other_seed)
    kept = found != 0
    assert kept.double().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(found[kept], 4 * large[kept])


@pytest.mark.parametrize("method", DENSE)
def test_dense_methods_say_how_far_the_rank_leaves_them_from_their_combination(method, bases):
    adapters = [random_adapter(bases["gpt2"]), other(bases["gpt2"], "rslora")]
    terms = [Term(adapters[0], 0.6), Term(adapters[1], 0.4)]

    found, fits = compose(terms, How(method, r=6, density=0.3, seed=4))

    for path, factors in found.layers.items():
        dense = [update.float() for update in (updates(adapters[0])[path], updates(adapters[1])[path])]
        exact = METHODS[method].combine(dense, [0.6, 0.4], 0.3, generator_for(4, path)).double()
        S = torch.linalg.svdvals(exact)
        assert fits[path].norm == pytest.approx(exact.norm().item(), rel=1e-4)
        assert fits[path].error == pytest.approx((S[6:].norm() / S.norm()).item(), rel=1e-3)
        missed = torch.linalg.norm(exact - factors.B.double() @ factors.A.double()) / exact.norm()
        assert fits[path].error == pytest.approx(missed.item(), rel=1e-3)


@pytest.mark.parametrize("method", DENSE)
def test_dense_methods_that_keep_everything_and_rank_enough_are_the_sum_or_the_mean(method, bases):
    """With one adapter there is nothing to elect: each gives that adapter back."""
    adapter = other(bases["llama"], "patterns")

    found, fits = compose([Term(adapter)], How(method, density=1.0))

    assert_same_updates(found, updates(adapter), tolerance=1e-5)
    assert max(fit.error for fit in fits.values()) < 1e-5


def dora(base, targets: str, seed: int = 1) -> Adapter:
    return random_adapter(base, targets, seed=seed, use_dora=True, use_rslora=True)


def test_doras_of_different_modules_stand_side_by_side(bases):
    q, v = dora(bases["llama"], "q"), dora(bases["llama"], "v", seed=2)
    model = load(bases["llama"])
    with torch.no_grad():
        for adapter in (q, v):
            for path, factors in adapter.layers.items():
                layer = model.get_submodule(path)
                layer.weight.copy_(factors.merge_into(layer.weight, adapter.config.at(path).scale))

    found, _ = compose([Term(q), Term(v)])

    for got, expected in zip(logits_of(bases["llama"], found), answers_of(model), strict=True):
        assert relative_difference(got, expected) <= 5e-6


def whole_weights(base, adapter: Adapter) -> dict[str, torch.Tensor]:
    """W of every module with the adapter in it, float64."""
    model = load(base)
    return {
        path: factors.merge_into(model.get_submodule(path).weight, adapter.config.at(path).scale).detach().double()
        for path, factors in adapter.layers.items()
    }


def own_weights(base) -> Callable[[str], torch.Tensor]:
    model = load(base)
    return lambda path: model.get_submodule(path).weight.detach()


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (1.5, -0.6)])
@pytest.mark.parametrize("second", ["dora", "plain"])
def test_doras_and_plain_adapters_on_the_same_modules_are_added_exactly(second, weights, bases):
    """W + Σ wᵢ (Wᵢ − W), of which each row is scaled otherwise, is again a DoRA."""
    base, own = bases["llama"], own_weights(bases["llama"])
    first = dora(base, "qv")
    other = dora(base, "q", seed=2) if second == "dora" else random_adapter(base, "qo", seed=2)

    found, fits = compose([Term(first, weights[0]), Term(other, weights[1])], own=own)

    assert found.config.use_dora
    one, two = whole_weights(base, first), whole_weights(base, other)
    for path, W in whole_weights(base, found).items():
        before = own(path).double()
        expected = before + sum(w * (x[path] - before) for w, x in zip(weights, (one, two), strict=True) if path in x)
        assert relative_difference(W, expected) <= EXACT
        assert fits[path].norm == pytest.approx((expected - before).norm().item(), rel=1e-4)
        assert fits[path].error < 1e-6


def test_a_cut_of_a_dora_keeps_its_gains_and_misses_the_least(bases):
    """What a rank leaves out of diag(g) W + N is what it leaves out of N, by Eckart and Young."""
    base, own = bases["llama"], own_weights(bases["llama"])
    adapter = random_adapter(base, "qv", r=8, use_dora=True)

    for found, fits in (
        resize(adapter, lambda spectra: by_number(spectra, 3), own),
        compose([Term(adapter)], How("svd", r=3), own=own),
    ):
        cut, whole = whole_weights(base, found), whole_weights(base, adapter)
        for path, W in whole.items():
            before = own(path).double()
            gain = adapter.layers[path].magnitude.double() / (before + updates(adapter)[path]).norm(dim=1)
            S = torch.linalg.svdvals(gain.unsqueeze(1) * updates(adapter)[path])
            assert len(found.layers[path].A) == 3
            assert (cut[path] - W).norm() == pytest.approx(S[3:].norm().item(), rel=1e-4)
            assert fits[path].error == pytest.approx((S[3:].norm() / (W - before).norm()).item(), rel=1e-4)


@pytest.mark.parametrize("method", DENSE)
def test_what_is_thinned_out_of_doras_is_the_update_beside_their_gains(method, bases):
    base, own = bases["llama"], own_weights(bases["llama"])
    adapter = dora(base, "q")

    found, fits = compose([Term(adapter, 0.5)], How(method, density=1.0), own=own)

    for path, W in whole_weights(base, adapter).items():
        before = own(path).double()
        assert relative_difference(whole_weights(base, found)[path], before + 0.5 * (W - before)) <= 1e-5
        assert fits[path].error < 1e-5


def test_a_dora_minus_itself_changes_nothing(bases):
    adapter = dora(bases["llama"], "q")

    _, fits = compose([Term(adapter), Term(adapter, -1.0)], own=own_weights(bases["llama"]))

    assert {fit.norm for fit in fits.values()} == {0.0}


def test_without_the_base_doras_are_added_where_no_module_is_shared_and_else_refused(bases):
    base = bases["llama"]
    q, v, plain = dora(base, "q"), dora(base, "v", seed=2), random_adapter(base, "k")
    needs_base = "a DoRA scales the rows of the base, so that .* can't be added to or cut without the base's own weight"

    for terms, how in (
        ([Term(q), Term(q)], How()),
        ([Term(q), Term(v, 0.5)], How()),
        ([Term(q), Term(plain)], How()),
        ([Term(q), Term(v)], How("svd")),
        ([Term(q), Term(v)], How("ties")),
        ([Term(q), Term(v)], How("linear", r=2)),
    ):
        with pytest.raises(ModelError, match=needs_base) as error:
            compose(terms, how)
        assert error.value.problems[0].fix == "give the base with `--base`"
    with pytest.raises(ModelError, match=needs_base):
        resize(q, lambda spectra: by_number(spectra, 2))
    alone, _ = compose([Term(q, 1.0), Term(plain, 0.0)])
    assert alone.layers.keys() == q.layers.keys()


def test_a_row_that_the_weights_take_away_is_no_doras_any_more(bases):
    """g = 2 in every row, minus one of it: the base's rows are gone, and an update would be left in them."""
    base, own = bases["llama"], own_weights(bases["llama"])
    adapter = dora(base, "q")
    doubled = {
        path: replace(f, magnitude=2 * (own(path) + updates(adapter)[path]).norm(dim=1).float())
        for path, f in adapter.layers.items()
    }

    with pytest.raises(ModelError, match="loses 32 rows of the base with these weights, and keeps an update in them"):
        compose([Term(replace(adapter, layers=doubled), -1.0)], own=own)


def test_experts_have_no_magnitudes_and_so_no_dora_beside_them(tmp_path):
    base = tiny_base(tmp_path / "mixtral", "mixtral")
    terms = [Term(dora(base, "q")), Term(random_adapter(base, ["experts.down_proj"]))]

    with pytest.raises(ModelError, match="PEFT's format has no magnitudes for experts"):
        compose(terms, own=own_weights(base))


def with_head(adapter: Adapter) -> Adapter:
    extras = {"lm_head": {"weight": torch.full((320, 32), 0.5)}}
    return replace(adapter, config=replace(adapter.config, modules_to_save=("lm_head",)), extras=extras)


def test_a_module_trained_whole_comes_along_as_it_is_and_goes_when_its_adapter_is_switched_off(bases):
    base = bases["llama"]
    headed = with_head(random_adapter(base))

    found, _ = compose([Term(other(base, "rslora"), 0.5), Term(headed)])
    model = load(base)
    switch(model, found)
    with_it = answers_of(model)
    switch(model, None)

    assert found.config.modules_to_save == ("lm_head",)
    assert torch.equal(found.extras["lm_head"]["weight"], headed.extras["lm_head"]["weight"])
    assert all(row.std(dim=-1).max() < 1e-4 for row in with_it)  # all logits of a token are the same
    assert all(torch.equal(got, plain) for got, plain in zip(answers_of(model), logits_of(base), strict=True))
    small, _ = resize(found, lambda s: by_number(s, 2))
    assert small.extras == found.extras


def test_classifiers_are_averaged_and_those_of_other_labels_are_not(bases):
    """A head that is new has nothing in the base that it could be added to."""
    heads = [torch.full((2, 32), value) for value in (1.0, 3.0)]
    terms = [
        Term(replace(random_adapter(bases["llama"]), extras={"score": {"weight": W}}, labels=("no", "yes")), 0.5)
        for W in heads
    ]

    found, _ = compose(terms)

    assert torch.equal(found.extras["score"]["weight"], torch.full((2, 32), 2.0))
    assert found.labels == ("no", "yes")
    with pytest.raises(ModelError, match=r"the base has no score.weight, so what was trained of it can be averaged"):
        compose([replace(term, weight=1.0) for term in terms], read=lambda parameter: None)
    other = Term(replace(terms[1].adapter, labels=("a", "b")), 0.5, "other")
    with pytest.raises(ModelError, match="the classifiers know other labels"):
        compose([terms[0], other])


def test_adapters_of_different_tasks_are_not_added(bases):
    adapter = random_adapter(bases["llama"])
    classifier = replace(adapter, config=replace(adapter.config, task_type="SEQ_CLS"))

    with pytest.raises(RecipeError, match="different tasks: CAUSAL_LM, SEQ_CLS"):
        compose([Term(adapter), Term(classifier)])


@pytest.mark.parametrize("name", OTHERS)
def test_a_cut_to_the_rank_it_has_is_the_same_function(name, bases):
    adapter = other(bases["llama"], name)
    largest = max(len(svd.S) for svd in spectra(adapter).values())

    found, fits = resize(adapter, lambda s: by_number(s, largest))

    assert_same_updates(found, updates(adapter))
    assert max(fit.error for fit in fits.values()) < 1e-6


def test_a_cut_leaves_narrower_modules_as_they_are(bases):
    adapter = other(bases["llama"], "patterns")

    found, fits = resize(adapter, lambda s: by_number(s, 3))

    assert {path: len(f.A) for path, f in found.layers.items()} == {
        path: 2 if ".0." in path else 3 for path in found.layers
    }
    assert all((fit.error == 0) == (".0." in path) for path, fit in fits.items())


def test_a_rank_above_all_there_is_is_refused(bases):
    with pytest.raises(RecipeError, match="`--r 5` is above the adapter's largest rank, 4"):
        resize(random_adapter(bases["llama"]), lambda s: by_number(s, 5))


def test_an_energy_gives_each_module_the_fewest_terms_that_hold_it(bases):
    adapter = random_adapter(bases["llama"], r=12)

    found, fits = resize(adapter, lambda s: by_energy(s, 0.8))

    for path, svd in spectra(adapter).items():
        r = len(found.layers[path].A)
        assert fits[path].error ** 2 <= 0.2 + 1e-9 < svd.error(r - 1) ** 2
    assert len({len(factors.A) for factors in found.layers.values()}) > 1


def test_a_budget_is_kept_and_spent_where_it_holds_most(bases):
    adapter = random_adapter(bases["llama"], r=12)
    whole = sum(s.norm**2 for s in spectra(adapter).values())

    found, fits = resize(adapter, lambda s: by_budget(s, 4000))
    even, even_fits = resize(adapter, lambda s: by_number(s, 3))

    def missed(fits):
        return sum((fit.error * fit.norm) ** 2 for fit in fits.values()) / whole

    assert even.parameters <= found.parameters <= 4000
    assert 4000 - found.parameters < 32 + 16  # the cheapest module's next term does not fit
    assert missed(fits) < missed(even_fits)


def test_a_budget_below_rank_1_is_refused(bases):
    with pytest.raises(RecipeError, match="the budget allows 100 parameters, and rank 1 on these modules has"):
        resize(random_adapter(bases["llama"]), lambda s: by_budget(s, 100))


RANKS = {
    "model.layers.0.q": 4, "model.layers.1.q": 4, "model.layers.10.q": 8, "model.layers.0.v": 2, "model.layers.1.v": 2,
    "model.layers.10.v": 2, "q": 16, "x.q": 5,
}  # fmt: skip


def test_patterns_give_every_module_its_rank_and_a_scale_of_1():
    like = LoRAConfig(
        r=3, lora_alpha=7, target_modules=("q",), use_rslora=True, rank_pattern={"v": 9}, lora_dropout=0.1
    )

    config = plain_config(RANKS, like=like, targets=["q", "v"])

    assert {path: config.at(path).r for path in RANKS} == RANKS
    assert {config.at(path).scale for path in RANKS} == {1.0}
    assert config.lora_dropout == 0


def test_any_sequence_of_switches_answers_as_a_fresh_load_and_leaves_the_base_bit_for_bit(bases):
    base = bases["gpt2"]
    adapters = {
        "a": random_adapter(base),
        "b": other(base, "rslora", targets="o"),
        "d": random_adapter(base, seed=5, use_dora=True),
        None: None,
    }
    fresh = {name: logits_of(base, adapter) for name, adapter in adapters.items()}
    model = load(base)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}

    for name in ("a", "b", "a", None, "d", "a", "d", "b", None, None):
        switch(model, adapters[name])
        for got, expected in zip(answers_of(model), fresh[name], strict=True):
            assert torch.equal(got, expected)

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], W) for name, (place, W) in before.items())


def test_an_adapter_that_does_not_fit_leaves_the_bare_base(bases):
    model = load(bases["gpt2"])
    switch(model, random_adapter(bases["gpt2"]))
    misfit = Adapter(
        LoRAConfig(r=1, lora_alpha=1, target_modules=("x",)), {"x": Factors(torch.ones(1, 2), torch.ones(2, 1))}
    )

    with pytest.raises(ModelError):
        switch(model, misfit)

    for got, expected in zip(answers_of(model), logits_of(bases["gpt2"]), strict=True):
        assert torch.equal(got, expected)
