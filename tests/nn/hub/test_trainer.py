"""Hugging Face's Trainer and push_to_hub on factorised models: every bit comes back."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hub_models import assert_same, mixed, small

import maestro_kernels as mk


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = (torch.arange(12) * (i + 1)) % 50
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_train_save_resume_and_best(kind, tmp_path):
    model, batch = small(kind)
    mixed(model)
    mk.save_pretrained(model, tmp_path / "start")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    whole = trainer(loaded, tmp_path / "whole", max_steps=4)
    whole.train()
    half = trainer(mk.load_pretrained(tmp_path / "start"), tmp_path / "half", max_steps=4)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    half.train(resume_from_checkpoint=True)
    assert_same(loaded.eval(), half.model.eval(), batch)
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "checkpoint-4")
    assert_same(loaded, last, batch)
    moved = [n for n, p in last.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert any(name.endswith(".u") for name in moved)
    best = trainer(
        mk.load_pretrained(tmp_path / "start"),
        tmp_path / "best",
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    best.train()
    first = mk.load_pretrained(Path(best.state.best_model_checkpoint))
    assert_same(first, best.model.eval(), batch)


@pytest.mark.filterwarnings("ignore")
def test_push_to_hub(monkeypatch, tmp_path):
    import huggingface_hub

    uploaded = tmp_path / "hub"

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            place = uploaded / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                place.write_bytes(file.read())

    def create_repo(self, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr("transformers.utils.hub.create_branch", None, raising=False)
    card = huggingface_hub.ModelCard("---\n{}\n---\n")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    model, batch = small("bert")
    mixed(model)
    model.push_to_hub("someone/small", max_shard_size="60KB")
    assert len(list(uploaded.glob("model-*.safetensors"))) > 2
    assert_same(model, transformers.AutoModel.from_pretrained(uploaded), batch)
    content = bytearray(next(uploaded.glob("model-00001*")).read_bytes())
    content[-1] ^= 1
    next(uploaded.glob("model-00001*")).write_bytes(bytes(content))
    with pytest.raises(ValueError, match="does not match its digest"):
        mk.load_pretrained(uploaded)
