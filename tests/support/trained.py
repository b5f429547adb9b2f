"""Models that have learned something in seconds: random weights would pass any evaluation.

A Llama in bfloat16 that knows the prose of Python's own documentation and a ViT that reads
scikit-learn's digits, each as a folder that transformers wrote.
"""

import importlib
import re
import wave
from pathlib import Path

import numpy as np
import torch

LENGTH = 64


def documentation():
    """The topics of Python's documentation, as text."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))


def tokenizer(folder, words=400):
    """A byte-level BPE of the documentation."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([documentation()[:200_000]], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def language_model(folder: Path, steps=250):
    """A Llama with its tokenizer, and text.txt that it was not trained on."""
    import transformers

    words = tokenizer(folder)
    text = documentation()[:200_000]
    ids = torch.tensor(words(text)["input_ids"])
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        max_position_embeddings=LENGTH + 2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    learn(model, steps, lambda: {"input_ids": rows(ids), "labels": None})
    model.generation_config.max_new_tokens = 7
    model.to(torch.bfloat16).save_pretrained(folder)
    held_out = documentation()[200_000:240_000]
    (folder / "text.txt").write_text("\n".join(held_out.split(". ")), encoding="utf-8")
    return folder


def rows(ids, size=16):
    """Sequences from anywhere in a text."""
    starts = torch.randint(len(ids) - LENGTH, (size,))
    return torch.stack([ids[start : start + LENGTH] for start in starts])


def learn(model, steps, batch, lr=3e-3):
    """Train a model on batches that hold labels, or ids that are labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        one = batch()
        if one.get("labels", 0) is None:
            one["labels"] = one["input_ids"]
        model(**one).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def vision_model(folder: Path, steps=250):
    """A ViT with its processor; images/CLASS/*.png that it was not trained on."""
    import PIL.Image
    import transformers
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = [f"digit {i}" for i in range(10)]
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=3,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, do_resize=False)
    pictures = [PIL.Image.fromarray((x * 15.9).astype(np.uint8)) for x in digits.images]
    pixels = processor([p.convert("RGB") for p in pictures[:1400]], return_tensors="pt")
    x, y = pixels["pixel_values"], torch.tensor(digits.target[:1400])

    def batch():
        chosen = torch.randint(len(x), (64,))
        return {"pixel_values": x[chosen], "labels": y[chosen]}

    learn(model, steps, batch)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for i, picture in enumerate(pictures[1400:]):
        place = folder / "images" / names[digits.target[1400 + i]]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{i:03d}.png")
    return folder


def tone(path: Path, rate=16000, seconds=0.5, hertz=440.0):
    """A .wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate) * 12000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
