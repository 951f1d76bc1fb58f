"""``megamix export``: the model of a checkpoint in Hugging Face's form, without engine or ranks.

    OUT/model.safetensors             weights (or shards and their index)
        config.json                   GPTNeoXConfig or LlamaConfig
        generation_config.json        end-of-text token
        tokenizer.json                the data's tokenizer, byte for byte
        tokenizer_config.json         its special tokens
        megamix.json                  run, step, config and mixture

The export omits the padding of embedding and output projection: the rows beyond ``model.token_ids``, by default the
tokenizer's ids or, of a model that began as another, the rows of that one. It holds one tensor in memory at a time. OUT
is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import megamix
from megamix.core.config import validate
from megamix.core.errors import InputError, MegamixError, ResumeRefused, check_known
from megamix.core.files import sync_folder
from megamix.data.tokens.manifest import TOKENIZER_FILE, Manifest
from megamix.engines.models import ModelConfig
from megamix.engines.models.layers import hugging_face_config, layer_shapes, rope_parameters, rotary_keys_before_5
from megamix.engines.models.pretrained_config import CLASSES, OUTPUT_NAMES
from megamix.interop.hugging_face.tensor_files import TensorSpec, write_tensors
from megamix.training.checkpoints import store
from megamix.training.checkpoints.state import RunState, read_state
from megamix.training.records.recorded_run import CONFIG, RecordedRun

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportedModel:
    """Exported model.

    Attributes:
        source: the checkpoint.
        num_bytes: size of the weights.
    """

    out: Path
    source: Path
    num_parameters: int
    num_bytes: int

    def line(self) -> str:
        size = f"{self.num_parameters:,} parameters, {self.num_bytes:,} bytes"
        return f"{self.out}: the model of {self.source} ({size})"


def export(path: Path, out: Path, dtype: str = "fp32", max_shard_bytes: int = MAX_SHARD_BYTES) -> ExportedModel:
    """Writes the model of a run to the folder ``out``.

    Args:
        path: a checkpoint, or a run directory, for its newest complete checkpoint.
        out: new or empty.
        dtype: fp32 or bf16; checkpoints hold fp32.
        max_shard_bytes: size beyond which the weights go to several files.

    Raises:
        InputError: ``path`` is no run or checkpoint or is in an engine's format, the data set is missing or another
            one, or ``out`` is not empty.
        ResumeRefused: the checkpoint is damaged.
    """
    check_known([dtype], DTYPES, "--dtype is")
    out = out.absolute()
    _check_out(out)
    source, run = find_checkpoint(path)
    state = read_state(source)
    refuse_own_format(source, "export")
    manifest = data_of(run, state, source)
    fingerprints = state.fingerprints
    model = validate(ModelConfig, fingerprints["model"], f"{source / 'state.json'}, model")
    rows = model.token_ids or manifest.tokenizer.vocab_size
    partial = _start(out)
    try:
        exported = _weights(source, partial, model, rows, DTYPES[dtype], max_shard_bytes)
        eod = manifest.tokenizer.eod_id
        _write_config(partial, model, fingerprints["order"]["seq_length"], rows, eod, dtype)
        _write_tokenizer(partial, manifest, fingerprints["order"]["seq_length"])
        _write_json(partial / "megamix.json", _provenance(run, state, source, dtype))
        os.replace(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise MegamixError(f"cannot write {out}: {error.strerror or error}. Free space or choose another.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportedModel(out, source, *exported)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not an empty folder. Choose another --out, or remove it.")


def refuse_own_format(source: Path, command: str) -> None:
    """Raises InputError for a checkpoint in an engine's own format."""
    if (holds := store.kind(source)) != store.LAYERS:
        raise InputError(
            f"{source} is in a format of engine {holds}'s own (engine.checkpoint_format: dist), which {command} does not "
            f"read. Resume the run, also one that is done, with engine.checkpoint_format=layers, and {command} what it writes."
        )


def _start(out: Path) -> Path:
    """Makes the partial folder, which is renamed to ``out`` at the end."""
    partial = out.with_name(out.name + store.PARTIAL)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(
            f"{partial} is there already: another export to {out} is under way or was killed. Remove it if none is."
        ) from error
    except OSError as error:
        raise InputError(f"cannot make {partial}: {error.strerror or error}. Choose another --out.") from error
    return partial


def find_checkpoint(path: Path) -> tuple[Path, RecordedRun]:
    """The checkpoint at ``path``, or the newest of the run there, and its run.

    Raises:
        InputError: there is none.
    """
    if (path / CONFIG).is_file():
        source = store.newest(path / "checkpoints")
        if source is None:
            raise InputError(f"the run {path} has no complete checkpoint. Train it until one is written.")
        return source, RecordedRun.open(path)
    if not (path / store.LISTING).is_file():
        raise InputError(f"{path} is neither a run (no {CONFIG}) nor a checkpoint (no store.json). Give one.")
    return path, RecordedRun.open(path.absolute().parent.parent)


def data_of(run: RecordedRun, state: RunState, source: Path) -> Manifest:
    """Data set of the checkpoint, for its tokenizer; the run may have gone on with another one."""
    if run.manifest is None:
        raise InputError(
            f"the tokenizer is with the data, and the data of {run.run_dir} cannot be opened: {run.missing_data}"
        )
    wanted, seen = state.fingerprints["tokenizer"]["sha256"], run.manifest.tokenizer.sha256
    if wanted != seen:
        raise InputError(
            f"{source} was trained with a tokenizer of hash {wanted[:12]}, but {run.config.data.manifest} has {seen[:12]}. "
            "Put the data set back that the run was made with."
        )
    return run.manifest


def _weights(
    source: Path, out: Path, model: ModelConfig, vocab_size: int, dtype: torch.dtype, max_bytes: int
) -> tuple[int, int]:
    """Writes the tensor files; returns the numbers of parameters and bytes."""
    layers = [layer_shapes(model, index) for index in range(model.num_layers + 2)]
    ends = (0, model.num_layers + 1)
    specs = []
    for index, shapes in enumerate(layers):
        for name, shape in shapes.items():
            saved = OUTPUT_NAMES[model.architecture] if name == "lm_head.weight" else name
            trimmed = index in ends and len(shape) == 2
            specs.append(TensorSpec(saved, (vocab_size, *shape[1:]) if trimmed else tuple(shape)))

    def tensors() -> Iterator[torch.Tensor]:
        for index, shapes in enumerate(layers):
            yield from read_layer(source, index, shapes, vocab_size if index in ends else None)

    write_tensors(out, specs, tensors(), dtype, max_bytes)
    num_parameters = sum(spec.size for spec in specs)
    return num_parameters, num_parameters * dtype.itemsize


def read_layer(
    source: Path, index: int, shapes: dict[str, torch.Size], vocab_size: int | None
) -> Iterator[torch.Tensor]:
    """Weights of a layer of a checkpoint, with matrices cut to ``vocab_size`` rows where it is given.

    Raises:
        ResumeRefused: the file is damaged, or of another model.
    """
    name = f"{store.LAYERS}/{index:05d}.safetensors"
    store.verify(source, name)
    try:
        with safe_open(source / name, "pt") as file:
            for parameter, shape in shapes.items():
                tensor = file.get_tensor(f"weight/{parameter}")
                if tensor.shape != shape:
                    raise ResumeRefused(
                        f"{source / name}: {parameter} has shape {list(tensor.shape)}, expected {list(shape)}: the "
                        "checkpoint is of another model."
                    )
                yield tensor[:vocab_size] if len(shape) == 2 else tensor
    except SafetensorError as error:
        raise ResumeRefused(f"{source / name}: {error}: the checkpoint is of another model.") from error


def _write_config(folder: Path, model: ModelConfig, seq_length: int, vocab_size: int, eod: int, dtype: str) -> None:
    upstream = hugging_face_config(model.model_copy(update={"vocab_size": vocab_size}), seq_length)
    upstream.architectures = [CLASSES[model.architecture]]
    upstream.use_cache = True
    # A document follows the end-of-document token of the previous one, so that token also begins a document.
    upstream.bos_token_id = upstream.eos_token_id = eod
    config = json.loads(upstream.to_json_string())
    # In the words of every transformers, whichever writes them: 4.56 renamed the type, 5 the rotary embedding.
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config.update(dtype=name, torch_dtype=name, **rope_parameters(model), **rotary_keys_before_5(model))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod})


def _write_tokenizer(folder: Path, manifest: Manifest, seq_length: int) -> None:
    tokenizer = manifest.load_tokenizer()
    shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)
    name = Tokenizer.from_file(str(tokenizer.path)).id_to_token(tokenizer.eod_id)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
        # By default transformers before 5 adds token types, which the models refuse.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": seq_length,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _provenance(run: RecordedRun, state: RunState, source: Path, dtype: str) -> dict[str, Any]:
    """Origin of the model, and the blend that it was trained on."""
    position = run.config.batches.position(state.step)
    line = run.ledger.line_at(position)
    return {
        "format": "megamix-export",
        "version": 1,
        "megamix": megamix.__version__,
        "run": str(run.config.run_dir),
        "checkpoint": source.name,
        "step": state.step,
        "tokens": run.config.batches.tokens(state.step),
        "dtype": dtype,
        "weights": dict(zip(line["domain_names"], line["domain_weights"], strict=True)),
        "samples": {name: int(count) for name, count in run.ledger.counts(position).items()},
        "fingerprints": state.fingerprints,
        "config": run.config.model_dump(mode="json"),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
