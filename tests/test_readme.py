"""What the README and its chapters show works as it stands: code, command lines, config keys, links, names of files."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
import yaml
from commands import ROOT
from megatron_forms import pretrain_of_018, pretrain_of_019
from readme_code import PAGES, Code, anchors, command_lines, links, pieces_of_code, python_blocks, readme_code
from small_config import SMALL
from titan_stand_in import installed
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.config import Config, configs_in, validate
from megamix.core.config_files import apply_overrides, merge, read_yaml
from megamix.core.yaml_text import parse_yaml
from megamix.interop.trainers.megatron_versions import SEEN
from megamix.studies.config import STUDIES
from megamix.training.config import KINDS, RunConfig

RUN_ELSEWHERE = {
    "mixing": ["class Progress(Mixer)"],  # tests/mixing/test_own_mixer.py
    "interop": [
        "DistributedDataParallel",
        "MegatronMix",
        "parse_and_validate_args",
        "MixCallback",
        "MixDataLoader",
        "StatefulDataLoader",
    ],  # tests/interop/test_ddp_loop.py, test_stateful.py; below
    "prepare": ["LocalPipelineExecutor"],  # tests/prepare/test_text_writer.py
    "README": ["forward(domain, sample)"],  # below
    "kernels": ["domain_cross_entropy("],  # below
}
NOT_OURS = {"pretrain_gpt.py", "loop.py", "mixers/progress.py"}
"""Files on the pages that are the reader's, or another project's."""
USAGE_ERROR: Any = typer.BadParameter.__base__
CHAPTERS = [name for name in PAGES if name != "README"]


# Code


def test_the_pieces_in_a_custom_trainer() -> None:
    """The README's loop, run with a toy in place of the reader's model: the losses fall and the weights move."""
    torch.manual_seed(0)
    logits = torch.zeros(2, 16, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    seen: list[list[int]] = []

    def forward(domain, sample):
        """Domain 0 always says 3, domain 1 anything: one can be learnt."""
        if logits.grad is not None:
            optimizer.step()
            optimizer.zero_grad()
        seen.append([int((domain == 0).sum()), int((domain == 1).sum())])
        domain, sample = torch.from_numpy(domain), torch.from_numpy(sample)
        labels = torch.where(domain == 0, torch.full_like(sample, 3), sample % 16)
        return logits[domain], labels, domain

    names: dict[str, Any] = {"forward": forward, "steps": 40}
    exec(readme_code("README", "forward(domain, sample)"), names)
    weights = names["blend"].weights
    assert seen[0] == [336, 144], "the first batch follows the initial weights"
    assert weights[1] > 0.6, "perplexity draws ODM to the domain that cannot be learnt"
    assert names["blend"].position == 40 * 480
    assert len(names["blend"].ledger) <= 2  # it does not grow


def test_the_kernels_example() -> None:
    logits = torch.randn(64, 16, requires_grad=True)
    labels, domains = torch.arange(64) % 16, torch.arange(64) % 22
    expected = torch.nn.functional.cross_entropy(logits.detach(), labels, reduction="none")
    names: dict[str, Any] = {"logits_NV": logits, "labels_N": labels, "domain_N": domains, "tokens_in_global_batch": 64}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(readme_code("kernels", "domain_cross_entropy("), names)
    finally:
        dist.destroy_process_group()
    by_domain = torch.stack([expected[domains == domain].mean() for domain in range(22)])
    torch.testing.assert_close(names["mean_loss_K"].float(), by_domain)
    assert names["out"].loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert not names["sums"].tokens.any(), "ready for the next step"


@pytest.fixture
def mix_yaml(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a ``mix.yaml`` over the tests' data."""
    monkeypatch.chdir(tmp_path)
    sections = {"data": {"manifest": str(data_dir), "seq_length": 32}, "mixture": "natural", "mixer": {"name": "odm"}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(sections))


def test_the_trainer_example(mix_yaml: None, tmp_path: Path) -> None:
    """Three steps of a tiny model; the mixer's weights are in the record that the page names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    code = readme_code("interop", "MixCallback")
    assert '"out", max_steps=1000' in code
    code = code.replace("max_steps=1000", "max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True")
    size: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names: dict[str, Any] = {"model": LlamaForCausalLM(LlamaConfig(**size, intermediate_size=32))}
    exec(code, names)
    assert names["trainer"].state.global_step == 3
    assert len((tmp_path / "out" / "megamix" / "weights.jsonl").read_text().splitlines()) > 1


def test_the_megatron_lm_example(mix_yaml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to Megatron-LM, of which the wheel of megatron-core has no training loop, in the form of every
    version; test_megatron_lm.py runs these functions in a stand-in for it."""
    names: dict[str, Any] = {
        "partial": lambda *arguments: arguments,
        "model_provider": "provider",
        "gpt_builder": "builder",
        "ModelType": types.SimpleNamespace(encoder_or_decoder="decoder"),
        "parse_and_validate_args": lambda args_defaults: "args",
        "gpt_config_from_args": lambda args: (args, "model"),
        "pretrain_cfg_container_from_args": lambda *arguments: arguments,
    }

    def of_016(
        train_valid_test_dataset_provider: Any, model_provider: Any, model_type: Any, forward_step_func: Any
    ) -> dict[str, Any]:
        return locals()

    code, given = readme_code("interop", "mix.pretrain("), readme_code("interop", "parse_and_validate_args")
    earlier = next(line for line in code.splitlines() if line.startswith("given = "))
    shorter = re.search(r"# core_v0.18: (.*)", given)
    assert shorter is not None
    provided = {"model_provider": ("provider", "builder")}
    for pretrain, first, expected in (
        (of_016, earlier, provided),
        (pretrain_of_018, f"args = 'args'; given = {shorter[1]}", {"cfg_container": ("args",), **provided}),
        (pretrain_of_019, given, {"cfg_container": ("args", ("args", "model"))}),
    ):
        training = types.SimpleNamespace(save_checkpoint=print, pretrain=pretrain)
        monkeypatch.setitem(sys.modules, "megatron.training", types.SimpleNamespace(training=training))
        exec(code.replace(earlier, first).replace("mix.pretrain(", "got = mix.pretrain("), names)
        got, mix = {key: value for key, value in names["got"].items() if value}, names["mix"]
        assert got.pop("train_valid_test_dataset_provider") == mix.train_valid_test_datasets_provider
        assert got.pop("forward_step_func") == mix.forward_step
        assert got == {"model_type": "decoder", **expected}
        assert training.save_checkpoint is not print


def test_the_versions_of_megatron_lm_seen_to_train() -> None:
    assert SEEN in " ".join(PAGES["interop"].read_text(encoding="utf-8").split())


def test_the_torchtitan_example(mix_yaml: None) -> None:
    """The config is one of torchtitan's with our parts, in sizes that agree; test_torchtitan.py runs them."""

    class Loose(types.SimpleNamespace):
        def __getattr__(self, name: str) -> Loose:
            setattr(self, name, Loose())
            return getattr(self, name)

    names: dict[str, Any] = {"llama3_debugmodel": Loose}
    with installed():
        exec(readme_code("interop", "MixDataLoader") + "config = my_run()\n", names)
    config = names["config"]
    data, training = config.dataloader, config.training
    assert (data.mix, data.steps, data.global_batch_size) == ("mix.yaml", training.steps, training.global_batch_size)
    assert training.disable_cuda_graphs
    assert isinstance(config.loss, names["MixLoss"].Config)


BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(python_blocks(page))
    if not any(part in block for part in RUN_ELSEWHERE.get(page, []))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_other_block_runs_by_itself(block: str) -> None:
    exec(block, {})


def test_blocks_that_run_elsewhere_are_there() -> None:
    for page, parts in RUN_ELSEWHERE.items():
        for part in parts:
            assert readme_code(page, part)


# Command lines and config keys


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with what a reader of the pages would have: the configs, one more, a model, a custom mixer."""
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (tmp_path / "configs" / path.name).symlink_to(path)
    (tmp_path / "configs" / "mine.yaml").write_text(SMALL)
    (tmp_path / "mixers").mkdir()
    (tmp_path / "mixers" / "progress.py").write_text(readme_code("mixing", "class Progress(Mixer)"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "mixers")
    yield
    sys.modules.pop("progress", None)


def parse(arguments: list[str], is_whole: bool) -> dict[str, Any]:
    """The values that a command would be called with, an empty dict where it only prints help; fails on what it would
    refuse."""
    command: Any = typer.main.get_command(app)
    rest = arguments
    if rest[:1] == ["--help-config"]:
        assert CliRunner().invoke(app, rest).exit_code == 0
        return {}
    while hasattr(command, "commands"):
        assert rest, f"megamix {' '.join(arguments)}: no command"
        name, *rest = rest
        assert name in command.commands, f"megamix {' '.join(arguments)}: no command {name}"
        command = command.commands[name]
    try:
        return command.make_context(name, rest or ["PATH"]).params
    except typer.Exit:
        return {}
    except USAGE_ERROR as error:
        if type(error).__name__ != "MissingParameter" or is_whole:
            pytest.fail(f"megamix {' '.join(arguments)}: {error.format_message()}")
        return {}


def check_config(data: dict[str, Any], what: str) -> None:
    """Refuses a config with a key or a value that no run or study has."""
    for study, steps in STUDIES.items():
        if study in data:
            validate(steps, data.pop(study), what)
    validate(RunConfig, data, what)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_understood(page: str, at_home: None) -> None:
    """Commands, options and their values exist, and so do the config keys behind them."""
    for arguments, is_whole in command_lines(page):
        params = parse(arguments, is_whole)
        config, overrides = (
            params.get("config") or params.get("source"),
            params.get("overrides", params.get("arguments")),
        )
        if overrides and "..." not in arguments and params.get("chain") != "prepare":
            known = config is not None and Path(config).is_file()
            overrides = [each for each in overrides if not each.startswith("[")]  # [key=value ...]
            base = read_yaml(Path(config), KINDS) if known else parse_yaml(SMALL, "SMALL")
            check_config(apply_overrides(base, overrides, KINDS), f"{page}: megamix {' '.join(arguments)}")


def test_the_commands_of_the_demo_are_shown() -> None:
    text = PAGES["README"].read_text(encoding="utf-8")
    for command in ("make demo", "make test", "megamix prepare", "megamix doctor", "megamix inspect", "megamix report"):
        assert command in text


def known_keys(config: type[Config], prefix: str = "") -> set[str]:
    """Every key of a config class with a path to it, whatever mixer, engine or mixture has it."""
    found = set()
    for name, field in config.model_fields.items():
        found.add(prefix + name)
        for nested in configs_in(field.annotation):
            found |= known_keys(nested, f"{prefix}{name}.")
    return found


KEYS = known_keys(RunConfig).union(*(known_keys(steps, f"{name}.") for name, steps in STUDIES.items()))
SECTIONS = {key.partition(".")[0] for key in KEYS}


def of_us(page: str) -> list[Code]:
    """The spans and blocks of a page, but those that name other projects' options."""
    return [code for code in pieces_of_code(PAGES[page]) if not (page == "interop" and code.column == 0)]


@pytest.mark.parametrize("page", PAGES)
def test_every_config_key_exists(page: str) -> None:
    named = [re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?=$|: |=)", code.text) for code in of_us(page) if code.language is None]
    keys = [match[1] for match in named if match and match[1].partition(".")[0] in SECTIONS]
    keys = [key for key in keys if not key.endswith((".html", ".json", ".py"))]
    assert [key for key in keys if key not in KEYS] == []


def pieces_of_configs(page: str) -> list[str]:
    """Overrides as they would stand on a command line, from ``mixer: {...}`` in a sentence and from the first column of
    a table headed ```mixer:```. Left out: what has dots for the rest, and keys of a mixer that is not named."""
    found = []
    for code in of_us(page):
        headed = re.fullmatch(r"`(\w+):`", code.header) if code.column == 0 else None
        pair = re.match(r"([a-z_.]+): (?=\S)", f"{headed[1]}: {code.text}" if headed else code.text)
        if (
            code.language is None
            and pair
            and pair[1].partition(".")[0] in SECTIONS
            and not pair[1].startswith("mixer.")
        ):
            found.append(f"{pair[1]}={code.text if headed else code.text[pair.end() :]}")
    return [piece for piece in found if "..." not in piece and " | " not in piece]


PIECES = [pytest.param(piece, id=f"{page}: {piece}") for page in PAGES for piece in pieces_of_configs(page)]
FILES = [
    code.text
    for page in PAGES
    for code in pieces_of_code(PAGES[page])
    if code.language == "yaml" and not code.text.startswith("task:")  # lm-evaluation-harness has these
]


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_of_a_config_is_accepted(piece: str) -> None:
    check_config(apply_overrides(parse_yaml(SMALL, "SMALL"), [piece], KINDS), piece)


@pytest.mark.parametrize("text", FILES)
def test_every_yaml_block_is_accepted(text: str, at_home: None) -> None:
    """As a file in ``configs``, over a small run."""
    Path("configs/block.yaml").write_text(text)
    check_config(merge(parse_yaml(SMALL, "SMALL"), read_yaml(Path("configs/block.yaml"), KINDS), KINDS), text)


# Links and names


@pytest.mark.parametrize(
    "path",
    [
        *PAGES.values(),
        *(ROOT / f"{name}.md" for name in ("DECISIONS", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
        ROOT / "configs" / "evidence" / "README.md",
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_readme_leads_to_every_chapter() -> None:
    packages = {path.parent.name for path in (ROOT / "megamix").glob("*/__init__.py")}
    assert packages - set(PAGES) == {"core"}
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(PAGES["README"])}
    assert {PAGES[name] for name in CHAPTERS} <= linked


@pytest.mark.parametrize("path", [*PAGES.values(), ROOT / "DECISIONS.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_named_exists(path: Path) -> None:
    named = {name for code in pieces_of_code(path) for name in re.findall(r"(?<![\w/.])[\w/]*\w\.py\b", code.text)}
    folders = [path.parent, ROOT, ROOT / "megamix", ROOT / "kernels" / "megamix_kernels"]
    missing = [name for name in named - NOT_OURS if not any((folder / name).is_file() for folder in folders)]
    assert missing == []


def test_every_message_that_is_explained_can_be_met() -> None:
    """Each piece between dots stands in a text of the code, or of the job scripts."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "slurm").glob("*.sh")]
    for path in (ROOT / "megamix").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    said = "\n".join(texts)
    pieces = [code for code in pieces_of_code(PAGES["analysis"]) if code.header == "message" and code.column == 0]
    assert len(pieces) > 20
    missing = [part for code in pieces for part in code.text.split("...") if part.strip() and part.strip() not in said]
    assert missing == []
