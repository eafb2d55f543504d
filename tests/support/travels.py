"""Ways in which a generation config comes to be another object with the same settings: copies, dicts, files."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig


def saved(config: GenerationConfig, folder: Path) -> GenerationConfig:
    config.save_pretrained(folder)
    return GenerationConfig.from_pretrained(folder)


TRAVELS: dict[str, Callable[[GenerationConfig, Path], GenerationConfig]] = {
    "as it is": lambda config, _: config,
    "copied": lambda config, _: copy.copy(config),
    "copied deeply": lambda config, _: copy.deepcopy(config),
    "pickled": lambda config, _: pickle.loads(pickle.dumps(config)),
    "from a dict": lambda config, _: GenerationConfig.from_dict(config.to_dict()),
    "from a dict of differences": lambda config, _: GenerationConfig.from_dict(config.to_diff_dict()),
    "from JSON": lambda config, _: GenerationConfig(**json.loads(config.to_json_string())),
    "saved": saved,
    "saved twice": lambda config, folder: saved(saved(config, folder / "a"), folder / "b"),
}
