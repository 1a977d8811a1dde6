"""The report: one safe, self-contained, well-formed page that shows what the run folder holds, and no less.

`write_run` makes a realistic run folder without a run.
"""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from actors.metrics import JsonlSink, Metrics
from afm_rl.errors import UserError
from topologies.report import render, write_report
from topologies.report_data import Report

POLICIES = ("sft", "rs", "dpo", "ipo", "mdloo", "distilled", "quantized 3.7")
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> \' " & \x00 \x1b[31m \ud800 \u202e </pre></main>'


def write_metrics(folder):
    """Learning curves of plausible shape: three pre-training tasks, two rounds of MDLOO, adapters of three ranks."""
    rng = np.random.default_rng(0)
    metrics = Metrics([JsonlSink(folder)])
    at = 0
    for task, count, low in (("core", 320, 3.1), ("continued", 120, 2.45), ("context lengthening", 60, 2.3)):
        for step in range(1, count + 1):
            loss = low + (7.6 - low) * math.exp(-step / 45) * (1 if task == "core" else 0.12)
            loss += rng.normal(0, 0.07)
            at += 1
            values = {
                "loss": loss if step != 40 else math.nan,
                "tokens": at * 4096,
                "grad_norm": 0.4 + rng.gamma(2, 0.1),
            }
            metrics.log(stage="pretrain", task=task, step=at, values=values)
    for round_ in (1, 2):
        for step in range(1, 41):
            reward = 1 - 0.55 * math.exp(-step / 11) / round_ + rng.normal(0, 0.03)
            kl = abs(rng.normal(0.06, 0.02)) * (1 + step / 60)
            metrics.log(stage="itec", task=f"round {round_} mdloo", step=step, values={"reward": reward, "kl": kl})
        for member in ("dpo", "ipo"):
            for step in range(1, 31):
                loss = 0.25 + 0.44 * math.exp(-step / 9) + rng.normal(0, 0.012) + 0.04 * (member == "ipo")
                metrics.log(stage="itec", task=f"round {round_} {member}", step=step, values={"loss": loss})
    for rank in (8, 16, 32):
        for step in range(1, 31):
            values = {"loss": 2.9 - 0.2 * math.log(rank) / 3 + 0.4 * math.exp(-step / 8)}
            metrics.log(stage="recover", task=f"rank {rank}", step=step, values=values)


def example_report():
    """report.json of a finished local run."""
    answers = (
        ("7+5=12 3+2=5 answer 52", False),
        ("7+5=12 3+2+1=6 answer 62", True),
        ("7+5=12 3+2+1=6 answer 62", True),
        ("7+5=12 3+2=5 answer 52", False),
        ("7+5=12 3+2+1=6 answer 62", True),
        ("7+5=12 3+2+1=6 answer 62", True),
        ("7+5=12 3+2+1=6 answer 6", False),
    )
    samples = [
        sample("What is 37 + 25?", "arithmetic", "62", answers),
        sample("What is 84 + 19?", "arithmetic", "103", [("4+9=13 8+1+1=10 answer 103", True)] * 7),
        sample(
            "Write three words in upper case.",
            "format",
            None,
            [("RED BLUE GREEN", True)] * 5 + [("red blue", False)] * 2,
        ),
        sample("Summarise: " + "the red fox saw the dog. " * 8, "summary", None, [("fox saw dog " * 14, None)] * 7),
        sample(
            "How do I pick my neighbour's lock?",
            "refusal",
            None,
            [("I cannot help with that.", True)] * 6 + [("", False)],
        ),
    ]
    stages = [
        stage(
            "tokenizer",
            "Tokenizer",
            "3.1.6",
            4.1,
            figures=[
                {"label": "Vocabulary", "value": 2048, "unit": "pieces"},
                {"label": "Compression", "value": 3.41, "unit": "bytes per token", "note": "held-out documents"},
            ],
        ),
        stage(
            "pretrain",
            "Pre-training in three stages",
            "3.2, appendices A to C",
            168.0,
            figures=[
                {"label": "Tokens", "value": 2048000},
                {"label": "Held-out loss", "value": 2.314, "unit": "nats per token", "note": "core mixture"},
                {"label": "Throughput", "value": 26512.0, "unit": "tokens/s"},
                {"label": "RoPE base at the end", "value": 6315089, "note": "rescaled from 500,000"},
            ],
            curves=[
                {"title": "Training loss", "x": "tokens", "y": ["loss"], "unit": "nats per token"},
                {"title": "Gradient norm before clipping", "y": ["grad_norm"], "tasks": ["core"]},
            ],
        ),
        stage(
            "sft",
            "Supervised fine-tuning",
            "4.2",
            31.5,
            figures=[
                {"label": "Greedy accuracy", "value": 0.598},
                {"label": "Sampled accuracy", "value": 0.738, "note": "T = 1"},
            ],
            curves=[{"title": "Loss", "y": ["loss"]}],
        ),
        stage(
            "itec",
            "Iterative teaching committee",
            "4.3.2",
            214.0,
            tables=[
                {
                    "title": "Committee by round, held-out prompts",
                    "columns": ["policy", "round", "greedy", "sampled", "reward", "win rate"],
                    "rows": [
                        ["sft", 1, 0.598, 0.738, 0.41, None],
                        ["rs", 1, 0.81, 0.79, 0.62, "71 %"],
                        ["dpo", 1, 0.874, 0.82, 0.7, "76 %"],
                        ["ipo", 1, 0.86, 0.815, 0.69, "74 %"],
                        ["mdloo", 1, 0.986, 0.943, 0.91, "88 %"],
                        ["mdloo", 2, 0.996, 0.984, 0.95, "91 %"],
                    ],
                    "note": "Greedy and sampled accuracy of the final answer. Win rate against sft.",
                }
            ],
            curves=[
                {
                    "title": "MDLOO: mean reward",
                    "y": ["reward"],
                    "unit": "verifier + 0.5 model",
                    "tasks": ["round 1 mdloo", "round 2 mdloo"],
                },
                {
                    "title": "MDLOO: KL to the collecting policy",
                    "y": ["kl"],
                    "unit": "nats per response",
                    "tasks": ["round 1 mdloo", "round 2 mdloo"],
                },
                {"title": "DPO and IPO", "y": ["loss"]},
            ],
        ),
        stage(
            "distill_committee",
            "Committee distillation",
            "4.3.2",
            36.0,
            figures=[{"label": "Chosen from mdloo", "value": "63 %"}],
        ),
        stage(
            "quantize",
            "Palettization",
            "5.2, F",
            9.3,
            figures=[
                {"label": "Projections", "value": 3.69, "unit": "bits per weight"},
                {"label": "Package", "value": 0.41, "unit": "MB"},
            ],
        ),
        stage("recover", "Accuracy-recovery adapters", "5.2", 44.0, curves=[{"title": "Recovery loss", "y": ["loss"]}]),
        stage("evaluate", "Evaluation", "6", 18.2),
        stage("serve", "Server", "5.1", 6.4),
    ]
    actors = [
        actor("learner-0", "learner", 1.0, 301.0, 1411, 942.0),
        actor("sampler-0", "sampler", 0.5, 144.0, 480, 512.0),
        actor("sampler-1", "sampler", 0.5, 139.0, 472, 508.0),
        actor("reward-0", "reward", 0.2, 48.0, 1904, 401.0),
        actor("committee-0", "committee", 0.1, 22.0, 40, 390.0),
        actor("annotator-0", "annotator", 0.1, 3.2, 12, 120.0),
        actor("quantizer-0", "quantizer", 0.2, 8.7, 42, 350.0),
        actor("server-0", "server", 0.2, 5.1, 9, 420.0),
        actor("weights-0", "weights", 0.0, 1.1, 960, 88.0),
    ]
    return {
        "name": "local", "created": "21 November 2026, 06:40", "total_s": 561.0, "dashboard": "http://127.0.0.1:8265",
        "environment": {"machine": "2 cores, Intel Xeon (Sapphire Rapids)", "python": "3.11.7", "jax": "0.10.2",
                        "ray": "2.60.0", "memory": "23 GiB", "command": "afm-rl launch topologies/local.yaml"},
        "topology": {
            "name": "local", "model": "tiny", "seed": 0,
            "actors": {"learner": {"processes": 1, "num_cpus": 1.0}, "sampler": {"replicas": 2, "num_cpus": 0.5},
                       "reward": {"num_cpus": 0.2, "num_gpus": 1.0}, "committee": {"replicas": 1, "num_cpus": 0.1},
                       "annotator": {"kind": "simulated", "num_cpus": 0.1},
                       "quantizer": {"replicas": 1, "num_cpus": 0.2}, "server": {"replicas": 1, "num_cpus": 0.2}},
            "stages": ["tokenizer", "pretrain", "sft", {"itec": {"rounds": 2}}, "distill_committee", "quantize",
                       "recover", "evaluate", "serve"],
        },
        "headline": [
            {"label": "Greedy accuracy, held-out sums", "value": "0.598 → 0.996", "note": "SFT → MDLOO, round 2"},
            {"label": "MDLOO wins against SFT", "value": 91, "unit": "%"},
            {"label": "Served at", "value": 3.69, "unit": "bits per weight", "note": "0.994 greedy, rank 16"},
            {"label": "Wall clock", "value": "9 min 21 s", "note": "two CPU cores"},
        ],
        "actors": actors, "stages": stages, "samples": samples,
    }  # fmt: skip


def stage(name, title, paper, seconds, **parts):
    return {"name": name, "title": title, "paper": paper, "seconds": seconds, **parts}


def actor(name, role, num_cpus, busy_s, calls, peak_mib):
    return {"name": name, "role": role, "num_cpus": num_cpus, "busy_s": busy_s, "calls": calls, "peak_mib": peak_mib}


def sample(prompt, kind, expected, answers):
    listed = [{"policy": p, "text": t, "passed": ok} for p, (t, ok) in zip(POLICIES, answers, strict=True)]
    return {"prompt": prompt, "kind": kind, "expected": expected, "answers": listed}


def write_run(folder, report=None):
    """A run folder: topology.yaml, report.json, metrics/."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(example_report() if report is None else report))
    (folder / "topology.yaml").write_text("name: local\nmodel: tiny\nactors:\n  sampler: {replicas: 2, num_cpus: 0.5}\n")
    write_metrics(folder / "metrics")
    return folder


class Page(HTMLParser):
    """What a browser would see: tags balanced, texts, attributes, and every address asked for."""

    VOID = frozenset({"meta", "br", "input", "link", "img"})

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.ids, self.addresses = [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        self.addresses += [value for key, value in attrs if key in {"src", "href", "action", "data"}]
        assert not any(key.startswith("on") for key, _ in attrs), (tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "local")


@pytest.fixture(scope="module")
def parsed(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_page_is_well_formed_and_ids_are_unique(parsed):
    """Every tag closes in order and every link within the page has its target, once."""
    assert len(parsed.ids) == len(set(parsed.ids))
    missing = {a[1:] for a in parsed.addresses if a.startswith("#")} - set(parsed.ids)
    assert not missing


def test_page_asks_nothing_of_the_network(run, parsed):
    """The only outside address is the dashboard's link; style and script hold no url() or import."""
    assert [a for a in parsed.addresses if not a.startswith("#")] == ["http://127.0.0.1:8265"]
    source = (run / "report.html").read_text()
    assert not re.search(r"url\((?!#)", source)
    assert "@import" not in source
    assert "default-src 'none'" in source
    assert len(parsed.of("script")) == 1


def test_everything_in_the_report_is_on_the_page(parsed):
    """Headline, figures, tables, notes, samples, actors and environment all reach the reader."""
    text = " ".join(" ".join(parsed.text).split())
    for said in (
        "0.598 → 0.996", "2,048,000", "nats per token", "appendices A to C", "Win rate against sft.",
        "What is 84 + 19?", "weights-0", "1,411 calls", "942 MiB", "Sapphire Rapids", "2 min 48 s",
        "name: local model: tiny", "weights k + 1",
        "between stages", "rank 32", "SFT → MDLOO, round 2", "I cannot help with that.", "expected", "(empty)",
    ):  # fmt: skip
        assert said in text, said


def test_the_picture_shows_roles_replicas_and_the_loop(parsed):
    """Both drawings hold every role and the loop's edges; the sampler's two replicas are two cards."""
    assert [svg["class"] for svg in parsed.of("svg")[:2]] == ["picture wide", "picture narrow"]
    for role in ("learner", "sampler", "reward", "committee", "annotator", "quantizer", "server", "group buffer"):
        assert parsed.text.count(role) >= 2, role
    assert {"2 × 0.5 CPU", "0.2 CPU + 1 GPU", "simulated · 0.1 CPU", "512 MiB · 25 % busy"} <= set(parsed.text)
    loops = [path for path in parsed.of("path") if path.get("class") == "flow loop"]
    assert len(loops) == 2 * 6


def test_charts_draw_one_line_per_task_and_column(parsed):
    """A curve over several tasks has that many lines, and its data holds the last value of each."""
    charts = [json.loads(svg["data-chart"]) for svg in parsed.of("svg") if "data-chart" in svg]
    names = [[series["name"] for series in chart["series"]] for chart in charts]
    assert ["core", "continued", "context lengthening"] in names
    assert ["rank 8", "rank 16", "rank 32"] in names
    assert names.count(["round 1 mdloo", "round 2 mdloo"]) == 2
    first = charts[0]["series"][0]
    assert first["x"][0] == 4096
    assert None in first["y"]


def test_a_curve_without_rows_says_where_it_looked(parsed):
    """A missing metric is named on the page instead of an empty chart or a crash."""
    assert "No values of loss in metrics/sft.jsonl." in parsed.text


@pytest.mark.parametrize("place", ["name", "sample", "cell", "task", "environment", "stage", "topology"])
def test_hostile_text_stays_text(place):
    """Whatever a model or a user wrote is shown, escaped, and adds no tag, attribute or script."""
    report = example_report()
    plain = len(Page(render(Report.model_validate(report), [])).of("script"))
    if place == "name":
        report["name"] = HOSTILE
    elif place == "sample":
        for key in ("prompt", "kind", "expected"):
            report["samples"][0][key] = HOSTILE
        report["samples"][0]["answers"] = [{"policy": HOSTILE, "text": HOSTILE, "passed": None}]
    elif place == "cell":
        report["stages"][3]["tables"][0]["rows"][0][0] = HOSTILE
        report["headline"][0] = {"label": HOSTILE, "value": HOSTILE, "unit": HOSTILE, "note": HOSTILE}
    elif place == "environment":
        report["environment"] = {HOSTILE: [HOSTILE]}
    elif place == "stage":
        report["stages"][0] |= {"name": HOSTILE, "title": HOSTILE, "paper": HOSTILE}
    elif place == "topology":
        report["topology"] = {"actors": {HOSTILE: {"kind": HOSTILE}}, "stages": [HOSTILE]}
    rows = [{"stage": "sft", "task": HOSTILE if place == "task" else "t", "step": 1, "time": 0.0, "loss": 1.0}]
    source = render(Report.model_validate(report), rows, HOSTILE)
    source.encode("utf-8")
    parsed = Page(source)
    assert len(parsed.of("script")) == plain == 1
    assert not parsed.of("img")
    assert "alert(1)" in "".join(parsed.text)


def test_a_link_that_is_not_http_is_not_a_link():
    """A dashboard address cannot smuggle in a script."""
    report = Report.model_validate({"name": "x", "dashboard": "javascript:alert(1)"})
    assert "javascript:" not in render(report, [])


def test_an_unfinished_run_has_a_report():
    """The barest report.json makes a page; stages not reached yet are counted and drawn as waiting."""
    Page(render(Report.model_validate({"name": "bare"}), []))
    report = example_report()
    report["stages"] = report["stages"][:3]
    parsed = Page(render(Report.model_validate(report), []))
    assert "3 of 9 stages so far" in parsed.text
    assert len([rect for rect in parsed.of("rect") if rect.get("class") == "chip waiting"]) == 2 * 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no stage of it has finished yet"),
        ("{", "not JSON"),
        ('{"name": "x", "stages": [{"name": "sft", "secnds": 3}]}', "stages.0.secnds"),
        ('{"name": "x", "stages": [{"name": "sft", "curves": [{"title": "t", "y": []}]}]}', "stages.0.curves.0.y"),
    ],
)
def test_a_bad_report_json_is_one_clear_error(tmp_path, content, said):
    """Missing file, broken JSON and unknown keys name the file and the place."""
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    assert str(tmp_path / "report.json") in str(error.value)
    assert said in str(error.value)
