"""Which model lies in a folder: its class in transformers, what it takes, what it is for."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maestro_kernels.benchmark.encoder import BUNDLED, bundled_folder, quiet_transformers
from maestro_kernels.measure.wording import first_line
from maestro_kernels.nn.hub.record import METHOD, method_of
from maestro_kernels.nn.hub.registration import check_version
from maestro_kernels.nn.hub.seals import CONFIG, read_json
from maestro_kernels.nn.swapping import open_all

_FN = "compress"
# What a model is for, by the mappings of transformers that name its class; the first one counts.
_TASKS = {
    "SPEECH_SEQ_2_SEQ": "speech",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "CAUSAL_LM": "language",
    "CTC": "labels",
    "MASKED_LM": "labels",
    "SEQUENCE_CLASSIFICATION": "labels",
    "TOKEN_CLASSIFICATION": "labels",
    "IMAGE_CLASSIFICATION": "labels",
    "AUDIO_CLASSIFICATION": "labels",
}
_INPUTS = {
    "input_ids": "text",
    "pixel_values": "images",
    "input_features": "sound",
    "input_values": "sound",
}
# Files beside a model that are copied as they are: of tokenizers, processors, sentence encoders.
_BESIDE = (
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.*",
    "config_sentence_transformers.json",
    "merges.txt",
    "modules.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece*",
    "special_tokens_map.json",
    "spiece*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "tokenizer*",
    "video_preprocessor_config.json",
    "vocab*",
    "*.model",
    "[0-9]_[A-Z]*/*",
)
# One of these is there where a tokenizer is.
_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "spiece*",
    "sentencepiece*",
    "*.tiktoken",
    "tekken.json",
    "*.model",
)


@dataclass(frozen=True)
class Architecture:
    """What a folder's config.json says.

    Attributes:
        folder: where it lies.
        kind: the class of transformers.
        task: "language" (the next token), "seq2seq", "speech" (sound to text), "labels" (classes,
            of whole inputs or of tokens), "embedding", or "" for one that cannot be judged.
        takes: "text", "images", "sound", or "".
    """

    folder: Path
    kind: Any
    task: str
    takes: str

    @property
    def name(self) -> str:
        """Of the class."""
        found: str = self.kind.__name__
        return found

    def load(self) -> nn.Module:
        """The dense model in its own dtype, in eval mode; its weights are mapped, not yet read.

        Modules that keep several matrices in one parameter (experts) are open: each is a layer.

        Raises:
            ValueError: the weights are damaged, or some are missing.
        """
        try:
            model, found = self.kind.from_pretrained(
                str(self.folder), dtype="auto", local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # what damaged weights raise is up to each format's reader
            why = first_line(error, type(error).__name__)
            raise ValueError(
                f"{_FN}: MODEL: expected the weights of a {self.name} in {str(self.folder)!r}, "
                f"got {why}"
            ) from error
        for what in ("missing_keys", "mismatched_keys"):
            if found[what]:
                raise ValueError(
                    f"{_FN}: MODEL: expected the weights of a {self.name} in "
                    f"{str(self.folder)!r}, got {what.replace('_', ' ')} "
                    f"{sorted(map(str, found[what]))[:4]}"
                )
        return open_all(model.eval())

    def processor(self) -> Any:
        """What turns texts, images or sound into batches.

        Raises:
            ValueError: there is none in the folder, or a damaged one.
        """
        import transformers

        loader, what = {
            "text": (transformers.AutoTokenizer, "a tokenizer"),
            "images": (transformers.AutoImageProcessor, "an image processor"),
            "sound": (transformers.AutoFeatureExtractor, "a feature extractor"),
        }[self.takes]
        try:
            # For some models transformers makes an empty tokenizer where there is none.
            if self.takes == "text" and not any(self._holds(name) for name in _TOKENIZERS):
                raise FileNotFoundError("no file of one")
            return loader.from_pretrained(str(self.folder), local_files_only=True)
        except Exception as error:  # of many kinds, one for each thing that may be missing
            why = first_line(error, type(error).__name__)
            raise ValueError(
                f"{_FN}: MODEL: expected {what} for --data in {str(self.folder)!r}, got {why}; "
                "without --data none is needed"
            ) from error

    def _holds(self, pattern: str) -> bool:
        return any(self.folder.glob(pattern))

    def beside(self) -> list[Path]:
        """Files to copy, relative to the folder."""
        found = {path for pattern in _BESIDE for path in self.folder.glob(pattern)}
        return sorted(path.relative_to(self.folder) for path in found if path.is_file())


class Copies:
    """Something that `save_pretrained` can save beside a model.

    Args:
        folder: where the files lie.
        names: relative to it.
        texts: more files, name -> content.
    """

    def __init__(self, folder: Path, names: list[Path], texts: dict[str, str]) -> None:
        self._folder, self._names, self._texts = folder, names, texts

    def save_pretrained(self, place: Path) -> None:
        """Write them into a folder."""
        for name in self._names:
            target = Path(place) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / name, target)
        for key, text in self._texts.items():
            (Path(place) / key).write_text(text, encoding="utf-8")


def find(source: str) -> Architecture:
    """The architecture of "minilm" (the bundled encoder) or of a folder.

    Raises:
        ValueError: no folder, no config.json, an architecture that transformers does not know, or
            a model that is factorised already.
        NotImplementedError: transformers is missing or too old; the model is quantised or brings
            code of its own.
    """
    transformers = quiet_transformers(_FN)
    check_version(_FN)
    folder = bundled_folder(_FN) if source == BUNDLED else Path(source)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{_FN}: MODEL: expected {BUNDLED!r} or a folder with {CONFIG}, got {source!r}"
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(
            f"{_FN}: MODEL: expected a JSON object in {str(folder / CONFIG)!r}, got something else"
        )
    _check_plain(source, config)
    names = config.get("architectures")
    kind = _named(source, names[0]) if isinstance(names, list) and names else _base(source, folder)
    takes = _INPUTS.get(getattr(kind, "main_input_name", ""), "")
    return Architecture(folder, kind, _task(transformers, kind.__name__) if takes else "", takes)


def _check_plain(source: str, config: dict[str, Any]) -> None:
    """Refuse what has no plain dense weights, or needs code that is not in transformers."""
    method = method_of(config)
    if method == METHOD:
        raise ValueError(
            f"{_FN}: MODEL: expected a dense model, got {source!r}, which is factorised already; "
            "mk.load_pretrained and mk.set_ranks make it smaller"
        )
    if config.get("quantization_config"):
        raise NotImplementedError(
            f"{_FN}: MODEL: expected a model that is not quantised, got {source!r} with "
            f"quant_method {method!r}; dequantise it first"
        )
    if config.get("auto_map"):
        raise NotImplementedError(
            f"{_FN}: MODEL: expected an architecture of transformers, got {source!r}, which "
            "brings code of its own"
        )


def _named(source: str, name: object) -> Any:
    """The class of transformers of this name."""
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"{_FN}: MODEL: expected an architecture of transformers {transformers.__version__} in "
            f"{source!r}/{CONFIG}, got {name!r}"
        )
    return kind


def _base(source: str, folder: Path) -> Any:
    """The class without a head, for a config.json that names no class."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        return transformers.MODEL_MAPPING[type(config)]
    except Exception as error:
        why = first_line(error, type(error).__name__)
        raise ValueError(
            f"{_FN}: MODEL: expected a model type of transformers in {source!r}/{CONFIG}, got {why}"
        ) from error


def _task(transformers: Any, name: str) -> str:
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")

    def holds(mapping: str) -> bool:
        found = getattr(modeling, mapping, {})
        return any(
            name == value or (isinstance(value, tuple | list) and name in value)
            for value in found.values()
        )

    for key, task in _TASKS.items():
        if holds(f"MODEL_FOR_{key}_MAPPING_NAMES"):
            return task
    return "embedding" if holds("MODEL_MAPPING_NAMES") else ""


def heads(model: nn.Module) -> set[str]:
    """Names of the modules that stay as they are: what turns hidden states into answers.

    They are small beside the rest, and what they lose is lost in every answer.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    return {
        name
        for name, module in model.named_modules()
        if module is output or (id(module) not in inside and not _around(module, base))
    }


def _around(module: nn.Module, base: nn.Module) -> bool:
    return any(part is base for part in module.modules())
