"""Hugging Face's own Trainer with the callback, on a small BERT of random weights."""

import warnings

import pytest
import torch

import jpq

transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "jpq[transformers]"')
pytest.importorskip("accelerate", reason='Trainer needs accelerate: pip install "jpq[transformers]"')

from jpq.integrations.transformers import CompressionCallback  # noqa: E402

IDS = torch.randint(3, 60, (48, 12), generator=torch.Generator().manual_seed(0))
IDS[::3, 8:] = 0
EXAMPLE = {"input_ids": IDS[:8], "attention_mask": (IDS[:8] > 0).long()}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, n):
        mask = (IDS[n] > 0).long()
        return {"input_ids": IDS[n], "attention_mask": mask, "labels": n % 2, "remark": torch.zeros(3)}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=12,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config).eval()


def callback_of(steps=6, **settings):
    torch.manual_seed(0)
    return CompressionCallback(bert(), EXAMPLE, steps=steps, **{"bops": "5%", **settings})


class Draws(transformers.TrainerCallback):
    """Seeds the noise by the step, so that a resumed run draws what the whole one did."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def trainer_of(callback, folder, **settings):
    usual = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 4}
    arguments = transformers.TrainingArguments(str(folder), **{**usual, **quiet, **settings})
    return transformers.Trainer(
        callback.model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback, Draws()]
    )


def used_share(callback):
    session = callback.model.session
    full = jpq.costs.baseline(session.net.exact_usage())["bops"]
    return jpq.measure(callback.small, EXAMPLE)["bops"] / (0.05 * full)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_gives_a_small_model_on_its_budget(settings, tmp_path):
    callback = callback_of(distill=1.0)
    trainer = trainer_of(callback, tmp_path, **settings)
    decided = {id(p) for p in callback.model.decisions}
    assert decided
    trainer.train()
    assert callback.model.session.done == 12
    assert not decided & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert 0.9 < used_share(callback) <= 1
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    with torch.no_grad():
        output = callback.small(**EXAMPLE)
        assert output.logits.shape == (8, 2)
        if "bf16" not in settings:
            assert torch.allclose(output.logits, callback.model(**EXAMPLE).logits, atol=1e-5)


@pytest.mark.parametrize(
    "saved_at", [4, pytest.param(6, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_checkpoint_resumes_to_the_same_bits(saved_at, tmp_path):
    whole, resumed = callback_of(), callback_of()
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=saved_at).train()
    trainer = trainer_of(resumed, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    first, second = whole.small.state_dict(), resumed.small.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class Words(Rows):
    def __getitem__(self, n):
        return {"input_ids": IDS[n], "attention_mask": (IDS[n] > 0).long(), "labels": IDS[n]}


def test_checkpoints_of_a_model_with_tied_weights_are_written_and_resume(tmp_path):
    config = transformers.GPT2Config(vocab_size=60, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    smalls = []
    for resumed in (False, True):
        torch.manual_seed(0)
        callback = CompressionCallback(transformers.GPT2LMHeadModel(config).eval(), EXAMPLE, steps=4, bops="20%")
        trainer = trainer_of(callback, tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
        trainer.train_dataset = Words()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        smalls.append(callback.small)
    assert smalls[0].lm_head.weight is smalls[0].transformer.wte.weight  # the tie is kept
    other = smalls[1].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in smalls[0].state_dict().items())


def test_an_optimizer_that_the_trainer_is_given_leaves_the_decisions_alone(tmp_path):
    callback = callback_of()
    decided = {id(p) for p in callback.model.decisions}
    optimizer = torch.optim.AdamW(callback.model.parameters(), 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = trainer_of(callback, tmp_path).args
    transformers.Trainer(
        callback.model, arguments, train_dataset=Rows(), callbacks=[callback], optimizers=(optimizer, schedule)
    ).train()
    assert not decided & {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert 0.9 < used_share(callback) <= 1


def test_training_that_ends_within_the_search_is_not_finalized(tmp_path):
    callback = callback_of(steps=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(callback, tmp_path, max_steps=2).train()
    assert callback.small is None
    assert any("step 2 of 100 of the search" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fp16": True}, "bf16=True or full precision"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True needs methods"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 needs methods"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "before its budget was met",
        ),
    ],
    ids=str,
)
def test_bad_arguments_end_in_a_sentence(settings, says, tmp_path):
    callback = callback_of(distill=1.0)
    with pytest.raises(jpq.JpqError, match=says):
        trainer_of(callback, tmp_path, **settings).train()


def test_another_model_in_the_trainer_is_refused(tmp_path):
    callback = callback_of()
    trainer = trainer_of(callback, tmp_path)
    trainer.model = trainer.model_wrapped = bert()
    with pytest.raises(jpq.JpqError, match=r"Trainer\(model=callback.model"):
        trainer.train()
