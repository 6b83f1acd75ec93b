"""How lmms-eval finds our model: the entry point `lmms_eval.models` of this package.

```
lmms-eval --model mmlm_efficient --model_args pretrained=pocket,methods=flowcut:36 --tasks ...
```
lmms-eval imports this at its start and skips the plug-ins of all packages behind one that fails:
nothing is imported here but its own registry.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "mmlm_efficient"


def manifests() -> list[Any]:
    """The ModelManifest of the chat model; its class is imported when it is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id=MODEL_NAME, chat_class_path="eval.lmms_model.EfficientChatModel")
    ]
