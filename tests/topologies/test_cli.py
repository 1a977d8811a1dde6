"""The command line: exit codes, one line for a user's mistake, and that every command does what it says."""

import errno
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from afm_rl.config import PRESETS
from afm_rl.errors import UserError
from topologies import cli
from topologies.run_folder import RunFolder
from topologies.schema import Topology, parse_topology

LOCAL = str(Path(__file__).parents[2] / "topologies" / "local.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder below ./runs, as `RUN` on the command line."""
    monkeypatch.chdir(tmp_path)
    return RunFolder.create_or_open("runs", parse_topology("{name: one, stages: [tokenizer, pretrain, sft]}"))


def fake_module(monkeypatch, name: str, **functions):
    """Stand in for a module that is heavy or starts Ray."""
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def save_tiny_policy(run: RunFolder, name: str) -> None:
    """A real policy folder: a random model with a real tokenizer."""
    import jax

    from afm_rl.huggingface import save_pretrained
    from afm_rl.parameters import init_params
    from pretrain.tokenizer_training import train_tokenizer

    config = PRESETS["tiny"].replace(vocab_size=400, dim=32, ffn_dim=32, num_layers=1)
    tokenizer = train_tokenizer([Path(__file__).read_text()], vocab_size=400, folder=run.tokenizer)
    params = init_params(config, jax.random.key(0))
    save_pretrained(params, run.policies / name / "0", config=config, tokenizer=tokenizer)


def test_launch_passes_topology_and_resume(monkeypatch):
    """Overrides and --resume reach the launcher."""
    seen = []
    fake_module(monkeypatch, "topologies.launch", launch=lambda topology, *, resume: seen.append((topology, resume)))
    assert cli.main(["launch", LOCAL, "--set", "seed=4", "--set", "stages.itec.rounds=1", "--resume"]) == 0
    ((topology, resume),) = seen
    assert isinstance(topology, Topology)
    assert (topology.seed, topology.stage("itec").rounds, resume) == (4, 1, True)


def test_a_users_mistake_is_one_line_and_code_two(monkeypatch, capsys):
    """No traceback for what the user can fix; anything else keeps its own."""

    def refuse(*_, **__):
        raise UserError("the run is unfinished")

    def fail(*_, **__):
        raise RuntimeError("a bug")

    fake_module(monkeypatch, "topologies.launch", launch=refuse)
    assert cli.main(["launch", LOCAL]) == 2
    assert capsys.readouterr().err == "afm-rl: the run is unfinished\n"
    assert cli.main(["launch", LOCAL, "--set", "stages.itec.ruonds=1"]) == 2
    assert capsys.readouterr().err == (
        "afm-rl: --set stages.itec.ruonds=1: stages[5].itec.ruonds: unknown key 'ruonds'; did you mean 'rounds'?\n"
    )
    fake_module(monkeypatch, "topologies.launch", launch=fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["launch", LOCAL])


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    """Ctrl-C during a launch is no error, and the run can be resumed."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    fake_module(monkeypatch, "topologies.launch", launch=interrupt)
    assert cli.main(["launch", LOCAL]) == 130
    assert "continue with --resume" in capsys.readouterr().err


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["launch", LOCAL], "continue with --resume"),
        (["import", "source", "policy"], "run the command again"),
        (["export", "one", "sft", "out"], "run the command again"),
    ],
)
def test_a_full_disk_says_how_to_go_on(monkeypatch, capsys, command, hint):
    """One line that names the file; only a launch can be resumed."""

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "part")

    fake_module(monkeypatch, "topologies.launch", launch=fill)
    fake_module(monkeypatch, "topologies.policy_commands", import_policy=fill, export_policy=fill)
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"afm-rl: the disk is full while writing part; free some space and {hint}\n"


def test_plan_for_people_and_for_scripts(capsys):
    """Both forms, on the shipped file; the cluster launcher, so that the testing machine's size does not matter."""
    assert cli.main(["plan", LOCAL, "--set", "launcher=cluster"]) == 0
    assert "learner" in capsys.readouterr().out
    assert cli.main(["plan", LOCAL, "--set", "launcher=cluster", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["name"] == "local"
    assert {actor["role"] for actor in data["actors"]} >= {"learner", "sampler"}


def test_report_and_serve_find_the_run(run, monkeypatch, capsys):
    """A run goes by its name; serve takes host and port from the topology unless told otherwise."""
    calls = []
    fake_module(monkeypatch, "topologies.report", write_report=lambda path: path / "report.html")
    fake_module(monkeypatch, "topologies.serving", serve_run=lambda path, **options: calls.append((path, options)))
    assert cli.main(["report", "one"]) == 0
    assert capsys.readouterr().out == f"{run.report_html}\n"
    assert cli.main(["serve", "one"]) == 0
    assert cli.main(["serve", "runs/one", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert [path for path, _ in calls] == [run.path, run.path]
    assert [(o["host"], o["port"], o["block"]) for _, o in calls] == [("127.0.0.1", 8000, True), ("0.0.0.0", 0, True)]
    assert cli.main(["report", "two"]) == 2
    assert "no run at two or runs/two" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_answers_with_a_real_policy(run, capsys):
    """Greedy answers are equal, sampled ones differ, a line each, and mistakes are one line."""
    save_tiny_policy(run, "sft")
    ask = ["generate", "one", "--policy", "sft", "--prompt", "3 + 4", "--max-tokens", "5", "--responses", "3", "--json"]
    assert cli.main(ask) == 0
    greedy = capsys.readouterr().out.splitlines()
    assert len(greedy) == 3
    assert len(set(greedy)) == 1
    answer = json.loads(greedy[0])
    assert set(answer) == {"text", "tokens", "finished"}
    assert 1 <= answer["tokens"] <= 5
    assert cli.main([*ask, "--temperature", "1", "--seed", "1"]) == 0
    sampled = capsys.readouterr().out
    assert len(set(sampled.splitlines())) == 3
    assert cli.main([*ask, "--temperature", "1", "--seed", "1"]) == 0
    assert capsys.readouterr().out == sampled
    assert cli.main(["generate", "one", "--policy", "stf", "--prompt", "x"]) == 2
    assert "no policy 'stf'; it has: sft" in capsys.readouterr().err
    assert cli.main([*ask, "--max-tokens", "1000000"]) == 2
    assert "positions of a context" in capsys.readouterr().err


def test_generate_refuses_a_folder_that_is_no_policy(run, capsys):
    """A reward model or half a policy is named, without a traceback."""
    (run.policies / "reward" / "0").mkdir(parents=True)
    (run.policies / "reward" / "0" / "config.json").write_text("{}")
    assert cli.main(["generate", "one", "--policy", "reward", "--prompt", "x"]) == 2
    assert "the policy 'reward' cannot answer prompts" in capsys.readouterr().err


def test_export_copies_whole_or_not_at_all(run, tmp_path, capsys):
    """The copy is complete, an existing folder is not touched, an empty one is fine."""
    source = run.policies / "sft" / "0"
    source.mkdir(parents=True)
    (source / "config.json").write_text('{"a": 1}')
    assert cli.main(["export", "one", "sft", str(tmp_path / "out" / "model")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{tmp_path}/out/model"
    assert shown[1].startswith("next: ")
    assert (tmp_path / "out" / "model" / "config.json").read_text() == '{"a": 1}'
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    assert cli.main(["export", "one", "sft", str(tmp_path / "out" / "model")]) == 2
    assert "exists" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["export", "one", "sft", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "config.json").exists()
    (source / "gone").symlink_to("nowhere")
    assert cli.main(["export", "one", "sft", str(tmp_path / "broken")]) == 2
    assert f"gone cannot be copied to {tmp_path}/broken: " in capsys.readouterr().err
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("below", ["file/policy", "file/deeper/policy"])
def test_no_target_below_a_file(foreign_tokenizer, run, tmp_path, capsys, below):
    """Import and export name the file in the way, in one line."""
    foreign_folder(foreign_tokenizer, run.policies / "sft" / "0")
    (tmp_path / "file").write_text("x")
    for command in (["import", str(run.policies / "sft" / "0")], ["export", "one", "sft"]):
        assert cli.main([*command, str(tmp_path / below)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"afm-rl: {tmp_path / below}: its folder cannot be made (")
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["launch"],
        ["generate", "one", "--policy", "a", "--prompt", "b", "--max-tokens", "0"],
        ["generate", "one", "--policy", "a", "--prompt", "b", "--temperature", "hot"],
        ["export", "one"],
    ],
)
def test_usage_errors_are_code_two(arguments, capsys):
    """argparse's own: usage on stderr, code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: afm-rl" in capsys.readouterr().err


def foreign_folder(tokenizer_folder: Path, folder: Path, *, vocab_size: int = 1024) -> Path:
    """Someone else's model: random weights with the tokenizer's files of `tokenizer_folder`."""
    import jax

    from afm_rl.huggingface import save_pretrained
    from afm_rl.parameters import init_params
    from afm_rl.tokenizer import Tokenizer

    config = PRESETS["tiny"].replace(vocab_size=vocab_size, dim=32, ffn_dim=32, num_layers=1)
    params = init_params(config, jax.random.key(0))
    save_pretrained(params, folder, config=config, tokenizer=Tokenizer.load(tokenizer_folder))
    return folder


def test_import_checks_and_copies(foreign_tokenizer, tmp_path, capsys):
    """A policy folder comes out, with figures for people and for scripts; nothing is overwritten."""
    from afm_rl.huggingface import load_params
    from afm_rl.tokenizer import Tokenizer

    source = foreign_folder(foreign_tokenizer, tmp_path / "source")
    assert cli.main(["import", str(source), str(tmp_path / "policy")]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer.json, 800 entries" in shown
    assert "chat template  yes" in shown
    assert shown.splitlines()[-1].startswith("next: put 'model: {huggingface:")
    assert "afm-rl plan FILE" in shown
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert Tokenizer.load(tmp_path / "policy").fingerprint == Tokenizer.load(source).fingerprint
    assert cli.main(["import", str(source), str(tmp_path / "policy")]) == 2
    assert "exists; give a folder that does not" in capsys.readouterr().err
    assert cli.main(["import", str(source), str(tmp_path / "half"), "--dtype", "bfloat16", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    config, _ = load_params(tmp_path / "half")
    assert (row["dtype"], row["parameters"], row["chat_template"]) == ("bfloat16", config.num_params, True)
    assert row["bytes"] == 2 * config.num_params


def test_import_refuses_in_one_line(foreign_tokenizer, tmp_path, capsys):
    """Configuration, tensors and tokenizer are all checked, and nothing is left behind."""
    source = foreign_folder(foreign_tokenizer, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    weights = (source / "model.safetensors").read_bytes()

    def refused(message: str) -> None:
        assert cli.main(["import", str(source), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {"source"}

    (source / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    refused("attention_bias = True")
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    refused("the tokenizer has 800 entries, the model only 700")
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(weights[:-8])
    refused("truncated")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    refused("weight_map['a'] must be the name of a file; it is 5")
    (source / "model.safetensors.index.json").unlink()
    refused("neither model.safetensors nor model.safetensors.index.json")
    (source / "tokenizer.json").unlink()
    refused("has no tokenizer")
    shutil.rmtree(source)
    source.write_text("x")
    refused(f"{source} is not a folder")


def test_export_casts_and_splits(foreign_tokenizer, run, tmp_path, capsys):
    """A foreign policy of a run leaves in another dtype and in several files, its tokenizer with it."""
    from afm_rl.huggingface import load_params

    source = foreign_folder(foreign_tokenizer, run.policies / "sft" / "0")
    command = ["export", "one", "sft", str(tmp_path / "out"), "--dtype", "bfloat16", "--max-shard-size", "40kB"]
    assert cli.main(command) == 0
    assert "next: " in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    theirs, ours = (load_params(folder, dtype="bfloat16")[1] for folder in (source, tmp_path / "out"))
    assert (theirs["layers"]["q"] == ours["layers"]["q"]).all()
    assert cli.main(["export", "one", "sft", str(tmp_path / "empty"), "--dtype", "float32"]) == 0
    for size in ("0", "5XB", "large"):
        with pytest.raises(SystemExit):
            cli.main(["export", "one", "sft", str(tmp_path / "no"), "--max-shard-size", size])


@pytest.mark.slow
def test_generate_with_a_foreign_tokenizer(foreign_tokenizer, run, capsys):
    """The whole way from a prompt through a chat template to text."""
    foreign_folder(foreign_tokenizer, run.policies / "sft" / "0")
    ask = ["generate", "one", "--policy", "sft", "--prompt", "3 + 4", "--max-tokens", "3", "--json"]
    assert cli.main(ask) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["tokens"] <= 3
