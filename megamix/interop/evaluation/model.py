"""Models to evaluate, in one process and in fp32: a checkpoint of a run, or a causal model of transformers.

Legend: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.text import listed
from megamix.data.tokens.manifest import Manifest
from megamix.engines.models import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.layers import make_layer, tie_ends
from megamix.engines.models.pretrained import compare_tokenizers
from megamix.engines.models.pretrained_config import read_json_object
from megamix.interop.hugging_face.export import find_checkpoint, read_layer, refuse_own_format
from megamix.training.checkpoints.state import read_state
from megamix.training.config import RunConfig
from megamix.training.records.recorded_run import CONFIG

MOST_TOKENS = 2048
"""Length of the samples for a model that could read longer ones."""

Logits = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and how a run evaluates it.

    Attributes:
        source: checkpoint or folder.
        logits: maps tokens int64 [B, S] and positions (None: they count in the sample) to float32 [B, S, V].
        seq_length: tokens in a sample.
        token_ids: those that join the softmax; None: those of the data's tokenizer.
        config: of the run that it comes from; None for any other model.
        manifest: the run's data set, where it has one.
    """

    source: Path
    logits: Logits
    seq_length: int
    token_ids: int | None
    config: RunConfig | None
    manifest: Path | None
    check_tokenizer: Callable[[Manifest], None]


def open_model(path: Path, device: torch.device) -> EvaluatedModel:
    """The model at ``path``: a run (its newest checkpoint), a checkpoint, or a folder of transformers.

    Raises:
        InputError: none of these, or one that cannot be read.
        ResumeRefused: the checkpoint is damaged.
    """
    is_run = (path / CONFIG).is_file() or (path / "state.json").is_file()
    if not is_run and not (path / "config.json").is_file():
        raise InputError(
            f"{path} is neither a run (no {CONFIG}), nor a checkpoint (no state.json), nor a model of transformers (no "
            "config.json). Give one of these."
        )
    return _of_run(path, device) if is_run else _of_transformers(path, device)


def _of_run(path: Path, device: torch.device) -> EvaluatedModel:
    source, run = find_checkpoint(path)
    state = read_state(source)
    refuse_own_format(source, "evaluate")
    model = validate(ModelConfig, state.fingerprints["model"], f"{source / 'state.json'}, model")
    length, layers = state.fingerprints["order"]["seq_length"], []
    masks = DocumentMasks() if run.config.data.within_documents else None
    for index in range(model.num_layers + 2):
        layer = make_layer(model, index, 0, length, masks)
        names = layer.hugging_face_names()
        shapes = {name: layer.get_parameter(own).shape for own, name in names.items()}
        saved = dict(zip(shapes, read_layer(source, index, shapes, None), strict=True))
        layer.load_state_dict({own: saved[name] for own, name in names.items()}, strict=False)
        layers.append(layer.to(device).eval())
    tie_ends(layers)

    def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor:
        flow: Any = tokens_BS if positions_BS is None else (tokens_BS, positions_BS)
        for layer in layers:
            flow = layer(flow)
        return flow

    def check(manifest: Manifest) -> None:
        trained, given = state.fingerprints["tokenizer"]["sha256"], manifest.tokenizer.sha256
        if trained != given:
            raise InputError(
                f"{source} was trained with a tokenizer of hash {trained[:12]}, but {manifest.folder} has {given[:12]}. Give "
                "data of the same tokenizer."
            )

    return EvaluatedModel(source, logits, length, model.token_ids, run.config, run.config.data.manifest, check)


def _opened(path: Path) -> Any:
    """The model of a folder of transformers, in fp32.

    Raises:
        InputError: it cannot be opened, or has no weights for a part of it, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    dtype = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # before 4.56
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(  # typed as the model alone
            path, local_files_only=True, output_loading_info=True, **{dtype: torch.float32}
        )
        model, info = opened
    except Exception as error:  # transformers raises a dozen kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path}: transformers cannot open the model: {reason}") from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise InputError(
            f"{path} has no weights for {listed(missing, 4)} of {type(model).__name__}, which config.json names. Give the whole "
            "model, with the config.json that belongs to it."
        )
    if left := sorted(map(str, info["unexpected_keys"])):
        get_logger().warning("%s: %s has no place for %s", path, type(model).__name__, listed(left, 4))
    return model


def _check_causal(path: Path, model: Any, length: int, device: torch.device) -> None:
    """Raises InputError for a model that sees the tokens it is to predict."""
    tokens_BS = torch.zeros(2, length, dtype=torch.int64, device=device)
    tokens_BS[1, -1] = 1
    with torch.no_grad():
        first_SV, second_SV = model(input_ids=tokens_BS, use_cache=False).logits
    change_S = (first_SV - second_SV).abs().amax(-1)
    # Of a causal model the logits before the changed token differ by rounding at most.
    if (change_S[:-1] > 1e-4 * change_S[-1]).any():
        raise InputError(
            f"{path}: {type(model).__name__} sees the tokens after those it reads, so its loss says nothing. Give a causal model."
        )


def _of_transformers(path: Path, device: torch.device) -> EvaluatedModel:
    model = _opened(path).to(device).eval()
    config = None
    if (path / "megamix.json").is_file():
        exported = read_json_object(path / "megamix.json")
        config = validate(RunConfig, exported.get("config"), str(path / "megamix.json"))
    known = getattr(model.config, "max_position_embeddings", None)
    length = config.data.seq_length if config is not None else min(known or MOST_TOKENS, MOST_TOKENS)
    _check_causal(path, model, min(length, 8), device)
    masks = DocumentMasks()

    def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor:
        given: dict[str, torch.Tensor] = {}
        if positions_BS is not None:
            # Without a mask, transformers takes positions that restart for documents to be kept apart, or does not,
            # by version and settings.
            within = config is not None and config.data.within_documents
            mask = masks.of(positions_BS, torch.float32) if within else torch.ones_like(positions_BS)
            given = {"position_ids": positions_BS, "attention_mask": mask}
        return model(input_ids=tokens_BS, use_cache=False, **given).logits

    def check(manifest: Manifest) -> None:
        compare_tokenizers(path, manifest.folder / manifest.tokenizer.file)
        rows, ids = model.get_input_embeddings().weight.shape[0], manifest.tokenizer.vocab_size
        if rows < ids:
            raise InputError(
                f"{path} knows {rows} token ids, but the tokenizer of {manifest.folder} has {ids}. Give data of the model's "
                "tokenizer."
            )

    # A model of a run's has no rows of padding.
    token_ids = None if config is None else model.get_input_embeddings().weight.shape[0]
    return EvaluatedModel(path, logits, length, token_ids, config, None, check)
