"""What users get wrong: every error names field or row, value and next step, and no row disappears."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlray import config, models, pipeline, schema
from ctrlray.errors import ConfigError
from ctrlray.ledger import Silent
from ctrlray.rewards.registry import build
from ctrlray.stages import prompts
from ctrlray.tables import Storage

TEMPLATE = "{rubric} {conversation} {answer}"


def whole_job() -> dict:
    """A valid job with a value for every setting, and every kind of prompts, reward, objective and tracker."""
    scores = {"attributes": ["charm"], "judge": False}
    endpoint = {"url": "http://h/v1", "token_env": "TOKEN", "timeout_s": 9.5, "retries": 3, "concurrency": 2}
    own = {
        "control": {
            "attributes": [{"name": "safety", "levels": 3, "score": "harmlessness"}, {"name": "ease", "score": {"charm": 0.5}}]
        },
        "rewards": [
            {"type": "embedded", "heads": "/heads.safetensors"},
            {"type": "tfidf", "heads": "/heads.safetensors", "judge": True},
            {"type": "hf", "model": "org/m", "revision": "v1", **scores},
            {"type": "function", "target": "m:f", **scores, "attributes": ["wit"]},
            {"type": "http", **endpoint, "requests_per_second": 2.5, **scores, "attributes": ["tact"]},
            {"type": "judge", **endpoint, "requests_per_second": 2.5, "model": "m", "attribute": "verve", "rubric": "r"}
            | {"template": TEMPLATE},
        ],
        "prompts": {
            "sources": [
                {"type": "packaged"},
                {"type": "file", "path": "/data/a.jsonl", "column": "q", "limit": 3},
                {"type": "hh", "path": "/data/hh.jsonl", "limit": 3},
                {"type": "hub", "name": "org/d", "config": "c", "column": "q", "limit": 3},
                {"type": "benchmark", "name": "xstest", "limit": 3},
            ]
        },
        "model": {"revision": "v1", "template_variables": {"think": "no"}},
        "generate": {
            "behaviours": [{"name": "plain", "system": "s", "prefix": "p", "max_tokens": 9}],
            "pool": {"nodes": "gpu"},
            "engine": {"compile": False},
        },
        "score": {"pool": {"nodes": "cpu"}},
        "train": {
            "seed": 3,
            "nodes": "gpu",
            "objectives": [
                {"type": "clm"},
                {"type": "exmate"},
                {
                    "type": "ppo",
                    "chances": {"safety": [1, 1, 2.5]},
                    "weights": {"ease": 0.5},
                    "reward_clip": 2.5,
                    "kl": {"target": 4.5},
                    "critic": {"model": "org/m"},
                },
            ],
        },
        "evaluate": {
            "levels": [[1, 3], [2]],
            "sets": [
                {
                    "name": "x",
                    "role": "over_refusal",
                    "attribute": "safety",
                    "limit": 3,
                    "sources": [{"type": "benchmark", "name": "xstest", "limit": 3}],
                }
            ],
        },
        "export": {"objective": "ppo", "levels": {"safety": [1, 3]}, "defaults": {"safety": 1}},
        "cluster": {"address": "auto", "cpus": 2},
        "trackers": [
            {"type": "mlflow", "uri": "file:///t", "experiment": "e"},
            {"type": "wandb", "entity": "me"},
        ],
    }
    return config.parse(config.Job, {"name": "t", "run_root": "/r", **own}, where="job.yaml").model_dump(mode="json")


def put(raw: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value


WHOLE = whole_job()
FIELDS = config.flat(WHOLE)
ANY_SCALAR = "model.template_variables.think"


def wrong_for(path: str) -> list[object]:
    """Values of other types than a setting's own."""
    match FIELDS[path]:
        case bool():
            scalars: list[object] = [1, 0.0, "perhaps"]
        case int() | float():
            scalars = [True, False, "many"]
        case str() if path != ANY_SCALAR:
            scalars = [7, 2.5, True]
        case _:
            scalars = []
    return [{"surprise": {"deep": 1}}, [["x"]], *scalars]


def test_the_whole_job_is_covered():
    kinds = "packaged file hh hub benchmark embedded tfidf hf function http judge clm exmate ppo mlflow wandb"
    assert set(kinds.split()) == {value for path, value in FIELDS.items() if path.endswith(".type")}
    assert [path for path, value in FIELDS.items() if value in (None, [], {})] == []


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_every_field_refuses_the_wrong_type_by_name(path):
    for wrong in wrong_for(path):
        raw = copy.deepcopy(WHOLE)
        put(raw, path, wrong)
        with pytest.raises(ConfigError) as caught:
            config.parse(config.Job, raw, where="job.yaml")
        where, *lines = str(caught.value).splitlines()
        shown = {dict: '"deep": 1', list: '"x"'}.get(type(wrong)) or f"(got {json.dumps(wrong)})"
        assert where == "job.yaml:" and [line for line in lines if line.startswith(f"  {path}") and shown in line], (wrong, lines)


def containers(value: object, at: str = "") -> Iterator[tuple[str, object]]:
    """Sections and lists at every depth, by path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        path = f"{at}.{key}".lstrip(".")
        if isinstance(inner, dict | list):
            yield path, inner
            yield from containers(inner, path)


CONTAINERS = dict(containers(WHOLE))
NONE_IS_A_VALUE = {"control.attributes.1.score", "train.lora", "evaluate.levels"}
A_NAME_DOES_TOO = {"control.attributes.1.score"}


@pytest.mark.parametrize("path", sorted(CONTAINERS))
def test_every_section_and_list_refuses_the_wrong_type_by_name(path):
    """`train: 7`, `rewards: {}`, and `control:` with nothing below it, which YAML reads as null."""
    wrong = [7, True, {} if isinstance(CONTAINERS[path], list) else []]
    wrong += [] if path in A_NAME_DOES_TOO else ["word"]
    wrong += [] if path in NONE_IS_A_VALUE else [None]
    for value in wrong:
        raw = copy.deepcopy(WHOLE)
        put(raw, path, value)
        with pytest.raises(ConfigError) as caught:
            config.parse(config.Job, raw, where="job.yaml")
        where, *lines = str(caught.value).splitlines()
        named = [line for line in lines if line.startswith(f"  {path}")]
        assert where == "job.yaml:" and any(f"(got {json.dumps(value)})" in line for line in named), (value, lines)


def read(tmp_path, file, train=1, evaluate=1):
    out = Storage(str(tmp_path / "out"))
    asked = config.Prompts(sources=(config.FilePrompts(path=str(file)),), train=train, eval=evaluate)
    result = prompts.run(asked, 0, out, Silent()).check("prompts")
    bad = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    return result, out.read_table("prompts", schema.PROMPTS).to_pylist(), bad


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", ""), ("b.csv", "prompt\n")])
def test_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"sources give 0 different ones; lower prompts\.train") as caught:
        read(tmp_path, tmp_path / name)
    assert str(caught.value).endswith(f". No row at all came from file {str(tmp_path / name)!r}")


def test_an_empty_source_is_told_beside_others(tmp_path):
    for name, rows in (("a.jsonl", ""), ("b.jsonl", '{"prompt": "q"}\n7\n'), ("c.jsonl", "")):
        (tmp_path / name).write_text(rows)
    sources = [config.FilePrompts(path=str(tmp_path / "b.jsonl")), config.HHPrompts(path=str(tmp_path / "a.jsonl"))]
    sources.append(config.FilePrompts(path=str(tmp_path / "c.jsonl")))
    asked = config.Prompts(sources=tuple(sources), train=1, eval=1)
    said = r"No row at all came from hh '.*a\.jsonl', file '.*c\.jsonl'\. 1 rows could not be read, the first of them b\.jsonl#2"
    with pytest.raises(ConfigError, match=said):
        prompts.run(asked, 0, Storage(str(tmp_path / "out")), Silent())


def test_rows_without_text_and_with_too_much(tmp_path):
    rows = [{"prompt": ""}, {"prompt": None}, {"other": "x"}, 7, {"prompt": "q" * 2**20}, {"prompt": "fine"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result, kept, bad = read(tmp_path, tmp_path / "a.jsonl")
    assert sorted(len(p["messages"][0]["content"]) for p in kept) == [4, 2**20]
    assert {b["row_id"] for b in bad} == {f"a.jsonl#{i}" for i in (1, 2, 3, 4)} and result.rows_in == 6


NOT_UTF8 = {
    "a.jsonl": b'{"prompt": "caf\xff"}\n{"prompt": "fine"}\n{"prompt": "caf\xc3\xa9"}',
    "a.json": b'[{"prompt": "caf\xff"}, {"prompt": "fine"}, {"prompt": "caf\xc3\xa9"}]',
    "a.csv": b"id,prompt\n1,caf\xff\n2,fine\n3,caf\xc3\xa9\n",
    "b.csv": b"id,prompt\n\xff,cafe\n2,fine\n3,caf\xc3\xa9\n",
}


@pytest.mark.parametrize("name", NOT_UTF8)
def test_a_row_that_is_not_utf8_is_quarantined_and_the_others_go_on(tmp_path, name):
    (tmp_path / name).write_bytes(NOT_UTF8[name])
    result, kept, bad = read(tmp_path, tmp_path / name)
    assert {p["messages"][0]["content"] for p in kept} == {"fine", "caf\u00e9"} and result.rows_in == 3
    assert [(b["row_id"], b["error"]) for b in bad] == [(f"{name}#1", "unreadable")]
    assert bad[0]["detail"].startswith("not UTF-8: byte 0xff after ")


def test_parquet_text_that_is_not_utf8_is_quarantined_by_row(tmp_path):
    raw = pa.array([b"fine", b"caf\xff", "caf\u00e9".encode()])
    text = pa.StringArray.from_buffers(3, *raw.buffers()[1:])  # as damaged writers leave it: nothing checks it
    pq.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    _, kept, bad = read(tmp_path, tmp_path / "a.parquet")
    assert {p["messages"][0]["content"] for p in kept} == {"fine", "caf\u00e9"}
    assert [(b["row_id"], b["detail"][:10]) for b in bad] == [("a.parquet#2", "not UTF-8:")]


HALVES = [
    {"prompt": "a \ud800"},
    {"messages": [{"role": "system", "content": "\udc80 b"}, {"role": "user", "content": "q"}]},
    {"prompt": "q", "label": "\udfff"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_halves_of_surrogate_pairs_are_quarantined(tmp_path, name):
    """JSON can spell them out in plain ASCII, and no table can hold them."""
    rows = [*HALVES, {"prompt": "fine"}, {"prompt": "\U0001f600"}, {"role \ud800": 1}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{', '.join(lines)}]")
    _, kept, bad = read(tmp_path, tmp_path / name)
    assert {p["messages"][0]["content"] for p in kept} == {"fine", "\U0001f600"}
    assert [b["row_id"] for b in bad] == [f"{name}#{i}" for i in (1, 2, 3, 6)]
    assert bad[0]["detail"] == r"not UTF-8: '\ud800', half of a surrogate pair, after 'a '; write it as UTF-8"


def test_a_dialogue_with_half_a_surrogate_pair(tmp_path):
    rows = [{"chosen": f"\n\nHuman: {text}\n\nAssistant: a"} for text in ("q", "\ud83d", "r", " ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(prompts.read_source(config.HHPrompts(path=str(tmp_path / "a.jsonl"))))
    assert [r.error for r in found] == [
        "",
        r"not UTF-8: '\ud83d', half of a surrogate pair, after ''; write it as UTF-8",
        "",
        "the last user turn is empty; fill it, or leave the row out",
    ]


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (turns(("user", "  \n")), "the last user turn is empty; fill it, or leave the row out"),
        (turns(("user", "q"), ("assistant", "a"), ("user", "")), "the last user turn is empty; fill it, or leave the row out"),
        (turns(("user", ""), ("assistant", "a")), "the last user turn is empty; fill it, or leave the row out"),
        (turns(("system", "be kind")), "no user turn to answer; add one, or leave the row out"),
        (turns(("system", "be kind"), ("assistant", "a")), "no user turn to answer; add one, or leave the row out"),
        (turns(("tool", "42")), "no user turn to answer; add one, or leave the row out"),
        (turns(("assistant", "a")), "messages has no turn to answer; end it with a user's turn"),
        ({"turns": [" ", "again"]}, "turns is empty; fill it, or leave the row out"),
        (turns(("user", "q"), ("bot", "a")), "messages holds {'content': 'a', 'role': 'bot'}, expected role"),
        (turns(("user", ""), ("assistant", "a"), ("user", "q")), ""),
        (turns(("user", "q"), ("assistant", "a"), ("tool", "42")), ""),
    ],
)
def test_a_conversation_without_a_question_is_quarantined(tmp_path, row, why):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (found,) = prompts.read_source(config.FilePrompts(path=str(tmp_path / "a.jsonl")))
    assert found.error.startswith(why) and (found.messages is None) == bool(why)


def test_pickle_only_checkpoints_are_refused(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = rf"^model\.name='{folder}': no \*\.safetensors; pytorch_model\.bin is a pickle, .* Convert it with save_pretrained"
    with pytest.raises(ConfigError, match=said):
        models.resolve(config.Model(name=str(folder)))


def test_a_folder_without_a_tokenizer(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said = "no tokenizer files; save the tokenizer into the same folder"
    with pytest.raises(ConfigError, match=rf"^rewards\.model='{folder}': {said}"):
        build(config.EmbeddedReward(model=str(folder)))
    with pytest.raises(ConfigError, match=rf"^model\.name='{folder}': {said}"):  # before any stage runs
        pipeline.Run(config.load_job("smoke", [f"model.name={folder}", f"run_root={tmp_path}/run"])).state("generate")
    with pytest.raises(ConfigError, match=rf"^model folder='{folder}': {said}"):
        models.fingerprint(folder)


def test_heads_of_another_model(tiny, private_cache):
    with pytest.raises(ConfigError, match=r"were made for the model with fingerprint \w+, .*" + models.fingerprint(tiny)):
        build(config.EmbeddedReward(model=str(tiny)))


def test_credentials_in_the_run_root_are_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="holds credentials; give them by the environment") as caught:
        config.load_job("quickstart", ["run_root=s3://key:hunter2@bucket/run"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("levels", [1, 11])
def test_number_of_levels(levels):
    with pytest.raises(ConfigError, match=r"control\.attributes\.0\.levels.*got " + str(levels)):
        config.load_job("quickstart", [f"control.attributes.0.levels={levels}"])


def test_unknown_attribute():
    with pytest.raises(ConfigError, match="no reward gives 'speed'"):
        config.load_job("quickstart", ["control.attributes.0.score=speed"])


def test_wrong_zero_stage():
    with pytest.raises(ConfigError, match=r"train\.zero_stage.*got 4"):
        config.load_job("quickstart", ["train.zero_stage=4"])
