"""What users get wrong: every error names field or row, value and next step, and no row disappears."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from ctrlray import config, models, schema
from ctrlray.errors import ConfigError, DataError
from ctrlray.ledger import Silent
from ctrlray.pipeline import _flat
from ctrlray.rewards.registry import build
from ctrlray.stages import prompts
from ctrlray.tables import Storage


def whole_job() -> dict:
    job = config.load_job("quickstart").model_dump(mode="json")
    job["prompts"]["sources"] = [{"type": "file", "path": "/data/a.jsonl", "column": "q", "limit": 3}]
    job["export"] |= {"levels": {"safety": [1, 3]}, "defaults": {"safety": 1}}
    return job


def put(raw: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value


PATHS = sorted(_flat(whole_job()))


def test_the_whole_job_is_covered():
    assert len(PATHS) > 100


@pytest.mark.parametrize("wrong", [{"surprise": {"deep": 1}}, [["x"]]], ids=["mapping", "list"])
@pytest.mark.parametrize("path", PATHS)
def test_every_field_refuses_the_wrong_type_by_name(path, wrong):
    raw = whole_job()
    put(raw, path, wrong)
    with pytest.raises(ConfigError) as caught:
        config.parse(config.Job, raw, where="job.yaml")
    parents = [p for p in path.split(".") if not p.isdigit()]
    assert str(caught.value).startswith("job.yaml:\n") and parents[0] in str(caught.value)
    assert parents[-1] in str(caught.value) or parents[-2] in str(caught.value)


def read(tmp_path, file, train=1, evaluate=1):
    out = Storage(str(tmp_path / "out"))
    asked = config.Prompts(sources=(config.FilePrompts(path=str(file)),), train=train, eval=evaluate)
    result = prompts.run(asked, 0, out, Silent()).check("prompts")
    bad = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    return result, out.read_table("prompts", schema.PROMPTS).to_pylist(), bad


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"sources give 0 different ones; lower prompts\.train"):
        read(tmp_path, tmp_path / "a.jsonl")


def test_broken_gzip(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q"}\n' * 50)[:-9])
    with pytest.raises(DataError, match=r"broken gzip.*fetch the file again"):
        read(tmp_path, tmp_path / "a.jsonl.gz")


def test_rows_without_text_and_with_too_much(tmp_path):
    rows = [{"prompt": ""}, {"prompt": None}, {"other": "x"}, 7, {"prompt": "q" * 2**20}, {"prompt": "fine"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result, kept, bad = read(tmp_path, tmp_path / "a.jsonl")
    assert sorted(len(p["messages"][0]["content"]) for p in kept) == [4, 2**20]
    assert {b["row_id"] for b in bad} == {f"a.jsonl#{i}" for i in (1, 2, 3, 4)} and result.rows_in == 6


def test_invalid_utf8_is_kept_readable(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "caf\xff"}\n{"prompt": "fine"}\n')
    _, kept, _ = read(tmp_path, tmp_path / "a.jsonl")
    assert {p["messages"][0]["content"] for p in kept} == {"caf\ufffd", "fine"}


def test_pickle_only_checkpoints_are_refused(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        models.resolve(config.Model(name=str(folder)))


def test_a_folder_without_a_tokenizer(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer files; save the tokenizer into the same folder"):
        models.resolve(config.Model(name=str(folder)))


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
