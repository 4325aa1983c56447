"""BERT: the numbers of transformers, the names of published checkpoints, and what may be wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.checkpoints.formats import FORMATS, read_config
from longscan.checkpoints.load import load_bert
from longscan.checkpoints.save import save
from longscan.errors import LongscanError
from longscan.models import Bert, BertConfig, Mamba, MambaConfig
from longscan.models.bert import PRESETS, PretrainingBatch
from longscan.tokenizers.wordpiece import WordPieceTokenizer, train_wordpiece

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # absolute; outputs are of the order of 1
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
HEADS = ("none", "pretraining", "classifier")
SMALL: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_positions": 24, "d_ff": 40}
MINILM = os.environ.get("MINILM_DIR", "")  # a directory with the files of all-MiniLM-L6-v2

TEXTS = ["the cat sat on the mat. ", "a dog ran after the cat. ", "the end of it all, said the dog. "]


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return train_wordpiece(TEXTS * 4, 90)


def config(head: str = "pretraining", **changes: Any) -> BertConfig:
    labels = ("bad", "fair", "good") if head == "classifier" else ()
    return BertConfig.from_dict({**SMALL, "vocab_size": 90, "head": head, "labels": labels, **changes})


def make(head: str = "pretraining", **changes: Any) -> Bert:
    """A start, moved a little so that no bias is zero."""
    draw = torch.Generator().manual_seed(0)
    model = Bert(config(head, **changes), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def inputs(vocab_size: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, types and mask of a full row and two that end in padding."""
    ids = torch.randint(1, vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(17) < torch.tensor([[17], [9], [2]])
    return ids * mask, (torch.arange(17) > 6).long() * mask, mask


def peer_of(model: Bert) -> Any:
    """The same model in transformers."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.BertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_inner,
        max_position_embeddings=c.max_positions,
        hidden_act="gelu" if c.activation == "gelu" else "gelu_new",
        num_labels=max(len(c.labels), 1),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    names = {
        "none": "BertModel",
        "pretraining": "BertForPreTraining",
        "classifier": "BertForSequenceClassification",
    }
    peer = getattr(transformers, names[c.head])(theirs).to(model.dtype).eval()
    ours = model.state_dict()
    tied = {"cls.predictions.decoder.weight": ours["bert.embeddings.word_embeddings.weight"]}
    their_names = {name: FORMATS["bert"].ours(name) for name in peer.state_dict()}
    peer.load_state_dict({name: (ours | tied)[mine] for name, mine in their_names.items() if mine})
    return peer


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE[got.dtype]


@DTYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_the_numbers_of_transformers(head: str, activation: str, dtype: torch.dtype) -> None:
    model = make(head, activation=activation).to(dtype)
    ids, types, mask = inputs()
    theirs = peer_of(model)(
        ids, attention_mask=mask.long(), token_type_ids=types, output_hidden_states=True, return_dict=True
    )
    output = model(ids, types)
    assert_close(output.hidden[mask], theirs.hidden_states[-1][mask])
    if head == "none":
        assert_close(output.pooled, theirs.pooler_output)
    elif head == "classifier":
        assert_close(model.classify(output.pooled), theirs.logits)
    else:
        assert_close(model.mlm_logits(output.hidden[mask]), theirs.prediction_logits[mask])
        assert_close(model.nsp_logits(output.pooled), theirs.seq_relationship_logits)


def test_the_losses_and_gradients_of_transformers() -> None:
    model = make(dropout=0.0, attention_dropout=0.0).double()
    ids, types, mask = inputs()
    labels = torch.where((torch.arange(17) % 3 == 1) & mask, ids, -100)
    is_random = torch.tensor([0, 1, 1])
    peer = peer_of(model)
    expected = peer(ids, mask.long(), types, labels=labels, next_sentence_label=is_random).loss
    words, follows = model.losses(PretrainingBatch(ids, types, labels, is_random))
    assert_close(words + follows, expected)
    expected.backward()
    (words + follows).backward()
    wanted = FORMATS["bert"].rename({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, wanted[name])


def test_the_activation_makes_a_difference() -> None:
    """Else the two parities above would show nothing."""
    ids, types, _ = inputs()
    one, other = (make(activation=name)(ids, types).hidden for name in ("gelu", "gelu_tanh"))
    assert 1e-5 < (one - other).abs().max() < 1e-1


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {
            name: Bert(BertConfig(**PRESETS[name], head="none")).num_parameters()
            for name in ("base", "minilm-l6")
        }
        whole = Bert(BertConfig(**PRESETS["base"])).num_parameters()
    assert sizes == {"base": 109_482_240, "minilm-l6": 22_713_216}
    assert whole == 110_106_428


def test_padding_changes_nothing() -> None:
    model = make().double()
    ids, types, mask = inputs()
    together = model(ids, types).hidden
    for row in range(3):
        length = int(mask[row].sum())
        alone = model(ids[row : row + 1, :length], types[row : row + 1, :length]).hidden
        assert_close(together[row : row + 1, :length], alone)
    other = ids + 5 * ~mask
    assert_close(model(other, types, mask).hidden[mask], together[mask])


def test_weights_are_shown_and_change_nothing() -> None:
    model = make().double()
    ids, types, mask = inputs()
    output = model(ids, types, return_weights=True)
    assert output.weights is not None
    assert sorted(output.weights) == ["encoder.0", "encoder.1"]
    for weights in output.weights.values():
        assert weights.shape == (3, 3, 17, 17)
        assert_close(weights.sum(-1), torch.ones(3, 3, 17, dtype=torch.float64))
        assert not weights[(~mask)[:, None, None].expand_as(weights)].any()
    assert_close(output.hidden, model(ids, types).hidden)
    assert model(ids, types).weights is None


def test_dropout_only_in_training() -> None:
    model = make(dropout=0.5, attention_dropout=0.5)
    ids, types, _ = inputs()
    assert torch.equal(model(ids, types).hidden, model(ids, types).hidden)
    model.train()
    assert not torch.equal(model(ids, types).hidden, model(ids, types).hidden)


def test_the_start() -> None:
    one, same, other = (Bert(config(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    for name, parameter in one.named_parameters():
        if parameter.dim() == 2:
            assert 0.01 < parameter.std() < 0.022, name
            assert parameter.abs().max() <= 0.04, name
        else:
            assert (parameter == (1 if name.endswith("LayerNorm.weight") else 0)).all(), name


def test_no_chosen_word_is_no_loss() -> None:
    model = make()
    ids, types, _ = inputs()
    words, _ = model.losses(PretrainingBatch(ids, types, torch.full_like(ids, -100), torch.zeros(3).long()))
    assert words == 0


def test_what_a_forward_pass_refuses() -> None:
    model = make("none")
    with pytest.raises(ValueError, match="at most 24 per row, got 25"):
        model(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="non-empty"):
        model(torch.ones(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="'pretraining', got 'none'"):
        model.mlm_logits(torch.zeros(1, 24))
    with pytest.raises(ValueError, match="'classifier', got 'none'"):
        model.classify(torch.zeros(1, 24))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, "divisor of d_model = 24"),
        ({"d_ff": 0}, "d_ff"),
        ({"pad_id": 90}, "pad_id"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"activation": "relu"}, "'gelu_tanh'"),
        ({"labels": ("a",)}, "labels"),
        ({"head": "classifier", "labels": ("a", "a")}, "distinct"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_sizes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LongscanError, match=words):
        config().replace(**changes)


# files


@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_is_loaded_here_and_there(
    head: str, tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(head, vocab_size=tokenizer.vocab_size)
    save(model, tmp_path / "model", tokenizer)
    loaded = load_bert(tmp_path / "model")
    assert (loaded.fresh, loaded.model.config) == ((), model.config)
    assert loaded.model.fingerprint() == model.fingerprint()
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    kinds = {"none": "AutoModel", "pretraining": "AutoModelForPreTraining"}
    peer, info = getattr(transformers, kinds.get(head, "AutoModelForSequenceClassification")).from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, types, mask = inputs(tokenizer.vocab_size)
    theirs = peer(ids, mask.long(), types, output_hidden_states=True).hidden_states[-1]
    assert_close(loaded.model(ids, types).hidden[mask], theirs[mask])
    if head == "classifier":
        assert peer.config.id2label == {0: "bad", 1: "fair", 2: "good"}


def published(directory: Path, tokenizer: WordPieceTokenizer, head: str = "none") -> dict[str, Tensor]:
    """A saved model; its tensors, to be written again under other names."""
    save(make(head, vocab_size=tokenizer.vocab_size), directory, tokenizer)
    return load_file(directory / "model.safetensors")


def write(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }


def buffered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = {"position_ids": torch.arange(24)[None], "token_type_ids": torch.zeros(1, 24).long()}
    return tensors | {f"bert.embeddings.{name}": tensor for name, tensor in extra.items()}


def repeated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }


@pytest.mark.parametrize("change", [bare, old, buffered, repeated], ids=lambda change: change.__name__)
def test_names_of_all_years(change: Any, tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    tensors = published(tmp_path, tokenizer, "pretraining")
    before = load_bert(tmp_path).model.fingerprint()
    write(tmp_path, change(tensors))
    loaded = load_bert(tmp_path)
    assert (loaded.fresh, loaded.model.fingerprint()) == ((), before)


def test_parts_that_a_checkpoint_lacks_start_fresh(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    tensors = published(tmp_path, tokenizer)
    heads = [load_bert(tmp_path, "classifier", labels=("no", "yes"), generator=seeded(n)) for n in (0, 0, 1)]
    assert [found.fresh for found in heads] == [("classifier.",)] * 3
    prints = [found.model.fingerprint() for found in heads]
    assert prints[0] == prints[1] != prints[2]
    assert heads[0].model.config.labels == ("no", "yes")
    assert heads[0].model.classifier.weight.std() > 0.01
    found = load_bert(tmp_path, "pretraining")
    assert found.fresh == ("cls.predictions.", "cls.seq_relationship.")
    with pytest.raises(LongscanError, match=r"can't guess words: it has no cls\.predictions"):
        found.need("cls.predictions.", "guess words")
    found.need("bert.pooler.", "pool")
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if "pooler" not in name})
    assert load_bert(tmp_path).fresh == ("bert.pooler.",)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_heads_that_are_not_wanted_are_left_out(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    tensors = published(tmp_path, tokenizer, "pretraining")
    write(tmp_path, tensors | {"qa_outputs.weight": torch.zeros(2, 24)})
    found = load_bert(tmp_path, "none")
    assert found.fresh == ()
    assert torch.equal(found.model.bert.pooler.dense.weight, tensors["bert.pooler.dense.weight"])
    assert not any(name.startswith("cls") for name in found.model.state_dict())


def test_a_classifier_goes_on_with_its_labels_only(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    published(tmp_path, tokenizer, "classifier")
    assert load_bert(tmp_path, "classifier").fresh == ()
    assert load_bert(tmp_path, "classifier", labels=("bad", "fair", "good")).fresh == ()
    assert load_bert(tmp_path, "classifier", labels=("good", "fair", "bad")).fresh == ("classifier.",)


def width(directory: Path) -> None:
    edit(directory, hidden_size=48)


def absurd_width(directory: Path) -> None:
    edit(directory, hidden_size=3 * 10**11)


def absurd_depth(directory: Path) -> None:
    edit(directory, num_hidden_layers=10**9)


def another_model(directory: Path) -> None:
    edit(directory, model_type="roberta")


def relative_positions(directory: Path) -> None:
    edit(directory, position_embedding_type="relative_key")


def decoder(directory: Path) -> None:
    edit(directory, is_decoder=True)


def relu(directory: Path) -> None:
    edit(directory, hidden_act="relu")


def unknown_field(directory: Path) -> None:
    edit(directory, flash_layers=3)


def regression(directory: Path) -> None:
    edit(directory, problem_type="ranking")


def broken_labels(directory: Path) -> None:
    edit(directory, architectures=["BertForSequenceClassification"], id2label={"0": "a", "2": "b"})


def other_padding(directory: Path) -> None:
    edit(directory, pad_token_id=1)


def another_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").write_text(
        "".join(f"{word}\n" for word in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(90))])
    )


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").unlink()


def half_a_head(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["cls.predictions.bias"]
    write(directory, tensors)


def strange_tensor(directory: Path) -> None:
    write(directory, load_file(directory / "model.safetensors") | {"bert.adapter.weight": torch.zeros(2, 2)})


def untied(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    write(
        directory,
        tensors | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"] + 1},
    )


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (width, "of another shape"),
        (absurd_width, "impossible|of another shape"),
        (absurd_depth, "1,000,000,000 layers"),
        (another_model, "roberta"),
        (relative_positions, "relative_key"),
        (decoder, "is_decoder"),
        (relu, "hidden_act"),
        (unknown_field, "flash_layers"),
        (regression, "problem_type"),
        (broken_labels, "id2label"),
        (other_padding, "pads with 0"),
        (another_tokenizer, "do not belong together"),
        (no_tokenizer, "no tokenizer"),
        (half_a_head, "cls.predictions.bias"),
        (strange_tensor, "bert.adapter.weight"),
        (untied, "is not the word embedding"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_checkpoint_that_does_not_fit(
    damage: Any, words: str, tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    published(tmp_path, tokenizer, "pretraining")
    damage(tmp_path)
    for head in ("pretraining", "classifier") if damage in (width, absurd_width, absurd_depth) else (None,):
        with pytest.raises(LongscanError, match=words) as caught:
            load_bert(tmp_path, head, labels=("a", "b") if head == "classifier" else ())
        assert str(tmp_path) in str(caught.value)


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    save(Mamba(MambaConfig(d_model=8, n_layers=1, vocab_size=9), seeded(0)), tmp_path)
    with pytest.raises(
        LongscanError, match="is a mamba, a language model; expected a masked language model such as BERT"
    ):
        load_bert(tmp_path)


@pytest.mark.skipif(not MINILM, reason="set MINILM_DIR to a directory with all-MiniLM-L6-v2")
@DTYPES
@torch.no_grad()
def test_the_real_minilm(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    found = load_bert(MINILM)
    assert found.fresh == ()
    assert found.model.num_parameters() == 22_713_216
    model, peer = found.model.to(dtype), transformers.BertModel.from_pretrained(MINILM).to(dtype).eval()
    ids, types = found.tokenizer.collate(found.tokenizer.frame_batch(TEXTS))
    mask = ids != 0
    theirs = peer(ids, attention_mask=mask.long(), token_type_ids=types)
    assert_close(model(ids, types).hidden[mask], theirs.last_hidden_state[mask])
    assert_close(model(ids, types).pooled, theirs.pooler_output)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": ["gelu"]},
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": [1], "1": {}}},
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "a"}},
    ],
    ids=["act", "labels", "labels-twice"],
)
def test_values_of_a_config_that_are_no_names(change: dict[str, Any]) -> None:
    raw = {"model_type": "bert", "vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(LongscanError, match="expected"):
        read_config(raw | {"num_hidden_layers": 1, "intermediate_size": 16} | change)
