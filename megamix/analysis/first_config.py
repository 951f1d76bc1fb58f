"""First config for a data set: what fits its domains and tokens, with comments, and nothing asked.

    tokens -> samples -> model (20 tokens a parameter) -> tokens of the run -> batch and steps -> learning rate

The rules of thumb are starting points from the literature, each named in the file that it decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.core.files import replace_file, writing
from megamix.core.packages import has_extra
from megamix.core.paths import literal
from megamix.core.text import plural
from megamix.core.yaml_text import parse_yaml
from megamix.data.tokens.manifest import Manifest
from megamix.engines.models.config import ModelConfig
from megamix.training.config import RunConfig
from megamix.training.plan import make_plan

PRESETS = ("neox-2m", "neox-70m", "neox-160m", "neox-410m", "neox-1b")
"""From small to large."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al., 2022 (arXiv 2203.15556): as many tokens make the best use of a given compute."""
MOST_EPOCHS = 4
"""Muennighoff et al., 2023 (arXiv 2305.16264): up to so many, repeated text is nearly as good as new."""
SAMPLE_LENGTHS = {10**9: 2048, 10**8: 1024, 10**7: 512, 2 * 10**6: 256, 0: 128}
"""Tokens of a sample, by the training tokens from which on."""
SHORTEST = 8
WANTED_STEPS = 2000
SMALLEST_BATCH, LARGEST_BATCH = 16, 2**19
"""Samples and tokens of a step."""
MICRO_BATCH = 8
LISTED = 40


@dataclass(frozen=True)
class Sizes:
    """What a run on a data set comes to."""

    preset: str
    parameters: int
    seq_length: int
    global_batch: int
    steps: int
    lr: float

    @property
    def tokens(self) -> int:
        """That the run reads."""
        return self.steps * self.global_batch * self.seq_length


def write_first_config(data: Path, out: Path | None = None) -> Path:
    """Writes a config for ``data`` that `megamix train` accepts, and returns its path.

    Args:
        data: manifest.json, or its folder.
        out: default: NAME.yaml here, after the data's folder. The run directory is runs/ and its name.

    Raises:
        InputError: no data set, one that no run can read, or a file that is there.
    """
    manifest = Manifest.load(data)
    name = manifest.folder.absolute().name or "run"
    out = Path(f"{name}.yaml") if out is None else out
    if out.exists():
        raise InputError(f"{out} is there, and is left as it is. Choose another --out, or remove it.")
    text = first_config(manifest, data, Path("runs") / out.stem)
    make_plan(validate(RunConfig, parse_yaml(text, str(out)), str(data)), verify=False)
    with writing(out, "Choose another --out."):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, text.encode())
    return out


def sizes_of(manifest: Manifest) -> Sizes:
    """Sizes that fit the tokens of a data set."""
    train = [domain.train.tokens for domain in manifest.domains]
    held_out = (domain.validation.tokens for domain in manifest.domains)
    shortest = min(*train, *filter(None, held_out), 2**62)  # a domain without validation text is only trained on
    seq_length = next(length for least, length in SAMPLE_LENGTHS.items() if sum(train) >= least)
    while seq_length > SHORTEST and shortest <= seq_length:
        seq_length //= 2
    models = {preset: _parameters(preset, manifest.tokenizer.vocab_size) for preset in PRESETS}
    fitting = [preset for preset in PRESETS if TOKENS_PER_PARAMETER * models[preset] <= sum(train)]
    preset = fitting[-1] if fitting else PRESETS[0]
    tokens = min(TOKENS_PER_PARAMETER * models[preset], MOST_EPOCHS * sum(train))
    wanted = _power_of_two(min(tokens / WANTED_STEPS, LARGEST_BATCH) / seq_length)
    global_batch = max(SMALLEST_BATCH, wanted)
    # A domain's last tokens that fill no sample are not read.
    most = MOST_EPOCHS * sum((each - 1) // seq_length for each in train)
    steps = max(1, min(tokens // seq_length, most) // global_batch)
    return Sizes(preset, models[preset], seq_length, global_batch, steps, _learning_rate(models[preset]))


def first_config(manifest: Manifest, data: Path, run_dir: Path) -> str:
    """The text of the config."""
    sizes = sizes_of(manifest)
    total = sum(domain.train.tokens for domain in manifest.domains)
    mixes = len(manifest.domains) > 1
    small = sizes.preset == PRESETS[0]
    lines = [
        f"# {plural(len(manifest.domains), 'domain')} of {data}, {total:,} training tokens:",
        "#",
        *_domains(manifest),
        "#",
        f"# megamix doctor FILE checks it here; megamix train FILE begins; the same again goes on. {plural(sizes.steps, 'step')} of",
        f"# {sizes.global_batch * sizes.seq_length:,} tokens read {sizes.tokens:,}, {sizes.tokens / total:.2g} times the corpus.",
        "# megamix --help-config KEY says what a key means.",
        f"run_dir: {_path(run_dir)}",
        "data:",
        f"  manifest: {_path(data)}",
        f"  seq_length: {sizes.seq_length}  # tokens of a sample; every domain has at least one, held out, too",
        f"  max_epochs: {MOST_EPOCHS}  # bounds the weight of a domain that would be read more often (arXiv 2305.16264)",
        "",
        "# What the model is to be good at: natural (text as it comes), uniform (all domains alike) or {domain: weight}.",
        "objective: natural",
        *(_mixer(sizes) if mixes else ["mixer: {name: static}  # one domain: nothing to mix"]),
        "",
        f"# {sizes.parameters / 1e6:,.1f} M parameters: the largest preset with {TOKENS_PER_PARAMETER} tokens a parameter in one epoch (arXiv 2203.15556),",
        "# or the smallest of all. Another of configs/models/, or dimensions of your own, may stand here.",
        f"model: {{preset: {sizes.preset}}}",
        "train:",
        f"  steps: {sizes.steps}",
        f"  global_batch: {sizes.global_batch}  # samples of a step, over all ranks",
        f"  micro_batch: {MICRO_BATCH}  # samples that a rank computes at once: what memory allows",
        f"  lr: {sizes.lr:.2g}  # by the number of parameters (arXiv 2001.08361, appendix D); try half and twice of it",
        "  warmup: 0.02",
        "",
        "# As many data-parallel ranks as the job has; more GPUs: megamix launch, or torchrun.",
        f"engine: {{name: {_engine()}, precision: {'fp32' if small else 'bf16'}}}",
        f"evaluate: {{every: {_part(sizes.steps, 10)}, samples: 64}}",
        f"checkpoint: {{every: {_part(sizes.steps, 8)}, keep: 2}}",
        f"log: {{every: {min(10, _part(sizes.steps, 50))}}}",
    ]
    return "\n".join(lines) + "\n"


def _domains(manifest: Manifest) -> list[str]:
    """The largest domains with tokens and shares."""
    shares = manifest.natural_weights()
    order = sorted(range(len(shares)), key=lambda index: -shares[index])
    width = min(40, max(len(manifest.domains[index].name) for index in order[:LISTED]))
    lines = [
        f"#   {manifest.domains[index].name:<{width}}  {manifest.domains[index].train.tokens:>17,}  {shares[index]:8.3%}"
        for index in order[:LISTED]
    ]
    return [*lines, *([f"#   and {len(order) - LISTED:,} more"] if len(order) > LISTED else [])]


def _mixer(sizes: Sizes) -> list[str]:
    warmup = _part(sizes.steps, 20)
    return [
        "# The rule samples as the objective asks, and leaves what no longer learns; it needs no warm-up. A static mixture:",
        "# mixer: {name: static} with mixture: natural, uniform, {temperature: 0.5} or {domain: weight}.",
        "mixer: {name: recommended}",
        "# Rules beside it see the same losses, change nothing and say what they would have done.",
        f"shadow: [{{name: odm, preset: official, warmup_steps: {warmup}}}]",
    ]


def _parameters(preset: str, vocab_size: int) -> int:
    return ModelConfig.model_validate({"preset": preset}).with_vocabulary(vocab_size).num_parameters()


def _learning_rate(parameters: int) -> float:
    """Kaplan et al., 2020 (arXiv 2001.08361), equation D.1."""
    return 0.003239 - 0.0001395 * math.log(parameters)


def _engine() -> str:
    """The first engine whose packages are here."""
    return next((name for name in ("deepspeed", "megatron") if has_extra(name)), "deepspeed")


def _part(steps: int, parts: int) -> int:
    return max(1, steps // parts)


def _power_of_two(number: float) -> int:
    return 2 ** max(0, round(math.log2(number)))


def _path(path: Path) -> str:
    """A path as YAML and `megamix.core.paths.expand` read it."""
    text = literal(path)
    is_plain = all(character.isalnum() or character in "/._-" for character in text) and not text.isdecimal()
    return text if is_plain else "'" + text.replace("'", "''") + "'"
