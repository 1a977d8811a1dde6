"""The command line, `afm-rl`.

A mistake of the user's (`UserError`) is one line on stderr for each thing to fix and exit code 2; an interrupt is 130;
everything else keeps its traceback. Heavy modules (Ray, JAX) are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import sys
from collections.abc import Callable, Sequence

from afm_rl.errors import UserError

_DTYPES = ("bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = args.command
    try:
        return command(args) or 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"afm-rl: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        hint = "continue with --resume" if command is _launch else "run the command again"
        print(f"afm-rl: the disk is full{where}; free some space and {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; continue with --resume" if command is _launch else ""
        print(f"afm-rl: interrupted{hint}", file=sys.stderr)
        return 130


def _launch(args: argparse.Namespace) -> None:
    from topologies.schema import load_topology

    topology = load_topology(args.file, args.set)
    from topologies.launch import launch

    launch(topology, resume=args.resume)


def _plan(args: argparse.Namespace) -> None:
    from topologies.plan import plan
    from topologies.schema import load_topology

    topology = load_topology(args.file, args.set)
    result = plan(topology)
    if args.json:
        print(json.dumps({"topology": topology.resolved(), **result.to_json()}, indent=2))
        return
    print(topology.to_yaml())
    from rich.console import Console

    from topologies.plan_view import print_plan

    print_plan(result, Console(highlight=False))


def _report(args: argparse.Namespace) -> None:
    from topologies.report import write_report
    from topologies.run_folder import RunFolder

    print(write_report(RunFolder.open(args.run).path))


def _watch(args: argparse.Namespace) -> None:
    from topologies.run_folder import RunFolder
    from topologies.watch import print_once, watch

    run = RunFolder.open(args.run)
    if args.once or args.json:
        print_once(run, as_json=args.json)
    else:
        watch(run)


def _generate(args: argparse.Namespace) -> None:
    from topologies.policy_commands import generate_answers
    from topologies.run_folder import RunFolder

    answers = generate_answers(
        RunFolder.open(args.run),
        args.policy,
        prompt=args.prompt,
        system=args.system,
        responses=args.responses,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    for answer in answers:
        print(json.dumps(vars(answer), ensure_ascii=False) if args.json else answer.text)


def _serve(args: argparse.Namespace) -> None:
    from topologies.run_folder import RunFolder

    run = RunFolder.open(args.run)
    server = run.topology.actors.server
    from topologies.serving import serve_run

    serve_run(
        run.path,
        host=server.host if args.host is None else args.host,
        port=server.port if args.port is None else args.port,
        replicas=server.replicas,
        num_cpus=server.num_cpus,
        compute_dtype=run.topology.compute.dtype,
        block=True,
    )


def _export(args: argparse.Namespace) -> None:
    from topologies.policy_commands import export_policy
    from topologies.run_folder import RunFolder

    run = RunFolder.open(args.run)
    folder = export_policy(run, args.policy, args.folder, dtype=args.dtype, max_shard_bytes=args.max_shard_size)
    print(folder)
    print(f"next: load it in transformers, AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _import(args: argparse.Namespace) -> None:
    from topologies.policy_commands import import_policy

    policy = import_policy(args.source, args.folder, dtype=args.dtype)
    model = f"model: {{huggingface: {json.dumps(policy.folder)}}}"
    next_step = f"put '{model}' into a topology file FILE, then: afm-rl plan FILE"
    if args.json:
        print(json.dumps({**vars(policy), "next": next_step}, ensure_ascii=False))
        return
    print(policy.folder)
    print(f"  parameters     {policy.parameters:,} ({policy.dtype}, {policy.bytes / 2**20:,.0f} MiB)")
    print(f"  vocabulary     {policy.vocabulary:,}")
    print(f"  tokenizer      {policy.tokenizer}, {policy.tokenizer_entries:,} entries")
    print(f"  chat template  {'yes' if policy.chat_template else 'no: role and text on lines of their own'}")
    print(f"next: {next_step}")


def _scale(args: argparse.Namespace) -> None:
    from topologies.control import check_request, scale
    from topologies.run_folder import RunFolder

    for role, count in args.roles:
        check_request(role, count)
    for role, count in args.roles:
        print(scale(RunFolder.open(args.run), role, count, timeout_s=args.timeout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afm-rl",
        description="A distributed actor system for online RL: launch a topology, look at its run, serve it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    launch = _topology_command(commands, "launch", _launch, "run every stage of a topology file")
    launch.add_argument("--resume", action="store_true", help="continue the unfinished run of this topology, if any")

    plan = _topology_command(commands, "plan", _plan, "show what a topology needs and does, and start nothing")
    plan.add_argument("--json", action="store_true", help="for a script to read")

    _run_command(commands, "report", _report, "write RUN/report.html again")

    watch = _run_command(commands, "watch", _watch, "watch a run in the terminal, while it goes on or afterwards; q leaves")
    watch.add_argument("--once", action="store_true", help="print how it is now, and leave")
    watch.add_argument("--json", action="store_true", help="the same for a script to read, once")

    generate = _run_command(commands, "generate", _generate, "answer a prompt with a policy of a run")
    generate.add_argument("--policy", required=True, metavar="NAME", help="a folder of RUN/policies")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--system", metavar="TEXT", help="a system instruction before the prompt")
    generate.add_argument("--responses", type=_count, default=1, metavar="N")
    generate.add_argument("--max-tokens", type=_count, default=64, metavar="N")
    generate.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default) is greedy")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument("--json", action="store_true", help="one object per line: text, tokens, finished")

    serve = _run_command(commands, "serve", _serve, "serve a run's model with OpenAI's HTTP interface")
    serve.add_argument("--host", help="default: the topology's (127.0.0.1)")
    serve.add_argument("--port", type=int, help="default: the topology's (8000); 0 takes a free one")

    scale = _run_command(commands, "scale", _scale, "change how many actors of a role a running launch has")
    scale.add_argument("roles", nargs="+", type=_role, metavar="ROLE=N", help="sampler, committee or reward")
    scale.add_argument("--timeout", type=float, default=180.0, metavar="S", help="seconds to wait (default 180)")

    export = _run_command(commands, "export", _export, "copy a policy out as a Hugging Face folder")
    export.add_argument("policy", metavar="POLICY")
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("--dtype", choices=_DTYPES, help="default: as it is stored")
    export.add_argument("--max-shard-size", type=_size, metavar="SIZE", help="bytes of one file of weights: 5GB, 500MiB")

    summary = "check a Hugging Face folder and copy it as a policy folder"
    importing = commands.add_parser("import", help=summary, description=summary)
    importing.add_argument("source", metavar="HF_FOLDER")
    importing.add_argument("folder", metavar="DEST")
    importing.add_argument("--dtype", choices=_DTYPES, help="default: as it is stored")
    importing.add_argument("--json", action="store_true", help="one object: folder, parameters, dtype, tokenizer, ...")
    importing.set_defaults(command=_import)
    return parser


def _topology_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("file", metavar="FILE", help="a topology file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value: stages.itec.rounds=1 (repeatable)",
    )
    parser.set_defaults(command=command)
    return parser


def _run_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("run", metavar="RUN", help="a run folder, or its name below ./runs")
    parser.set_defaults(command=command)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _role(text: str) -> tuple[str, int]:
    role, _, count = text.partition("=")
    if not count.isdecimal():
        raise argparse.ArgumentTypeError(f"must be ROLE=N, as in sampler=4, got {text!r}")
    return role, int(count)


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size like 5GB, 500MiB or 1000000, got {text!r}")
    return size


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
