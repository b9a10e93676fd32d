"""Merging by hand, and adapters that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrlray.adapter import ADAPTER, ADAPTER_CARD, check_homes, home, merge, merged, merged_tensors, tensor_names
from ctrlray.errors import ConfigError

CARD = {"lora_scale": 2.0, "control_ids": [1, 3]}


def base(tmp_path):
    """Two shards and a config."""
    folder = tmp_path / "base"
    folder.mkdir()
    first = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "plain": torch.tensor([7.0])}
    save_file({n: t.bfloat16() for n, t in first.items()}, folder / "a.safetensors", metadata={"format": "pt", "k": "v"})
    save_file({"embed": torch.arange(8.0).reshape(4, 2).bfloat16()}, folder / "b.safetensors")
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_lora_adds_the_scaled_product():
    """B A = [[1], [2]] [[0.5, 1]] = [[0.5, 1], [1, 2]]; twice that on top of W."""
    adapter = {"w.lora_A": torch.tensor([[0.5, 1.0]]), "w.lora_B": torch.tensor([[1.0], [2.0]])}
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert merged("w", value, adapter, CARD).tolist() == [[2.0, 4.0], [5.0, 8.0]]
    assert value.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert merged("other", value, adapter, CARD) is value


def test_control_rows_and_whole_tensors_are_replaced():
    rows = {"embed.rows": torch.tensor([[9.0, 9.0], [8.0, 8.0]])}
    assert merged("embed", torch.arange(8.0).reshape(4, 2), rows, CARD).tolist() == [[0, 1], [9, 9], [4, 5], [8, 8]]
    assert merged("w", torch.zeros(2), {"w": torch.ones(2)}, CARD).tolist() == [1, 1]


def test_what_is_added_is_rounded_once_to_the_dtype_asked_for(tmp_path):
    """bfloat16 has steps of 2^-6 at 3: an update of 0.001 is lost in it, and kept in float32, whatever the base's dtype."""
    small = {"w.lora_A": torch.full((1, 2), 0.0005), "w.lora_B": torch.ones(2, 1), "embed.rows": torch.full((2, 2), 1.001)}
    made = dict(merged_tensors(base(tmp_path), small, CARD, "float32"))
    assert made["w"][1, 0].item() == pytest.approx(3.001, abs=1e-6) and made["embed"][3, 0].item() == pytest.approx(1.001)
    assert made["plain"].dtype == torch.float32 and made["plain"].item() == 7.0
    coarse = dict(merged_tensors(str(tmp_path / "base"), small, CARD, "bfloat16"))
    assert coarse["w"][1, 0].item() == 3.0 and coarse["w"].dtype == torch.bfloat16


def test_a_folder_is_merged_shard_by_shard(tmp_path):
    folder, out, adapter = base(tmp_path), tmp_path / "out", tmp_path / "adapter"
    adapter.mkdir()
    save_file({"w.lora_A": torch.tensor([[0.5, 1.0]]), "w.lora_B": torch.tensor([[1.0], [2.0]])}, adapter / ADAPTER)
    (adapter / ADAPTER_CARD).write_text(json.dumps(CARD))
    merge(folder, str(adapter), str(out))
    assert sorted(p.name for p in out.iterdir()) == ["a.safetensors", "b.safetensors", "config.json"]
    made = load_file(out / "a.safetensors")
    assert made["w"].tolist() == [[2.0, 4.0], [5.0, 8.0]] and made["w"].dtype == torch.bfloat16
    assert tensor_names(str(out)) == tensor_names(folder) == {"w", "plain", "embed"}


def test_tensors_without_a_home_or_another_half_are_named(tmp_path):
    folder = base(tmp_path)
    check_homes(folder, {"w.lora_A": 0, "w.lora_B": 0, "embed.rows": 0, "plain": 0})
    with pytest.raises(ConfigError, match=r"without a home in .*\['nose\.lora_A'\]"):
        check_homes(folder, {"nose.lora_A": 0, "w": 0})
    with pytest.raises(ConfigError, match=r"without their other half: \['w\.lora_B'\]"):
        check_homes(folder, {"w.lora_B": 0})
    assert home("a.b.rows") == "a.b" and home("a.b") == "a.b"
