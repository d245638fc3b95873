"""Texts for models of transformers, read with the tokenizer of the model's folder; the copies that a run keeps."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jpq.cli.evaluate import Evaluate, read_data_of
from jpq.cli.inspect import Inspect, model_and_example
from jpq.cli.main import main
from jpq.config import Budget, Config, Run, Task, Train
from jpq.files.model_files import KEPT, keep_files, kept_model, text_model, tokenizer_checksum
from jpq.recipe import optimize
from jpq.results.run_status import clear_folder, input_files
from jpq.tasks import models
from jpq.tasks.data import load
from jpq.tasks.load import load_dense_model, read_data
from jpq.training.run_state import RunState
from jpq.trials.settings import SETTINGS, TOKENIZER, WEIGHTS, Study, _shared_settings, check_agreement
from jpq.types import JpqError

transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "jpq[transformers]"')
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD = ["a moving film", "Funny and warm", "warm, moving and wise, and never too long for a child", "wise"]
BAD = ["a dull film", "Long and dull", "cold, long, dull", "an endless story of a cold and dull man"]


def write_texts(folder: Path, labels: tuple[str, str] = ("0", "1")) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{text}\t{label}" for label, texts in zip(labels, (BAD, GOOD), strict=True) for text in texts]
    for part, number in (("train", 5), ("dev", 1), ("test", 2)):
        (folder / f"{part}.tsv").write_text("\n".join(rows * number))
    return f"text:{folder}"


def write_tokenizer(folder: Path, size: int = 60) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([*GOOD, *BAD], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_bert(folder: Path, **changes: object) -> str:
    """A folder with a small BERT of random weights, and its tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    settings = {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 2, **sizes, **changes}
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).save_pretrained(folder)
    write_tokenizer(folder)
    return f"hf:{folder}"


def train_bert(folder: Path) -> torch.Tensor:
    """Train the model in a folder with its tokenizer, by transformers alone; its logits of the test texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    labels = torch.tensor([0] * len(BAD) + [1] * len(GOOD))
    inputs = tokenizer([*BAD, *GOOD], padding=True, return_tensors="pt")
    optim = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):  # not enough for all of them
        optim.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optim.step()
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer([*BAD, *GOOD] * 2, padding=True, return_tensors="pt")).logits


def settings_of(folder: Path, model: str, data: str) -> Config:
    return Config(
        task=Task(data=data, model=model, weights=Path(model.removeprefix("hf:")) / "model.safetensors"),
        budget=Budget(target_bops="50%"),
        train=Train(epochs=2, batch_size=8),
        run=Run(out=folder, name="run", threads=1),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a trained BERT whose own folder is gone; the logits that transformers gave before."""
    place = tmp_path_factory.mktemp("bert")
    model, data = write_bert(place / "bert"), write_texts(place / "texts")
    logits = train_bert(place / "bert")
    config = settings_of(place / "runs", model, data)
    read = read_data(config, CPU)
    shutil.copytree(place / "bert", place / "saved")
    result = optimize(config)
    shutil.rmtree(place / "bert")
    return SimpleNamespace(result=result, data=read, logits=logits, place=place, config=config)


def test_the_float_model_answers_as_in_transformers(finished):
    config = settings_of(finished.place, f"hf:{finished.place / 'saved'}", finished.config.task.data)
    model = load_dense_model(config, finished.data, CPU)
    with torch.no_grad():
        logits = torch.cat([model(**x) for x, _ in finished.data.test])
    torch.testing.assert_close(logits, finished.logits, atol=1e-5, rtol=0)
    labels = torch.tensor(([0] * len(BAD) + [1] * len(GOOD)) * 2)
    right = (finished.logits.argmax(1) == labels).sum().item()
    assert right > 0
    assert finished.result.float.accuracy == right / len(labels)
    assert not any("numbers words itself" in note for note in finished.result.notes)


def test_a_finished_run_needs_the_models_folder_no_more(finished, capsys, tmp_path):
    folder = finished.result.folder
    assert sorted(path.name for path in (folder / KEPT).iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    main(["evaluate", str(folder), "--runtime", "onnxruntime"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{100 * finished.result.compressed.accuracy:.2f} % of 16 test texts" in said
    assert "The same class for 16 of 16" in said
    main(["export", str(folder), "--out", str(tmp_path / "final")])
    assert (tmp_path / "final" / KEPT / "tokenizer.json").is_file()
    shutil.move(tmp_path / "final", tmp_path / "moved")
    main(["evaluate", str(tmp_path / "moved" / "model.onnx")])
    assert "of 16 test texts" in " ".join(capsys.readouterr().out.split())


def test_other_texts_come_in_the_length_of_the_file(finished, tmp_path):
    (tmp_path / "new.tsv").write_text("wise\t1\ndull\t0\n" * 8)
    file = finished.result.folder / "model.onnx"
    data = read_data_of(file, Evaluate(data=f"text:{tmp_path / 'new.tsv'}"), finished.result.folder)
    assert data.shape == finished.data.shape
    assert data.example["input_ids"][0, 0] == 2  # [CLS]
    assert data.about["tokenizer_checksum"] == finished.data.about["tokenizer_checksum"]


def test_the_readme_names_the_tokenizer_and_its_code_runs(finished, monkeypatch, capsys):
    text = (finished.result.folder / "README.md").read_text(encoding="utf-8")
    assert "pip install onnxruntime transformers" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(finished.result.folder)
    exec(code, {})
    assert capsys.readouterr().out.strip() in ("0", "1")
    record = json.loads((finished.result.folder / "result.json").read_text())["data"]
    assert record["tokenizer"] == "BertTokenizer of transformers, with the files in hf-model"
    assert (record["length"], record["padding"]) == (*finished.data.shape, 0)
    assert record["tokenizer_checksum"] == tokenizer_checksum(f"hf:{finished.place / 'saved'}")


def test_texts_are_the_tokenizers_ids_with_its_padding(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    file = tmp_path / "bert" / "tokenizer_config.json"
    for side in ("right", "left"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": side}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
        read = load(data, text_model=model, attention_mask=True, batch_size=100)
        (x, _), *more = read.test
        expected = tokenizer([*BAD, *GOOD] * 2, padding=True, return_tensors="pt")
        assert not more
        assert (x["input_ids"][0, 0] == tokenizer.pad_token_id) == (side == "left")
        assert torch.equal(x["input_ids"], expected["input_ids"])
        assert torch.equal(x["attention_mask"], expected["attention_mask"])
        assert read.arguments == {"vocabulary": len(tokenizer), "length": expected["input_ids"].shape[1]}


@pytest.mark.parametrize(("changes", "limit"), [({"max_position_embeddings": 6}, None), ({}, 6)])
def test_long_texts_are_cut_to_the_positions_of_model_and_tokenizer(tmp_path, changes, limit):
    model, data = write_bert(tmp_path / "bert", **changes), write_texts(tmp_path / "texts")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.model_max_length = limit or tokenizer.model_max_length
    tokenizer.save_pretrained(tmp_path / "bert")
    read = load(data, text_model=model, attention_mask=True)
    assert read.shape == (6,)
    cut = sum(len(ids) > 6 for ids in tokenizer([*BAD, *GOOD])["input_ids"])
    assert 0 < cut < 8
    assert f"{2 * cut} of 16 texts of the test part are cut to 6 tokens." in read.notes


def test_classes_are_in_the_order_of_the_models_outputs(tmp_path):
    names = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    model, data = write_bert(tmp_path / "bert", **names), write_texts(tmp_path / "texts", ("negative", "positive"))
    assert load(data, text_model=model).class_names == ("positive", "negative")
    assert load(data).class_names == ("negative", "positive")


def test_folders_without_a_tokenizer_are_noted(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).unlink()
    read = load(data, text_model=model, attention_mask=True)
    assert f"{model} has no tokenizer, so jpq numbers words itself" in read.notes[0]
    assert read.about["vocabulary"][:2] == ["<padding>", "<unknown>"]
    assert tokenizer_checksum(model) == ""


def test_vocab_txt_alone_is_a_tokenizer(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    before = load(data, text_model=model, attention_mask=True)
    numbers = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert").get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).unlink()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(sorted(numbers, key=numbers.get)))
    after = load(data, text_model=f"{model}/config.json", attention_mask=True)
    assert torch.equal(after.train.images["input_ids"], before.train.images["input_ids"])
    assert after.checksum != before.checksum


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    bert = tmp_path / "bert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bert)
    with pytest.raises(JpqError, match="has no token for padding"):
        load(data, text_model=model)
    (bert / "tokenizer.json").write_text("{")
    with pytest.raises(JpqError, match="cannot read the tokenizer in"):
        load(data, text_model=model)
    write_tokenizer(bert)
    (bert / "tokenizer.json").unlink()
    with pytest.raises(JpqError, match="knows no words: the file of its vocabulary is missing"):
        load(data, text_model=model)
    model = write_bert(bert, max_position_embeddings=2)
    with pytest.raises(JpqError, match="takes 2 tokens, of which the tokenizer's own marks are 2"):
        load(data, text_model=model)
    model = write_bert(bert, vocab_size=30)
    read = load(data, text_model=model, attention_mask=True)
    with pytest.raises(JpqError, match=r"data have \d+ different tokens, and hf:.* takes 30"):
        models.build(model, 2, None, read.arguments)
    (bert / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(JpqError, match="takes images, and the data are texts"):
        load(data, text_model=model)


def test_resumed_runs_and_studies_notice_another_tokenizer(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    config = settings_of(tmp_path / "runs", model, data)
    before, first = read_data(config, CPU), tokenizer_checksum(model)
    attributes = {SETTINGS: _shared_settings(config, Study()), WEIGHTS: "w", TOKENIZER: first}
    check_agreement(config, Study(), "w", SimpleNamespace(user_attrs=attributes))
    write_tokenizer(tmp_path / "bert", size=50)
    after = read_data(config, CPU)
    assert before.checksum != after.checksum
    state = RunState(config, SimpleNamespace(), config.folder())
    state.saved = {"data": before.checksum}
    with pytest.raises(JpqError, match=r"data text:.*, or the tokenizer of model hf:.*, is no longer the one"):
        state.check_data(after.checksum)
    with pytest.raises(JpqError, match="was begun with another tokenizer"):
        check_agreement(config, Study(), "w", SimpleNamespace(user_attrs=attributes))


def test_copies_stand_for_the_folder_and_are_removed_with_the_run(tmp_path):
    model = write_bert(tmp_path / "bert")
    folder = tmp_path / "run"
    assert text_model(model) == model
    assert text_model(model, folder) == ""  # a run of an earlier version, which knew no tokenizers
    assert kept_model(model, folder) == model
    keep_files(model, folder)
    (folder / KEPT / "vocab.txt").write_text("of an earlier run")
    keep_files(model, folder)
    assert not (folder / KEPT / "vocab.txt").exists()
    assert text_model(model, folder) == kept_model(model, folder) == f"hf:{folder / KEPT}"
    assert tokenizer_checksum(kept_model(model, folder)) == tokenizer_checksum(model)
    keep_files("convnet", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    clear_folder(folder, keep=input_files(Config(task=Task(model=f"hf:{folder / KEPT}"))))
    assert (folder / KEPT / "config.json").is_file()
    clear_folder(folder)
    assert not (folder / KEPT).exists()


def test_inspect_reads_texts_as_a_run_does(tmp_path):
    model, data = write_bert(tmp_path / "bert"), write_texts(tmp_path / "texts")
    _, example = model_and_example(Inspect(model=model, data=data))
    read = read_data(settings_of(tmp_path, model, data), CPU)
    assert {name: value.tolist() for name, value in example.items()} == {
        name: value.tolist() for name, value in read.example.items()
    }


def test_positions_of_roberta_begin_behind_that_of_padding(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RobertaConfig(vocab_size=60, max_position_embeddings=32, pad_token_id=1, **sizes)
    config.save_pretrained(tmp_path)
    model = f"hf:{tmp_path}"
    assert models.usual_input(model) == ((30,), 2)
    main(["inspect", "--model", model])
    models.build(model, 2, None, {"vocabulary": 60, "length": 30})
    with pytest.raises(JpqError, match=r"takes 30: set max_position_embeddings in its config\.json to 33 or more"):
        models.build(model, 2, None, {"vocabulary": 60, "length": 31})
