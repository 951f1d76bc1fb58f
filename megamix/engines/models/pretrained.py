"""Pretrained weights in Hugging Face's format, by pipeline layer, and the check that the data have their tokenizer.

Padding rows of the embedding and the output projection are zero: no token id and no softmax reaches them, so they get
no gradient, and weight decay keeps them zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.data.tokens.tokenizer import refusing_bad_tokenizers, switch_off_sampling
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.layers import layer_shapes
from megamix.engines.models.pretrained_config import OUTPUT_NAMES, read_json_object, read_pretrained_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
# Constants beside the parameters in older files of GPT-NeoX.
_CONSTANTS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
_PROBE = "Hello, world!  def f(x):\n\treturn x + 1  # 12345\n\nGrüße, 你好, здравствуйте "
"""Text that reveals different pre-tokenization rules."""


class PretrainedWeights:
    """Pretrained weights, read one layer at a time.

    Args:
        folder: holds config.json and ``model.safetensors``, or shards with their index.
        model: has its vocabulary size set.

    Raises:
        InputError: files are missing or damaged, or their tensors do not match ``model``.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = Path(folder)
        self._model = model
        config = read_pretrained_config(self.folder)
        self._vocab_size, self._tied = config.vocab_size, config.tied
        self._files = _find_tensors(self.folder)
        if self._tied and not model.tie_word_embeddings:
            get_logger().warning(
                "%s has one matrix for embedding and output, and model.tie_word_embeddings is false: here they are two, "
                "which both start from it and are trained by themselves.",
                self.folder,
            )
        self._check()

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Returns Hugging Face name -> float32 CPU tensor of pipeline layer ``index`` (0: embedding, 1 to num_layers:
        decoder layers, num_layers + 1: norm and output).

        Raises:
            InputError: a file is damaged.
        """
        tensors = {}
        for name, shape in layer_shapes(self._model, index).items():
            stored = self._stored(name)
            try:
                with safe_open(self._files[stored], "pt") as file:
                    tensor = file.get_tensor(stored).float()
            except (OSError, SafetensorError) as error:
                raise _damaged(self._files[stored], error) from error
            if tensor.shape != shape:
                rows = min(len(tensor), shape[0])
                tensor = torch.cat([tensor[:rows], tensor.new_zeros(shape[0] - rows, *shape[1:])])
            tensors[name] = tensor.contiguous()
        return tensors

    def _stored(self, name: str) -> str:
        """Returns the parameter's name in the files."""
        if name != "lm_head.weight":
            return name
        if self._tied:
            return next(iter(layer_shapes(self._model, 0)))
        saved = OUTPUT_NAMES[self._model.architecture]
        return saved if saved in self._files else name

    def _check(self) -> None:
        """Compares names, shapes and types in the file headers with the model."""
        wanted = {}
        for index in range(self._model.num_layers + 2):
            for name, shape in layer_shapes(self._model, index).items():
                rows = self._vocab_size if index == 0 or name == "lm_head.weight" else shape[0]
                wanted[self._stored(name)] = (rows, *shape[1:])
        unused = {OUTPUT_NAMES[self._model.architecture], "lm_head.weight"} if self._tied else set()
        known = wanted.keys() | unused
        stray = [name for name in self._files if name not in known and not name.endswith(_CONSTANTS)]
        missing = [name for name in wanted if name not in self._files]
        if stray or missing:
            problem = f"has no tensor '{missing[0]}'" if missing else f"has a tensor '{stray[0]}'"
            raise InputError(
                f"{self.folder} {problem}, unlike the model that its config.json describes ({len(missing)} missing, "
                f"{len(stray)} too many). Copy it again."
            )
        for path in sorted(set(self._files.values())):
            try:
                with safe_open(path, "pt") as file:
                    for name in wanted:
                        if self._files[name] == path:
                            _check_tensor(file.get_slice(name), name, wanted[name], path)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error


def read_pretrained(model: ModelConfig, tokenizer: Path, tokenizer_size: int) -> PretrainedWeights:
    """Returns the weights in ``model.from_pretrained`` for data with this tokenizer.

    Args:
        model: has ``from_pretrained`` and its vocabulary size set.
        tokenizer: the data's tokenizer.json.
        tokenizer_size: the tokenizer's largest token id + 1.

    Raises:
        InputError: the folder holds no such model, or has another tokenizer.
    """
    folder = model.from_pretrained
    assert folder is not None
    weights = PretrainedWeights(folder, model)
    rows = read_pretrained_config(folder).vocab_size
    if rows < tokenizer_size:
        raise InputError(
            f"model.from_pretrained {folder} knows {rows} token ids, but the tokenizer of the data has {tokenizer_size}. "
            "Prepare the data with the model's tokenizer."
        )
    compare_tokenizers(folder, tokenizer)
    return weights


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file."""
    if (folder / INDEX).is_file():
        files = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise InputError(f"{folder / INDEX} has no weight_map of tensors to files. Copy it again.")
        for file in sorted(set(files.values())):
            if not (folder / file).is_file():
                raise InputError(f"{folder} has no {file}, which its index names. Copy it again.")
        return {name: folder / file for name, file in files.items()}
    path = folder / SINGLE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles:
            raise InputError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which could run code. Convert them with "
                f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers, then give that folder."
            )
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}. Give the folder of a model.")
    try:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _check_tensor(head: Any, name: str, shape: Iterable[int], path: Path) -> None:
    if list(head.get_shape()) != list(shape):
        raise InputError(
            f"{path}: {name} has shape {list(head.get_shape())}, but config.json means {list(shape)}. Copy both again."
        )
    if head.get_dtype() not in _FLOATS:
        raise InputError(
            f"{path}: {name} is stored as {head.get_dtype()}, expected {', '.join(_FLOATS)}. Choose a model that is not "
            "quantised."
        )


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read: {error}. Copy it again.")


def compare_tokenizers(folder: Path, of_data: Path) -> None:
    """Compares the tokenizers of model and data by ids, merges and the tokens of a text: the files may differ in form.

    Raises:
        InputError: the tokenizers differ, or one of them cannot be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        get_logger().warning(
            "%s has no tokenizer.json: whether the data were cut by the model's tokenizer cannot be checked", folder
        )
        return
    ids, merges, probes = [], [], []
    for file in (path, of_data):
        with refusing_bad_tokenizers(file, "Copy it again."):
            tokenizer = Tokenizer.from_file(str(file))
        switch_off_sampling(tokenizer)
        ids.append(tokenizer.get_vocab(with_added_tokens=True))
        merges.append(_merges(file))
        probes.append(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
    differing = sorted(name for name in ids[0].keys() | ids[1].keys() if ids[0].get(name) != ids[1].get(name))
    if differing:
        name = differing[0]
        problem = f"the id of {name!r} is {ids[0].get(name)} in the model's and {ids[1].get(name)} in the data's"
    elif merges[0] != merges[1]:
        problem = "their merges differ"
    elif probes[0] != probes[1]:
        problem = "they cut the same text differently"
    else:
        return
    raise InputError(
        f"{of_data}, the tokenizer of the data, is not the model's ({path}): {problem}. Prepare the data with --tokenizer "
        f"{path}."
    )


def _merges(path: Path) -> list[str]:
    """Returns a BPE tokenizer's merges as "a b", one of the two forms in files."""
    model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
