"""Lightning's own Trainer with the callback: budget, resumption to the same bits, accumulation, bad input."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_net import Small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import jpq

L = pytest.importorskip("lightning.pytorch", reason='needs the extra: pip install "jpq[lightning]"')

from jpq.integrations.lightning import CompressionCallback  # noqa: E402

X = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Small()

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def test_step(self, batch, batch_idx):
        self.log("right", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def trainer(folder, callback, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, **{"max_epochs": 3, "callbacks": [callback], **quiet, **settings})


def fit(folder, callback=None, module=None, ckpt_path=None, **settings):
    """(callback, module, trainer) after a fit of 24 steps."""
    callback = callback or CompressionCallback("net", bops="4%")
    module, used = module or Module(), trainer(folder, callback, **settings)
    torch.manual_seed(1)
    used.fit(module, loader(), ckpt_path=ckpt_path)
    return callback, module, used


def used_share(small, share=0.04):
    """Share of the budget that the small model uses, counted as it runs."""
    full = sum(layer.macs for layer in jpq.trace(Small().eval(), (X[:2],)).layers) * 32 * 32
    return jpq.measure(small, X[:8])["bops"] / (share * full)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ({"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0})
        ),
    ],
    ids=str,
)
def test_fit_gives_a_small_model_on_its_budget(settings, tmp_path):
    callback, module, used = fit(tmp_path, CompressionCallback("net", bops="4%", distill=1.0), **settings)
    assert 0.9 < used_share(callback.small) <= 1
    assert module.net is callback.small
    (scores,) = used.test(module, loader(), verbose=False)
    assert 0 <= scores["right"] <= 1


def test_steps_are_those_of_the_optimizer_and_weights_follow_the_schedule(tmp_path):
    callback = CompressionCallback("net", bops="4%", search=0.25)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            session = module.net.session
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append((session.done, session.controller is None, len(module.net.decisions), rates[0]))

    torch.manual_seed(1)
    used = trainer(tmp_path, callback, callbacks=[callback, Watch()], accumulate_grad_batches=2)
    used.fit(Module(), loader())
    assert [row[0] for row in seen] == [n // 2 for n in range(1, 25)]  # 12 steps of two batches
    assert [row[1] for row in seen] == [row[0] >= 3 for row in seen]
    assert [row[2] == 0 for row in seen] == [row[1] for row in seen]
    assert seen[-1][3] < seen[0][3]


def test_the_second_of_two_stages_begins_when_the_first_share_of_the_steps_is_over(tmp_path):
    callback = CompressionCallback("net", bops="4%", search=0.5, method="two-stage")
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append((module.net.session.done, module.net.session.decided))

    trainer(tmp_path, callback, callbacks=[callback, Watch()]).fit(Module(), loader())
    assert seen == [(step, step >= 12) for step in range(1, 25)]
    assert used_share(callback.small) <= 1


@pytest.mark.parametrize(
    ("search", "saved_at"),
    [
        pytest.param(12, 8, id="within the search"),
        pytest.param(8, 8, id="at its end", marks=pytest.mark.slow),
        pytest.param(6, 16, id="after it", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumes_to_the_same_bits(tmp_path, search, saved_at):
    finals = []
    for path in (None, tmp_path / f"step={saved_at}.ckpt"):
        keep = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
        callback = CompressionCallback("net", bops="4%", steps=search)
        used = trainer(tmp_path, callback, callbacks=[Draws(), callback, keep])
        used.fit(Module(), loader(), ckpt_path=path)
        finals.append(callback.small.state_dict())
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


class Draws(L.Callback):
    """Seeds the gates' noise by the step, so that a resumed run draws what the whole one did."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


def test_a_search_that_is_cut_short_is_not_finalized(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback, _, _ = fit(tmp_path, CompressionCallback("net", bops="4%", steps=100))
    assert callback.small is None
    assert any("step 24 of 100 of the search" in str(w.message) for w in caught)
    assert any("call callback.managed.session.finalize()" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert used_share(callback.managed.session.finalize()) <= 1


def test_a_callback_whose_search_was_cut_compresses_the_network_of_a_new_module(tmp_path):
    callback = CompressionCallback("net", bops="4%", steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, callback, max_epochs=1)
    first, second = callback.managed, Module()
    fit(tmp_path, callback, second, max_epochs=2)
    assert second.net is callback.small
    assert first.session.done == 8  # the second training did not go on with the first one's search


def test_checkpoints_of_the_training_are_not_loaded_into_the_small_model(tmp_path):
    callback = CompressionCallback("net", bops="4%")
    _, module, used = fit(tmp_path, callback, callbacks=[callback, L.callbacks.ModelCheckpoint(tmp_path)])
    with pytest.raises(jpq.JpqError, match=r"Trainer\(\)\.test\(module, \.\.\.\)"):
        used.test(dataloaders=loader(), verbose=False)  # Lightning takes its best checkpoint without a module
    (scores,) = trainer(tmp_path, callback).test(module, loader(), verbose=False)
    assert 0 <= scores["right"] <= 1


class ByHand(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("given", "module", "settings", "says"),
    [
        ({"network": "model", "bops": "4%"}, Module, {}, "no module 'model'.*one of net"),
        ({"network": "net"}, Module, {}, "No target"),
        ({"network": "net", "bops": "4%", "method": "dais"}, Module, {}, "different samples"),
        ({"network": "net", "bops": "4%"}, ByHand, {}, "optimizes by hand"),
        ({"network": "net", "bops": "4%"}, Module, {"max_epochs": -1}, "give CompressionCallback steps=N"),
        (
            {"network": "net", "bops": "4%"},
            Module,
            {"precision": "bf16-true"},
            "32-true or bf16-mixed, and got bf16-true",
        ),
        ({"network": "net", "bops": "4%"}, Module, {"callbacks": "averaged"}, "average weights from before discret"),
    ],
)
def test_bad_requests_end_in_a_sentence(tmp_path, given, module, settings, says):
    callback = CompressionCallback(**given)
    if "callbacks" in settings:
        settings = {"callbacks": [callback, L.callbacks.StochasticWeightAveraging(1e-3)]}
    with pytest.raises(jpq.JpqError, match=says):
        trainer(tmp_path, callback, **settings).fit(module(), loader())


def test_batches_of_another_kind_need_example_inputs(tmp_path):
    batches = DataLoader([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)], batch_size=8)
    with pytest.raises(jpq.JpqError, match="is a dict: give CompressionCallback example_inputs="):
        trainer(tmp_path, CompressionCallback("net", bops="4%")).fit(Module(), batches)
    with pytest.raises(jpq.JpqError, match="no share of the steps"):
        CompressionCallback("net", bops="4%", search=0)
    assert isinstance(Module().net, nn.Module)
