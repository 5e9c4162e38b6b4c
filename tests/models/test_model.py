"""The language model: any family behind one interface, attention as numbers, heads, checkpointing, copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from posttrain.errors import CheckpointError, ConfigError
from posttrain.layout import Layout
from posttrain.models.model import LanguageModel
from posttrain.models.random import FAMILIES, random_model

torch.set_num_threads(1)

OWN = ("llama", "mistral", "qwen2", "qwen3", "gemma")
FOREIGN = ("gpt_neox", "gpt2")


def layout(width: int | None = None) -> Layout:
    generator = torch.Generator().manual_seed(5)
    sizes = (5, 12, 1, 11)
    return Layout.of(torch.randint(3, 61, (29,), generator=generator), sizes, width=width)


def test_every_family_is_tested() -> None:
    assert set(OWN + FOREIGN) == set(FAMILIES)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("family", FOREIGN)
def test_a_foreign_trunk_gives_the_same_as_row_by_row(family: str, dtype: str, tolerance: float) -> None:
    model, here = random_model(family, dtype=dtype), layout(width=15)
    assert model.decoder is None
    logits = model.logits(model.trunk(here).hidden)
    assert logits.shape == (29, 61)
    for row, start in enumerate(here.offsets[:-1]):
        tokens = here.tokens[start : start + here.sizes[row]][None]
        expected = model.module(tokens).logits[0]
        torch.testing.assert_close(logits[start : start + here.sizes[row]], expected, atol=tolerance, rtol=0)


def test_own_and_foreign_paths_agree_through_one_interface() -> None:
    model, here = random_model("qwen3"), layout(width=14)
    own = model.trunk(here, attention_layers=(0, -1))
    decoder, model.decoder = model.decoder, None
    foreign = model.trunk(here, attention_layers=(0, -1))
    logits = model.logits(foreign.hidden)
    model.decoder = decoder
    torch.testing.assert_close(own.hidden, foreign.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(own.hidden), logits, atol=1e-5, rtol=0)
    assert own.attention.keys() == foreign.attention.keys() == {0, -1}
    for layer in (0, -1):
        torch.testing.assert_close(own.attention[layer], foreign.attention[layer], atol=1e-5, rtol=0)


def test_inputs_beyond_tokens_reach_the_model() -> None:
    model, here = random_model("gpt2"), layout()
    kinds = torch.arange(29) % 7
    more = replace(here, extra={"token_type_ids": kinds})
    hidden = model.trunk(more).hidden
    expected = model.module.transformer(here.tokens[5:17][None], token_type_ids=kinds[5:17][None])[0][0]
    torch.testing.assert_close(hidden[5:17], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(hidden, model.trunk(here).hidden)
    with pytest.raises(ConfigError, match="LlamaForCausalLM takes no input 'token_type_ids'"):
        random_model("llama").trunk(more)


def test_a_cap_after_the_head_is_kept() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, final_logit_softcapping=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model, here = LanguageModel(Gemma2ForCausalLM(config)), layout()
    logits = model.logits(model.trunk(here).hidden)
    assert logits.abs().max() < 0.05
    torch.testing.assert_close(logits[5:17], model.module(here.tokens[5:17][None]).logits[0], atol=1e-6, rtol=0)
    assert logits.requires_grad


@pytest.mark.parametrize("family", OWN)
def test_attention_equals_the_eager_one_of_transformers(family: str) -> None:
    config = {"sliding_window": 4} if family == "mistral" else {}
    model, here = random_model(family, **config), layout(width=13)
    found = model.trunk(here, attention_layers=(0, 1, 2)).attention
    model.module.set_attn_implementation("eager")
    for row, start in enumerate(here.offsets[:-1]):
        size = here.sizes[row]
        maps = model.module(here.tokens[start : start + size][None], output_attentions=True).attentions
        for layer in range(3):
            mine = found[layer][row]  # [H, T, T]
            torch.testing.assert_close(mine[:, :size, :size], maps[layer][0], atol=1e-5, rtol=0)
            assert mine[:, size:].abs().max() == 0
            assert size == 13 or mine[:, :, size:].abs().max() == 0
            assert not mine.requires_grad


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_embeddings_in_place_of_tokens(family: str) -> None:
    model, here = random_model(family), layout()
    given = model.embed(here.tokens).detach().requires_grad_()
    plain, replaced = model.trunk(here).hidden, model.trunk(here, embeddings=given).hidden
    torch.testing.assert_close(replaced, plain)
    replaced[5].sum().backward()  # the first token of row 1
    assert given.grad.abs().sum(-1).nonzero()[:, 0].tolist() == [5]
    if family == "gemma":
        torch.testing.assert_close(model.embed(torch.tensor([7])), model.module.model.embed_tokens.weight[[7]] * 32**0.5)


def test_checkpointing_changes_no_gradient() -> None:
    plain, here = random_model("llama", dtype="float64"), layout()
    saving = LanguageModel(random_model("llama", dtype="float64").module, checkpointing=True)
    for model in (plain, saving):
        model.logits(model.trunk(here).hidden).pow(2).sum().backward()
    for name, weight in plain.parameters().items():
        assert torch.equal(weight.grad, saving.parameters()[name].grad), name
    with pytest.warns(UserWarning, match="checkpointing has no effect on GPT2LMHeadModel"):
        LanguageModel(random_model("gpt2").module, checkpointing=True)


def test_dropout_is_off_unless_asked_for() -> None:
    model, here = LanguageModel(random_model("gpt2", resid_pdrop=0.5).module.train()), layout()
    assert torch.equal(model.trunk(here).hidden, model.trunk(here).hidden)
    model.dropout(True)
    assert not torch.equal(model.trunk(here).hidden, model.trunk(here).hidden)
    model.dropout(False)
    assert torch.equal(model.trunk(here).hidden, model.trunk(here).hidden)


def test_heads() -> None:
    model, here = random_model("llama"), layout()
    hidden = model.trunk(here).hidden
    value, reward = model.add_value_head(), model.add_reward_head(seed=3)
    assert torch.equal(value(hidden), torch.zeros(29))
    assert torch.equal(reward.weight, random_model("llama").add_reward_head(seed=3).weight)
    assert not torch.equal(reward.weight, random_model("llama").add_reward_head(seed=4).weight)
    torch.testing.assert_close(reward(hidden), (hidden * reward.weight).sum(-1) + reward.bias)
    assert model.add_value_head() is value
    assert {"heads.value.weight", "heads.value.bias", "heads.reward.weight"} <= model.parameters().keys()
    assert random_model("llama", dtype="float64").add_value_head().weight.dtype == torch.float64
    half = random_model("llama", dtype="bfloat16")
    assert half.add_reward_head()(half.trunk(here).hidden).dtype == torch.float32


def test_fingerprint_follows_every_weight() -> None:
    model = random_model("qwen2")
    first = model.fingerprint()
    assert first == random_model("qwen2").fingerprint()
    assert first != random_model("qwen2", seed=1).fingerprint()
    with torch.no_grad():
        model.module.model.norm.weight[0] += 1e-6
    assert model.fingerprint() != first
    second = model.fingerprint()
    model.add_value_head()
    assert model.fingerprint() != second


def test_a_frozen_copy_stays_behind() -> None:
    model, here = random_model("qwen2"), layout()
    copy = model.frozen_copy()
    before = copy.trunk(here).hidden
    assert not copy.parameters()
    assert torch.equal(before, model.trunk(here).hidden)
    with torch.no_grad():
        for weight in model.parameters().values():
            weight.add_(0.1)
    assert torch.equal(copy.trunk(here).hidden, before)
    assert not torch.equal(model.trunk(here).hidden, before)


def test_load_weights() -> None:
    model, other, here = random_model("qwen2"), random_model("qwen2", seed=1), layout()
    model.load_weights({name: value.detach() for name, value in other.weights()})
    assert model.fingerprint() == other.fingerprint()
    assert torch.equal(model.trunk(here).hidden, other.trunk(here).hidden)
    with pytest.raises(CheckpointError, match=r"no weight 'model.norm.weigh' .nearest: 'model.norm.weight'"):
        model.load_weights({"model.norm.weigh": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"has shape .3,.; this model's has .32,."):
        model.load_weights({"model.norm.weight": torch.zeros(3)})


def test_refusals() -> None:
    model, here = random_model("llama"), layout()
    with pytest.raises(ConfigError, match="layer 3 was asked for; this model has layers 0 to 2"):
        model.trunk(here, attention_layers=(3,))
    with pytest.raises(ConfigError, match="no LoRA adapters to turn off"), model.adapters_off():
        pass
    with pytest.raises(ConfigError, match=r"is no transformers causal model|base_model_prefix|get_input_embeddings"):
        LanguageModel(random_model("gpt2").module.transformer).trunk(here)


def test_tied_weights_count_once() -> None:
    tied, apart = random_model("llama", tie_word_embeddings=True), random_model("llama")
    assert apart.num_parameters - tied.num_parameters == 61 * 32
    assert isinstance(tied.heads, nn.ModuleDict)
    assert tied.vocab_size == 61
    assert tied.hidden_size == 32
    assert tied.dtype == torch.float32
    assert tied.device.type == "cpu"
