"""Maestro in Lightning and in Hugging Face's Trainer: real where installed, and a stand-in."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.training import callbacks
from maestro_kernels.training.layers import full_rank

OPTIONS = {"lam": 3e-2, "threshold": 1e-2, "seed": 1, "freeze_period": 2}


def data(width=12, classes=4, n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator)
    return x, torch.randn(n, classes, generator=generator)


def net():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    return mk.convert(dense, allow_larger=True)


def by_hand(epochs, options=OPTIONS):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    maestro = training.Maestro(model, optimizer, **options)
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    for _ in range(epochs):
        for x, y in maestro.epoch(loader):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    maestro.close()
    return model


def assert_same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.fixture
def lightning_module(monkeypatch):
    """Our module over a package that is lightning in name only."""
    fake = types.ModuleType("lightning.pytorch")
    fake.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    return load_anew()


def load_anew():
    path = Path(callbacks.__file__).with_name("lightning.py")
    spec = importlib.util.spec_from_file_location("our_lightning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StandIn:
    """Calls what Lightning calls, in its order: the gradient exists only inside the closure."""

    log_every_n_steps = 4

    def __init__(self, callback, module):
        self.callback, self.module = callback, module
        module.automatic_optimization = True
        callback.setup(self, module, "fit")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        self.optimizers = [optimizer]

    def fit(self, epochs):
        cb, module, optimizer = self.callback, self.module, self.optimizers[0]
        cb.on_train_start(self, module)
        for _ in range(epochs):
            cb.on_train_epoch_start(self, module)
            for i, batch in enumerate(DataLoader(TensorDataset(*data()), batch_size=8)):
                cb.on_train_batch_start(self, module, batch, i)
                loss = []

                def closure(batch=batch, loss=loss):
                    optimizer.zero_grad()
                    loss.append(F.mse_loss(module(batch[0]), batch[1]))
                    loss[0].backward()
                    cb.on_before_optimizer_step(self, module, optimizer)
                    return loss[0]

                optimizer.step(closure)
                cb.on_train_batch_end(self, module, {"loss": loss[0].detach()}, batch, i)
                full = {n: full_rank(layer) for n, layer in mk.nn.lod_layers(module).items()}
                assert mk.ranks(module) == full
            cb.on_train_epoch_end(self, module)
            self.saved = {"state": module.state_dict(), "callback": cb.state_dict()}
            cb.on_save_checkpoint(self, module, self.saved)
        cb.on_train_end(self, module)
        cb.teardown(self, module, "fit")


def test_lightning_trains_as_the_plain_loop_does(lightning_module):
    model = net()
    StandIn(lightning_module.MaestroCallback(**OPTIONS), model).fit(6)
    other = by_hand(6)
    # Worth comparing only where layers were sliced.
    assert model[0].max_rank < 12
    assert_same(model, other)


@pytest.mark.parametrize(("penalty", "stored"), [("hierarchical", [12, 3]), ("funnel", [12, 4])])
def test_lightning_goes_on_where_a_checkpoint_was_written(lightning_module, penalty, stored):
    model = net()
    options = {**OPTIONS, "penalty": penalty}
    first = StandIn(lightning_module.MaestroCallback(**options), model)
    first.fit(5)
    assert [layer.max_rank for layer in mk.nn.lod_layers(model).values()] == stored
    state = json.loads(json.dumps(first.saved["callback"]))
    callback, again = lightning_module.MaestroCallback(**options), net()
    second = StandIn(callback, again)
    again.load_state_dict(first.saved["state"])
    callback.load_state_dict(state)
    second.optimizers = [torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)]
    second.optimizers[0].load_state_dict(first.optimizers[0].state_dict())
    second.fit(2)
    assert_same(again, by_hand(7, options))
    assert (callback.maestro.epochs, callback.maestro.steps) == (7, 56)


def test_lightning_stops_on_values_that_are_not_finite(lightning_module):
    callback, model = lightning_module.MaestroCallback(), net()
    trainer = StandIn(callback, model)
    callback.on_train_start(trainer, model)
    loss = {"loss": torch.tensor(float("nan"))}
    for i in range(3):
        callback.on_train_batch_end(trainer, model, loss, None, i)
    with pytest.raises(training.NonFiniteLoss, match=r"got nan at step 4"):
        callback.on_train_batch_end(trainer, model, loss["loss"], None, 3)
    with torch.no_grad():
        model[2].v[0, 0] = float("inf")
    with pytest.raises(training.NonFiniteLoss, match=r"after step 4, .* parameter '2.v'"):
        callback.on_save_checkpoint(trainer, model, {})


def test_lightning_refuses_what_it_cannot_do(lightning_module):
    make = lightning_module.MaestroCallback
    with pytest.raises(TypeError, match=r"MaestroCallback: lamda: expected one of lam, threshold"):
        make(lamda=1)
    with pytest.raises(TypeError, match="MaestroCallback: attach"):
        make(attach=True)
    with pytest.raises(ValueError, match="MaestroCallback: model: expected at least one LoD layer"):
        make().setup(None, nn.Linear(2, 2), "fit")
    with pytest.raises(RuntimeError, match="expected on_train_start first"):
        make().on_train_epoch_start(None, None)
    trainer = StandIn(make(), net())
    trainer.optimizers *= 2
    with pytest.raises(ValueError, match="expected one optimizer, got 2"):
        trainer.fit(1)
    trainer.module.automatic_optimization = False
    with pytest.raises(NotImplementedError, match="expected automatic optimization, got manual"):
        trainer.callback.on_train_start(trainer, trainer.module)


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotImplementedError, match=r"lightning or pytorch_lightning, got neither"):
        load_anew()


def test_the_package_that_is_loaded_already_is_used(monkeypatch):
    bases = {}
    for name in ("lightning.pytorch", "pytorch_lightning"):
        fake = types.ModuleType(name)
        fake.Callback = bases[name] = type("Callback", (), {})
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    assert issubclass(load_anew().MaestroCallback, bases["lightning.pytorch"])
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    assert issubclass(load_anew().MaestroCallback, bases["pytorch_lightning"])


# Frameworks warn about workers, loggers and their own dependencies.
@pytest.mark.filterwarnings("ignore")
def test_the_real_lightning_agrees_and_resumes(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from maestro_kernels.training.lightning import MaestroCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def fit(epochs, checkpoint=None):
        module = Module()
        trainer = pl.Trainer(
            max_epochs=epochs,
            default_root_dir=tmp_path,
            callbacks=[MaestroCallback(**OPTIONS)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(TensorDataset(*data()), batch_size=8)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.net

    assert fit(5)[2].max_rank < 4
    assert_same(fit(7, tmp_path / "5.ckpt"), by_hand(7))


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make():
        config = transformers.BertConfig(
            **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_labels": 2},
            **{"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8},
        )
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        return mk.convert(model, allow_larger=True)

    return make


TOKENS = torch.randint(0, 50, (64, 8), generator=torch.Generator().manual_seed(0))
SENTENCES = [{"input_ids": row, "labels": row[0] % 2} for row in TOKENS]


def hf_train(folder, model, resume=None, options=OPTIONS, **arguments):
    from transformers import Trainer, TrainingArguments

    from maestro_kernels.training.huggingface import MaestroCallback

    settings = {"num_train_epochs": 4, "save_strategy": "epoch", "learning_rate": 1e-2}
    args = TrainingArguments(
        str(folder),
        **{**settings, **arguments},
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    callback = MaestroCallback(**options)
    trainer = Trainer(model, args, train_dataset=SENTENCES, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return callback


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [{}, {"save_strategy": "steps", "save_steps": 8}])
def test_hugging_face_resumes_with_the_same_bits(bert, tmp_path, save):
    model, again = bert(), bert()
    hf_train(tmp_path / "a", model, **save)
    layers = mk.nn.lod_layers(model)
    assert layers["bert.pooler.dense"].max_rank < 16
    assert mk.ranks(model) == {name: full_rank(layer) for name, layer in layers.items()}
    # Step 16 is the last of the second epoch: saved by steps, layers have not yet shrunk for it.
    callback = hf_train(tmp_path / "b", again, resume=str(tmp_path / "a/checkpoint-16"), **save)
    assert_same(again, model)
    assert (callback.maestro.epochs, callback.maestro.steps) == (4, 32)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_stops_before_it_saves_what_is_not_finite(bert, tmp_path):
    from safetensors.torch import load_file

    save = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.0}
    with pytest.raises(
        training.NonFiniteLoss, match=r"MaestroCallback: expected a finite model after step \d+"
    ):
        hf_train(tmp_path, bert(), options={"lam": 0.0}, learning_rate=1e25, optim="sgd", **save)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert checkpoints
    for folder in checkpoints:
        tensors = load_file(folder / "model.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())


def test_hugging_face_refuses_what_it_cannot_do():
    pytest.importorskip("transformers")
    from maestro_kernels.training.huggingface import MaestroCallback

    with pytest.raises(TypeError, match="MaestroCallback: rate: expected one of lam"):
        MaestroCallback(rate=1)
    with pytest.raises(ValueError, match="MaestroCallback: model: expected at least one LoD layer"):
        MaestroCallback().on_init_end(None, None, None, model=nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="expected on_train_begin first"):
        MaestroCallback().on_step_begin(None, None, None)
    assert MaestroCallback().state() == {"args": {}, "attributes": {"maestro": None}}
