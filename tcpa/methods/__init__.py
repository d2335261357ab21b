"""The methods, one file each: token prompts, prompts on the image, tunings; see `base.py`."""

import importlib
import pkgutil

from .base import InputConfig, PromptConfig, TuningConfig

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_file.name}", __name__)

TOKEN_PROMPTS, INPUT_PROMPTS, TUNINGS = PromptConfig.kinds, InputConfig.kinds, TuningConfig.kinds
"""Name under which a choice is saved and asked for -> its configuration."""
