"""The loader: files of many formats -> `Request`s."""

from sagellm_ir.requests.loader import Loaded, load_requests
from sagellm_ir.requests.source import Limits

__all__ = ["Limits", "Loaded", "load_requests"]
