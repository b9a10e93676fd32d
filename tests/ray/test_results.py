"""What benchmarks.results makes of evaluated runs, and the page of it: the evaluation is real, its engines are not."""

from __future__ import annotations

import pytest

from benchmarks import results, results_page
from ctrlray import schema
from ctrlray.stages import questions
from ctrlray.tables import Storage, from_rows
from tests.ray.test_evaluate import FakePool, given, job, prompt, run

pytestmark = pytest.mark.soak
TOOK = {"seconds": 60.0, "tokens": 100, "rows_out": 7}


class Finished:
    """As much of a finished run as the benchmark reads."""

    def __init__(self, made, out, evaluated, keys):
        self.job, self._out, self.keys = made, out, keys
        slopes = [[{"value": v, "low": v - 0.1, "high": v + 0.1} for v in row] for row in ((1.0, -0.2), (-0.2, 1.0))]
        trained = {"exmate": {"steps": 9, "seconds": 30.0}, "ppo": {"steps": 3, "seconds": 20.0}}
        self._results = {
            "distill": TOOK | {"facts": {"pool_slopes": slopes}},
            "train": TOOK | {"facts": trained},
            "evaluate": TOOK | {"facts": evaluated.facts},
        }

    def result(self, stage):
        return self._results.get(stage)

    def out(self, stage):
        assert stage == "evaluate"
        return self._out

    def prompts(self, split):
        return from_rows([prompt(split, i) for i in range(4)], schema.PROMPTS)


@pytest.fixture(scope="module")
def measured(local_ray, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("results")
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "EnginePool", FakePool)
        for name, more in (("base", {}), ("seed-1", {"methods": []})):
            made = job(tmp_path, "exmate", sets=[], **more)
            out = Storage(str(tmp_path / name))
            keys = {s: s if s == "distill" else f"{s}-{name}" for s in results.STAGES}
            runs[name] = Finished(made, out, run(made, given(tmp_path), tmp_path / name), keys)
    return runs, *results.measured(runs)


def test_every_target_is_measured(measured):
    _, figures, _ = measured
    assert [f["name"] for f in figures if f["measured"] is None] == []
    # of two attributes Spearman and two accuracies, of two pairs a slope, of both attributes the difference; the tokens
    assert len(figures) == 2 * 2 + 2 + 2 + 2 + 1
    names = " ".join(f["name"] for f in figures)
    assert "ExMATE - reranking" in names and "slope of variety on brevity's dial" in names


def test_a_request_costs_all_of_its_candidates(measured):
    runs, figures, facts = measured
    rows = runs["base"].out("evaluate").read_table("answers", questions.answers_schema(runs["base"].job)).to_pylist()
    tokens = {m: [r["num_tokens"] for r in rows if r["method"] == m] for m in ("start", "reranking", "exmate")}
    spent = facts["tokens_per_request"]
    assert len(tokens["reranking"]) == 6 and spent["reranking"] == pytest.approx(sum(tokens["reranking"]) / 3, abs=0.01)
    assert len(tokens["exmate"]) == 12 and spent["exmate"] == pytest.approx(sum(tokens["exmate"]) / 12, abs=0.01)
    assert figures[-1]["measured"] == pytest.approx(spent["reranking"] / spent["exmate"], abs=0.01)


def test_seeds_are_answers_to_the_same_prompts_and_baselines_are_of_the_first_run(measured):
    _, _, facts = measured
    own = facts["metrics"]["training reward"]
    # 3 prompts x 4 settings, one answer lost, twice
    assert {m: (v["num_prompts"], v["num_rows"]) for m, v in own.items()} == {
        "start": (3, 12), "reranking": (3, 12), "exmate": (3, 22), "ppo": (3, 22),
    }  # fmt: skip
    assert facts["kl_base"].keys() == {"exmate", "ppo"} and facts["shape"]["seeds"]["exmate"] == 2
    assert facts["stages"]["base"].keys() == {"distill", "train", "evaluate"}
    assert facts["stages"]["seed-1"].keys() == {"train", "evaluate"}


def test_the_page_shows_it(measured):
    _, figures, facts = measured
    machine = {"cpu": "some CPU", "cores": "2", "memory": "12 GiB"}
    text = results_page.section({"run_commit": "abc", "machine": machine, "figures": figures, **facts})
    assert all(f"| {f['name']} | {f['target']} |" in text for f in figures)
    assert "### The brevity dial" in text and "- PPO ≥ ExMATE: **neither shown nor contradicted**" in text
    assert "- CLM ≥ prompting: **not measured**." in text and "| seed-1 | train | 1 min 00 s | 100 | 7 |" in text
