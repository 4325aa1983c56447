"""Language models in transformers: generate, pipeline, Trainer and PEFT, and directories both ways."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longscan
from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel
from longscan.models.common.losses import IGNORE
from longscan.tokenizers.base import ByteTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language"]
FAST: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def hf() -> Any:
    import longscan.hf

    longscan.hf.register()  # a second time: changes nothing
    return longscan.hf


def build(name: str, **fields: Any) -> LanguageModel:
    entry = MODELS[name]
    config = entry.config.from_dict({**entry.presets["tiny"], **fields})
    model = entry.cls(config, torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    return model


def draw_ids() -> Tensor:
    return torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_with_the_state_is_that_without(name: str, hf: Any) -> None:
    model, ids = hf.wrap(build(name)), draw_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = model.generate(ids, attention_mask=mask, **FAST)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **FAST))
    alone = model.generate(ids[:1, 3:], **FAST)  # padding changes nothing
    assert torch.equal(found[0, 9:], alone[0, 6:])
    beams = {**FAST, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("name", LANGUAGE)
def test_directories_go_both_ways(name: str, hf: Any, tmp_path: Path) -> None:
    model, ids = build(name), draw_ids()
    hf.wrap(model).save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(ids).logits
        ours, _ = longscan.load(tmp_path / "model")
        assert torch.equal(ours(ids).logits, expected)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        width = model.config.vocab_size
        found = theirs.eval()(ids).logits[..., :width]
        torch.testing.assert_close(found, expected[..., :width], rtol=1e-3, atol=2e-4)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.hidden_size == model.config.d_model
    assert config.num_hidden_layers == model.config.n_layers


def test_loss_and_gradients_are_ours(hf: Any) -> None:
    model, ids = build("mamba3"), draw_ids()
    labels = ids.clone()
    labels[:, :4] = IGNORE
    expected = model(ids, labels=labels).loss
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    wrapped = hf.wrap(model)
    output = wrapped(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(output.loss, list(model.parameters())), wanted)
    part = wrapped(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(part, expected * 10 / 40)
    hidden = wrapped(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.n_layers + 1
    assert torch.equal(wrapped(ids, return_dict=False)[0], output.logits)


def test_a_state_goes_on_where_it_was(hf: Any) -> None:
    model, ids = hf.wrap(build("hybrid")), draw_ids()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:8], past_key_values=first.past_key_values)
        third = model(ids[:, 8:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert third.past_key_values.get_seq_length() == 9
    with pytest.raises(LongscanError, match="no last tokens to drop"):
        third.past_key_values.crop(3)


def test_pipeline(hf: Any, tmp_path: Path) -> None:
    longscan.save(build("s4d", vocab_size=257), tmp_path / "model", ByteTokenizer())
    write = transformers.pipeline("text-generation", str(tmp_path / "model"))
    (found,) = write("Once", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("Once")
    model, tokenizer = longscan.load(tmp_path / "model")
    ours = longscan.generate(model, tokenizer, "Once", max_new_tokens=5, temperature=0.0)
    assert found["generated_text"] == "Once" + "".join(ours)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A sentence, again and again."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(ByteTokenizer().encode("abcd" * 4))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("lora", [False, True])
def test_trainer_and_peft(lora: bool, hf: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network = build("lssl" if not lora else "mamba3", vocab_size=257)
    model: Any = hf.wrap(network)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"]))
        assert 0 < model.get_nb_trainable_parameters()[0] < network.num_parameters()
    model.train()
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=2e-2,
        report_to=[],
        save_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=not lora,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Rows())
    before = trainer.evaluate(Rows())["eval_loss"]
    trainer.train()
    after = trainer.evaluate(Rows())["eval_loss"]
    assert after < 0.9 * before
    saved = tmp_path / "out" / "checkpoint-8"
    ids = Rows()[0]["input_ids"][None]
    if lora:
        assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4
        merged = model.merge_and_unload()
        fresh = peft.PeftModel.from_pretrained(hf.wrap(build("mamba3", vocab_size=257)), saved)
        with torch.no_grad():
            torch.testing.assert_close(
                fresh.eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-3, atol=1e-4
            )
        longscan.save(build("mamba3", vocab_size=257), tmp_path / "base")
        ours, _ = longscan.load(tmp_path / "base", adapter=saved)
        with torch.no_grad():
            found = ours(ids).logits[..., :257]
            torch.testing.assert_close(found, merged(ids).logits, rtol=1e-3, atol=1e-4)
        return
    again, _ = longscan.load(saved)
    with torch.no_grad():
        assert torch.equal(again(ids).logits[..., :257], network.eval()(ids).logits[..., :257])
    resumed = transformers.Trainer(
        model=hf.wrap(build("lssl", vocab_size=257)).train(), args=settings, train_dataset=Rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for ours, theirs in zip(resumed.model.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_copies_pickles_and_other_tensors(hf: Any, tmp_path: Path) -> None:
    model, ids = hf.wrap(build("mamba3")), draw_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(ids).logits, expected)
        assert pickle.loads(pickle.dumps(model.config)).settings() == model.network.config
        other = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "half", state_dict=other)
        half, _ = longscan.load(tmp_path / "half")
        assert torch.equal(half.backbone.embedding.weight, model.network.backbone.embedding.weight * 0.5)
        assert torch.equal(model(ids).logits, expected)
        some = model(ids, logits_to_keep=torch.tensor([1, 3])).logits
        assert torch.equal(some, expected[:, [1, 3]])
    found = model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **FAST)
    assert all(len(step) == model.config.n_layers + 1 for step in found.hidden_states)
    with pytest.raises(LongscanError, match="expected a LongscanCache, got DynamicCache"):
        model(ids, past_key_values=transformers.DynamicCache())


def test_what_is_not_supported_is_refused(hf: Any, tmp_path: Path) -> None:
    model = hf.wrap(build("lstm"))
    with pytest.raises(LongscanError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(LongscanError, match="vocabulary"):
        model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(LongscanError, match="load_in_8bit"):
        auto.from_pretrained(tmp_path / "model", load_in_8bit=True)
    assert auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="stateful"):
        model.generate(draw_ids(), prompt_lookup_num_tokens=2, **FAST)
