import re
from math import sqrt

import pytest

from lora_cli.lora.config import LoRAConfig, first_match, matches


def config(**settings) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ("q_proj",)} | settings)


def test_the_scale_is_alpha_over_r_and_over_its_root_with_rslora():
    assert config().scale == 1.5
    assert config(use_rslora=True).scale == 3.0


def test_at_resolves_the_patterns_for_one_module_and_the_first_match_wins():
    patterned = config(rank_pattern={"0.q_proj": 2, "q_proj": 16}, alpha_pattern={"k_proj": 1})

    assert [
        (patterned.at(path).r, patterned.at(path).lora_alpha) for path in ("l.0.q_proj", "l.1.q_proj", "l.k_proj")
    ] == [
        (2, 6),
        (16, 6),
        (4, 1),
    ]
    assert patterned.at("l.0.q_proj").at("l.1.q_proj").r == 2


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("path", ["l.q_proj", "l.k_proj", "l.v_proj"])
def test_twice_the_rank_keeps_every_scale(use_rslora, path):
    before = config(use_rslora=use_rslora, rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5})

    after = before.with_rank_times(2)

    assert after.at(path).r == 2 * before.at(path).r
    assert after.at(path).scale == pytest.approx(before.at(path).scale, rel=1e-12)
    assert after.at(path).lora_alpha == pytest.approx(before.at(path).lora_alpha * (sqrt(2) if use_rslora else 2))


@pytest.mark.parametrize("key", ["q_proj", "layers.1.*", r".*\.(q|k)_proj", "a|b", "x.q_proj", "1", r"l\.\d+\.q_proj"])
@pytest.mark.parametrize("path", ["q_proj", "l.1.q_proj", "layers.1.mlp", "l.k_proj", "my_q_proj", "b", "q_proj.base"])
def test_patterns_match_as_pefts_do(key, path):
    assert matches(key, path) == bool(re.match(rf"(.*\.)?({key})$", path))


def test_the_first_match_or_the_default():
    assert first_match({"q": 1, "q|k": 2}, "l.k", 7) == 2
    assert first_match({}, "l.k", 7) == 7
