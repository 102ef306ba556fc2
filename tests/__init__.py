"""The suite. Set here, before any test file is imported: nothing asks the hub, which PEFT does for a base that is a relative path."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
