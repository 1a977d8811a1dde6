"""The topology file: what is accepted, and that every mistake is reported with its line, its place and the way out."""

import inspect
from pathlib import Path

import pytest

from afm_rl.config import PRESETS
from afm_rl.data.dataset import from_files
from afm_rl.errors import UserError
from afm_rl.worlds.python_world import build_world
from topologies.schema import Files, WorldSizes, load_topology, parse_topology
from topologies.stage_options import STAGES

TOPOLOGIES = Path(__file__).parents[2] / "topologies"

MINIMAL = """\
name: mini
stages:
  - tokenizer
  - pretrain
  - sft:
      steps: 10
  - itec: {rounds: 1}
"""


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    return load_topology(path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("name", [path.stem for path in TOPOLOGIES.glob("*.yaml")])
def test_shipped_files_load_and_survive_a_round_trip(name):
    """The files users launch are valid, and `resolved` loses nothing; smoke.yaml has every stage there is."""
    topology = load_topology(TOPOLOGIES / f"{name}.yaml")
    assert topology.name == name
    assert set(topology.stage_names) == set(STAGES) or name != "smoke"
    assert parse_topology(topology.to_yaml()) == topology
    assert parse_topology(topology.to_yaml()).to_yaml() == topology.to_yaml()


def test_paper_values_are_defaults():
    """Numbers that the paper gives and that do not depend on scale are what an empty file gets."""
    topology = parse_topology("{name: a, stages: [tokenizer, pretrain, sft, quantize, recover, adapters]}")
    core, continued, context = (phase for _, phase in topology.stage("pretrain").phases)
    assert (core.peak_lr, core.end_fraction, core.weight_decay) == (0.01, 0.005, 3.16e-4)
    assert (continued.peak_lr, continued.end_fraction, continued.weight_decay) == (3e-4, 0.001, 1e-5)
    assert (context.peak_lr, context.rope_base) == (3e-4, "rescaled")
    assert (topology.stage("sft").learning_rate, topology.stage("sft").dropout) == (2e-5, 0.1)
    assert (topology.stage("quantize").bits_per_weight, topology.stage("quantize").group_size) == ([3.7, 3.5], 16)
    assert (topology.stage("recover").ranks, topology.stage("adapters").rank) == ([8, 16, 32], 16)


def test_unknown_key_names_file_line_place_and_nearest(tmp_path):
    """The error that a typo gives, word for word as documented."""
    text = MINIMAL.replace("{rounds: 1}", "\n      ruonds: 1")
    assert message(tmp_path, text) == "t.yaml:8: stages[3].itec.ruonds: unknown key 'ruonds'; did you mean 'rounds'?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL.replace("name: mini", "nmae: mini"), "t.yaml:1: nmae: unknown key 'nmae'; did you mean 'name'?"),
        (MINIMAL.replace("name: mini", "seed: 1"), "t.yaml:1: name: missing; it has no default"),
        (MINIMAL.replace("steps: 10", "steps: 0"), "t.yaml:6: stages[2].sft.steps: "),
        (MINIMAL.replace("steps: 10", "steps: yes"), "t.yaml:6: stages[2].sft.steps: input should be a valid integer"),
        (MINIMAL.replace("steps: 10", "steps: '10'"), "t.yaml:6: stages[2].sft.steps: input should be a valid integer"),
        (MINIMAL.replace("steps: 10", "learning_rate: .nan"), "t.yaml:6: stages[2].sft.learning_rate: "),
        (MINIMAL.replace("- tokenizer", "- tokeniser"), "t.yaml:3: stages[0]: unknown stage 'tokeniser'; did you mean"),
        (MINIMAL.replace("steps: 10", "name: x"), "t.yaml:6: stages[2].sft.name: unknown key 'name'"),
        (MINIMAL + "model: tinny\n", "t.yaml:8: model.preset: unknown model preset 'tinny'; did you mean 'tiny'?"),
        (MINIMAL + "model: {dim: 8}\n", "t.yaml:8: model: missing vocab_size, ffn_dim"),
        (
            MINIMAL + "model: {preset: tiny, num_kv_heads: 3}\n",
            "model: model.num_heads (4) must be a multiple",
        ),
        (MINIMAL + "model: {huggingface: x, dim: 8}\n", "t.yaml:8: model.dim: a Hugging Face folder gives all"),
        (
            MINIMAL + "model: {huggingface: /nowhere}\n",
            "t.yaml:8: model.huggingface: /nowhere/config.json does",
        ),
        (
            MINIMAL + "actors: {annotator: {kind: human}}\n",
            "'human' is not available in this version; valid: sim",
        ),
        (
            MINIMAL + "actors:\n  learner:\n    mesh: {fsdp: 3}\n",
            "t.yaml:10: actors.learner.mesh.fsdp: does not divide model.dim, 128",
        ),
        (
            MINIMAL + "actors: {learner: {processes: 2}}\n",
            "actors.learner.processes: the mesh has 1 devices, which 2 processes cannot share equally",
        ),
        (
            MINIMAL + "actors:\n  learner:\n    mesh: {tensor: 4}\nmodel: {preset: tiny, num_heads: 12, num_kv_heads: 6}\n",
            "actors.learner.mesh.tensor: neither divides model.num_kv_heads, 6, nor is a multiple",
        ),
        (MINIMAL + "compute: {attention: cudnn}\n", "compute.attention: does not run on CPU; use auto or xla"),
        (
            MINIMAL + "compute: {microbatch_tokens: 64}\nactors: {learner: {mesh: {data: 2}}}\n",
            "compute.microbatch_tokens: less than one row of",
        ),
        (
            MINIMAL + "launcher: inline\nactors: {learner: {processes: 2, mesh: {data: 2}}}\n",
            "actors.learner.processes: the inline launcher is one process; use launcher: local",
        ),
        (MINIMAL + "address: auto\n", "t.yaml:8: address: only the cluster launcher takes an address"),
        (MINIMAL + "data: {world: python, files: {}}\n", "t.yaml:8: data.files: give either files or world, not both"),
        (MINIMAL + "data: {files: {prompts: gone.jsonl}}\n", "gone.jsonl does not exist"),
        (
            MINIMAL.replace("  - sft:\n      steps: 10\n", ""),
            "stages[2].itec: needs an SFT policy, which no earlier",
        ),
        (MINIMAL.replace("rounds: 1", "members: [sft, ppo]"), "itec.members[1]: unknown committee member 'ppo'"),
        (
            MINIMAL.replace("- pretrain", "- pretrain:\n      core:\n        mixture: {web: 1, cod: 1}"),
            "t.yaml:6: stages[1].pretrain.core.mixture.cod: unknown domain 'cod'; did you mean 'code'?",
        ),
        (MINIMAL + "  - sft\n", "t.yaml:8: stages[4].sft: the stage 'sft' is listed twice"),
        (MINIMAL.replace("rounds: 1", "members: [sft, rs, sft]"), "stages[3].itec.members[2]: 'sft' is listed twice"),
        (
            MINIMAL + "  - prune\nsmall_model: {ffn_dim: 512}\n",
            "t.yaml:9: small_model.ffn_dim: must be less than model",
        ),
        (
            MINIMAL.replace("- tokenizer", "- tokenizer: {vocab_size: 4096}"),
            "vocab_size: must be model.vocab_size, 2048; change",
        ),
        (MINIMAL.replace("rounds: 1", "mdloo: {inner_steps: 1}"), "stages[3].itec.mdloo.inner_steps: "),
        ("- a\n", "t.yaml:1: a topology is a mapping"),
        ("", "a topology is a mapping"),
        ("name: a\nname: b\n", "t.yaml:2: the key 'name' is given twice"),
        ("name: a\n3: b\n", "t.yaml:2: a key must be text, got 3"),
        ("name: [a\n", "t.yaml:2: not YAML"),
        ("name: &x [*x]\n", "t.yaml:1: name[0]: an alias inside the value it names"),
        ("name: !!python/object:os.system a\n", "t.yaml:1: name: the tag "),
    ],
)
def test_mistakes_are_reported_where_they_stand(tmp_path, text, expected):
    """One mistake, one line: file, line, place, what to do."""
    text = message(tmp_path, text)
    assert expected in text
    assert "\n" not in text


def test_several_mistakes_are_reported_together(tmp_path):
    """A user should not have to launch once for every typo."""
    lines = message(tmp_path, MINIMAL.replace("steps: 10", "steps: 0") + "seed: -1\ncompute: {dtyp: x}\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["seed", "compute.dtyp", "stages[2].sft.steps"]


def test_a_union_is_one_message(tmp_path):
    """A value that fits neither a number nor a name is reported once, with both."""
    text = message(tmp_path, MINIMAL.replace("- pretrain", "- pretrain: {core: {rope_base: big}}"))
    assert text == (
        "t.yaml:4: stages[1].pretrain.core.rope_base: input should be a valid number, "
        "or input should be 'model' or 'rescaled', got 'big'"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2", 2.0), (".5", 0.5), ("1_000", 1000.0), ("010", 10.0), ("5e2", 500.0)],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    """PyYAML alone reads 1e-3 as text and 010 as eight."""
    topology = load(tmp_path, MINIMAL.replace("steps: 10", f"learning_rate: {text}"))
    assert topology.stage("sft").learning_rate == value


def test_overrides_reach_stages_by_name_and_by_index(tmp_path):
    """`--set` values are YAML; bare stage names and the model's short form open up."""
    topology = load(
        tmp_path,
        MINIMAL.replace("seed: 0", "") + "model: tiny\n",
        "stages.itec.mdloo.gamma=1e-1",
        "stages.1.pretrain.core.steps=7",
        "stages.pretrain.core.warmup_steps=1",
        "actors.sampler.replicas=3",
        "model.dim=64",
        "seed=5",
        "stages.sft={steps: 3}",
        "stages.tokenizer.vocab_size=512",
        "model.vocab_size=512",
    )
    assert topology.stage("itec").mdloo.gamma == 0.1
    assert topology.stage("itec").rounds == 1
    assert (topology.stage("pretrain").core.steps, topology.stage("pretrain").core.warmup_steps) == (7, 1)
    assert topology.actors.sampler.replicas == 3
    assert topology.model.config() == PRESETS["tiny"].replace(dim=64, vocab_size=512)
    assert topology.seed == 5
    assert topology.stage("sft").steps == 3
    assert topology.stage("tokenizer").vocab_size == 512


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stages.itec.ruonds=1",
            "--set stages.itec.ruonds=1: stages[3].itec.ruonds: unknown key 'ruonds'; did you mean",
        ),
        ("stages.itek.rounds=1", "stages has no 'itek'; it has: tokenizer, pretrain, sft, itec"),
        ("stages.9=sft", "stages has 4 items, counted from 0; there is no item 9"),
        ("name.x=1", "name is 'mini', which has no 'x'"),
        ("seed", "expected key=value"),
        ("a..b=1", "expected key=value"),
        ("seed=[1", "--set seed=[1"),
        ("stages=[sft]", "--set stages=[sft]: stages[0].sft: needs a tokenizer, which no earlier stage makes"),
    ],
)
def test_override_mistakes_name_the_option(tmp_path, override, expected):
    """A line number would mislead where the command line is at fault."""
    text = message(tmp_path, MINIMAL, override)
    assert expected in text
    assert "t.yaml" not in text


def test_a_scalar_stands_for_a_list_of_one(tmp_path):
    """`bits_per_weight: 3.7`, as the design writes it."""
    topology = load(tmp_path, MINIMAL + "  - quantize: {bits_per_weight: 3.7}\n")
    assert topology.stage("quantize").bits_per_weight == [3.7]


def test_files_need_what_the_stages_read(tmp_path):
    """A stage whose records no file gives is an error before the launch, and paths become absolute."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "d.jsonl").write_text("")
    files = f"data: {{files: {{documents: {{web: {tmp_path}/docs}}, demonstrations: {tmp_path}/docs/../d.jsonl}}}}\n"
    assert "stages[3].itec: reads prompts, and data.files gives none" in message(tmp_path, MINIMAL + files)
    topology = load(tmp_path, MINIMAL.replace("  - itec: {rounds: 1}\n", "") + files)
    assert topology.data.world is None
    assert topology.data.files.demonstrations == f"{tmp_path}/d.jsonl"


def test_a_hugging_face_folder_gives_tokenizer_and_base_model(tmp_path):
    """Post-training can start from a checkpoint; training another tokenizer under it is refused."""
    folder = Path(__file__).parents[1] / "fixtures" / "qwen3_tiny"
    model = f"model: {{huggingface: {folder}}}\n"
    topology = load(tmp_path, f"name: a\n{model}stages: [sft]\n")
    assert topology.model.config().num_layers >= 1
    text = message(tmp_path, f"name: a\n{model}stages:\n  - tokenizer\n  - sft\n")
    assert "t.yaml:4: stages[0].tokenizer: the Hugging Face folder already gives the tokenizer" in text


def test_options_of_data_are_arguments_of_what_makes_it():
    """The schema's names and defaults are those of the world and of the file reader, so that neither drifts."""
    world = inspect.signature(build_world).parameters
    assert {name: world[name].default for name in WorldSizes.model_fields} == WorldSizes().model_dump()
    assert set(Files.model_fields) <= set(inspect.signature(from_files).parameters)


def test_missing_file_is_a_user_error(tmp_path):
    """No traceback for a mistyped path."""
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.yaml"):
        load_topology(tmp_path / "nowhere.yaml")
